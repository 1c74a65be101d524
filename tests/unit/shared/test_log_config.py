from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from lathe_protos import reapi
from lathe_shared.log_config import configure_logging
from lathe_shared.request_metadata import NO_METADATA, REQUEST_METADATA_KEY, RequestMetadata
from lathe_shared.rpc_context import RpcContext, bind_request_metadata, current_rpc

METADATA = bytes(
    reapi.RequestMetadata(tool_invocation_id="run", action_id="abc", target_id="//a", action_mnemonic="Cc")
)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = before[0], before[1]
    current_rpc.set(None)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_lines_are_json_with_service_level_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("cas")
    log = structlog.get_logger()
    log.debug("unseen")
    log.info("seen", size_bytes=3)

    (record,) = lines(capsys)
    assert list(record) == ["timestamp", "level", "service", "event", "size_bytes"]
    assert (record["event"], record["service"], record["level"], record["size_bytes"]) == ("seen", "cas", "info", 3)
    assert str(record["timestamp"]).endswith("Z")


def test_lines_name_invocation_action_and_target_of_their_rpc(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("cas", "debug")
    current_rpc.set(RpcContext("/a/b", metadata={REQUEST_METADATA_KEY: METADATA}))
    structlog.get_logger().debug("one")
    bind_request_metadata(METADATA)
    structlog.get_logger().debug("two")
    bind_request_metadata(b"")
    structlog.get_logger().debug("three")

    one, two, three = lines(capsys)
    assert (one["invocation_id"], one["action_id"], one["target_id"], one["mnemonic"]) == ("run", "abc", "//a", "Cc")
    assert two["invocation_id"] == "run"
    assert "invocation_id" not in three


def test_a_traceback_is_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("cas")
    structlog.get_logger().error("internal_error", exc_info=ValueError("deliberate"))

    (record,) = lines(capsys)
    assert "ValueError: deliberate" in str(record["exception"])


def test_libraries_log_in_the_same_form_and_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("cas", "debug")
    logging.getLogger("grpclib.server").info("Request was cancelled")
    logging.getLogger("grpclib.server").warning("something %s", "odd")

    (record,) = lines(capsys)
    assert (record["event"], record["level"], record["service"]) == ("something odd", "warning", "cas")


def test_malformed_request_metadata_counts_as_none() -> None:
    assert RequestMetadata.parse(b"\xff\xff\xff") is NO_METADATA
    assert RequestMetadata.parse(b"\x12\x02\xff\xff") is NO_METADATA
    assert NO_METADATA.log_fields() == {}
