"""The hand-written wire readers against google-protobuf and betterproto, over any bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.google_messages import message_class, reapi_class
from tests.unit.shared.wire_strategies import damaged, message_bytes, top_level_fields

from lathe_protos import bytestream, reapi
from lathe_shared import action_result_wire, cas_wire, tree_wire, wire
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable


def _view_digest(digest: Any) -> tuple[str, int]:
    return digest.hash, digest.size_bytes


def _nodes(directory: Any) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        [(f.name, f.digest.hash, f.digest.size_bytes, f.is_executable) for f in directory.files],
        [(d.name, d.digest.hash, d.digest.size_bytes) for d in directory.directories],
        [(s.name, s.target) for s in directory.symlinks],
    )


def _read_nodes(contents: tree_wire.DirectoryContents) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        [tuple(f[:4]) for f in contents.files],
        [tuple(d) for d in contents.directories],
        [tuple(s[:2]) for s in contents.symlinks],
    )


def _batch_update(data: bytes) -> Any:
    request = cas_wire.read_batch_update(data)
    items = [(i.hash, i.size_bytes, bytes(i.data), i.compressor) for i in request.items]
    return request.instance_name, request.function_value, items


def _read_tree(data: bytes) -> Any:
    root, children = tree_wire.read_tree(data)
    return _read_nodes(root), [_read_nodes(child) for child in children]


def _batch_read(data: bytes) -> Any:
    request = cas_wire.read_batch_read(data)
    digests = [digest[1:] for digest in request.digests]
    return request.instance_name, request.function_value, digests, list(request.acceptable_compressors)


def _write_request(data: bytes) -> Any:
    request = cas_wire.read_write_request(data)
    return (*request[:3], bytes(request.data))


def _references(message: Any) -> Any:
    blobs = [_view_digest(f.digest) for f in message.output_files]
    if message.HasField("stdout_digest"):
        blobs.append(_view_digest(message.stdout_digest))
    if message.HasField("stderr_digest"):
        blobs.append(_view_digest(message.stderr_digest))
    directories = message.output_directories
    trees = [_view_digest(d.tree_digest) for d in directories if d.HasField("tree_digest")]
    roots = [_view_digest(d.root_directory_digest) for d in directories if d.HasField("root_directory_digest")]
    return blobs, trees, roots, message.exit_code


def _read_references(data: bytes) -> Any:
    found = action_result_wire.read_references(data)
    return list(found.blobs), list(found.trees), list(found.root_directories), found.exit_code


CASES: dict[str, tuple[str, Callable[[bytes], Any], Callable[[Any], Any]]] = {
    "Digest": ("build.bazel.remote.execution.v2.Digest", cas_wire.read_digest, _view_digest),
    "Directory": (
        "build.bazel.remote.execution.v2.Directory",
        lambda data: _read_nodes(tree_wire.read_directory(data)),
        _nodes,
    ),
    "Tree": (
        "build.bazel.remote.execution.v2.Tree",
        _read_tree,
        lambda message: (_nodes(message.root), [_nodes(child) for child in message.children]),
    ),
    "BatchUpdateBlobsRequest": (
        "build.bazel.remote.execution.v2.BatchUpdateBlobsRequest",
        _batch_update,
        lambda m: (
            m.instance_name,
            m.digest_function,
            [(*_view_digest(r.digest), r.data, r.compressor) for r in m.requests],
        ),
    ),
    "BatchReadBlobsRequest": (
        "build.bazel.remote.execution.v2.BatchReadBlobsRequest",
        _batch_read,
        lambda m: (
            m.instance_name,
            m.digest_function,
            [_view_digest(d) for d in m.digests],
            list(m.acceptable_compressors),
        ),
    ),
    "ReadRequest": (
        "google.bytestream.ReadRequest",
        lambda data: tuple(cas_wire.read_read_request(data)),
        lambda m: (m.resource_name, m.read_offset, m.read_limit),
    ),
    "WriteRequest": (
        "google.bytestream.WriteRequest",
        _write_request,
        lambda m: (m.resource_name, m.write_offset, m.finish_write, m.data),
    ),
    "QueryWriteStatusRequest": (
        "google.bytestream.QueryWriteStatusRequest",
        cas_wire.read_query_write_status,
        lambda m: m.resource_name,
    ),
    "ActionResult": ("build.bazel.remote.execution.v2.ActionResult", _read_references, _references),
}
# Readers that look at every byte, so that they refuse exactly what google-protobuf refuses.
EXACT = {
    "Digest", "BatchUpdateBlobsRequest", "BatchReadBlobsRequest", "ReadRequest", "WriteRequest",
    "QueryWriteStatusRequest",
}  # fmt: skip


def _judge(name: str, data: bytes) -> None:
    full_name, read, view = CASES[name]
    try:
        expected = view(message_class(full_name).FromString(data))
    except DecodeError:
        if name in EXACT:
            with pytest.raises(wire.MalformedMessageError):
                read(data)
        else:
            with contextlib.suppress(wire.MalformedMessageError):
                read(data)
        return
    assert read(data) == expected


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=200)
@given(data=st.data())
def test_a_reader_finds_what_google_protobuf_finds(name: str, data: st.DataObject) -> None:
    _judge(name, data.draw(message_bytes(message_class(CASES[name][0]))))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=200)
@given(data=st.data())
def test_a_reader_refuses_what_google_protobuf_refuses(name: str, data: st.DataObject) -> None:
    _judge(name, data.draw(damaged(message_bytes(message_class(CASES[name][0])))))


@settings(max_examples=400)
@given(st.binary(max_size=64))
def test_noise_is_judged_alike(data: bytes) -> None:
    for name in CASES:
        _judge(name, data)


digests = st.builds(Digest.of, st.binary(max_size=4), st.just(DigestFunction.SHA256))
sized = st.builds(
    Digest,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 1, 127, 128, 2**14, 2**21, 2**28, 2**35, 2**42])),
)


@given(st.text(max_size=5), st.lists(sized, max_size=8), st.sampled_from([0, 1]), st.booleans())
def test_find_missing_reads_plain_and_shuffled_requests_alike(
    name: str, wanted: list[Digest], function: int, is_shuffled: bool
) -> None:
    request = reapi_class("FindMissingBlobsRequest")(instance_name=name, digest_function=function)
    for digest in wanted:
        request.blob_digests.add(hash=digest.hash, size_bytes=digest.size_bytes)  # type: ignore[attr-defined]  # dynamic class
    data = request.SerializeToString()
    if is_shuffled:
        data = b"".join(reversed(top_level_fields(data)))
        wanted.reverse()

    found = cas_wire.read_find_missing(data)

    assert found.instance_name == name
    assert found.function is DigestFunction.SHA256
    assert [(key, size) for _, key, size in found.blobs] == [(d.key, d.size_bytes) for d in wanted]
    response = reapi_class("FindMissingBlobsResponse").FromString(b"".join(item for item, _, _ in found.blobs))
    assert [_view_digest(d) for d in response.missing_blob_digests] == [  # type: ignore[attr-defined]  # dynamic class
        (d.hash, d.size_bytes) for d in wanted
    ]


@settings(max_examples=400)
@given(st.data())
def test_find_missing_agrees_with_google_protobuf_on_anything(data: st.DataObject) -> None:
    cls = reapi_class("FindMissingBlobsRequest")
    strategy = message_bytes(cls)
    raw = data.draw(st.one_of(strategy, damaged(strategy)))
    try:
        expected: Any = cls.FromString(raw)
    except DecodeError:
        with pytest.raises(wire.MalformedMessageError):
            cas_wire.read_find_missing(raw)
        return
    try:
        found = cas_wire.read_find_missing(raw)
    except InvalidArgumentError as error:
        assert not isinstance(error, wire.MalformedMessageError)  # noqa: PT017  # the class is the point
        return
    assert found.instance_name == expected.instance_name
    assert [(k[1:].hex(), s) for _, k, s in found.blobs] == [_view_digest(d) for d in expected.blob_digests]


@settings(max_examples=400)
@given(st.data())
def test_get_action_result_agrees_with_google_protobuf_on_anything(data: st.DataObject) -> None:
    cls = reapi_class("GetActionResultRequest")
    strategy = message_bytes(cls)
    raw = data.draw(st.one_of(strategy, damaged(strategy)))
    try:
        expected: Any = cls.FromString(raw)
    except DecodeError:
        with pytest.raises(wire.MalformedMessageError):
            cas_wire.read_get_action_result(raw)
        return
    try:
        found = cas_wire.read_get_action_result(raw)
    except InvalidArgumentError as error:
        assert not isinstance(error, wire.MalformedMessageError)  # noqa: PT017  # the class is the point
        return
    assert found.instance_name == expected.instance_name
    assert (found.digest.hash, found.digest.size_bytes) == _view_digest(expected.action_digest)
    assert (found.inline_stdout, found.inline_stderr) == (expected.inline_stdout, expected.inline_stderr)
    assert list(found.inline_output_files) == list(expected.inline_output_files)


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_name_that_lies_about_its_length_is_no_plain_request(lie: int) -> None:
    digest = Digest.of(b"abc")
    request = bytearray(wire.string_field(1, "main") + wire.message_field(2, digest.wire))
    request[1] += lie

    for reader in (cas_wire.read_find_missing, cas_wire.read_get_action_result):
        with pytest.raises(wire.MalformedMessageError):
            reader(bytes(request))


@given(st.text(max_size=5), sized, st.booleans(), st.booleans(), st.lists(st.text(max_size=3), max_size=3))
def test_get_action_result_reads_what_betterproto_wrote(
    name: str, digest: Digest, out: bool, err: bool, files: list[str]
) -> None:
    request = reapi.GetActionResultRequest(
        instance_name=name,
        action_digest=digest.to_message(),
        inline_stdout=out,
        inline_stderr=err,
        inline_output_files=files,
    )

    assert cas_wire.read_get_action_result(bytes(request)) == (name, digest, out, err, files)


@given(st.text(max_size=5), sized, st.integers(0, 255))
def test_update_action_result_keeps_the_results_bytes(name: str, digest: Digest, exit_code: int) -> None:
    result = bytes(reapi.ActionResult(exit_code=exit_code)) + b"\xf8\x07\x01"  # an unknown field stays, too
    request = wire.string_field(1, name) + wire.message_field(3, result) + wire.message_field(2, digest.wire)

    assert cas_wire.read_update_action_result(request) == (name, digest, result)


def test_update_without_a_result_is_refused() -> None:
    with pytest.raises(wire.MalformedMessageError, match="action_result"):
        cas_wire.read_update_action_result(wire.message_field(2, Digest.of(b"").wire))


@given(sized, st.integers(-5, 5), st.text(max_size=5))
def test_get_tree_reads_what_betterproto_wrote(digest: Digest, page_size: int, token: str) -> None:
    request = reapi.GetTreeRequest(
        instance_name="i", root_digest=digest.to_message(), page_size=page_size, page_token=token
    )

    assert cas_wire.read_get_tree(bytes(request)) == ("i", digest, page_size, token)


@given(st.text(max_size=9), st.integers(0, 2**63 - 1), st.booleans(), st.binary(max_size=99))
def test_byte_stream_writers_are_read_by_betterproto(name: str, offset: int, finish: bool, data: bytes) -> None:
    assert bytestream.WriteRequest().parse(cas_wire.write_request(name, offset, finish, data)) == (
        bytestream.WriteRequest(resource_name=name, write_offset=offset, finish_write=finish, data=data)
    )
    assert bytestream.ReadRequest().parse(cas_wire.read_request(name, offset, 7)) == (
        bytestream.ReadRequest(resource_name=name, read_offset=offset, read_limit=7)
    )
    assert bytestream.ReadResponse().parse(cas_wire.read_response_prefix(len(data)) + data).data == data
    assert bytestream.WriteResponse().parse(cas_wire.write_response(offset)).committed_size == offset
    status = bytestream.QueryWriteStatusResponse().parse(cas_wire.query_write_status_response(offset, finish))
    assert (status.committed_size, status.complete) == (offset, finish)
    assert cas_wire.committed_size(cas_wire.write_response(offset)) == offset


@given(st.text(max_size=5), st.lists(sized, max_size=5))
def test_a_find_missing_request_is_read_back(name: str, wanted: list[Digest]) -> None:
    request = cas_wire.find_missing_request(name, wanted)

    parsed = reapi.FindMissingBlobsRequest().parse(request)
    assert [_view_digest(d) for d in parsed.blob_digests] == [(d.hash, d.size_bytes) for d in wanted]
    response = reapi.FindMissingBlobsResponse(missing_blob_digests=parsed.blob_digests)
    assert cas_wire.find_missing_response_digests(bytes(response)) == [(d.hash, d.size_bytes) for d in wanted]


def test_batch_response_items_are_read_by_betterproto() -> None:
    digest = Digest.of(b"abc")
    item = cas_wire.batch_read_response_item(digest.wire, b"abc", b"", 1)
    bad = cas_wire.batch_read_response_item(digest.wire, b"", cas_wire.rpc_status(5, "gone"))
    update = cas_wire.batch_update_response_item(digest.wire, cas_wire.rpc_status(3, "no"))

    read = reapi.BatchReadBlobsResponse().parse(item + bad).responses
    updated = reapi.BatchUpdateBlobsResponse().parse(update).responses

    assert [(r.digest.hash, r.data, r.status.code, r.status.message, int(r.compressor)) for r in read] == [
        (digest.hash, b"abc", 0, "", 1),
        (digest.hash, b"", 5, "gone", 0),
    ]
    assert (updated[0].status.code, updated[0].status.message) == (3, "no")


@given(st.integers(0, 255), st.booleans(), st.text(max_size=9))
def test_an_execute_response_wraps_the_results_bytes(exit_code: int, cached: bool, message: str) -> None:
    result = bytes(reapi.ActionResult(exit_code=exit_code))
    status = cas_wire.rpc_status(4, "late")

    data = action_result_wire.execute_response(result, cached_result=cached, status=status, message=message)

    parsed = reapi.ExecuteResponse().parse(data)
    assert (parsed.result.exit_code, parsed.cached_result, parsed.message) == (exit_code, cached, message)
    assert (parsed.status.code, parsed.status.message) == (4, "late")


@pytest.mark.parametrize(
    "names", [[""], ["."], [".."], ["a/b"], ["a\0b"], ["x", "x"]], ids=["empty", "dot", "dots", "slash", "nul", "twice"]
)
@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
def test_a_directory_that_cannot_be_made_is_refused(names: list[str], kind: str) -> None:
    digest = Digest.of(b"").to_message()
    nodes: dict[str, Any] = {
        "files": [reapi.FileNode(name=n, digest=digest) for n in names],
        "directories": [reapi.DirectoryNode(name=n, digest=digest) for n in names],
        "symlinks": [reapi.SymlinkNode(name=n, target="t") for n in names],
    }
    directory = tree_wire.read_directory(bytes(reapi.Directory(**{kind: nodes[kind]})))

    with pytest.raises(InvalidArgumentError, match="root"):
        directory.check(field="root")


def test_a_good_directory_passes() -> None:
    digest = Digest.of(b"").to_message()
    directory = reapi.Directory(
        files=[
            reapi.FileNode(name="a" * 200, digest=digest, is_executable=True),
            reapi.FileNode(name="ä", digest=digest),
        ],
        directories=[reapi.DirectoryNode(name="d", digest=digest)],
        symlinks=[reapi.SymlinkNode(name="s", target="../x")],
    )

    contents = tree_wire.read_directory(bytes(directory))

    contents.check()
    assert [f.name for f in contents.files] == ["a" * 200, "ä"]
    assert [f.is_executable for f in contents.files] == [True, False]


def test_what_is_inside_of_an_unknown_group_may_have_the_number_zero() -> None:
    raw = b"\x0b\x00\x20\x0c"

    reapi_class("BatchReadBlobsRequest").FromString(raw)  # raises if it is malformed
    assert cas_wire.read_batch_read(raw).digests == []


def test_groups_nested_too_deep_are_refused() -> None:
    with pytest.raises(wire.MalformedMessageError, match="nested"):
        list(wire.scan(b"\x0b" * 101 + b"\x0c" * 101))


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_varint_reads_back(value: int) -> None:
    data = wire.varint(value)

    assert wire.read_varint(data, 0, len(data)) == (value % 2**64, len(data))
