"""Every RPC of the services that clients talk to, each with a valid request, to be sent as messages or as any bytes."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import INSTANCE, RPC_SECONDS, IndependentClient

_REAPI = "build.bazel.remote.execution.v2"
_ACTION_CACHE = ("ActionCache/GetActionResult", "ActionCache/UpdateActionResult")
_OPERATIONS = tuple(
    f"Operations/{verb}Operation{plural}"
    for verb, plural in (("Get", ""), ("List", "s"), ("Wait", ""), ("Cancel", ""), ("Delete", ""))
)
_BOTH = (*_ACTION_CACHE, "Capabilities/GetCapabilities", "Health/Check", "Health/Watch")

RPCS = [
    *(f"cas {name}" for name in _BOTH),
    *(
        f"cas ContentAddressableStorage/{method}"
        for method in (
            "FindMissingBlobs",
            "BatchUpdateBlobs",
            "BatchReadBlobs",
            "GetTree",
            "SplitBlob",
            "SpliceBlob",
        )
    ),
    *(f"cas ByteStream/{method}" for method in ("Read", "Write", "QueryWriteStatus")),
    *(f"scheduler {name}" for name in _BOTH),
    *(f"scheduler {name}" for name in ("Execution/Execute", "Execution/WaitExecution", *_OPERATIONS)),
]
"""Names of all RPCs that are offered, with the service that is asked."""

INSTANCE_RPCS = [
    name
    for name in RPCS
    # The names of operations are the service's own: one that it did not give is not found, whatever it begins with.
    if not any(part in name for part in ("Health", "Operations", "WaitExecution"))
]
"""Those whose requests say which instance they are for."""


@dataclass(frozen=True)
class Rpc:
    """One RPC.

    Attributes:
        channel: Leads to the service.
        path: As gRPC names the method.
        request_class: Of the messages that it takes.
        answer_class: Of those that it gives.
        streams_requests: Whether it takes several.
        streams_answers: Whether it gives several.
        is_endless: Whether it gives more only when something changes.
        requests: Makes valid requests, each time as good as new.
    """

    channel: grpc.Channel
    path: str
    request_class: Any
    answer_class: Any
    streams_requests: bool
    streams_answers: bool
    is_endless: bool
    requests: Callable[[], list[Any]]

    def call(self, requests: Sequence[bytes]) -> list[bytes]:
        """Send requests that are bytes already; return the answers as bytes, of an endless RPC the first."""
        kind = f"{'stream' if self.streams_requests else 'unary'}_{'stream' if self.streams_answers else 'unary'}"
        method = getattr(self.channel, kind)(self.path)
        answer = method(iter(requests) if self.streams_requests else requests[0], timeout=RPC_SECONDS)
        if not self.streams_answers:
            return [answer]
        answers = list(islice(answer, 1 if self.is_endless else None))
        answer.cancel()
        return answers

    def plain_call(self) -> list[Any]:
        """Send valid requests as they are; return what is the same in all answers to them."""
        return self.comparable(self.call([request.SerializeToString() for request in self.requests()]))

    def comparable(self, answers: list[bytes]) -> list[Any]:
        """Parse answers, and drop what need not be the same each time: names of operations and unknown fields."""
        messages = [self.answer_class.FromString(answer) for answer in answers]
        for message in messages:
            message.DiscardUnknownFields()
            for operation in getattr(message, "operations", [message]):
                if operation.DESCRIPTOR.name == "Operation":
                    operation.ClearField("name")
        if self.path.endswith("/Execute"):
            # How many states of the course are seen is chance.
            return messages[-1:]
        return messages


class EveryRpc:
    """Makes an `Rpc` of each name in `RPCS`, over blobs and an action result that it stores.

    Args:
        client: Reaches the services; no worker is needed.
        salt: Makes what is stored different from what any other test stores; 200 bytes or more.
    """

    def __init__(self, client: IndependentClient, salt: bytes) -> None:
        self._client = client
        self._api = client.api
        self._instance = INSTANCE
        self._actions = Actions(client, salt)
        self._blob = salt * 10
        self._absent = client.digest(salt + b"absent")
        *_, self._root, _, self._action = client.store(
            *self._actions.blobs("true; true", inputs={"a": {"b": self._blob}, "c": self._blob})
        )
        self._result = self._make_result()
        client.action_cache.UpdateActionResult(self._update_action_result_request(INSTANCE))

    def of_instance(self, instance: str) -> "EveryRpc":
        """Return the same whose requests name another instance."""
        other = copy(self)
        other._instance = instance
        return other

    def rpc(self, name: str) -> Rpc:
        """Return an RPC by its name, such as ``cas ByteStream/Read``."""
        service, _, method = name.partition(" ")
        of_service, _, of_method = method.partition("/")
        descriptor = self._service_descriptor(of_service).methods_by_name[of_method]
        return Rpc(
            channel=self._client.cas_channel if service == "cas" else self._client.scheduler_channel,
            path=f"/{descriptor.containing_service.full_name}/{of_method}",
            request_class=GetMessageClass(descriptor.input_type),
            answer_class=GetMessageClass(descriptor.output_type),
            streams_requests=descriptor.client_streaming,
            streams_answers=descriptor.server_streaming,
            is_endless=of_method == "Watch",
            requests=self._requests(of_method, GetMessageClass(descriptor.input_type)),
        )

    def all(self) -> Iterator[tuple[str, Rpc]]:
        """Yield every RPC with its name."""
        return ((name, self.rpc(name)) for name in RPCS)

    def _service_descriptor(self, name: str) -> Any:
        modules = (self._api.reapi, self._api.bytestream, self._api.operations, self._api.health)
        services = {key: value for module in modules for key, value in module.DESCRIPTOR.services_by_name.items()}
        return services[name]

    def _make_result(self) -> Any:
        result = self._api.reapi.ActionResult(
            output_files=[{"path": "out", "digest": self._client.digest(self._blob), "is_executable": True}],
            output_symlinks=[{"path": "link", "target": "out"}],
            exit_code=3,
            stdout_raw=b"\x00\xff",
        )
        result.execution_metadata.worker = "somebody's worker"
        result.execution_metadata.worker_start_timestamp.FromNanoseconds(1_700_000_000_123_456_789)
        return result

    def _requests(self, method: str, request_class: Any) -> Callable[[], list[Any]]:
        if method == "Write":
            return lambda: list(self._client.write_requests(self._upload_name(), self._blob))
        if method == "UpdateActionResult":
            return lambda: [self._update_action_result_request(self._instance)]
        return lambda: [request_class(**self._fields(method))]

    def _fields(self, method: str) -> dict[str, Any]:
        """Return the fields of a valid request."""
        blob, instance = self._client.digest(self._blob), {"instance_name": self._instance}
        digest_function = {"digest_function": self._api.reapi.DigestFunction.SHA256}
        match method:
            case "FindMissingBlobs":
                return instance | digest_function | {"blob_digests": [blob, self._absent, blob]}
            case "BatchUpdateBlobs":
                return instance | digest_function | {"requests": [{"digest": blob, "data": self._blob}]}
            case "BatchReadBlobs":
                return instance | digest_function | {"digests": [blob], "acceptable_compressors": [0, 1]}
            case "GetTree":
                return instance | digest_function | {"root_digest": self._root, "page_size": 10}
            case "SplitBlob" | "SpliceBlob":
                chunks = {"chunk_digests": [blob]} if method == "SpliceBlob" else {}
                return instance | digest_function | chunks | {"blob_digest": blob, "chunking_function": 1}
            case "GetActionResult":
                wishes = {"inline_stdout": True, "inline_stderr": True, "inline_output_files": ["out", "link"]}
                return instance | digest_function | wishes | {"action_digest": self._action}
            case "GetCapabilities":
                return instance
            case "Read":
                return {"resource_name": self._read_name(), "read_offset": 7, "read_limit": 500}
            case "QueryWriteStatus":
                return {"resource_name": self._finished_upload()}
            case "Execute":
                policies = {"execution_policy": {"priority": 3}, "results_cache_policy": {"priority": -3}}
                wishes = {"inline_stdout": True, "inline_output_files": ["out", "link"]}
                return instance | digest_function | wishes | policies | {"action_digest": self._action}
            case "Check" | "Watch":
                return {"service": f"{_REAPI}.ActionCache"}
            case _:
                return self._operation_fields(method)

    def _operation_fields(self, method: str) -> dict[str, Any]:
        match method:
            case "ListOperations":
                return {"name": self._done_operation(), "filter": "stage=COMPLETED", "page_size": 3}
            case "WaitOperation":
                return {"name": self._done_operation(), "timeout": {"seconds": 3, "nanos": 500}}
            case _:
                return {"name": self._done_operation()}

    def _update_action_result_request(self, instance: str) -> Any:
        return self._api.reapi.UpdateActionResultRequest(
            instance_name=instance,
            action_digest=self._action,
            action_result=self._result,
            results_cache_policy={"priority": 3},
            digest_function=self._api.reapi.DigestFunction.SHA256,
        )

    def _done_operation(self) -> str:
        """Return the name of an operation that is over: the action cache answers it at once."""
        return str(list(self._actions.start(self._action))[-1].name)

    def _read_name(self) -> str:
        return self._named(self._client.read_name(self._blob))

    def _upload_name(self) -> str:
        return self._named(self._client.upload_name(self._blob))

    def _finished_upload(self) -> str:
        name = self._client.upload_name(self._blob)
        self._client.write(name, self._blob)
        return self._named(name)

    def _named(self, resource_name: str) -> str:
        """Put the instance into a resource name."""
        return resource_name.replace(f"{INSTANCE}/", f"{self._instance}/" if self._instance else "", 1)
