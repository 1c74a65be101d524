from __future__ import annotations

from typing import Any

import pytest
from betterproto.lib.google.protobuf import Any as AnyMessage
from grpclib.const import Status
from tests.support.google_messages import message_class

from lathe_protos import longrunning, reapi, rpc
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    AbortedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    LatheError,
    MissingInputsError,
    NotFoundError,
    UnavailableError,
)
from lathe_shared.status_details import (
    MAX_DETAILS_BYTES,
    LatheStatusDetailsCodec,
    error_from,
    error_of,
    full_name,
    pack_any,
    status_of,
    unpack_any,
)
from lathe_shared.wire import MalformedMessageError

FAILURE = rpc.PreconditionFailure(violations=[rpc.PreconditionFailureViolation(type="MISSING", subject="blobs/a/1")])


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (rpc.PreconditionFailure, "google.rpc.PreconditionFailure"),
        (reapi.ExecuteResponse, "build.bazel.remote.execution.v2.ExecuteResponse"),
        (longrunning.Operation, "google.longrunning.Operation"),
        (AnyMessage, "google.protobuf.Any"),
    ],
)
def test_messages_are_named_as_their_proto_names_them(ours: type[reapi.Action], name: str) -> None:
    assert full_name(ours) == name


def test_what_is_packed_unpacks_for_us_and_for_google_protobuf() -> None:
    packed = pack_any(FAILURE)

    assert unpack_any(packed) == FAILURE
    assert unpack_any(packed, rpc.PreconditionFailure) == FAILURE
    theirs: Any = message_class("google.rpc.Status")()
    theirs.details.add().MergeFromString(bytes(packed))
    unpacked: Any = message_class("google.rpc.PreconditionFailure")()
    assert theirs.details[0].Unpack(unpacked)
    assert unpacked.violations[0].subject == "blobs/a/1"


def test_an_any_of_an_unknown_type_stays_as_it_is() -> None:
    for url in ("type.googleapis.com/some.other.Message", "type.googleapis.com/google.rpc.Nothing", "", "/"):
        value = AnyMessage(type_url=url, value=b"\xff\xff")
        assert unpack_any(value) == value


def test_an_any_of_another_type_than_expected_is_malformed() -> None:
    with pytest.raises(MalformedMessageError, match="PreconditionFailure"):
        unpack_any(pack_any(FAILURE), rpc.BadRequest)


@pytest.mark.parametrize(
    "error",
    [
        MissingInputsError([Digest.of(b"x")]),
        NotFoundError("no such thing"),
        UnavailableError("away"),
        AbortedError("given up"),
        DeadlineExceededError("too long"),
        InternalError("a bug"),
    ],
)
def test_an_error_survives_the_way_through_a_status(error: LatheError) -> None:
    back = error_of(rpc.Status().parse(bytes(status_of(error))))

    assert back.status is error.status
    assert back.message == error.message
    assert list(back.details) == list(error.details)
    assert isinstance(error, type(back))


def test_an_invalid_argument_keeps_its_field() -> None:
    back = error_of(status_of(InvalidArgumentError("digest.hash", "not hexadecimal")))

    assert isinstance(back, InvalidArgumentError)
    assert (back.field, back.reason) == ("digest.hash", "not hexadecimal")
    assert str(back) == "digest.hash: not hexadecimal"


def test_a_status_without_an_error_of_its_own_is_internal() -> None:
    assert isinstance(error_from(Status.DATA_LOSS, None), InternalError)
    assert isinstance(error_of(rpc.Status(code=99, message="?")), InternalError)


def test_the_codec_reads_what_it_writes_and_survives_what_it_cannot_read() -> None:
    codec = LatheStatusDetailsCodec()
    data = codec.encode(Status.NOT_FOUND, "text", [FAILURE, rpc.ResourceInfo(resource_name="x")])

    assert codec.decode(Status.NOT_FOUND, "text", data) == [FAILURE, rpc.ResourceInfo(resource_name="x")]
    assert codec.decode(Status.NOT_FOUND, "text", b"\xff\xff") == []


def test_details_stay_within_what_a_trailer_carries() -> None:
    codec = LatheStatusDetailsCodec()
    error = MissingInputsError(Digest.of(str(number).encode()) for number in range(5000))

    data = codec.encode(error.status, error.message, error.details)

    assert len(data) <= MAX_DETAILS_BYTES
    (detail,) = codec.decode(error.status, None, data)
    assert isinstance(detail, rpc.PreconditionFailure)
    assert [v.subject for v in detail.violations] == [f"blobs/{d}" for d in error.digests[: len(detail.violations)]]
