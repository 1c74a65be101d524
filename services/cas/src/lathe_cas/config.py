"""The CAS's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lathe_cas.compression.zstd_encoder import DEFAULT_LEVEL, MAX_LEVEL
from lathe_cas.eviction_policy import HIGH_WATERMARK_RATIO, LEASE_SECONDS, LOW_WATERMARK_RATIO, EvictionPolicy
from lathe_cas.fast_cdc import (
    LARGEST_AVERAGE_BYTES,
    LEAST_AVERAGE_BYTES,
    RECOMMENDED_AVERAGE_BYTES,
    FastCdcParameters,
)
from lathe_cas.remote_asset.host_patterns import HostPatterns
from lathe_cas.stores.lmdb_storage import UPLOAD_MAX_AGE_SECONDS, LmdbOptions
from lathe_cas.stores.shard_map import MAX_SHARDS
from lathe_shared.config_loading import DigestFunctionList, InstanceNameList, Port, ServiceSettings
from lathe_shared.digest import DigestFunction

MIN_SIZE_BYTES = 1 << 20
"""Below a mebibyte the store's own pages would be most of it."""


MAX_RETENTION_SECONDS = 100 * 365 * 24 * 3600
"""A century; more would be a mistake in the unit."""


class CasSettings(ServiceSettings):
    """All that the CAS can be told; to check its store, see ``lathe-cas fsck --help``."""

    service: ClassVar[str] = "cas"

    port: Port = Field(default=50051, description="port for clients: CAS, ByteStream, ActionCache, Capabilities")
    http_port: Port = Field(default=50081, description="port of /metrics, /healthz and /status, and of http_cache")
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="how many processes serve clients, sharing ports and data: more use more processors, up to about "
        "one each, and none of them waits while another one is busy",
    )
    data_dir: Path = Field(default=Path("~/.cache/lathe/cas"), description="where everything is kept")
    data_dirs: list[Path] = Field(
        default=[],
        max_length=MAX_SHARDS,
        description="several folders, a disk each, instead of data_dir: each keeps an equal share of everything",
    )
    max_size_bytes: int = Field(
        default=50 << 30,
        ge=MIN_SIZE_BYTES,
        description=(
            "bytes on disk that are kept at most, in all folders together; what was used least recently goes first"
        ),
    )
    lease_seconds: int = Field(
        default=LEASE_SECONDS,
        ge=0,
        le=MAX_RETENTION_SECONDS,
        description=(
            "for how long what was written, read or found is not deleted, whatever room is needed; as Bazel's "
            "--experimental_remote_cache_ttl. 0: anything may go, as for a store of a few megabytes"
        ),
    )
    max_age_seconds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_RETENTION_SECONDS,
        description="after how long without use data is deleted though there is room; unset: never",
    )
    high_watermark: float = Field(
        default=HIGH_WATERMARK_RATIO, gt=0, le=1, description="share of max_size_bytes above which old data is deleted"
    )
    low_watermark: float = Field(
        default=LOW_WATERMARK_RATIO, gt=0, lt=1, description="share of max_size_bytes down to which it is deleted then"
    )
    instance_names: InstanceNameList = Field(default=[], description="instance names to answer for; none means any")
    digest_functions: DigestFunctionList = Field(
        default=[function.segment for function in DigestFunction],
        min_length=1,
        description=(
            "digest functions that are offered; a hash of 64 digits that comes without a function is by the first of "
            "sha256, sha256tree, blake3 that is"
        ),
    )
    # What gRPC libraries accept by default is 4 MiB; the rest of it is room for what frames the blobs.
    max_batch_total_size_bytes: int = Field(
        default=4_000_000, ge=1 << 10, le=15 << 20, description="bytes of blobs in one batch request, as advertised"
    )
    upload_max_age_seconds: int = Field(
        default=UPLOAD_MAX_AGE_SECONDS, ge=60, description="after how long without a byte an unfinished upload is gone"
    )
    # Off: a port that was for monitoring must not begin to take part in builds because its service was upgraded.
    http_cache: Literal["off", "read-only", "read-write"] = Field(
        default="off", description="whether /cas/, /ac/ and /cache/ are served on http_port, to whoever reaches it"
    )
    # Far above what compilers write. A body without a length may make so much room for itself before it is refused.
    http_cache_max_body_bytes: int = Field(
        default=4 << 30, ge=1, description="largest blob or value that the HTTP cache takes"
    )
    chunk_average_bytes: int = Field(
        default=RECOMMENDED_AVERAGE_BYTES,
        ge=LEAST_AVERAGE_BYTES,
        le=LARGEST_AVERAGE_BYTES,
        description="about how large the chunks are into which SplitBlob cuts blobs, a power of two, as advertised",
    )

    remote_asset: bool = Field(
        default=False, description="whether clients may fetch content by address (the Remote Asset API)"
    )
    remote_asset_hosts: list[str] = Field(
        default=[],
        description="hosts that content is downloaded from: names, addresses, or *. and what names below it end with; "
        "only what is named itself may have a private address; none: only what was pushed is found",
    )
    remote_asset_authorities: Path | None = Field(
        default=None, description="certificates in PEM form that those hosts are verified with beside the system's"
    )
    remote_asset_push: bool = Field(
        default=False,
        description="whether clients may say which content stands for an address; others get it unseen, "
        "so only where all clients are trusted",
    )
    remote_asset_max_bytes: int = Field(default=4 << 30, ge=1, description="bytes of one download at most")
    remote_asset_timeout_seconds: float = Field(
        default=600.0, gt=0, description="how long one download may take, unless a client asks for less"
    )
    remote_asset_max_age_seconds: float = Field(
        default=3600.0,
        ge=0,
        le=MAX_RETENTION_SECONDS,
        description="how long a download whose checksum nobody gave answers for its address",
    )
    remote_asset_max_entries: int = Field(
        default=100_000, ge=1, description="files and directories of one archive at most"
    )
    remote_asset_max_unpacked_bytes: int = Field(default=16 << 30, ge=1, description="bytes in one archive at most")

    compress_stored: bool = Field(
        default=False,
        description="compress what clients send uncompressed where that saves an eighth of the disk it would take; "
        "writes then take several times the processor time, and reads have to decompress",
    )
    zstd_level: int = Field(
        default=DEFAULT_LEVEL,
        ge=1,
        le=MAX_LEVEL,
        description="zstd level of what is compressed here: for compress_stored, and for clients that ask for zstd "
        "where a blob is stored uncompressed",
    )

    tls_port: Port | None = Field(default=None, description="port for the same over TLS; unset: none")
    tls_certificate: Path | None = Field(
        default=None,
        description="certificate for it in PEM form, with its chain; unset: one of a private authority in tls_dir",
    )
    tls_key: Path | None = Field(default=None, description="the certificate's private key, without a password")
    tls_dir: Path | None = Field(
        default=None,
        description="where a private authority is made and kept; clients need its ca.crt; unset: tls in data_dir",
    )
    tls_names: list[str] = Field(
        default=[],
        description="names and addresses for the private authority's certificate, beside localhost and the host's name",
    )
    tls_names_file: Path | None = Field(
        default=None, description="file with more of them, one a line: the name of the machine around a container"
    )

    @field_validator("chunk_average_bytes", mode="after")
    @classmethod
    def _check_power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, such as {1 << (value.bit_length() - 1)}")
        return value

    @field_validator("remote_asset_hosts", mode="after")
    @classmethod
    def _check_hosts(cls, value: list[str]) -> list[str]:
        HostPatterns(value)
        return value

    @model_validator(mode="after")
    def _check_remote_asset(self) -> CasSettings:
        if not self.remote_asset and (self.remote_asset_hosts or self.remote_asset_push):
            raise ValueError("remote_asset_hosts and remote_asset_push have no use without remote_asset")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> CasSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError(
                "tls_certificate and tls_key need each other: give both, or neither for a private authority"
            )
        if self.tls_certificate is not None and self.tls_port is None:
            raise ValueError("tls_certificate has no use without tls_port: give the port for TLS, usually 50071")
        return self

    @model_validator(mode="after")
    def _check_data_dirs(self) -> CasSettings:
        if len(set(self.data_dirs)) < len(self.data_dirs):
            raise ValueError("data_dirs names one folder twice")
        if self.max_size_bytes_each < MIN_SIZE_BYTES:
            raise ValueError(f"max_size_bytes is less than {MIN_SIZE_BYTES} for each of data_dirs")
        return self

    @model_validator(mode="after")
    def _check_eviction(self) -> CasSettings:
        if self.low_watermark >= self.high_watermark:
            raise ValueError(
                f"low_watermark ({self.low_watermark}) must be less than high_watermark ({self.high_watermark})"
            )
        if self.max_age_seconds is not None and self.max_age_seconds < self.lease_seconds:
            raise ValueError(
                f"max_age_seconds ({self.max_age_seconds}) is less than lease_seconds ({self.lease_seconds}), for "
                "which nothing is deleted: raise the one or lower the other"
            )
        return self

    @property
    def all_data_dirs(self) -> list[Path]:
        """The folders that data is kept in."""
        return self.data_dirs or [self.data_dir]

    @property
    def max_size_bytes_each(self) -> int:
        """The limit of one folder, and so of one blob."""
        return self.max_size_bytes // len(self.all_data_dirs)

    @property
    def offered_functions(self) -> tuple[DigestFunction, ...]:
        """The digest functions that are offered, SHA-256 before others whose hashes are as long."""
        return tuple(function for function in DigestFunction if function.segment in self.digest_functions)

    def storage_options(self) -> LmdbOptions:
        """Return what the storage needs to know."""
        policy = EvictionPolicy(
            self.max_size_bytes_each,
            high_ratio=self.high_watermark,
            low_ratio=self.low_watermark,
            lease_seconds=self.lease_seconds,
            max_age_seconds=self.max_age_seconds,
        )
        return LmdbOptions(
            policy,
            upload_max_age_seconds=self.upload_max_age_seconds,
            compress_stored=self.compress_stored,
            zstd_level=self.zstd_level,
        )

    def chunking_parameters(self) -> FastCdcParameters:
        """Return how blobs are split."""
        return FastCdcParameters(self.chunk_average_bytes)
