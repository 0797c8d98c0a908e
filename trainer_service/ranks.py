"""One trainer on N ranks: the processes that torchrun starts, and the executor that gives them one order of commands.

Rank 0 serves and holds a RanksExecutor; the others `follow` it. Every engine call is a command: rank 0 broadcasts
it (the method and its arguments, pickled: ranks trust each other) over a gloo group of its own, all ranks execute it
on their own engine at the same time, then all tell each other the outcome. Only then does the next command begin.

- A ServiceError with the same reason on all ranks is a refusal: the caller gets rank 0's, the group goes on.
- Any other exception on any rank, and a refusal by some ranks only, may have left the ranks in different states. The
  group ends, with an `Exit` status, so that torchrun (--max-restarts) starts it again.

When a rank fails, the whole group ends within

- a second, if its process ended: every follower and rank 0 hold a connection to each other that tells;
- the limit of the command (`command_timeout`, or the method's own, see `may_take`), if it hangs in one;
- three ticks, if it or its host froze between commands: every `tick` seconds rank 0 sends a command that does nothing,
  and everybody expects that, and everybody's outcome of it, within three ticks.

torchrun sees it within 0.1 s. It kills a rank that its own watchdog could not end (one that keeps the interpreter
locked) 30 s later. The process groups' own timeouts never strike first.

torchrun passes SIGTERM and SIGINT on to all ranks. Followers ignore both: they end when rank 0, having drained, says
so. torchrun waits 30 s for that before it kills, so draining must take less.
"""

import asyncio
import concurrent.futures
import contextlib
import datetime
import enum
import io
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, NoReturn

import structlog
import torch
from torch import distributed

from service_common.errors import ServiceError

log = structlog.get_logger(__name__)

# The watchdogs decide how long a rank may take; no process group gives up before them.
NEVER = datetime.timedelta(days=3650)

# How much later than the others a rank may start: imports from a cold disk take their time.
_JOIN_SECONDS = 300.0
_WATCH_SECONDS = 0.1
_LIMIT = "limit_seconds"
# A command travels as the size of its pickle, the seconds it may take (or _STOP), and the pickle. Every broadcast costs
# all ranks a wake-up, so the first carries as much as most commands need, and only larger ones take a second.
_HEADER = struct.Struct("<qd")
_STOP = 0.0
_FIRST_BYTES = 1 << 14
_OUTCOME_BYTES = 64


class Exit(enum.IntEnum):
    """Exit statuses of a rank that ends the group."""

    FAILED = 81  # a command raised something other than a refusal
    DISAGREED = 82  # some ranks refused a command that others executed, or for another reason
    HUNG = 83  # the watchdog's
    PEER_LOST = 84  # another rank's process ended


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started, or alone."""

    rank: int
    world_size: int
    local_rank: int
    torchrun: bool
    attempt: int  # how often torchrun has started the group again

    @classmethod
    def from_environment(cls) -> "Process":
        """Reads torchrun's variables; without them this is a world of one."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            torchrun="RANK" in os.environ and "WORLD_SIZE" in os.environ,
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )

    def device(self, kind: str) -> torch.device:
        """The device of this rank; `kind` is "cpu" or "cuda"."""
        return torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)

    def join(self, device: torch.device) -> None:
        """Initialises torch.distributed: gloo, and NCCL for tensors on a GPU. Does nothing the second time.

        Waits for all ranks, and makes `device` the calling thread's current one.
        """
        if distributed.is_initialized():
            return
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        if self.torchrun:
            # torchrun keeps one store for all attempts, and in it the addresses of processes that are gone.
            store, rank, world_size = next(distributed.rendezvous("env://", timeout=NEVER))
            store = distributed.PrefixStore(f"attempt-{self.attempt}", store)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=NEVER)
        else:
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def may_take[F: Callable](seconds: float) -> Callable[[F], F]:
    """Decorates an engine method that may run longer than `command_timeout`."""

    def decorate(method: F) -> F:
        setattr(method, _LIMIT, seconds)
        return method

    return decorate


class OnRankZero:
    """A callback among the arguments of a command that is called on rank 0; on the other ranks it does nothing."""

    def __init__(self, callback: Callable[..., None]):
        self._callback = callback

    def __call__(self, *args: Any) -> None:
        """Calls back."""
        self._callback(*args)

    def __reduce__(self) -> tuple:
        return OnRankZero, (_ignore,)


