"""The TLS port beside the plain one: which certificate it shows."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from lathe_shared.clock import SystemClock
from lathe_shared.lifecycle import StartError
from lathe_shared.tls import CertificateSource, OperatorFiles, PrivateAuthority, ServerTls, TlsError

if TYPE_CHECKING:
    from lathe_cas.config import CasSettings

ALWAYS = ("localhost", "127.0.0.1", "::1")
"""How clients on the same machine reach the port, whatever that machine is called."""


def open_tls(settings: CasSettings) -> ServerTls:
    """Load the operator's certificate, or make or renew that of the private authority.

    Raises:
        StartError: There is no usable certificate.
    """
    try:
        return ServerTls(_source(settings), SystemClock())
    except TlsError as error:
        raise StartError(f"tls: {error}") from None


def certificate_names(settings: CasSettings) -> list[str]:
    """List the names for the private authority's certificate, each once.

    Raises:
        OSError: ``tls_names_file`` cannot be read.
    """
    names = [*ALWAYS, socket.gethostname(), *settings.tls_names]
    if settings.tls_names_file is not None:
        names += settings.tls_names_file.read_text().split()
    return list(dict.fromkeys(names))


def _source(settings: CasSettings) -> CertificateSource:
    if settings.tls_certificate is not None and settings.tls_key is not None:
        return OperatorFiles(settings.tls_certificate, settings.tls_key)
    directory = settings.tls_dir or settings.all_data_dirs[0] / "tls"
    try:
        names = certificate_names(settings)
    except OSError as error:
        raise TlsError(f"tls_names_file {settings.tls_names_file} cannot be read: {error.strerror}") from None
    return PrivateAuthority(directory, names, SystemClock())
