"""One plain form for "what is on the wire", read from three sources: facts, descriptors, betterproto classes.

Tests compare the three; everything that a peer could notice is in the form, and nothing else is.
"""

import dataclasses
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, get_args, get_origin

import betterproto
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto


@dataclass(frozen=True, order=True)
class FieldShape:
    """One field. ``type`` is a scalar's name, a full message or enum name, or ``map<key, value>``."""

    number: int
    type: str
    name: str
    repeated: bool = False
    oneof: str = ""


@dataclass
class MessageShape:
    fields: set[FieldShape] = field(default_factory=set)
    reserved: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class RpcShape:
    request: str
    response: str
    client_streaming: bool
    server_streaming: bool


@dataclass
class Shapes:
    """Messages, enums and rpcs by their full names, and the fields marked as deprecated."""

    messages: dict[str, MessageShape] = field(default_factory=dict)
    enums: dict[str, dict[str, int]] = field(default_factory=dict)
    rpcs: dict[str, RpcShape] = field(default_factory=dict)
    deprecated: set[str] = field(default_factory=set)


_FIELD = re.compile(r"(\d+) (repeated )?(map<.+>|\S+) (\w+)( deprecated)?(?: oneof (\w+))?")
_RPC = re.compile(r"rpc (\w+)\((stream )?(\S+)\) returns \((stream )?(\S+)\)")
_RESERVED = re.compile(r"reserved (\d+)\.\.(\d+)")


def shapes_from_facts(text: str) -> Shapes:
    """Parse the notation of wire-facts.txt.

    Raises:
        ValueError: a line is in none of the known forms; nothing is skipped silently.
    """
    shapes = Shapes()
    package = owner = ""
    for line in (raw.strip() for raw in text.splitlines()):
        keyword, _, rest = line.partition(" ")
        if not line or keyword == "#":
            continue
        if keyword == "package":
            package = rest
        elif keyword == "service":
            owner = f"{package}.{rest}"
        elif keyword == "message":
            owner = f"{package}.{rest}"
            shapes.messages[owner] = MessageShape()
        elif keyword == "enum":
            name, _, values = rest.partition(": ")
            pairs = (value.split("=") for value in values.split(", "))
            shapes.enums[f"{package}.{name}"] = {key: int(number) for key, number in pairs}
        else:
            _read_member(shapes, owner, line)
    return shapes


def _read_member(shapes: Shapes, owner: str, line: str) -> None:
    if match := _FIELD.fullmatch(line):
        number, repeated, type_, name, deprecated, oneof = match.groups()
        shape = FieldShape(int(number), type_, name, bool(repeated), oneof or "")
        shapes.messages[owner].fields.add(shape)
        if deprecated:
            shapes.deprecated.add(f"{owner}.{name}")
    elif match := _RPC.fullmatch(line):
        name, client, request, server, response = match.groups()
        shapes.rpcs[f"{owner}.{name}"] = RpcShape(request, response, bool(client), bool(server))
    elif match := _RESERVED.fullmatch(line):
        shapes.messages[owner].reserved.update(range(int(match[1]), int(match[2]) + 1))
    else:
        raise ValueError(f"not understood: {line!r}")


def shapes_from_descriptors(files: Iterable[FileDescriptorProto]) -> Shapes:
    """Read what protoc made of .proto files."""
    shapes = Shapes()
    for file in files:
        for message in file.message_type:
            _read_message(shapes, file.package, message)
        for enum in file.enum_type:
            shapes.enums[f"{file.package}.{enum.name}"] = {value.name: value.number for value in enum.value}
        for service in file.service:
            for method in service.method:
                shapes.rpcs[f"{file.package}.{service.name}.{method.name}"] = RpcShape(
                    method.input_type.removeprefix("."),
                    method.output_type.removeprefix("."),
                    method.client_streaming,
                    method.server_streaming,
                )
    return shapes


def _read_message(shapes: Shapes, scope: str, message: DescriptorProto) -> None:
    full_name = f"{scope}.{message.name}"
    entries = {f".{full_name}.{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    shape = shapes.messages[full_name] = MessageShape()
    for member in message.field:
        oneof = message.oneof_decl[member.oneof_index].name if member.HasField("oneof_index") else ""
        if entry := entries.get(member.type_name):
            type_, repeated = f"map<{_type_name(entry.field[0])}, {_type_name(entry.field[1])}>", False
        else:
            type_, repeated = _type_name(member), member.label == FieldDescriptorProto.LABEL_REPEATED
        shape.fields.add(FieldShape(member.number, type_, member.name, repeated, oneof))
        if member.options.deprecated:
            shapes.deprecated.add(f"{full_name}.{member.name}")
    for numbers in message.reserved_range:
        shape.reserved.update(range(numbers.start, numbers.end))
    for enum in message.enum_type:
        shapes.enums[f"{full_name}.{enum.name}"] = {value.name: value.number for value in enum.value}
    for nested in message.nested_type:
        if not nested.options.map_entry:
            _read_message(shapes, full_name, nested)


def _type_name(member: FieldDescriptorProto) -> str:
    if member.type_name:
        return member.type_name.removeprefix(".")
    return FieldDescriptorProto.Type.Name(member.type).removeprefix("TYPE_").lower()


def betterproto_class(full_name: str, package: str) -> Any:
    """Return the generated class of a message or enum: betterproto joins the names of nested ones."""
    module = importlib.import_module(f"lathe_protos.{package}")
    return getattr(module, full_name.removeprefix(f"{package}.").replace(".", ""))


def fields_from_betterproto(message_class: Any, full_names: Mapping[type, str]) -> set[FieldShape]:
    """Read a betterproto class; ``full_names`` gives the proto name of every generated class."""
    names = {**full_names, datetime: "google.protobuf.Timestamp", timedelta: "google.protobuf.Duration"}
    hints = message_class._type_hints()
    shapes = set()
    for member in dataclasses.fields(message_class):
        meta = betterproto.FieldMetadata.get(member)
        hint = hints[member.name]
        origin, arguments = get_origin(hint), get_args(hint)
        if meta.map_types:
            key, value = (
                _betterproto_type(kind, arg, names) for kind, arg in zip(meta.map_types, arguments, strict=True)
            )
            type_ = f"map<{key}, {value}>"
        elif meta.wraps:
            type_ = {"uint32": "google.protobuf.UInt32Value"}[meta.wraps]
        else:
            type_ = _betterproto_type(meta.proto_type, arguments[0] if origin is list else hint, names)
        shapes.add(FieldShape(meta.number, type_, member.name, origin is list, meta.group or ""))
    return shapes


def _betterproto_type(proto_type: str, python_type: type, names: Mapping[type, str]) -> str:
    return names[python_type] if proto_type in {"message", "enum"} else proto_type
