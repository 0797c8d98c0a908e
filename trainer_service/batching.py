"""Gathers Forward and ForwardBackward calls of different adapters into shared passes through the model.

A pass carries at most a budget of tokens. Adapters get equal shares of it for as long as they have something to
compute: each next sequence comes from the adapter that has had the fewest tokens (start-time fair queueing: Goyal, Vin
and Cheng, 1996), so a long queue delays its owner and nobody else.
"""

import asyncio
import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from service_common.errors import ServiceError
from trainer_service import losses
from trainer_service.batch import Datum, num_tokens
from trainer_service.commands import Commands
from trainer_service.engine import Engine
from trainer_service.losses import Loss, LossConfig
from trainer_service.metrics import Metrics
from trainer_service.passes import Part, PartResult


@dataclass(frozen=True)
class Computed:
    """Log-probabilities per datum, float32 [N] each, and the metrics of the batch."""

    logprobs: list[np.ndarray]
    metrics: dict[str, float]


@dataclass
class _Call:
    adapter_id: str
    data: Sequence[Datum]
    loss: Loss
    config: LossConfig
    backward: bool
    future: asyncio.Future[Computed]
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0  # data that passes have been given
    logprobs: list[np.ndarray] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)

    def part(self, count: int) -> Part:
        """The next `count` data, as a pass takes them."""
        first = self.taken
        self.taken += count
        return Part(
            adapter_id=self.adapter_id,
            data=self.data[first : self.taken],
            loss=self.loss,
            config=self.config,
            backward=self.backward,
            is_last=self.taken == len(self.data),
        )

    def add(self, result: PartResult) -> bool:
        """Takes a pass's result; returns whether the call has ended."""
        if result.refusal:
            self.fail(result.refusal)
            return True
        self.logprobs += result.logprobs
        for name, value in result.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.taken < len(self.data):
            return False
        if not self.future.done():
            self.future.set_result(Computed(self.logprobs, losses.metrics(self.sums)))
        return True

    def fail(self, error: BaseException) -> None:
        """Ends the call with an error."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass
class _Queue:
    """One adapter's calls, and its virtual time: the tokens it has had, counted from when it last began to queue."""

    calls: collections.deque[_Call]
    tokens: float


class Batcher:
    """Turns calls into passes."""

    def __init__(self, commands: Commands, metrics: Metrics, max_pass_tokens: int, window_seconds: float = 0.003):
        """`window_seconds`: how long a pass waits for company when the engine is idle."""
        self._commands = commands
        self._metrics = metrics
        self._max_pass_tokens = max_pass_tokens
        self._window_seconds = window_seconds
        self._queues: dict[str, _Queue] = {}
        self._clock = 0.0  # virtual time of the adapter served last: newcomers begin there
        self._running: asyncio.Task[None] | None = None

    async def compute(
        self, adapter_id: str, data: Sequence[Datum], loss: Loss, config: LossConfig, backward: bool
    ) -> Computed:
        """Computes checked data. ServiceError LOSS_NOT_FINITE when a gradient was asked for and the loss has none."""
        call = _Call(adapter_id, data, loss, config, backward, asyncio.get_running_loop().create_future())
        queue = self._queues.get(adapter_id)
        if queue is None:
            queue = self._queues[adapter_id] = _Queue(collections.deque(), self._clock)
        queue.calls.append(call)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        result = await call.future
        self._metrics.tokens.labels("forward_backward" if backward else "forward").inc(num_tokens(data))
        return result

    async def _run(self) -> None:
        try:
            while self._queues:
                # Steps of the last pass's adapters are under way, and their next calls come after them.
                await self._commands.wait_idle()
                if self._waiting_tokens() < self._max_pass_tokens:
                    await asyncio.sleep(self._window_seconds)
                await self._one_pass()
        finally:
            self._running = None

    async def _one_pass(self) -> None:
        chosen = self._choose()
        parts = [call.part(count) for call, count in chosen]
        started = time.monotonic()
        for call, count in chosen:
            if call.taken == count:  # its first pass
                self._metrics.queue_seconds.observe(started - call.arrived)
        results: Sequence[PartResult | Exception]
        try:
            results = await self._commands.run(Engine.run_pass, parts)
        except Exception as error:
            results = [_failed(error) for _ in parts]
        self._metrics.pass_tenants.observe(len({call.adapter_id for call, _ in chosen}))
        self._metrics.pass_tokens.observe(sum(num_tokens(part.data) for part in parts))
        self._metrics.pass_seconds.observe(time.monotonic() - started)
        for (call, _), result in zip(chosen, results, strict=True):
            if isinstance(result, Exception):
                call.fail(result)
            elif not call.add(result):
                continue
            queue = self._queues[call.adapter_id]
            queue.calls.remove(call)
            if not queue.calls:
                del self._queues[call.adapter_id]

    def _choose(self) -> list[tuple[_Call, int]]:
        """The calls of the next pass, and how many of its data each gives; calls of one adapter in order."""
        counts: dict[str, list[int]] = {}
        budget = self._max_pass_tokens
        open_queues = dict(self._queues)
        while open_queues:
            adapter_id = min(open_queues, key=lambda name: open_queues[name].tokens)
            queue = open_queues[adapter_id]
            given = counts.setdefault(adapter_id, [0])
            call = queue.calls[len(given) - 1]
            if call.taken + given[-1] == len(call.data):
                following = queue.calls[len(given)] if len(given) < len(queue.calls) else None
                # A gradient is taken back as a whole, so a pass has one call of an adapter that makes one.
                if following is None or following.backward or call.backward:
                    del open_queues[adapter_id]
                else:
                    given.append(0)
                continue
            length = len(call.data[call.taken + given[-1]])
            if length > budget and budget < self._max_pass_tokens:
                break  # it goes first next time
            given[-1] += 1
            budget -= length
            self._clock = max(self._clock, queue.tokens)
            queue.tokens += length
            if budget <= 0:
                break
        return [
            (call, count)
            for adapter_id, given in counts.items()
            for call, count in zip(self._queues[adapter_id].calls, given, strict=False)
            if count
        ]

    def _waiting_tokens(self) -> int:
        return sum(num_tokens(call.data[call.taken :]) for queue in self._queues.values() for call in queue.calls)


def _failed(error: Exception) -> Exception:
    """The error for one of several calls that share it: an exception belongs to one task."""
    if isinstance(error, ServiceError):
        return ServiceError(error.code, error.reason, error.message, field=error.field, **error.metadata)
    failure = RuntimeError(f"the pass failed: {error!r}")
    failure.__cause__ = error
    return failure
