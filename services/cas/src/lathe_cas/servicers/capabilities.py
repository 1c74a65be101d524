"""Capabilities of the cache; the scheduler adds those of execution.

Spec: REAPI, service Capabilities, message CacheCapabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import reapi, semver
from lathe_shared.compressor import Compressor
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, unary

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lathe_cas.fast_cdc import FastCdcParameters
    from lathe_shared.digest import DigestFunction
    from lathe_shared.instance_name import InstanceNames

LOW_API_VERSION = semver.SemVer(major=2, minor=0)
"""Bazel up to version 7 refuses a server whose lowest version is above 2.0."""

HIGH_API_VERSION = semver.SemVer(major=2, minor=3)
"""From 2.1 on clients send ``output_paths``, from 2.3 on ``digest_function``."""


class CapabilitiesServicer(Servicer):
    """Serves ``build.bazel.remote.execution.v2.Capabilities``.

    Args:
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
        max_batch_total_size_bytes: Bytes of blobs in one batch.
        max_blob_size_bytes: Bytes of one blob.
        chunking: How blobs are split.
    """

    service_name = "build.bazel.remote.execution.v2.Capabilities"

    def __init__(
        self,
        instance_names: InstanceNames,
        functions: Collection[DigestFunction],
        max_batch_total_size_bytes: int,
        max_blob_size_bytes: int,
        chunking: FastCdcParameters,
    ) -> None:
        self._instance_names = instance_names
        cache = reapi.CacheCapabilities(
            digest_functions=[reapi.DigestFunctionValue(function.value) for function in functions],
            action_cache_update_capabilities=reapi.ActionCacheUpdateCapabilities(update_enabled=True),
            max_batch_total_size_bytes=max_batch_total_size_bytes,
            # A symlink's target is kept as it is; whether it means anything is between client and worker.
            symlink_absolute_path_strategy=reapi.SymlinkAbsolutePathStrategyValue(
                reapi.SymlinkAbsolutePathStrategyValue.ALLOWED
            ),
            max_cas_blob_size_bytes=max_blob_size_bytes,
            split_blob_support=True,
            splice_blob_support=True,
            fast_cdc_2020_params=reapi.FastCdc2020Params(
                avg_chunk_size_bytes=chunking.average_bytes, seed=chunking.seed
            ),
            # Identity goes without saying.
            supported_compressors=[reapi.CompressorValue(Compressor.ZSTD.value)],
            supported_batch_update_compressors=[reapi.CompressorValue(Compressor.ZSTD.value)],
        )
        self._answer = bytes(
            reapi.ServerCapabilities(
                cache_capabilities=cache, low_api_version=LOW_API_VERSION, high_api_version=HIGH_API_VERSION
            )
        )

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"GetCapabilities": unary(self._get_capabilities)}

    def _get_capabilities(self, data: bytes, _context: RpcContext) -> bytes:
        self._instance_names.check(decode(reapi.GetCapabilitiesRequest, data).instance_name)
        return self._answer
