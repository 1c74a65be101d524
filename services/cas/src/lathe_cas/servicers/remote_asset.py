"""Fetch and Push, the services of the Remote Asset API.

Spec: Remote Asset API, services Fetch and Push.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from lathe_cas.remote_asset import qualifiers
from lathe_cas.remote_asset.asset_records import AssetName
from lathe_cas.remote_asset.remote_assets import FetchOutcome, FetchRequest, RemoteAssets
from lathe_protos import asset, reapi, rpc
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import InvalidArgumentError, PermissionDeniedError
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, unary
from lathe_shared.status_details import status_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lathe_shared.instance_name import InstanceNames

FetchMessageT = TypeVar("FetchMessageT", asset.FetchBlobRequest, asset.FetchDirectoryRequest)

_LAST_SECONDS = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC).timestamp()
"""Spec: google.protobuf.Timestamp, up to the year 9999."""

MAX_URIS = 100
"""Addresses in one request: far more than anybody has mirrors, and each may cost a download."""


class FetchServicer(Servicer):
    """Serves ``build.bazel.remote.asset.v1.Fetch``.

    Args:
        assets: Does the work.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
    """

    service_name = "build.bazel.remote.asset.v1.Fetch"

    def __init__(
        self, assets: RemoteAssets, instance_names: InstanceNames, functions: Collection[DigestFunction]
    ) -> None:
        self._assets = assets
        self._instance_names = instance_names
        self._functions = functions

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"FetchBlob": unary(self._fetch_blob), "FetchDirectory": unary(self._fetch_directory)}

    async def _fetch_blob(self, data: bytes, _context: RpcContext) -> bytes:
        request = self._request(decode(asset.FetchBlobRequest, data), is_directory=False)
        outcome = await self._assets.fetch(request)
        response = asset.FetchBlobResponse(
            status=_status(outcome), uri=outcome.uri, digest_function=reapi.DigestFunctionValue(request.function.value)
        )
        if outcome.asset is None:
            # Bazel 4 looks at the digest alone. Without one it makes an empty file and goes on; with one that no blob
            # can have it fails.
            response.blob_digest = reapi.Digest(hash="0" * request.function.hash_length, size_bytes=1)
        else:
            response.blob_digest = outcome.asset.digest.to_message()
            if outcome.asset.expires_at is not None:
                response.expires_at = _time(outcome.asset.expires_at)
        return bytes(response)

    async def _fetch_directory(self, data: bytes, _context: RpcContext) -> bytes:
        request = self._request(decode(asset.FetchDirectoryRequest, data), is_directory=True)
        outcome = await self._assets.fetch(request)
        response = asset.FetchDirectoryResponse(
            status=_status(outcome), uri=outcome.uri, digest_function=reapi.DigestFunctionValue(request.function.value)
        )
        if outcome.asset is not None:
            response.root_directory_digest = outcome.asset.digest.to_message()
            if outcome.asset.expires_at is not None:
                response.expires_at = _time(outcome.asset.expires_at)
        return bytes(response)

    def _request(
        self, message: asset.FetchBlobRequest | asset.FetchDirectoryRequest, *, is_directory: bool
    ) -> FetchRequest:
        self._instance_names.check(message.instance_name)
        if message.timeout < datetime.timedelta(0):
            raise InvalidArgumentError("timeout", "is negative")
        return FetchRequest(
            is_directory,
            message.instance_name,
            _uris(message.uris),
            qualifiers.identity(message.qualifiers),
            # Spec: FetchBlobRequest.digest_function, "if unset, the server SHOULD default to SHA256".
            select_function(int(message.digest_function) or DigestFunction.SHA256, 0, self._functions),
            message.timeout.total_seconds(),
            message.oldest_content_accepted.timestamp(),
        )


class PushServicer(Servicer):
    """Serves ``build.bazel.remote.asset.v1.Push``.

    Args:
        assets: Does the work.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
        allowed: Whether clients may push.
    """

    service_name = "build.bazel.remote.asset.v1.Push"

    def __init__(
        self,
        assets: RemoteAssets,
        instance_names: InstanceNames,
        functions: Collection[DigestFunction],
        *,
        allowed: bool,
    ) -> None:
        self._assets = assets
        self._instance_names = instance_names
        self._functions = functions
        self._allowed = allowed

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"PushBlob": unary(self._push_blob), "PushDirectory": unary(self._push_directory)}

    async def _push_blob(self, data: bytes, _context: RpcContext) -> bytes:
        request = decode(asset.PushBlobRequest, data)
        await self._push(request, request.blob_digest, "blob_digest", is_directory=False)
        return b""

    async def _push_directory(self, data: bytes, _context: RpcContext) -> bytes:
        request = decode(asset.PushDirectoryRequest, data)
        await self._push(request, request.root_directory_digest, "root_directory_digest", is_directory=True)
        return b""

    async def _push(
        self,
        request: asset.PushBlobRequest | asset.PushDirectoryRequest,
        message: reapi.Digest,
        field: str,
        *,
        is_directory: bool,
    ) -> None:
        self._instance_names.check(request.instance_name)
        if not self._allowed:
            raise PermissionDeniedError("pushing assets is not allowed here (setting remote_asset_push)")
        function = select_function(request.digest_function, len(message.hash), self._functions, field)
        digest = Digest.from_message(message, function, field)
        identity = qualifiers.identity(request.qualifiers)
        names = [AssetName(is_directory, request.instance_name, uri, identity, function) for uri in _uris(request.uris)]
        expire_at = request.expire_at.timestamp()
        await self._assets.push(
            names,
            digest,
            # Unset reads as 1970.
            expire_at if expire_at > 0 else None,
            _digests(request.references_blobs, function, "references_blobs"),
            _digests(request.references_directories, function, "references_directories"),
        )


def _uris(uris: Sequence[str]) -> tuple[str, ...]:
    if not uris:
        raise InvalidArgumentError("uris", "at least one is needed")
    if len(uris) > MAX_URIS:
        raise InvalidArgumentError("uris", f"{len(uris)} are more than {MAX_URIS}")
    return tuple(uris)


def _digests(messages: Sequence[reapi.Digest], function: DigestFunction, field: str) -> list[Digest]:
    return [Digest.from_message(message, function, f"{field}[{place}]") for place, message in enumerate(messages)]


def _status(outcome: FetchOutcome) -> rpc.Status:
    return rpc.Status() if outcome.error is None else status_of(outcome.error)


def _time(seconds: float) -> datetime.datetime:
    # The last moment that a Timestamp can say stands for "never", and becomes more than that as a float.
    return datetime.datetime.fromtimestamp(min(seconds, _LAST_SECONDS), datetime.UTC)
