"""What is made of runs: rates, ratios, the table, the JSON."""

import json

import pytest
from tools.bench.machine import cpu_model, machine_facts
from tools.bench.measuring import RowResult, Run
from tools.bench.processes import CpuTime, cpu_time
from tools.bench.report import as_json, table
from tools.bench.rows import Row, all_rows


@pytest.fixture
def row() -> Row:
    return next(row for row in all_rows() if row.name == "inline unary echo" and row.load.in_flight == 8)


@pytest.fixture
def result(row: Row) -> RowResult:
    lathe = [Run(rate, 1000, CpuTime(0.006, 0.004)) for rate in (90_000.0, 100_000.0, 60_000.0)]
    grpclib = [Run(rate, 100, CpuTime(0.018, 0.002)) for rate in (5_000.0, 4_000.0, 4_000.0)]
    return RowResult(row, {"lathe": lathe, "grpclib": grpclib})


def test_best_and_median(result: RowResult) -> None:
    assert result.best("lathe") == 100_000
    assert result.median("lathe") == 90_000


def test_ratio_is_that_of_the_median_turn(result: RowResult) -> None:
    # 18, 25 and 15: a turn that both engines spent on a busy machine counts like any other.
    assert result.ratio("lathe", "grpclib") == pytest.approx(18)


def test_server_time_of_a_call(result: RowResult) -> None:
    assert result.server_us_per_call("lathe") == pytest.approx(10)
    assert result.server_us_per_call("grpclib") == pytest.approx(200)
    assert result.kernel_share("lathe") == pytest.approx(0.4)


def test_kernel_share_of_no_time_is_unknown(row: Row) -> None:
    result = RowResult(row, {"lathe": [Run(1.0, 1, CpuTime(0.0, 0.0))], "target": [Run(1.0, 1, None)]})

    assert result.kernel_share("lathe") is None
    assert result.server_us_per_call("target") is None


def test_table_of_two_engines(result: RowResult) -> None:
    head, _, line = table([result], ["lathe", "grpclib"]).splitlines()

    assert head.split() == [
        *("call", "in", "flight", "client", "unit"),
        *("lathe", "best", "median", "µs/call", "kernel"),
        *("grpclib", "best", "median", "µs/call", "kernel"),
        "ratio",
    ]
    assert line.split() == [
        *("inline", "unary", "echo", "8", "h2load", "rpc/s"),
        *("100,000", "90,000", "10.0", "40%"),
        *("5,000", "4,000", "200", "10%"),
        "18.0",
    ]


def test_table_of_a_server_by_address(row: Row) -> None:
    head, _, line = table([RowResult(row, {"target": [Run(42.0, 10, None)]})], ["target"]).splitlines()

    assert not head.endswith("ratio")
    assert line.split()[-4:] == ["42.0", "42.0", "-", "-"]


def test_json_has_machine_settings_and_every_run(result: RowResult) -> None:
    document = json.loads(json.dumps(as_json([result], {"cpu": "any"}, {"turns": 3})))

    (row,) = document.pop("rows")
    assert document == {"machine": {"cpu": "any"}, "settings": {"turns": 3}}
    engines = row.pop("engines")
    assert row == {
        "call": "inline unary echo",
        "client": "h2load",
        "connections": 1,
        "in_flight": 8,
        "unit": "rpc/s",
        "ratio": 18.0,
    }
    assert engines["lathe"]["best"] == 100_000
    assert engines["grpclib"]["kernel_share"] == 0.1
    assert engines["grpclib"]["runs"][0] == {
        "rate": 5000.0,
        "calls": 100,
        "cpu": {"user_seconds": 0.018, "kernel_seconds": 0.002},
    }


def test_machine_facts_are_ready_for_json() -> None:
    facts = json.loads(json.dumps(machine_facts()))

    assert {"cpu", "cores", "kernel", "python", "load_average_before", "versions"} <= set(facts)
    assert len(facts["load_average_before"]) == 3


def test_cpu_model() -> None:
    assert cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n") == "AMD EPYC"


def test_cpu_time_of_a_program_with_an_odd_name() -> None:
    fields = ["S", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "250", "150", "13", "14", "20", "0"]

    taken = cpu_time("123 (a) b (c) " + " ".join(fields))

    # In ticks, of which Linux has 100 a second.
    assert taken == CpuTime(2.5, 1.5)
    assert taken.since(CpuTime(0.5, 0.5)).total_seconds == 3.0


def test_rows_have_names_of_their_own() -> None:
    rows = [(row.name, row.client, row.load) for row in all_rows()]

    assert len(set(rows)) == len(rows)
