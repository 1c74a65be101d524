"""What a gRPC request's headers say, and the answer to those that cannot be served."""

from __future__ import annotations

import pytest
from grpclib.const import Status

from lathe_shared.http2.header_rules import CheckedHeaders
from lathe_shared.http2.request_head import RequestHead

GOOD = {":method": "POST", ":path": "/t.S/m", "te": "trailers", "content-type": "application/grpc"}


def head(*more: tuple[str, str], **changed: str | None) -> RequestHead:
    fields = {**GOOD, **{name.replace("_", "-"): value for name, value in changed.items()}}
    present = [(name, value) for name, value in fields.items() if value is not None]
    return RequestHead(CheckedHeaders([*present, *more], {}, -1), "peer", "proto")


@pytest.mark.parametrize(
    "content_type",
    ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "application/grpc+proto; x=y"],
)
def test_requests_of_our_kind_are_served(content_type: str) -> None:
    assert head(content_type=content_type).refusal is None


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/grpc-web",
        "application/grpcfoo",
        "application/grpc+json",
        "application/json",
    ],
)
def test_other_kinds_are_refused_with_415(content_type: str | None) -> None:
    refusal = head(content_type=content_type).refusal

    assert refusal is not None
    assert refusal.http_status == 415


@pytest.mark.parametrize("te", [None, "", "gzip"])
def test_a_client_that_takes_no_trailers_is_refused(te: str | None) -> None:
    refusal = head(te=te).refusal

    assert refusal is not None
    assert refusal.http_status == 400


def test_another_method_than_post_is_refused() -> None:
    refusal = RequestHead(CheckedHeaders([(":method", "GET")], {}, -1), "peer", "proto").refusal

    assert refusal is not None
    assert (refusal.http_status, refusal.grpc_status) == (405, None)


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("400m", 0.4), ("5u", 5e-6), ("6n", 6e-9), ("99999999S", 99_999_999)],
)
def test_timeouts_have_a_number_and_a_unit(timeout: str, seconds: float) -> None:
    assert head(grpc_timeout=timeout).timeout_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("timeout", ["", "5", "S", "5s", "-5S", "5.5S", "999999999S", "5 S", "5S5S"])
def test_other_timeouts_are_refused(timeout: str) -> None:
    refusal = head(grpc_timeout=timeout).refusal

    assert refusal is not None
    assert refusal.grpc_status is Status.INVALID_ARGUMENT


def test_metadata_is_what_is_the_clients_own() -> None:
    found = head(
        ("user-agent", "x"), ("grpc-encoding", "gzip"), ("a", "1"), ("a", "2"), ("b-bin", "AP8"), ("b-bin", "AA==,/w")
    )

    assert found.user_agent == "x"
    assert found.encoding == "gzip"
    assert list(found.metadata.items()) == [
        ("a", "1"),
        ("a", "2"),
        ("b-bin", b"\0\xff"),
        ("b-bin", b"\0"),
        ("b-bin", b"\xff"),
    ]
    assert found.metadata is found.metadata


@pytest.mark.parametrize("value", ["a", "!!!!", "AP8\xe4"])
def test_what_is_no_base64_is_left_out(value: str) -> None:
    assert dict(head(("x-bin", value), ("y", "z")).metadata) == {"y": "z"}
