"""A private certificate authority in a directory, and the server certificate that it signs.

For operators who have no certificates: clients are given ``ca.crt`` once and need nothing ever after, because the
authority stays while certificates come and go under it. Whoever has ``ca.key`` can pass for any server with those
clients, so it never leaves the directory, and the directory belongs with the secrets of the machine.

Spec: RFC 5280 (certificates), RFC 6125 (names are those of the subject alternative name only).
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

AUTHORITY_DAYS = 3650
"""Long, because replacing the authority means a visit to every client."""

CERTIFICATE_DAYS = 397
"""The longest that all current clients accept of any certificate."""

RENEW_BEFORE_DAYS = 132
"""A third of its life is left then: months in which a machine that is off, or a clock that is wrong, does no harm."""

CLOCK_SKEW = datetime.timedelta(hours=1)
"""Certificates begin this much in the past, for clients whose clocks are slow."""

_KEY_MODE = 0o600
_CERTIFICATE_MODE = 0o644


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where a server's certificate lies.

    Attributes:
        certificate: PEM, the server's own first.
        key: PEM, its private key.
        authority: PEM, what clients must trust; None if that is none of ours.
    """

    certificate: Path
    key: Path
    authority: Path | None = None


def ensure_certificate(directory: Path, names: Iterable[str], now: datetime.datetime) -> CertificateFiles:
    """Make an authority and a certificate, or renew what is no longer good, or leave all as it is.

    A certificate is renewed when its end is near, when it is for other names, or when it does not fit its key or the
    authority. An authority is made anew only if it is absent or too near its own end to sign anything useful.

    Args:
        directory: Where all files are; made if absent. Several processes may call this at once.
        names: DNS names and IP addresses by which clients reach the server.
        now: The time, aware.

    Raises:
        OSError: The directory cannot be read or written.
        ValueError: A name is neither, or ``ca.crt`` or ``ca.key`` is damaged. It is not replaced then, because clients
            trust it; whoever wants another one deletes both.
    """
    wanted = [general_name(name) for name in dict.fromkeys(names)]
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    files = CertificateFiles(directory / "server.crt", directory / "server.key", directory / "ca.crt")
    with _locked(directory):
        authority = _ensure_authority(directory, now)
        if not _is_good(files, authority, wanted, now):
            _issue(files, authority, wanted, now)
    return files


def general_name(name: str) -> x509.GeneralName:
    """Turn a DNS name or an IP address into what a certificate calls it.

    Raises:
        ValueError: It is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.removeprefix("*.").split(".")
    if not all(label and label.replace("-", "").replace("_", "").isalnum() and label.isascii() for label in labels):
        raise ValueError(f"{name!r} is neither a host name nor an IP address")
    return x509.DNSName(name)


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _ensure_authority(directory: Path, now: datetime.datetime) -> _Authority:
    certificate_path, key_path = directory / "ca.crt", directory / "ca.key"
    if certificate_path.exists() and key_path.exists():
        authority = _Authority(_read_certificate(certificate_path), _read_key(key_path))
        if authority.key.public_key() != authority.certificate.public_key():
            raise ValueError(f"{key_path} is not the key of {certificate_path}; restore the right one or delete both")
        if authority.certificate.not_valid_after_utc - now > datetime.timedelta(days=RENEW_BEFORE_DAYS):
            return authority
    key = ec.generate_private_key(ec.SECP256R1())
    # A name that is never used twice: a client that trusts two authorities tells them apart by it.
    serial = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Lathe private authority {serial % 0x1_0000_0000:08x}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), _CERTIFICATE_MODE)
    return _Authority(certificate, key)


def _is_good(
    files: CertificateFiles, authority: _Authority, wanted: list[x509.GeneralName], now: datetime.datetime
) -> bool:
    try:
        certificate, key = _read_certificate(files.certificate), _read_key(files.key)
        certificate.verify_directly_issued_by(authority.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (FileNotFoundError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    left = certificate.not_valid_after_utc - now
    # One from the future was made by a clock that has been put right since.
    begun = certificate.not_valid_before_utc <= now
    return (
        begun
        and left > datetime.timedelta(days=RENEW_BEFORE_DAYS)
        and set(names) == set(wanted)
        and key.public_key() == certificate.public_key()
    )


def _issue(
    files: CertificateFiles, authority: _Authority, wanted: list[x509.GeneralName], now: datetime.datetime
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + datetime.timedelta(days=CERTIFICATE_DAYS), authority.certificate.not_valid_after_utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lathe")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    # A crash between the two leaves a pair that does not match, which the next call replaces.
    _write_key(files.key, key)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), _CERTIFICATE_MODE)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not a certificate in PEM form") from None


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise ValueError(f"{path} is not a private key in PEM form") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is not a key of ours: not of an elliptic curve")
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(path, pem, _KEY_MODE)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Put a file in place whole, on disk, and never readable by more people than its mode says."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)  # the umask may have taken something away that clients need
        file.write(content)
        file.flush()
        os.fsync(fd)
    new.replace(path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
