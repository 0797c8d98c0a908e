import textwrap
from pathlib import Path

import psutil
import pytest

from benchmarks import isolated
from benchmarks.harness import Row
from benchmarks.isolated import Plan

ROWS = """
    import functools, os, subprocess, sys, time
    from benchmarks.harness import Row

    def row(quick, name):
        return Row(name, os.getpid(), 1.0, "s", "quick" if quick else "")

    def fails(quick):
        raise ValueError("no such luck")

    def dies(quick):
        os._exit(3)

    def hangs(quick):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(os.path.join(os.path.dirname(__file__), "child"), "w") as file:
            file.write(str(child.pid))
        time.sleep(600)

    ROWS = {name: functools.partial(row, name=name) for name in ("first", "second", "third", "fourth")}
    ROWS |= {"fails": fails, "dies": dies, "hangs": hangs}
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "some_rows.py").write_text(textwrap.dedent(ROWS))
    monkeypatch.syspath_prepend(tmp_path)

    def measured(plans: list[tuple[str, str]], limit_seconds: float = 60.0) -> list[Row | str]:
        table = {name: Plan("some_rows", process, limit_seconds) for name, process in plans}
        return list(isolated.measured(table, quick=True, start_seconds=0))

    return measured


def test_rows_of_one_process_share_it_and_one_that_fails_loses_itself(rows) -> None:
    first, failed, second, third = rows([("first", "a"), ("fails", "a"), ("second", "a"), ("third", "b")])
    assert [row.name for row in (first, second, third)] == ["first", "second", "third"]
    assert failed == "fails: ValueError: no such luck"
    assert first.ours == second.ours != third.ours
    assert first.note == "quick"


def test_a_process_that_dies_loses_the_row_that_it_was_at(rows) -> None:
    first, died, second = rows([("first", "a"), ("dies", "a"), ("second", "a")])
    assert died == "dies: its process ended with status 3"
    assert (first.name, second.name) == ("first", "second")
    assert first.ours != second.ours


@pytest.mark.slow
def test_a_row_that_takes_too_long_ends_with_all_that_it_started(rows, tmp_path) -> None:
    hung, second = rows([("hangs", "a"), ("second", "a")], limit_seconds=5.0)
    assert hung == "hangs: not there after 5 s"
    assert second.name == "second"
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