def _ignore(*_: Any) -> None:
    pass


class Group:
    """A rank's ties to the others: the control channel, a watchdog, and connections that notice when a rank ends."""

    def __init__(self, process: Process, device: torch.device, command_timeout: float = 600.0, tick: float = 10.0):
        """Joins, and waits for the other ranks; all times in seconds."""
        self.rank = process.rank
        self.tick = tick
        self.command_timeout = command_timeout
        self._ending = threading.Lock()
        self._left = threading.Event()
        self.expect("all ranks to join", _JOIN_SECONDS)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        process.join(device)
        self._control = distributed.new_group(backend="gloo", timeout=NEVER)
        self._lifelines = distributed.new_group(backend="gloo", timeout=NEVER)
        self._peers = [0] if self.rank else list(range(1, process.world_size))
        self._listeners = [
            threading.Thread(target=self._listen, args=[peer], name=f"lifeline-{peer}", daemon=True)
            for peer in self._peers
        ]
        for listener in self._listeners:
            listener.start()

    def expect(self, what: str, seconds: float) -> None:
        """Tells the watchdog what must be over, by the next call of this, within `seconds`."""
        self._expected = what, time.monotonic() + seconds

    def send(self, message: torch.Tensor) -> None:
        """Rank 0's part of `receive`; uint8 [at least _FIRST_BYTES], see `_message`."""
        distributed.broadcast(message[:_FIRST_BYTES], 0, self._control)
        if len(message) > _FIRST_BYTES:
            distributed.broadcast(message[_FIRST_BYTES:], 0, self._control)

    def receive(self) -> memoryview | None:
        """The pickled command that rank 0 sent, empty for a tick; None ends the group.

        The watchdog waits for the end of the command from here on.
        """
        self.expect("a command from rank 0", 3 * self.tick)
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        distributed.broadcast(first, 0, self._control)
        size, limit = _HEADER.unpack_from(first.numpy())
        if limit == _STOP:
            return None
        self.expect("a command", limit)
        end = _HEADER.size + size
        message = torch.empty(max(end, _FIRST_BYTES), dtype=torch.uint8)
        message[:_FIRST_BYTES] = first
        if len(message) > _FIRST_BYTES:
            distributed.broadcast(message[_FIRST_BYTES:], 0, self._control)
        return memoryview(message.numpy())[_HEADER.size : end]

    def agree(self, command: str, refusal: ServiceError | None) -> None:
        """Compares this rank's outcome of a command with the others'; returns if all are alike."""
        reason = refusal.reason if refusal else ""
        own = torch.zeros(_OUTCOME_BYTES, dtype=torch.uint8)
        encoded = reason.encode()[:_OUTCOME_BYTES]
        own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        outcomes = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(outcomes, own, self._control)
        if any(not outcome.equal(own) for outcome in outcomes):
            reasons = [bytes(outcome.tolist()).rstrip(b"\0").decode(errors="replace") for outcome in outcomes]
            self.end(Exit.DISAGREED, "ranks_disagree", command=command, refusals=reasons, message=str(refusal or ""))

    def leave(self) -> None:
        """Parts from the other ranks, which do the same."""
        self.expect("all ranks to leave", 3 * self.tick)
        for peer in self._peers:
            distributed.send(torch.zeros(1), peer, self._lifelines)
        for listener in self._listeners:
            listener.join()
        self._left.set()
        distributed.destroy_process_group()

    def end(self, status: Exit, event: str, **facts: Any) -> NoReturn:
        """Ends this process, and with it the group, at once. Logs where each thread stands."""
        self._ending.acquire()  # never released: whoever comes second waits for the end
        # A thread that hangs while it logs holds the logger's lock.
        threading.Timer(5, os._exit, [status]).start()
        frames = sys._current_frames()
        stacks = {
            thread.name: "".join(traceback.format_stack(frames[thread.ident]))
            for thread in threading.enumerate()
            if thread.ident in frames
        }
        log.error(event, rank=self.rank, status=int(status), stacks=stacks, **facts)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _watch(self) -> None:
        while not self._left.wait(_WATCH_SECONDS):
            what, deadline = self._expected
            if time.monotonic() > deadline:
                self.end(Exit.HUNG, "rank_hung", waited_for=what)

    def _listen(self, peer: int) -> None:
        try:
            distributed.recv(torch.zeros(1), peer, self._lifelines)
        except RuntimeError as error:
            self.end(Exit.PEER_LOST, "rank_lost", lost=peer, error=str(error))


