"""betterproto and google-protobuf read what the other one writes, byte for byte."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import betterproto
import pytest
from google.protobuf import text_format
from tests.support.google_messages import message_class

from lathe_protos import bytestream, health, longrunning, reapi, rpc, worker_v1

DIGEST = reapi.Digest(hash="ab" * 32, size_bytes=1 << 40)
STAMP = datetime(2024, 2, 29, 12, 30, 0, 123456, tzinfo=UTC)

MESSAGES = [
    reapi.Action(command_digest=DIGEST, input_root_digest=DIGEST, timeout=timedelta(seconds=90, milliseconds=5)),
    reapi.Command(
        arguments=["cc", "-c", "ö.c", ""],
        environment_variables=[reapi.CommandEnvironmentVariable(name="PATH", value="/bin")],
        output_files=["a.o"],
        output_directories=["d"],
        platform=reapi.Platform(properties=[reapi.PlatformProperty(name="cpu_count", value="1")]),
        output_directory_format=reapi.CommandOutputDirectoryFormat(2),
    ),
    reapi.Directory(
        files=[reapi.FileNode(name="f", digest=DIGEST, is_executable=True)],
        node_properties=reapi.NodeProperties(mtime=STAMP, unix_mode=0o644),
    ),
    reapi.ActionResult(
        exit_code=-9,
        stdout_raw=b"\x00\xff",
        output_file_symlinks=[reapi.OutputSymlink(path="l", target="t")],
        execution_metadata=reapi.ExecutedActionMetadata(worker="w", queued_timestamp=STAMP),
    ),
    reapi.ExecuteResponse(
        result=reapi.ActionResult(exit_code=1),
        status=rpc.Status(code=4, message="too long"),
        server_logs={"log": reapi.LogFile(digest=DIGEST, human_readable=True)},
    ),
    reapi.BatchReadBlobsRequest(digests=[DIGEST] * 3, acceptable_compressors=[reapi.CompressorValue(1)] * 2),
    longrunning.Operation(name="op", done=True, error=rpc.Status(code=5, message="gone")),
    bytestream.WriteRequest(resource_name="r", write_offset=1 << 62, finish_write=True, data=bytes(range(256))),
    health.HealthCheckResponse(status=health.HealthCheckResponseServingStatus(3)),
    worker_v1.WorkerMessage(draining=worker_v1.Draining()),
    worker_v1.WorkerMessage(
        register=worker_v1.Register(
            worker_id="w",
            protocol_version=1,
            properties=[worker_v1.Property(name="a", value="1"), worker_v1.Property(name="a", value="2")],
            held=[worker_v1.HeldAction(lease_id="l", action_digest=DIGEST)],
        )
    ),
    worker_v1.SchedulerMessage(
        registered=worker_v1.Registered(heartbeat_interval=timedelta(seconds=5), lost_after=timedelta(seconds=30))
    ),
]


def full_name(message: betterproto.Message) -> str:
    package = type(message).__module__.removeprefix("lathe_protos.")
    return f"{package}.{type(message).__name__}"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_google_protobuf_reads_and_rewrites_the_same_bytes(message: betterproto.Message) -> None:
    written = bytes(message)
    google = message_class(full_name(message)).FromString(written)
    assert google.SerializeToString(deterministic=True) == written
    assert "unknown" not in text_format.MessageToString(google, print_unknown_fields=True)
    assert type(message)().parse(google.SerializeToString()) == message


def test_deprecated_fields_make_no_warning() -> None:
    """Warnings are errors in this suite: real clients send these fields with every action."""
    command = reapi.Command(output_files=["a"], output_directories=["b"], platform=reapi.Platform())
    assert reapi.Command().parse(bytes(command)) == command


def test_generated_packages_shadow_nothing() -> None:
    """The generated ``google`` and ``grpc`` are only ever reached through ``lathe_protos``."""
    program = (
        "import lathe_protos.reapi, lathe_protos.health, lathe_protos.rpc, grpc, google.protobuf, sys;"
        "assert 'lathe_protos' not in grpc.__file__ + google.protobuf.__file__;"
        "assert not {'build', 'lathe'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
