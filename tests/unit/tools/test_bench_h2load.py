"""What h2load says, as it says it."""

import pytest
from tools.bench.errors import BenchError
from tools.bench.h2load import Summary, parse

OUTPUT = """\
starting benchmark...
spawning thread #0: 4 total client(s). 200000 total requests
Application protocol: h2c
progress: 50% done
progress: 100% done

finished in {finished}, 91574.36 req/s, 3.93MB/s
requests: 200000 total, 200000 started, 200000 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: {succeeded} 2xx, 0 3xx, {failed} 4xx, 0 5xx
traffic: 8.58MB (9000244) total, 1.91MB (2000000) headers (space savings 95.83%), 1.72MB (1800000) data
                     min         max         mean         sd        +/- sd
time for request:       94us      6.59ms       685us       142us    89.35%
"""


def output(finished: str = "2.18s", succeeded: int = 200000, failed: int = 0) -> str:
    return OUTPUT.format(finished=finished, succeeded=succeeded, failed=failed)


@pytest.mark.parametrize(
    ("finished", "seconds"),
    [("2.18s", 2.18), ("743.27ms", 0.74327), ("980us", 0.00098), ("1.05m", 63.0), ("1.5h", 5400.0)],
)
def test_time_is_read_in_any_unit(finished: str, seconds: float) -> None:
    assert parse(output(finished)).seconds == pytest.approx(seconds)


def test_counts_are_read() -> None:
    summary = parse(output(succeeded=199_990, failed=10))

    assert summary == Summary(seconds=2.18, done=200_000, succeeded=199_990, data_bytes=1_800_000)


def test_anything_else_is_told_as_it_is() -> None:
    with pytest.raises(BenchError, match="could not resolve host"):
        parse("could not resolve host nowhere")
