"""Our .proto files, and the classes generated from them, against the machine-listed facts of the APIs."""

import functools
from pathlib import Path

import betterproto.lib.google.protobuf as well_known
import pytest
from tests.support.google_messages import descriptor_set
from tests.unit.protos.wire_shapes import (
    FieldShape,
    RpcShape,
    Shapes,
    betterproto_class,
    fields_from_betterproto,
    shapes_from_descriptors,
    shapes_from_facts,
)

FACTS = Path(__file__).parents[2] / "data" / "wire-facts.txt"

# The facts give the health service in prose, at their head.
HEALTH_FACTS = """
package grpc.health.v1
service Health
  rpc Check(grpc.health.v1.HealthCheckRequest) returns (grpc.health.v1.HealthCheckResponse)
  rpc Watch(grpc.health.v1.HealthCheckRequest) returns (stream grpc.health.v1.HealthCheckResponse)
message HealthCheckRequest
    1 string service
message HealthCheckResponse
    1 grpc.health.v1.HealthCheckResponse.ServingStatus status
enum HealthCheckResponse.ServingStatus: UNKNOWN=0, SERVING=1, NOT_SERVING=2, SERVICE_UNKNOWN=3
"""

# The API marks these as deprecated. Our files don't: betterproto would warn at each use, and Bazel uses them.
DEPRECATED = {
    "build.bazel.remote.execution.v2.Command.output_files",
    "build.bazel.remote.execution.v2.Command.output_directories",
    "build.bazel.remote.execution.v2.Command.platform",
    "build.bazel.remote.execution.v2.ActionResult.output_file_symlinks",
    "build.bazel.remote.execution.v2.ActionResult.output_directory_symlinks",
}


@functools.cache
def facts() -> Shapes:
    return shapes_from_facts(FACTS.read_text() + HEALTH_FACTS)


@functools.cache
def ours() -> Shapes:
    return shapes_from_descriptors(file for file in descriptor_set().file if not file.package.startswith("lathe."))


@functools.cache
def packages() -> dict[str, str]:
    """Package of every message and enum in our files, lathe's own included, by full name."""
    shapes_by_package = {file.package: shapes_from_descriptors([file]) for file in descriptor_set().file}
    for file in descriptor_set().file:
        more = shapes_from_descriptors([file])
        shapes_by_package[file.package].messages.update(more.messages)
        shapes_by_package[file.package].enums.update(more.enums)
    return {
        name: package
        for package, shapes in shapes_by_package.items()
        if package != "google.protobuf"
        for name in (*shapes.messages, *shapes.enums)
    }


@functools.cache
def generated_names() -> dict[type, str]:
    """Full proto names of all generated classes that a field may have as its type."""
    names: dict[type, str] = {betterproto_class(name, package): name for name, package in packages().items()}
    return {**names, well_known.Any: "google.protobuf.Any"}


def test_facts_are_parsed_in_full() -> None:
    lines = [line.strip() for line in FACTS.read_text().splitlines()]
    assert len(shapes_from_facts(FACTS.read_text()).messages) == sum(line.startswith("message ") for line in lines)
    assert sum(len(shape.fields) for shape in facts().messages.values()) == 2 + sum(
        line[:1].isdigit() for line in lines
    )
    assert len(facts().rpcs) == 2 + sum(line.startswith("rpc ") for line in lines)


def test_an_unknown_line_in_the_facts_is_an_error() -> None:
    with pytest.raises(ValueError, match="not understood: '1 string'"):
        shapes_from_facts("package p\nmessage M\n  1 string\n")


def test_same_messages() -> None:
    assert ours().messages.keys() == facts().messages.keys()


@pytest.mark.parametrize("name", sorted(facts().messages))
def test_same_fields(name: str) -> None:
    assert ours().messages[name].fields == facts().messages[name].fields


@pytest.mark.parametrize("name", sorted(name for name, shape in facts().messages.items() if shape.reserved))
def test_same_reserved_numbers(name: str) -> None:
    assert ours().messages[name].reserved == facts().messages[name].reserved


def test_same_enums() -> None:
    assert ours().enums == facts().enums


def test_same_rpcs() -> None:
    assert ours().rpcs == facts().rpcs


def test_deprecated_fields_are_left_unmarked_knowingly() -> None:
    assert facts().deprecated == DEPRECATED
    assert ours().deprecated == set()


@pytest.mark.parametrize("name", sorted(name for name in facts().messages if name in packages()))
def test_betterproto_class_has_the_fields_of_the_facts(name: str) -> None:
    generated = fields_from_betterproto(betterproto_class(name, packages()[name]), generated_names())
    assert generated == facts().messages[name].fields


@pytest.mark.parametrize("name", sorted(facts().enums))
def test_betterproto_enum_has_the_values_of_the_facts(name: str) -> None:
    members = betterproto_class(name, packages()[name])
    assert {member.name: int(member) for member in members} == facts().enums[name]


def test_betterproto_services_have_the_rpcs_of_the_facts() -> None:
    generated: dict[str, RpcShape] = {}
    names = {**generated_names(), well_known.Empty: "google.protobuf.Empty"}
    services = {(name.rpartition(".")[0], facts_package(name)) for name in facts().rpcs}
    for service, package in services:
        for path, handler in betterproto_class(f"{service}Base", package)().__mapping__().items():
            generated[path.removeprefix("/").replace("/", ".")] = RpcShape(
                names[handler.request_type],
                names[handler.reply_type],
                handler.cardinality.client_streaming,
                handler.cardinality.server_streaming,
            )
    assert generated == facts().rpcs


def facts_package(rpc_name: str) -> str:
    return rpc_name.rsplit(".", 2)[0]


def test_a_wrong_field_would_be_seen() -> None:
    """The comparison itself: number, type, name, label and oneof each make a difference."""
    right = FieldShape(1, "string", "name")
    others = [
        FieldShape(2, "string", "name"),
        FieldShape(1, "bytes", "name"),
        FieldShape(1, "string", "other"),
        FieldShape(1, "string", "name", repeated=True),
        FieldShape(1, "string", "name", oneof="result"),
    ]
    lines = ["1 string name", "2 string name", "1 bytes name", "1 string other", "1 repeated string name"]
    parsed = [shapes_from_facts(f"package p\nmessage M\n{line}").messages["p.M"].fields for line in lines]
    assert parsed == [{right}, *({other} for other in others[:4])]
    assert right not in others
