from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from lathe_shared.config_loading import (
    ConfigurationError,
    NestedSettings,
    Port,
    ServiceSettings,
    endpoint_validator,
    load_settings,
    read_settings,
)
from lathe_shared.config_reference import describe_settings, help_text, reference_section
from lathe_shared.endpoint import Endpoint, parse_endpoint


class CommandValue(NestedSettings):
    command: str = Field(description="what to run")


class WorkerSettings(ServiceSettings):
    """Run actions."""

    service: ClassVar[str] = "worker"

    http_port: Port = Field(default=50083, description="HTTP port")
    slots: int = Field(default=4, gt=0, description="actions at once")
    data_dir: Path = Field(default=Path("~/.cache/lathe/worker"), description="where files are kept")
    cache_dirs: list[Path] = Field(default=[], description="more places")
    sandbox: Literal["bubblewrap", "none"] = Field(default="bubblewrap", description="how actions are contained")
    properties: dict[str, str | CommandValue] = Field(default={}, description="what the worker offers")
    names: list[str] = Field(default=[], description="names")
    network: bool = Field(default=False, description="whether actions have a network")
    limit_bytes: int | None = Field(default=None, description="a limit")
    pair: int = Field(default=1, description="goes with slots")
    cas_endpoint: Annotated[str, endpoint_validator(50051)] = Field(default="127.0.0.1:50051", description="the CAS")

    @model_validator(mode="after")
    def _check_together(self) -> WorkerSettings:
        if self.pair > self.slots:
            raise ValueError(f"pair ({self.pair}) must not be more than slots ({self.slots})")
        return self


def problems(*arguments: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read_settings(WorkerSettings, arguments, environ)
    return list(caught.value.problems)


def write(folder: Path, text: str) -> str:
    path = folder / "worker.toml"
    path.write_text(text)
    return f"--config={path}"


def test_flags_count_before_variables_before_the_file_before_defaults(tmp_path: Path) -> None:
    config = write(tmp_path, 'slots = 1\nlog_level = "warning"\nsandbox = "none"\n')

    settings = read_settings(
        WorkerSettings, [config, "--slots=3"], {"LATHE_WORKER_SLOTS": "2", "LATHE_WORKER_LOG_LEVEL": "error"}
    )

    assert (settings.slots, settings.log_level, settings.sandbox, settings.http_port) == (3, "error", "none", 50083)


def test_every_setting_is_a_flag_and_a_variable() -> None:
    flags = [
        "--slots", "7", "--data-dir=/d", "--cache-dirs=/a,~/b", "--names", '["x,y", "z"]', "--network",
        '--properties={"os": "linux", "cpu_count": {"command": "nproc"}}', "--limit-bytes=10", "--drain-seconds=0.5",
    ]  # fmt: skip
    variables = {
        "LATHE_WORKER_SLOTS": "7",
        "LATHE_WORKER_DATA_DIR": "/d",
        "LATHE_WORKER_CACHE_DIRS": "/a,~/b",
        "LATHE_WORKER_NAMES": '["x,y", "z"]',
        "LATHE_WORKER_NETWORK": "true",
        "LATHE_WORKER_PROPERTIES": '{"os": "linux", "cpu_count": {"command": "nproc"}}',
        "LATHE_WORKER_LIMIT_BYTES": "10",
        "LATHE_WORKER_DRAIN_SECONDS": "0.5",
    }

    by_flags = read_settings(WorkerSettings, flags)

    assert by_flags == read_settings(WorkerSettings, [], variables)
    assert by_flags.cache_dirs == [Path("/a"), Path("~/b").expanduser()]
    assert by_flags.names == ["x,y", "z"]
    assert by_flags.properties == {"os": "linux", "cpu_count": CommandValue(command="nproc")}
    assert (by_flags.slots, by_flags.network, by_flags.limit_bytes, by_flags.drain_seconds) == (7, True, 10, 0.5)


def test_tables_nest_in_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, '[properties]\nos = "linux"\ncpu_count = { command = "nproc" }\n')

    settings = read_settings(WorkerSettings, [config])

    assert settings.properties == {"os": "linux", "cpu_count": CommandValue(command="nproc")}


def test_a_home_directory_is_expanded_in_defaults_too() -> None:
    assert read_settings(WorkerSettings).data_dir == Path.home() / ".cache/lathe/worker"


def test_a_flag_can_be_negated() -> None:
    assert not read_settings(WorkerSettings, ["--no-network"], {"LATHE_WORKER_NETWORK": "1"}).network
    assert not read_settings(WorkerSettings, ["--network=false"]).network


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        (["--slotz=3"], {}, "--slotz: unknown flag; did you mean --slots?"),
        (["--slotz", "3"], {}, "--slotz: unknown flag; did you mean --slots?"),
        (["extra"], {}, "extra: unexpected argument; settings are given as --name=value"),
        (["--slots"], {}, "--slots: needs a value, as in --slots=…"),
        (["--slots", "--network"], {}, "--slots: needs a value, as in --slots=…"),
        ([], {"LATHE_WORKER_SLOTZ": "3"}, "LATHE_WORKER_SLOTZ: unknown variable; did you mean LATHE_WORKER_SLOTS?"),
        (
            ["--slots=many"],
            {},
            "slots: 'many' by flag --slots is not accepted: input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        (
            [],
            {"LATHE_WORKER_SLOTS": "0"},
            "slots: '0' in variable LATHE_WORKER_SLOTS is not accepted: input should be greater than 0",
        ),
        (
            ["--sandbox=docker"],
            {},
            "sandbox: 'docker' by flag --sandbox is not accepted: input should be 'bubblewrap' or 'none'",
        ),
        (
            ["--cas-endpoint=a:x"],
            {},
            "cas_endpoint: 'a:x' by flag --cas-endpoint is not accepted: 'a:x' is not an address: "
            "the port must be a number from 1 to 65535",
        ),
    ],
)
def test_what_is_wrong_is_named_in_one_line(arguments: list[str], environ: dict[str, str], expected: str) -> None:
    assert problems(*arguments, **environ) == [expected]


