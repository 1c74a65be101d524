"""The engine with other HTTP/2 implementations at the other end: h2 without I/O, curl and nghttp as programs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.http2.services import Service, served
from tests.support.required import require_programs
from tests.unit.shared.http2.raw_frames import REQUEST, RESPONSE, TRAILERS, Recorder, RecordingStream

from lathe_shared.http2.connection import Connection
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.limits import SERVER_LIMITS

# h2, both roles, in memory


def pump(ours: Connection, theirs: h2.connection.H2Connection) -> Iterator[h2.events.Event]:
    """Carry bytes both ways until neither side has any, and give h2's events."""
    while True:
        data = b"".join(map(bytes, ours.out))
        ours.out.clear()
        events = theirs.receive_data(data)
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            yield event
        answer = theirs.data_to_send()
        ours.receive(answer)
        for stream in list(ours.streams.values()):
            ours.release(stream, stream.held_bytes)
        if not answer and not ours.out:
            return


def pair(*, is_client: bool, window: int) -> tuple[Connection, Recorder, h2.connection.H2Connection]:
    owner = Recorder()
    ours = Connection(owner, SERVER_LIMITS, is_client=is_client)
    owner.http2 = ours
    theirs = h2.connection.H2Connection(h2.config.H2Configuration(client_side=not is_client, header_encoding=None))
    theirs.initiate_connection()
    theirs.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    list(pump(ours, theirs))
    return ours, owner, theirs


bodies = st.lists(st.integers(0, 60_000), min_size=1, max_size=6)


@given(
    requests=st.lists(bodies, min_size=1, max_size=4),
    window=st.sampled_from([100, 5000, 65_535, 1 << 20]),
    padding=st.integers(0, 255),
)
@settings(max_examples=25)
def test_an_h2_client_and_our_server_carry_any_bodies(requests: list[list[int]], window: int, padding: int) -> None:
    ours, owner, theirs = pair(is_client=False, window=window)
    events: list[h2.events.Event] = []
    for body in requests:
        stream_id = theirs.get_next_available_stream_id()
        theirs.send_headers(stream_id, REQUEST, priority_weight=16, priority_depends_on=0)
        for size in body:
            for begin in range(0, size, 10_000):
                theirs.send_data(stream_id, b"r" * min(10_000, size - begin), pad_length=padding)
                events += pump(ours, theirs)
        theirs.send_headers(stream_id, TRAILERS, end_stream=True)
        events += pump(ours, theirs)
    for stream, body in zip(list(owner.accepted.values()), requests, strict=True):
        assert (len(stream.data), stream.ended) == (sum(body), 1)
        ours.send_headers(stream, literal_block(RESPONSE), end=False)
        ours.send_data(stream, [stream.data], len(stream.data), end=False)
        ours.send_headers(stream, literal_block(TRAILERS), end=True)
    events += pump(ours, theirs)

    got: dict[int, int] = {}
    for event in events:
        if isinstance(event, h2.events.DataReceived):
            got[event.stream_id] = got.get(event.stream_id, 0) + len(event.data)
    assert [got.get(number, 0) for number in owner.accepted] == [sum(body) for body in requests]
    assert sum(isinstance(event, h2.events.TrailersReceived) for event in events) == len(requests)
    assert ours.streams == {}


@given(answers=st.lists(bodies, min_size=1, max_size=4), window=st.sampled_from([100, 5000, 65_535, 1 << 20]))
@settings(max_examples=25)
def test_our_client_and_an_h2_server_carry_any_bodies(answers: list[list[int]], window: int) -> None:
    ours, _, theirs = pair(is_client=True, window=window)
    calls = []
    for body in answers:
        call = RecordingStream(ours)
        calls.append(call)
        ours.open(call, literal_block(REQUEST), end=False)
        ours.send_data(call, [b"q" * sum(body)], sum(body), end=True)
    received: dict[int, int] = {}
    for event in pump(ours, theirs):
        if isinstance(event, h2.events.DataReceived):
            received[event.stream_id] = received.get(event.stream_id, 0) + len(event.data)
    for call, body in zip(calls, answers, strict=True):
        assert received.get(call.id, 0) == sum(body)
        theirs.send_headers(call.id, RESPONSE)
        for size in body:
            for begin in range(0, size, 10_000):
                theirs.send_data(call.id, b"a" * min(10_000, size - begin))
                list(pump(ours, theirs))
        theirs.send_headers(call.id, TRAILERS, end_stream=True)
        list(pump(ours, theirs))

        assert (len(call.data), call.ended) == (sum(body), 1)
        assert call.trailers is not None


def test_h2_agrees_on_how_a_connection_ends() -> None:
    ours, owner, theirs = pair(is_client=False, window=65_535)
    theirs.send_headers(1, REQUEST)
    list(pump(ours, theirs))
    ours.drain("bye")
    (goaway,) = [e for e in pump(ours, theirs) if isinstance(e, h2.events.ConnectionTerminated)]

    assert (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (1, 0, b"bye")
    assert list(owner.accepted) == [1]


# Programs


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    return output.decode("utf-8", "replace")


@pytest.fixture
def body(tmp_path: Path) -> str:
    """Write a file that holds a framed message."""
    path = tmp_path / "body.bin"
    path.write_bytes(b"\0\0\0\0\x05hello")
    return str(path)


GRPC = ("-H", "content-type: application/grpc", "-H", "te: trailers")


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_curl_calls_a_method(name: str, body: str) -> None:
    require_programs("curl")
    async with served(Service()) as server:
        url = f"http://127.0.0.1:{server.port}/t.S/{name}"
        output = await run("curl", "-sS", "-i", "--http2-prior-knowledge", *GRPC, "--data-binary", f"@{body}", url)
        refused = await run("curl", "-sS", "-i", "--http2-prior-knowledge", url)

    assert output.startswith("HTTP/2 200")
    assert "\0\0\0\0\x05hello" in output
    assert "grpc-status: 0" in output
    assert refused.startswith("HTTP/2 405")


@pytest.mark.parametrize(
    "more", [(), ("--no-dep",), ("-w", "2", "-W", "2"), ("-b", "200"), ("--continuation",)], ids=str
)
@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_nghttp_calls_a_method(name: str, more: tuple[str, ...], body: str) -> None:
    """It sends PRIORITY on idle streams, and by options padding, CONTINUATION and tiny windows."""
    require_programs("nghttp")
    async with served(Service()) as server:
        url = f"http://127.0.0.1:{server.port}/t.S/{name}"
        output = await run("nghttp", "-v", "-n", "-m", "5", *more, *GRPC, "-d", body, url)

    assert len(re.findall(r":status: 200", output)) == 5
    assert len(re.findall(r"grpc-status: 0", output)) == 5
    assert "error_code=NO_ERROR" in output


async def test_h2load_finds_no_failure(body: str) -> None:
    require_programs("h2load")
    async with served(Service()) as server:
        url = f"http://127.0.0.1:{server.port}/t.S/"
        for name in ("Echo", "Inline"):
            output = await run("h2load", "-n", "3000", "-c", "5", "-m", "50", *GRPC, "-d", body, url + name)
            assert "3000 succeeded, 0 failed, 0 errored, 0 timeout" in output
