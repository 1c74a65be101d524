"""The CAS's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from lathe_cas.eviction_policy import EvictionPolicy
from lathe_cas.stores.lmdb_storage import UPLOAD_MAX_AGE_SECONDS, LmdbOptions
from lathe_shared.config_loading import InstanceNameList, Port, ServiceSettings

MIN_SIZE_BYTES = 1 << 20
"""Below a mebibyte the store's own pages would be most of it."""


class CasSettings(ServiceSettings):
    """All that the CAS can be told; see each description."""

    service: ClassVar[str] = "cas"

    port: Port = Field(default=50051, description="port for clients: CAS, ByteStream, ActionCache, Capabilities")
    http_port: Port = Field(default=50081, description="port of /metrics, /healthz and /status")
    data_dir: Path = Field(default=Path("~/.cache/lathe/cas"), description="where everything is kept")
    max_size_bytes: int = Field(
        default=50 << 30,
        ge=MIN_SIZE_BYTES,
        description="bytes on disk that are kept at most; what was used least recently goes first",
    )
    instance_names: InstanceNameList = Field(default=[], description="instance names to answer for; none means any")
    # What gRPC libraries accept by default is 4 MiB; the rest of it is room for what frames the blobs.
    max_batch_total_size_bytes: int = Field(
        default=4_000_000, ge=1 << 10, le=15 << 20, description="bytes of blobs in one batch request, as advertised"
    )
    upload_max_age_seconds: int = Field(
        default=UPLOAD_MAX_AGE_SECONDS, ge=60, description="after how long without a byte an unfinished upload is gone"
    )

    def storage_options(self) -> LmdbOptions:
        """Return what the storage needs to know."""
        return LmdbOptions(EvictionPolicy(self.max_size_bytes), upload_max_age_seconds=self.upload_max_age_seconds)
