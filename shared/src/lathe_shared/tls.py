"""What a TLS port shows to clients: the operator's certificate, or one of a private authority, always the current one.

A certificate that is replaced, by the operator or because its end is near, is shown to the next client that connects;
connections that stand go on.

Spec: RFC 9113 section 9.2 (TLS under HTTP/2), RFC 7301 (ALPN).
"""

from __future__ import annotations

import abc
import os
import ssl
from typing import TYPE_CHECKING, Any

import structlog
from cryptography import x509
from typing_extensions import override

from lathe_shared.tls_authority import CertificateFiles, ensure_certificate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lathe_shared.clock import Clock

CHECK_SECONDS = 3600.0
"""How often the files are looked at: an hour is nothing beside a certificate's life."""

# RFC 9113 section 9.2.2 and its appendix A: of TLS 1.2's suites only ephemeral key exchange with AEAD may be used.
_TLS_1_2_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

_log = structlog.get_logger("lathe.tls")


class TlsError(Exception):
    """There is no usable certificate; the message says why, and which file it is about."""


class CertificateSource(abc.ABC):
    """Where a server's certificate comes from."""

    @abc.abstractmethod
    def current(self) -> CertificateFiles:
        """Return the files to use from now on; make or renew them first if that is this source's task.

        Raises:
            OSError: The files cannot be read or written.
            ValueError: They are damaged, or what they are to be made from is.
        """


class OperatorFiles(CertificateSource):
    """Files that somebody else keeps current.

    Args:
        certificate: PEM; intermediate certificates, if any, behind the server's own.
        key: PEM, without a password.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = CertificateFiles(certificate, key)

    @override
    def current(self) -> CertificateFiles:
        return self._files


class PrivateAuthority(CertificateSource):
    """An authority of our own in a directory.

    Args:
        directory: Where it is, or will be made.
        names: DNS names and IP addresses for the certificate.
        clock: Says when a certificate's end is near.
    """

    def __init__(self, directory: Path, names: Sequence[str], clock: Clock) -> None:
        self._directory = directory
        self._names = names
        self._clock = clock

    @override
    def current(self) -> CertificateFiles:
        return ensure_certificate(self._directory, self._names, self._clock.now())


class ServerTls:
    """The context of a TLS port, kept current.

    Args:
        source: Where the certificate comes from.
        clock: For the pauses between two looks.

    Attributes:
        context: For the port.

    Raises:
        TlsError: There is no usable certificate.
    """

    def __init__(self, source: CertificateSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._loaded: tuple[object, ...] = ()
        self.context = _new_context()
        self.refresh()

    def refresh(self) -> None:
        """Show the source's current certificate to clients that connect from now on.

        Raises:
            TlsError: It cannot be used; clients are shown the former one.
        """
        try:
            self._refresh()
        except ssl.SSLError as error:
            raise TlsError(f"the certificate or its key cannot be used: {_reason(error)}") from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TlsError(f"{error.filename or 'the certificate or its key'} cannot be used: {reason}") from None
        except ValueError as error:
            raise TlsError(str(error)) from None

    def _refresh(self) -> None:
        files = self._source.current()
        version = tuple(_version(path) for path in (files.certificate, files.key))
        if version == self._loaded:
            return
        certificate = _read_certificate(files.certificate)
        # Tried apart: a certificate without its key, as in the middle of a replacement, would spoil a context in use.
        for context in (_new_context(), self.context):
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        self._files = files
        self._certificate = certificate
        self._loaded = version
        _log.info("certificate_loaded", **self.describe())

    async def keep_current(self) -> None:
        """Look at the source from time to time, for ever; run it in the background."""
        while True:
            await self._clock.sleep(CHECK_SECONDS)
            try:
                self.refresh()
            except TlsError as error:
                _log.error("certificate_not_replaced", problem=str(error), effect="clients are shown the former one")

    def describe(self) -> dict[str, Any]:
        """Say what clients are shown: for logs and ``/status``."""
        shown: dict[str, Any] = {
            "certificate": str(self._files.certificate),
            "names": self._names,
            "expires": self._certificate.not_valid_after_utc.isoformat(),
        }
        if self._files.authority is not None:
            shown["authority"] = str(self._files.authority)
        return shown

    @property
    def _names(self) -> list[str]:
        try:
            names = self._certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return []
        return [str(name.value) for name in names]


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    return context


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not a certificate in PEM form") from None


def _reason(error: ssl.SSLError) -> str:
    """Turn OpenSSL's KEY_VALUES_MISMATCH and the like into words."""
    return (error.reason or str(error)).lower().replace("_", " ")


def _no_password() -> str:
    """Answer OpenSSL's question for a password, which it would otherwise put to the terminal."""
    raise ValueError("the private key has a password; store it without one, readable by the service only")


def _version(path: Path) -> tuple[object, ...]:
    """Tell one content of a file from the next, also where a symlink is turned to another file."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
