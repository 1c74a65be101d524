"""The private authority: what it makes, when it renews, what it leaves alone."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from lathe_shared.tls_authority import (
    AUTHORITY_DAYS,
    CERTIFICATE_DAYS,
    RENEW_BEFORE_DAYS,
    CertificateFiles,
    ensure_certificate,
)

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
NAMES = ("localhost", "build.example.org", "lathe_cas", "127.0.0.1", "::1")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "above" / "tls"


def days(count: float) -> datetime.timedelta:
    return datetime.timedelta(days=count)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def contents(files: CertificateFiles) -> tuple[bytes, bytes, bytes]:
    assert files.authority is not None
    return files.certificate.read_bytes(), files.key.read_bytes(), files.authority.read_bytes()


def test_a_certificate_is_for_all_names_and_an_independent_program_accepts_it(directory: Path) -> None:
    files = ensure_certificate(directory, NAMES, NOW)
    names = load(files.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "build.example.org", "lathe_cas"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.IPv4Address("127.0.0.1"),
        ipaddress.IPv6Address("::1"),
    ]
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(files.authority)]
    command += ["-attime", str(int(NOW.timestamp())), str(files.certificate)]
    for name in (["-verify_hostname", "build.example.org"], ["-verify_ip", "::1"]):
        said = subprocess.run([*command[:-1], *name, command[-1]], capture_output=True, text=True)
        assert said.returncode == 0, said.stdout + said.stderr
    other = subprocess.run([*command[:-1], "-verify_hostname", "example.org", command[-1]], capture_output=True)
    assert other.returncode != 0


def test_keys_are_for_nobody_else_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        files = ensure_certificate(directory, NAMES, NOW)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    assert files == CertificateFiles(directory / "server.crt", directory / "server.key", directory / "ca.crt")


def test_what_is_good_is_left_alone(directory: Path) -> None:
    before = contents(ensure_certificate(directory, NAMES, NOW))
    later = NOW + days(CERTIFICATE_DAYS - RENEW_BEFORE_DAYS - 1)
    assert contents(ensure_certificate(directory, reversed(NAMES), later)) == before


def test_a_certificate_near_its_end_is_renewed_under_the_same_authority(directory: Path) -> None:
    certificate, key, authority = contents(ensure_certificate(directory, NAMES, NOW))
    later = NOW + days(CERTIFICATE_DAYS - RENEW_BEFORE_DAYS + 1)
    renewed = ensure_certificate(directory, NAMES, later)
    new_certificate, new_key, same_authority = contents(renewed)
    assert same_authority == authority
    assert certificate != new_certificate
    assert key != new_key
    assert load(renewed.certificate).not_valid_after_utc == later + days(CERTIFICATE_DAYS)


def test_other_names_make_another_certificate(directory: Path) -> None:
    before = contents(ensure_certificate(directory, NAMES, NOW))
    after = contents(ensure_certificate(directory, (*NAMES, "new.example.org"), NOW))
    assert after[0] != before[0]
    assert after[2] == before[2]


def test_a_certificate_from_the_future_is_replaced(directory: Path) -> None:
    ensure_certificate(directory, NAMES, NOW + days(10))
    files = ensure_certificate(directory, NAMES, NOW)
    assert load(files.certificate).not_valid_before_utc <= NOW


@pytest.mark.parametrize("damage", ["absent", "empty", "another"])
@pytest.mark.parametrize("name", ["server.crt", "server.key"])
def test_a_pair_that_does_not_fit_is_replaced(directory: Path, tmp_path: Path, name: str, damage: str) -> None:
    files = ensure_certificate(directory, NAMES, NOW)
    authority = contents(files)[2]
    if damage == "absent":
        (directory / name).unlink()
    elif damage == "empty":
        (directory / name).write_bytes(b"")
    else:
        other = ensure_certificate(tmp_path / "other", NAMES, NOW)
        shutil.copy(other.certificate.parent / name, directory / name)
    ensure_certificate(directory, NAMES, NOW)
    load(files.certificate).verify_directly_issued_by(load(directory / "ca.crt"))
    assert contents(files)[2] == authority
    before = contents(files)
    assert contents(ensure_certificate(directory, NAMES, NOW)) == before, "it fits now"


def test_an_authority_near_its_end_is_made_anew_and_signs_until_its_own_end_before(directory: Path) -> None:
    files = ensure_certificate(directory, NAMES, NOW)
    authority = contents(files)[2]
    end = load(directory / "ca.crt").not_valid_after_utc
    assert end == NOW + days(AUTHORITY_DAYS)

    ensure_certificate(directory, NAMES, end - days(RENEW_BEFORE_DAYS + 1))
    assert contents(files)[2] == authority
    assert load(files.certificate).not_valid_after_utc == end

    ensure_certificate(directory, NAMES, end - days(RENEW_BEFORE_DAYS - 1))
    assert contents(files)[2] != authority
    load(files.certificate).verify_directly_issued_by(load(directory / "ca.crt"))


@pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
def test_a_damaged_authority_is_never_replaced_in_silence(directory: Path, name: str) -> None:
    ensure_certificate(directory, NAMES, NOW)
    (directory / name).write_text("damaged")
    with pytest.raises(ValueError, match=name):
        ensure_certificate(directory, NAMES, NOW)
    assert (directory / name).read_text() == "damaged"


def test_a_key_of_another_authority_is_told(directory: Path, tmp_path: Path) -> None:
    ensure_certificate(directory, NAMES, NOW)
    ensure_certificate(tmp_path / "other", NAMES, NOW)
    shutil.copy(tmp_path / "other/ca.key", directory / "ca.key")
    with pytest.raises(ValueError, match=r"is not the key of .*ca\.crt"):
        ensure_certificate(directory, NAMES, NOW)


@pytest.mark.parametrize("name", ["", "a b", "host:50071", "grpcs://host", "a..b", "bücher.example"])
def test_what_is_no_name_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(ValueError, match="neither a host name nor an IP address"):
        ensure_certificate(directory, [name], NOW)
    assert not directory.exists()
