"""Message classes of google-protobuf for our .proto files: the independent judge of what is on the wire.

Made from descriptors at run time, so nothing generated is kept, and nothing of betterproto takes part.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import grpc_tools
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

if TYPE_CHECKING:
    from google.protobuf.message import Message

PROTO_ROOT = Path(__file__).parents[2] / "protos" / "proto"
WELL_KNOWN_ROOT = Path(grpc_tools.__file__).parent / "_proto"


@functools.cache
def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    """Compile all our .proto files, with what they import, into descriptors."""
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set.bin"
        arguments = [
            "protoc", f"-I{PROTO_ROOT}", f"-I{WELL_KNOWN_ROOT}", "--include_imports",
            f"--descriptor_set_out={target}", *sources,
        ]  # fmt: skip
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc refused our .proto files")
        return descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_set().file:
        pool.Add(file)
    return pool


@functools.cache
def message_class(full_name: str) -> type[Message]:
    """Return the class of a message by its full name, such as ``google.bytestream.ReadRequest``."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(full_name))


def reapi_class(name: str) -> type[Message]:
    """Return the class of one of REAPI's messages, such as ``Directory``."""
    return message_class(f"build.bazel.remote.execution.v2.{name}")
