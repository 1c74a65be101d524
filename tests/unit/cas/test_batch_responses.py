"""Responses of the batch RPCs stay below what clients accept, whatever is in them."""

from __future__ import annotations

from lathe_cas.batch_responses import batch_read_response, batch_update_response
from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError, LatheError, NotFoundError

NOT_FOUND = 5
INVALID_ARGUMENT = 3
RESOURCE_EXHAUSTED = 8
MAX_BYTES = 10_000

_WIRE = Digest.of(b"a blob").wire


def read(outcomes: list[bytes | LatheError]) -> list[tuple[int, str, bytes]]:
    """Write a response and parse it: code, text and data of each blob."""
    data = batch_read_response([_WIRE] * len(outcomes), outcomes, MAX_BYTES)
    assert len(data) <= MAX_BYTES
    responses = reapi.BatchReadBlobsResponse().parse(data).responses
    assert all(response.digest.hash == Digest.of(b"a blob").hash for response in responses)
    return [(response.status.code, response.status.message, response.data) for response in responses]


def test_what_fits_is_all_there() -> None:
    assert read([b"blob", NotFoundError("gone"), b""]) == [(0, "", b"blob"), (NOT_FOUND, "gone", b""), (0, "", b"")]


def test_a_blob_without_room_is_left_for_another_request() -> None:
    large = bytes(6_000)

    first, second, third, fourth = read([large, large, b"small", NotFoundError("gone")])

    assert first == (0, "", large)
    assert (second[0], second[2]) == (RESOURCE_EXHAUSTED, b"")
    assert "ask again" in second[1]
    assert (third, fourth) == ((0, "", b"small"), (NOT_FOUND, "gone", b""))


def test_many_small_blobs_keep_room_for_each_other() -> None:
    blob = b"a small blob" * 5

    first, *_, last = read([blob] * 110)

    assert first == (0, "", blob)
    assert last == (RESOURCE_EXHAUSTED, "", b"")


def test_many_errors_keep_room_for_each_other() -> None:
    first, *_, last = read([NotFoundError("a long text " * 20)] * 110)

    assert first == (NOT_FOUND, "a long text " * 20, b"")
    assert last == (NOT_FOUND, "", b"")


def test_errors_of_an_update_without_room_keep_their_codes() -> None:
    outcomes: list[LatheError | None] = [None, *[InvalidArgumentError("digest", "long " * 50)] * 100, None]

    data = batch_update_response([_WIRE] * len(outcomes), outcomes, MAX_BYTES)

    assert len(data) <= MAX_BYTES
    statuses = [response.status for response in reapi.BatchUpdateBlobsResponse().parse(data).responses]
    assert [status.code for status in statuses] == [0, *[INVALID_ARGUMENT] * 100, 0]
    assert statuses[1].message.startswith("digest: long")
    assert statuses[-2].message == ""


def test_an_update_says_what_is_wrong_with_each() -> None:
    data = batch_update_response([_WIRE] * 2, [None, InvalidArgumentError("digest", "no")])

    statuses = [response.status for response in reapi.BatchUpdateBlobsResponse().parse(data).responses]
    assert [(status.code, status.message) for status in statuses] == [(0, ""), (INVALID_ARGUMENT, "digest: no")]
