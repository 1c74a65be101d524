"""Digests: what identifies a blob.

A ``Digest`` that exists is well-formed: its hash has its function's length and is lower-case hexadecimal, its size is
not negative. Wire digests are turned into this type at the edge of a service and nowhere else; the hottest paths
(``wire``) carry the key alone.

Spec: REAPI, messages Digest and DigestFunction.
"""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from blake3 import blake3
from typing_extensions import override

from lathe_protos import reapi
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.sha256_tree import Sha256Tree
from lathe_shared.wire import string_field, varint_field

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from typing_extensions import Buffer

MAX_SIZE_BYTES = 2**63 - 1
"""Largest size that Digest.size_bytes, an int64, can carry."""

_HEXADECIMAL = re.compile(r"[0-9a-f]+", re.ASCII)


class Hasher(Protocol):
    """What hashlib's objects and their like have in common."""

    def update(self, data: Buffer, /) -> object:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far, in lower-case hexadecimal."""


class DigestFunction(enum.IntEnum):
    """The hash functions that Lathe can compute, under REAPI's numbers."""

    SHA256 = 1
    SHA1 = 2
    MD5 = 3
    SHA384 = 5
    SHA512 = 6
    SHA256TREE = 8
    BLAKE3 = 9

    @property
    def segment(self) -> str:
        """Name of the function inside a resource name, such as ``sha256``, and in configurations."""
        return self.name.lower()

    @property
    def is_told_by_length(self) -> bool:
        """Whether a resource name leaves the function out, for the length of the hash to tell it.

        Spec: REAPI, service ContentAddressableStorage, on ``digest_function`` in resource names.
        """
        return self not in (DigestFunction.SHA256TREE, DigestFunction.BLAKE3)

    @property
    def hash_length(self) -> int:
        """Length of a hash, in hexadecimal digits."""
        return _HASH_LENGTHS[self]

    def new_hasher(self) -> Hasher:
        """Return a fresh hash object."""
        return _CONSTRUCTORS[self]()


_CONSTRUCTORS: dict[DigestFunction, Callable[[], Hasher]] = {
    DigestFunction.SHA256: hashlib.sha256,
    DigestFunction.SHA1: lambda: hashlib.sha1(usedforsecurity=False),
    DigestFunction.MD5: lambda: hashlib.md5(usedforsecurity=False),
    DigestFunction.SHA384: hashlib.sha384,
    DigestFunction.SHA512: hashlib.sha512,
    DigestFunction.SHA256TREE: Sha256Tree,
    DigestFunction.BLAKE3: blake3,
}
_HASH_LENGTHS = {function: 2 * len(bytes.fromhex(make().hexdigest())) for function, make in _CONSTRUCTORS.items()}


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """Hash and size of a blob, with the function that made the hash.

    The constructor trusts its caller; ``parse`` and ``from_message`` are for what came from outside.

    Attributes:
        hash: Lower-case hexadecimal.
        size_bytes: Size of the blob, not negative.
        function: The function that made ``hash``; two functions never share a digest.
    """

    hash: str
    size_bytes: int
    function: DigestFunction = field(default=DigestFunction.SHA256)

    @classmethod
    def of(cls, data: Buffer, function: DigestFunction = DigestFunction.SHA256) -> Digest:
        """Compute the digest of bytes."""
        hasher = function.new_hasher()
        hasher.update(data)
        return cls(hasher.hexdigest(), memoryview(data).nbytes, function)

    @classmethod
    def parse(
        cls, hash_: str, size_bytes: int, function: DigestFunction = DigestFunction.SHA256, field: str = "digest"
    ) -> Digest:
        """Check a digest that came from outside.

        Args:
            hash_: What should be a hash by ``function``.
            size_bytes: What should be a size.
            function: The function that the request names or implies.
            field: Path of the digest in the request, for the error.

        Raises:
            InvalidArgumentError: The hash or the size is malformed.
        """
        if len(hash_) != function.hash_length or not _HEXADECIMAL.fullmatch(hash_):
            raise InvalidArgumentError(
                f"{field}.hash",
                f"{_shorten(hash_)} is not {function.hash_length} lower-case hexadecimal digits ({function.name})",
            )
        if not 0 <= size_bytes <= MAX_SIZE_BYTES:
            raise InvalidArgumentError(f"{field}.size_bytes", f"{size_bytes} is not a size")
        return cls(hash_, size_bytes, function)

    @classmethod
    def from_message(
        cls, message: reapi.Digest, function: DigestFunction = DigestFunction.SHA256, field: str = "digest"
    ) -> Digest:
        """Check a wire digest; see ``parse``."""
        return cls.parse(message.hash, message.size_bytes, function, field)

    def to_message(self) -> reapi.Digest:
        """Return the wire form as a message."""
        return reapi.Digest(hash=self.hash, size_bytes=self.size_bytes)

    @property
    def key(self) -> bytes:
        """Function and hash in binary: what storage files a blob under."""
        return bytes((self.function,)) + bytes.fromhex(self.hash)

    @property
    def wire(self) -> bytes:
        """The serialized REAPI Digest message."""
        return string_field(1, self.hash) + varint_field(2, self.size_bytes)

    @property
    def is_empty(self) -> bool:
        """Whether this is the digest of no bytes, which every store holds without being given it."""
        return self.size_bytes == 0 and self.hash == EMPTY_HASHES[self.function]

    @override
    def __str__(self) -> str:
        return f"{self.hash}/{self.size_bytes}"

    @override
    def __hash__(self) -> int:
        # The hash tells nearly all digests apart, and a string remembers its own, unlike an enumeration's member.
        return hash(self.hash)


EMPTY_HASHES = {function: function.new_hasher().hexdigest() for function in DigestFunction}
"""Hash of the empty blob by each function."""

EMPTY_DIGEST = Digest(EMPTY_HASHES[DigestFunction.SHA256], 0)
"""The SHA-256 digest of the empty blob."""


def select_function(
    value: int, hash_length: int, offered: Collection[DigestFunction], field: str = "digest"
) -> DigestFunction:
    """Tell which digest function a request means.

    Clients older than the ``digest_function`` field leave it at zero; the length of the hash then tells, as the
    specification asks; if it fits several, the first one offered is meant.

    Args:
        value: The request's ``digest_function``, an enum value as it came from the wire.
        hash_length: Length of a hash in the request, in hexadecimal digits; used only if ``value`` is zero.
        offered: The functions that this service offers.
        field: Path of the digest with that hash in the request, for the error.

    Raises:
        InvalidArgumentError: The function is unknown or not offered, or no offered one has such hashes.

    Spec: REAPI, the ``digest_function`` field of each request.
    """
    if value:
        for function in offered:
            if function == value:
                return function
        raise InvalidArgumentError("digest_function", f"{_function_name(value)} is not one of {_names(offered)}")
    for function in offered:
        if _HASH_LENGTHS[function] == hash_length:
            return function
    raise InvalidArgumentError(
        f"{field}.hash", f"a hash of {hash_length} hexadecimal digits belongs to none of {_names(offered)}"
    )


def _names(functions: Collection[DigestFunction]) -> str:
    return ", ".join(function.name for function in sorted(functions))


def _function_name(value: int) -> str:
    try:
        return str(reapi.DigestFunctionValue(value).name)
    except ValueError:
        return str(value)


def _shorten(text: str) -> str:
    """Quote text from outside without letting it flood a message."""
    return repr(text) if len(text) <= 140 else f"{text[:140]!r}… ({len(text)} characters)"
