"""Actions, as a stranger puts them together, and what comes back from executing them."""

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from tests.integration.independent_client.client import INSTANCE, IndependentClient

# Longer than any test waits: such an action ends by being killed, or its test fails.
ENDLESS = "echo begun; sleep 1000; echo ended"

InputTree = Mapping[str, "bytes | InputTree"]
"""Contents of files by their names, and below the names of directories trees."""


class Actions:
    """Makes actions, stores all that they need, and executes them.

    Args:
        client: Reaches the cluster.
        salt: Goes into each Action, so that no two tests have an action in common.
    """

    def __init__(self, client: IndependentClient, salt: bytes) -> None:
        self._client = client
        self._salt = salt

    def store(self, *arguments: str, inputs: InputTree | None = None, **fields: Any) -> Any:
        """Store an Action with its Command and its input root; return its digest.

        Args:
            arguments: The command line; one alone is a shell script.
            inputs: What is in the input root.
            fields: Further fields, of the Action if it has them, else of the Command.
        """
        blobs = self.blobs(*arguments, inputs=inputs, **fields)
        return self._client.store(*blobs)[-1]

    def blobs(self, *arguments: str, inputs: InputTree | None = None, **fields: Any) -> list[bytes]:
        """Serialize what `store` stores: all of the input root, the root itself, the Command, and last the Action."""
        reapi, digest = self._client.api.reapi, self._client.digest
        of_action = {name: fields.pop(name) for name in list(fields) if name in reapi.Action.DESCRIPTOR.fields_by_name}
        if len(arguments) == 1:
            arguments = ("/bin/sh", "-c", *arguments)
        command = reapi.Command(arguments=arguments, **fields).SerializeToString()
        *below, root = self.input_root(inputs or {})
        action = reapi.Action(
            command_digest=digest(command), input_root_digest=digest(root), salt=self._salt, **of_action
        )
        return [*below, root, command, action.SerializeToString()]

    def input_root(self, tree: InputTree) -> list[bytes]:
        """Serialize a tree of inputs, the root last; files called ``*.sh`` are executable."""
        digest = self._client.digest
        directory, blobs = self._client.api.reapi.Directory(), []
        for name, content in sorted(tree.items()):
            if isinstance(content, bytes):
                blobs.append(content)
                directory.files.add(name=name, digest=digest(content), is_executable=name.endswith(".sh"))
            else:
                blobs += self.input_root(content)
                directory.directories.add(name=name, digest=digest(blobs[-1]))
        return [*blobs, directory.SerializeToString()]

    def capabilities(self) -> Any:
        """Ask the scheduler what it can do."""
        stub = self._client.api.reapi_stubs.CapabilitiesStub(self._client.scheduler_channel)
        return stub.GetCapabilities(self._client.api.reapi.GetCapabilitiesRequest(instance_name=INSTANCE))

    def start(self, action_digest: Any, **fields: Any) -> Any:
        """Call Execute; return the stream of Operations."""
        request = self._client.api.reapi.ExecuteRequest(
            **{"instance_name": INSTANCE, "action_digest": action_digest, **fields}
        )
        return self._client.execution.Execute(request)

    def wait(self, name: str) -> Any:
        """Call WaitExecution; return the stream of Operations."""
        return self._client.execution.WaitExecution(self._client.api.reapi.WaitExecutionRequest(name=name))

    def execute(self, action_digest: Any, **fields: Any) -> Any:
        """Execute to the end; return the ExecuteResponse, whatever its status."""
        return self.response(list(self.start(action_digest, **fields))[-1])

    def run(self, *arguments: str, **fields: Any) -> Any:
        """Store and execute; return the ActionResult of an action that could be run, whatever its exit code."""
        response = self.execute(self.store(*arguments, **fields))
        assert response.status.code == 0, response
        return response.result

    def cached(self, action_digest: Any) -> Any:
        """Look an action up in the action cache; None if it is not there."""
        request = self._client.api.reapi.GetActionResultRequest(instance_name=INSTANCE, action_digest=action_digest)
        try:
            return self._client.action_cache.GetActionResult(request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            return None

    def response(self, operation: Any) -> Any:
        """Unpack what a done operation ended with."""
        assert operation.done, operation
        response = self._client.api.reapi.ExecuteResponse()
        assert operation.response.Unpack(response), operation
        return response

    def metadata(self, operation: Any) -> Any:
        """Unpack what an operation says of its course."""
        metadata = self._client.api.reapi.ExecuteOperationMetadata()
        assert operation.metadata.Unpack(metadata), operation
        return metadata

    def stage(self, operation: Any) -> str:
        """Name the stage that an operation is in."""
        return str(self._client.api.reapi.ExecutionStage.Value.Name(self.metadata(operation).stage))

    def until_stage(self, operations: Iterator[Any], stage: str) -> list[Any]:
        """Take operations from a stream up to the first that is in a stage."""
        taken = []
        for operation in operations:
            taken.append(operation)
            if self.stage(operation) == stage:
                return taken
        raise AssertionError(f"the stream ended without {stage}: {taken}")

    def missing_subjects(self, status: Any) -> set[str]:
        """List the blobs that a google.rpc.Status says are missing."""
        (detail,) = status.details
        violations = self._client.unpack(detail).violations
        assert {violation.type for violation in violations} == {"MISSING"}
        return {violation.subject for violation in violations}

    def subject(self, digest: Any) -> str:
        """Return how a violation names a blob."""
        return f"blobs/{digest.hash}/{digest.size_bytes}"
