"""A toy engine on two ranks: one order of commands, and no failure that outlives its stated time."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from processes import TWO_RANKS, rank_environment
from rank_programs import toy

from trainer_service.ranks import Exit, Process

pytestmark = [pytest.mark.engine, pytest.mark.cpu_only]

# What a rank needs to notice that another is gone, plus what a busy machine adds.
AT_ONCE = 5.0


def _rank(scenario: str, folder: Path, rank: int, port: int) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    with (folder / f"log-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    toy.main(scenario, folder)


class Ranks:
    """Two ranks, forked from a process that has imported torch: importing it takes most of a test's time."""

    def __init__(self, scenario: str, folder: Path):
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "structlog"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=[scenario, folder, rank, port]) for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, name: str, seconds: float = 60.0) -> None:
        """Until a file of this name is in the folder."""
        wait_for(self.folder / name, seconds)

    def statuses(self, seconds: float) -> list[int | None]:
        """Of both ranks, which must end within `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(deadline - time.monotonic())
        return [process.exitcode for process in self.processes]

    def events(self, rank: int) -> list[dict]:
        """What the rank logged."""
        lines = (self.folder / f"log-{rank}").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def kill(self) -> None:
        """Leaves nothing behind."""
        for process in self.processes:
            process.kill()
            process.join()


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} after {seconds} s"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    started: list[Ranks] = []

    def begin(scenario: str, ready: str = "began") -> Ranks:
        ranks = Ranks(scenario, tmp_path)
        started.append(ranks)
        ranks.wait_for(ready)
        return ranks

    yield begin
    for ranks in started:
        ranks.kill()


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Iterator[dict]:
    ranks = Ranks("answers", tmp_path_factory.mktemp("answers"))
    try:
        assert ranks.statuses(60) == [0, 0]
        yield json.loads((ranks.folder / "report.json").read_text())
    finally:
        ranks.kill()


def test_each_caller_gets_its_own_result(answers) -> None:
    for first, sums in enumerate(answers["sums"]):
        assert sums == [2 * (100 * first + i) + 1 for i in range(20)]
    assert answers["at_once"] == [2 * (1000 + i) + 1 for i in range(50)]


def test_all_ranks_execute_in_the_order_of_the_calls(answers) -> None:
    leader, follower = answers["journals"]
    assert leader == follower
    assert len(leader) == 8 * 20 + 50 + 1
    assert [value for value in leader if 1000 <= value < 2000] == list(range(1000, 1050))


def test_a_refusal_by_all_ranks_reaches_the_caller_and_the_group_goes_on(answers) -> None:
    refusal = ["INVALID_ARGUMENT", "TOO_LARGE", "it is too large", {"value": "7"}]
    assert answers["refusals"] == [refusal, refusal]


def test_what_cannot_be_sent_fails_for_its_caller_alone(answers) -> None:
    assert "pickled_a_lock" not in answers


def test_arrays_messages_and_keywords_arrive_whole(answers) -> None:
    count = 1 << 20
    assert answers["checksum"] == 2 * (count * (count - 1) / 2 * 0.5 + 3)


def test_a_callback_is_called_on_rank_zero_only(answers) -> None:
    assert answers["stages"] == ["rank 0"]


def test_a_cancelled_call_runs_to_its_end_if_it_had_begun_and_never_otherwise(answers) -> None:
    assert answers["after_cancel"] == 2 * 5000 + 1
    assert answers["journals"][0][-1] == 5000


def test_closing_ends_the_running_call_and_drops_the_rest(start) -> None:
    ranks = start("close_drops")
    assert ranks.statuses(10) == [0, 0]
    report = json.loads((ranks.folder / "report.json").read_text())
    assert report["ends"] == ["float", "CancelledError", "CancelledError", "CancelledError"]


def test_an_exception_on_one_rank_ends_all(start) -> None:
    ranks = start("fail")
    statuses = ranks.statuses(AT_ONCE)
    # Rank 0 sees rank 1 go either in the collective that both are in or through the lifeline.
    assert statuses[1] == Exit.FAILED
    assert statuses[0] in {Exit.FAILED, Exit.PEER_LOST}
    failure = ranks.events(1)[-1]
    assert (failure["rank"], failure["command"]) == (1, "Toy.fail")
    assert "ZeroDivisionError: by design" in failure["exception"]


@pytest.mark.parametrize("scenario", ["refuse_alone", "refuse_otherwise"])
def test_ranks_that_do_not_agree_on_a_refusal_end(start, scenario) -> None:
    ranks = start(scenario)
    statuses = ranks.statuses(AT_ONCE)
    assert Exit.DISAGREED in statuses
    assert set(statuses) <= {Exit.DISAGREED, Exit.PEER_LOST, Exit.FAILED}
    disagreement = next(
        event for rank in range(2) for event in ranks.events(rank) if event["event"] == "ranks_disagree"
    )
    assert disagreement["refusals"] == {"refuse_alone": ["", "TOO_LARGE"], "refuse_otherwise": ["R0", "R1"]}[scenario]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("scenario", ["busy", "idle"])
def test_a_killed_rank_takes_the_other_with_it(start, scenario, victim) -> None:
    ranks = start(scenario)
    ranks.processes[victim].kill()
    statuses = ranks.statuses(AT_ONCE)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] in {Exit.PEER_LOST, Exit.FAILED}


def test_a_rank_that_hangs_in_a_command_ends_all_at_the_limit(start) -> None:
    ranks = start("hang")
    started = time.monotonic()
    statuses = ranks.statuses(toy.COMMAND_TIMEOUT + AT_ONCE)
    assert time.monotonic() - started > toy.COMMAND_TIMEOUT / 2
    assert Exit.HUNG in statuses
    assert set(statuses) <= {Exit.HUNG, Exit.PEER_LOST, Exit.FAILED}
    # Whoever was first to log: where rank 1 hung is in its own last words.
    assert any("time.sleep" in stack for stack in ranks.events(1)[-1]["stacks"].values())


def test_a_rank_that_freezes_between_commands_is_noticed_within_three_ticks(start) -> None:
    ranks = start("freeze", ready="froze")
    ranks.processes[0].join(3 * toy.TICK + AT_ONCE)
    assert ranks.processes[0].exitcode == Exit.HUNG
    assert ranks.processes[1].is_alive()  # as torchrun would find it, which kills it


def torchrun(scenario: str, folder: Path, *options: str) -> subprocess.Popen:
    program = ["-m", "rank_programs.toy", scenario, str(folder)]
    return subprocess.Popen([*TWO_RANKS, *options, *program], env=rank_environment())


def test_torchrun_starts_the_group_again(tmp_path) -> None:
    launcher = torchrun("restart", tmp_path, "--max-restarts", "1")
    try:
        assert launcher.wait(180) == 0
    finally:
        launcher.kill()
    assert json.loads((tmp_path / "report.json").read_text()) == {"attempt": 1, "sum": 2.0}
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}


def test_sigterm_to_all_ranks_lets_rank_zero_drain(tmp_path) -> None:
    launcher = torchrun("drain", tmp_path)
    try:
        wait_for(tmp_path / "began", 180)
        ranks = psutil.Process(launcher.pid).children()
        launcher.terminate()
        launcher.wait(60)
    finally:
        launcher.kill()
    assert not any(rank.is_running() for rank in ranks)
    assert json.loads((tmp_path / "report.json").read_text()) == {"sum": 2.0}
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}


def test_without_torchrun_this_is_a_world_of_one(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Process.from_environment() == Process(rank=0, world_size=1, local_rank=0, torchrun=False, attempt=0)


def test_a_rank_has_the_gpu_of_its_local_rank(monkeypatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    process = Process.from_environment()
    assert (process.rank, process.world_size, process.torchrun) == (5, 8, True)
    assert str(process.device("cuda")) == "cuda:1"
    assert str(process.device("cpu")) == "cpu"