def test_settings_that_do_not_fit_together_are_one_line() -> None:
    assert problems("--pair=5") == ["pair (5) must not be more than slots (4)"]


def test_unknown_keys_in_the_file_are_refused_at_any_depth(tmp_path: Path) -> None:
    config = write(tmp_path, 'slotz = 3\n[properties]\nos = { comand = "uname" }\n')

    found = problems(config)

    assert found[0] == f"slotz: unknown key in {tmp_path}/worker.toml; did you mean slots?"
    assert any("comand: unknown key" in line and "did you mean command?" in line for line in found)


def test_everything_that_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    config = write(tmp_path, "slots = -1\n")

    found = problems(config, "--bogus=1", "--drain-seconds=-1", LATHE_WORKER_NOTHING="1")

    assert len(found) == 4


def test_a_file_that_is_absent_or_no_toml_is_one_line(tmp_path: Path) -> None:
    assert problems(f"--config={tmp_path}/absent") == [
        f"--config: {tmp_path}/absent cannot be read: No such file or directory"
    ]
    assert problems(write(tmp_path, "slots = "))[0].startswith(f"--config: {tmp_path}/worker.toml is not TOML: ")
    (tmp_path / "worker.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in problems(f"--config={tmp_path}/worker.toml")[0]


def test_the_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    write(tmp_path, "slots = 9\n")

    assert read_settings(WorkerSettings, [], {"LATHE_WORKER_CONFIG": f"{tmp_path}/worker.toml"}).slots == 9


def test_variables_of_make_run_and_of_other_services_are_not_ours() -> None:
    environ = {
        "LATHE_WORKER_API_PORT": "50061",
        "LATHE_WORKERS": "2",
        "LATHE_CAS_NONSENSE": "1",
        "LATHE_DATA_DIR": "/x",
        "PATH": "/bin",
    }

    assert read_settings(WorkerSettings, [], environ) == read_settings(WorkerSettings)


def test_cas_endpoint_is_understood_without_prefix() -> None:
    assert read_settings(WorkerSettings, [], {"CAS_ENDPOINT": "cas"}).cas_endpoint == "cas:50051"
    both = {"CAS_ENDPOINT": "cas", "LATHE_WORKER_CAS_ENDPOINT": "other:1"}
    assert read_settings(WorkerSettings, [], both).cas_endpoint == "other:1"


def test_constructing_settings_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_WORKER_SLOTS", "99")
    monkeypatch.setenv("SLOTS", "98")

    assert WorkerSettings().slots == 4
    assert WorkerSettings(slots=5).slots == 5


def test_load_settings_writes_problems_and_ends_with_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LATHE_WORKER_API_PORT", raising=False)
    with pytest.raises(SystemExit) as caught:
        load_settings(WorkerSettings, ["--slotz=1"])

    assert caught.value.code == 2
    assert capsys.readouterr().err == "lathe-worker: --slotz: unknown flag; did you mean --slots?\n"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--check-config", "configuration ok\n"),
        ("--version", "lathe-worker 0.1.0\n"),
        ("--help", "usage: lathe-worker"),
    ],
)
def test_some_flags_only_print(flag: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(WorkerSettings, [flag])

    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(expected)


def test_check_config_checks() -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(WorkerSettings, ["--check-config", "--slots=none"])

    assert caught.value.code == 2


def test_help_and_reference_name_every_setting_with_its_default() -> None:
    described = describe_settings(WorkerSettings)
    text = help_text(WorkerSettings)
    reference = reference_section(WorkerSettings)

    assert {setting.name for setting in described} == set(WorkerSettings.model_fields)
    for setting in described:
        assert setting.text
        assert f"{setting.flag} ({setting.accepts})" in text
        assert f"default: {setting.default}; variable: {setting.variable}" in text
        assert f"| `{setting.name}` |" in reference
    by_name = {setting.name: setting for setting in described}
    assert by_name["slots"].accepts == "number, more than 0"
    assert by_name["data_dir"].default == '"~/.cache/lathe/worker"'
    assert by_name["sandbox"].accepts == '"bubblewrap" or "none"'
    assert by_name["limit_bytes"].default == "unset"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cas", Endpoint("cas", 50051)),
        ("cas:1", Endpoint("cas", 1)),
        ("10.0.0.1:65535", Endpoint("10.0.0.1", 65535)),
        ("grpc://cas:1", Endpoint("cas", 1)),
        ("[::1]:7", Endpoint("::1", 7)),
        ("[::1]", Endpoint("::1", 50051)),
        ("::1", Endpoint("::1", 50051)),
    ],
)
def test_endpoints_are_hosts_with_or_without_port(text: str, expected: Endpoint) -> None:
    assert parse_endpoint(text, 50051) == expected
    assert parse_endpoint(str(expected), 50051) == expected


@pytest.mark.parametrize(
    "text", ["", ":1", "host:", "host:0", "host:65536", "host:x", "a:b:", "a b", "[::1", "[::1]x", "http://a/b"]
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        parse_endpoint(text, 50051)