@dataclass(frozen=True)
class _Call:
    method: Callable
    args: tuple
    kwargs: dict[str, Any]
    future: concurrent.futures.Future


class RanksExecutor[E]:
    """Rank 0's executor: runs engine methods on all ranks, in the order of the calls to `run`.

    Methods and their arguments are pickled by reference and by value: functions of a module or class, dataclasses,
    arrays, messages, `OnRankZero` callbacks. What can't be pickled fails for its caller alone. The result is rank 0's.
    """

    def __init__(self, engine: E, group: Group):
        """`engine` is rank 0's own."""
        self._engine = engine
        self._group = group
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._lead, name="engine", daemon=True)
        self._thread.start()

    async def run[**P, R](self, method: Callable[Concatenate[E, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """See Executor."""
        call = _Call(method, args, kwargs, concurrent.futures.Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor is closed")
            self._calls.put(call)
        return await asyncio.wrap_future(call.future)

    def close(self) -> None:
        """See Executor. The followers return from `follow`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
        self._thread.join()

    def _lead(self) -> None:
        with _ends_on_failure(self._group, "control"):
            while self._lead_one():
                pass
            self._group.send(_message(_STOP))
            self._group.leave()

    def _lead_one(self) -> bool:
        """Has one command executed; False at the end. Keeps no reference to it, whose arguments may be large."""
        group = self._group
        group.expect("a command or tick", 3 * group.tick)
        try:
            call = self._calls.get(timeout=group.tick)
        except queue.Empty:
            group.send(_message(3 * group.tick))
            group.agree("tick", None)
            return True
        if call is None:
            return False
        if self._closed:
            call.future.cancel()
        if not call.future.set_running_or_notify_cancel():
            return True
        limit = getattr(call.method, _LIMIT, group.command_timeout)
        try:
            message = _message(limit, call.method, call.args, call.kwargs)
        except Exception as error:
            call.future.set_exception(error)
            return True
        group.expect(call.method.__qualname__, limit)
        group.send(message)
        del message
        result, refusal = _execute(group, self._engine, call.method, call.args, call.kwargs)
        if refusal:
            call.future.set_exception(refusal)
        else:
            call.future.set_result(result)
        return True


def _message(limit: float, *command: Any) -> torch.Tensor:
    """What `Group.send` takes. Nothing to pickle: a tick. Raises whatever pickling does."""
    buffer = io.BytesIO(bytes(_FIRST_BYTES))
    buffer.seek(_HEADER.size)
    if command:
        pickle.dump(command, buffer, pickle.HIGHEST_PROTOCOL)
    size = buffer.tell() - _HEADER.size
    message = buffer.getbuffer()
    _HEADER.pack_into(message, 0, size, limit)
    return torch.frombuffer(message, dtype=torch.uint8)


def follow(engine: Any, group: Group) -> None:
    """Executes rank 0's commands on this rank's engine until rank 0 closes its executor. For the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with _ends_on_failure(group, "control"):
        while (command := group.receive()) is not None:
            if command:
                method, args, kwargs = pickle.loads(command)
                _execute(group, engine, method, args, kwargs)
                del command, args, kwargs  # they may be large, and the next command may be long in coming
            else:
                group.agree("tick", None)
        group.leave()


def _execute(
    group: Group, engine: Any, method: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, ServiceError | None]:
    """Returns the result and the refusal, once all ranks have come as far."""
    result = refusal = None
    with _ends_on_failure(group, method.__qualname__):
        try:
            result = method(engine, *args, **kwargs)
        except ServiceError as error:
            refusal = error
        group.agree(method.__qualname__, refusal)
    return result, refusal


@contextlib.contextmanager
def _ends_on_failure(group: Group, command: str):
    try:
        yield
    except BaseException:
        group.end(Exit.FAILED, "command_failed", command=command, exc_info=True)
