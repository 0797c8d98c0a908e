import io
import json

import pytest
import rich.console

from benchmarks import harness, report
from benchmarks.harness import Report, Row, Times

ROWS = [
    Row("train.fast", 2.0, 3.0, "s", "half as long again"),
    Row("train.slow", 50.0, 100.0, "tokens/s", "half the rate"),
]


@pytest.fixture
def measured() -> Report:
    return Report("Some CPU, 2 cores", {"torch": "2.11.0"}, "2025-01-02T03:04:05+00:00", ROWS)


def test_ratio_is_above_one_when_ours_is_better_in_either_direction_of_the_unit() -> None:
    assert [row.ratio for row in ROWS] == [1.5, 0.5]
    assert Row("memory", 8.0, 4.0, "MB", "").ratio == 0.5


@pytest.mark.parametrize("ours, unit", [(1.0, "furlongs"), (0.0, "s"), (float("nan"), "s")])
def test_a_row_that_nobody_could_read_is_refused(ours, unit) -> None:
    with pytest.raises(ValueError, match="bad"):
        Row("bad", ours, 1.0, unit, "")


def test_compare_takes_turns_clears_up_after_each_call_and_leaves_the_first_round_out() -> None:
    calls: list[str] = []
    times = harness.compare(
        lambda: calls.append("ours"), lambda: calls.append("theirs"), 3, lambda: calls.append("between")
    )
    assert calls == ["ours", "between", "theirs", "between"] * 4
    assert len(times.ours) == len(times.baseline) == 3


def test_compare_times_each_side_without_what_is_between(monkeypatch) -> None:
    clock = [0.0]

    def takes(seconds: float):
        def call() -> None:
            clock[0] += seconds

        return call

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    times = harness.compare(takes(1), takes(4), 2, takes(100))
    assert times == Times([1, 1], [4, 4])


def test_times_become_a_row_of_medians_that_tells_the_spread() -> None:
    row = Times([1, 2, 9], [4, 4, 9]).row("train.x", "what it is")
    assert (row.ours, row.baseline, row.unit, row.ratio) == (2, 4, "s", 2)
    assert row.note == "what it is; medians of 3, ratios 1.00 to 4.00"


def test_json_has_the_fields_that_every_benchmark_has_and_reads_back(measured, tmp_path) -> None:
    file = tmp_path / "new" / "cpu.json"
    measured.write(file)
    assert json.loads(file.read_text()) == {
        "machine": "Some CPU, 2 cores",
        "versions": {"torch": "2.11.0"},
        "date": "2025-01-02T03:04:05+00:00",
        "rows": [
            {
                "name": "train.fast",
                "ours": 2.0,
                "baseline": 3.0,
                "unit": "s",
                "ratio": 1.5,
                "note": "half as long again",
            },
            {
                "name": "train.slow",
                "ours": 50.0,
                "baseline": 100.0,
                "unit": "tokens/s",
                "ratio": 0.5,
                "note": "half the rate",
            },
        ],
    }
    assert Report.read(file) == measured


def test_machine_names_become_file_names() -> None:
    assert harness.slug("AMD EPYC 7763 64-Core Processor") == "amd-epyc-7763-64-core-processor"
    assert harness.slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"
    assert harness.processor() in harness.machine()


def test_tables_and_plot_show_every_row(measured, tmp_path) -> None:
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(measured))
    lines = console.export_text().splitlines()
    assert [line.split() for line in lines if "train." in line] == [
        ["train.fast", "2", "3", "s", "1.50"],
        ["train.slow", "50", "100", "tokens/s", "0.50"],
    ]
    assert "| `train.slow` | 50 | 100 | tokens/s | 0.50 | half the rate |" in report.markdown(measured).splitlines()
    file = tmp_path / "new" / "cpu.png"
    report.draw(measured, file)
    assert file.read_bytes().startswith(b"\x89PNG")
