"""TLS for Debian's Bazel.

Bazel's own builds carry BoringSSL. Debian's carries nothing: its Netty looks for OpenSSL under a name that Debian's
package of it does not use, and falls back to Java's TLS, from which Debian took ALPN, which gRPC needs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGED_NAME = "libnetty-tcnative.so"
EXPECTED_NAME = "libnetty_tcnative.so"
BAZEL_LIBRARIES = "/usr/share/bazel"


def tls_startup_flags(folder: Path) -> tuple[str, ...]:
    """Give the startup flags with which Debian's Bazel can use ``grpcs://``.

    Args:
        folder: Where the library is copied under the expected name, for as long as Bazel runs. A symlink would not do:
            the library looks at what it is really called.

    Raises:
        AssertionError: The package libnetty-tcnative-jni is not installed.
    """
    found = sorted(Path("/usr/lib").glob(f"*/jni/{PACKAGED_NAME}"))
    assert found, "the package libnetty-tcnative-jni is not installed; `make test-compose` as root installs it"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(found[0], folder / EXPECTED_NAME)
    return (f"--host_jvm_args=-Djava.library.path={BAZEL_LIBRARIES}:{folder}",)
