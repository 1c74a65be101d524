"""Decoding by betterproto is held to google-protobuf's judgement."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import betterproto
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tests.support.google_messages import message_class
from tests.unit.shared.wire_strategies import damaged, message_bytes

from lathe_protos import bytestream, longrunning, reapi, worker_v1
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.message_decoding import decode
from lathe_shared.wire import MalformedMessageError, message_field, varint

if TYPE_CHECKING:
    from google.protobuf.message import Message

REAPI = "build.bazel.remote.execution.v2."
CASES: list[tuple[type[betterproto.Message], str]] = [
    (reapi.ExecuteRequest, REAPI + "ExecuteRequest"),
    (reapi.Command, REAPI + "Command"),
    (reapi.Directory, REAPI + "Directory"),
    (reapi.CacheCapabilities, REAPI + "CacheCapabilities"),
    (reapi.BatchReadBlobsRequest, REAPI + "BatchReadBlobsRequest"),
    (bytestream.WriteRequest, "google.bytestream.WriteRequest"),
    (longrunning.CancelOperationRequest, "google.longrunning.CancelOperationRequest"),
    (worker_v1.WorkerMessage, "lathe.worker.v1.WorkerMessage"),
]
PAIRS = [pytest.param(ours, name, id=ours.__name__) for ours, name in CASES]


def judged(name: str, data: bytes) -> Message | None:
    """Parse with google-protobuf; None if it refuses."""
    try:
        message = message_class(name).FromString(data)
    except DecodeError:
        return None
    message.DiscardUnknownFields()
    return message


def has_time(message: object) -> bool:
    """Whether a message holds a Timestamp, which reaches further and finer than datetime."""
    return any(word in str(message) for word in ("mtime", "execution_start"))


def compare(ours: type[betterproto.Message], name: str, data: bytes) -> None:
    theirs = judged(name, data)
    decoded, refusal = None, ""
    try:
        decoded = decode(ours, data)
    except MalformedMessageError as error:
        refusal = str(error)
    if decoded is None:
        # Inside a group that it skips google-protobuf does not mind the field number zero, though it is forbidden.
        assert theirs is None or has_time(theirs) or "no field has the number 0" in refusal
    else:
        assert theirs is not None
        assert has_time(theirs) or message_class(name).FromString(bytes(decoded)) == theirs


@pytest.mark.parametrize(("ours", "name"), PAIRS)
@given(data=st.data())
def test_any_message_is_read_as_google_protobuf_reads_it(
    ours: type[betterproto.Message], name: str, data: st.DataObject
) -> None:
    compare(ours, name, data.draw(message_bytes(message_class(name))))


@pytest.mark.parametrize(("ours", "name"), PAIRS)
@given(data=st.data())
def test_damaged_messages_are_refused_where_google_protobuf_refuses(
    ours: type[betterproto.Message], name: str, data: st.DataObject
) -> None:
    compare(ours, name, data.draw(damaged(message_bytes(message_class(name)))))


@given(data=st.binary(max_size=40))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    for ours, name in CASES:
        compare(ours, name, data)


def test_times_and_wrapped_values_are_read() -> None:
    properties: Any = message_class(REAPI + "NodeProperties")(properties=[{"name": "a"}])
    properties.mtime.seconds = 1_600_000_000
    properties.unix_mode.value = 0o755

    decoded = decode(reapi.NodeProperties, properties.SerializeToString())

    assert decoded.mtime == datetime.datetime(2020, 9, 13, 12, 26, 40, tzinfo=datetime.UTC)
    assert decoded.unix_mode == 0o755
    assert decoded.properties[0].name == "a"


def test_a_time_beyond_datetime_is_malformed() -> None:
    mtime = message_field(2, b"\x08" + varint(2**62))

    with pytest.raises(MalformedMessageError):
        decode(reapi.NodeProperties, mtime)


def test_deep_nesting_is_refused_and_not_a_recursion_error() -> None:
    data = b""
    for _ in range(5000):
        data = message_field(7, data)  # Action.timeout, and then whatever

    assert decode(reapi.Command, message_field(2, b"")) is not None
    with pytest.raises(MalformedMessageError):
        decode(reapi.Command, data[:-1] + b"\xff")


def test_malformed_bytes_are_the_clients_fault() -> None:
    with pytest.raises(InvalidArgumentError):
        decode(reapi.ExecuteRequest, b"\x0a\xff")
