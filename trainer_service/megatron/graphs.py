"""Passes as CUDA graphs.

The CPU needs longer to launch a pass's kernels than the GPU for what they do to a few thousand tokens. A graph is
launched as a whole. It reads fixed memory, and its shapes are fixed: a pass is filled up with tokens that nobody asked
for, and which tokens belong to which adapter is data (see `grouped.py`). The loss, which is the caller's, runs between
the graph of the forward pass and that of the backward pass.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton

from trainer_service.lora.grouped import TILE_ROWS, Grouped, Ranks, Tables
from trainer_service.lora.products import no_adapters
from trainer_service.lora.routing import Routing
from trainer_service.megatron.inputs import Inputs, PackedSequence, packed, prepare, segments
from trainer_service.megatron.layer_spec import batch_length
from trainer_service.megatron.rotary import PackedRotary

# Of an 8B model the CPU needs 260 ms to launch a pass, and an H200 253 ms for 4096 tokens. Larger passes keep the GPU
# busy, and a graph has memory for activations of its own.
_MAX_TOKENS = 4096
_TOKEN_STEP = 256
_MAX_SEQUENCES = 128
_LEAST_SEQUENCES = 8


@dataclass(frozen=True)
class _Shape:
    """What passes of one graph have in common."""

    num_tokens: int
    num_sequences: int  # at most, and so are the adapters
    longest: int  # tokens that a sequence may have; attention starts blocks for as many of each, there or not
    length: int  # of every sequence, if attention takes them as a batch; otherwise 0
    ranks: Ranks | None  # None for passes of the bare base model

    @classmethod
    def of(cls, sequences: Sequence[PackedSequence]) -> "_Shape":
        """The smallest for sequences whose tokens are a multiple of the step."""
        lengths = [len(sequence.tokens) for sequence in sequences]
        arenas = [sequence.arena for sequence in sequences if sequence.arena is not None]
        length, num_tokens = batch_length(lengths), sum(lengths)
        return cls(
            num_tokens=num_tokens,
            num_sequences=max(_LEAST_SEQUENCES, triton.next_power_of_2(len(lengths))),
            longest=length or min(num_tokens, max(_TOKEN_STEP, triton.next_power_of_2(max(lengths)))),
            length=length,
            ranks=Ranks.of(arenas) if arenas else None,
        )


@dataclass(frozen=True)
class _Recording:
    """Two graphs, and the memory that they read and write."""

    inputs: Inputs
    tables: Tables | None
    logprobs: torch.Tensor  # float32 [T]
    gradient: torch.Tensor  # of the loss by `logprobs`
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Graphs:
    """Records a pass of each shape when the first of its kind comes."""

    def __init__(
        self, forward: Callable[[Inputs], torch.Tensor], grouped: Grouped, routing: Routing, rotary: PackedRotary
    ):
        """`forward`: log-probabilities of the inputs' targets."""
        self._forward = forward
        self._grouped = grouped
        self._routing = routing
        self._rotary = rotary
        self._recordings: dict[_Shape, _Recording] = {}
        # One after the other, all graphs can work in the same memory. PyTorch cannot use a pool again after the last of
        # its graphs is gone, so recordings stay.
        self._pool = torch.cuda.graph_pool_handle()

    def take(self, sequences: Sequence[PackedSequence]) -> bool:
        """Whether a graph serves this pass."""
        num_tokens = sum(len(sequence.tokens) for sequence in sequences)
        return num_tokens <= _MAX_TOKENS and len(sequences) < _MAX_SEQUENCES

    def run(
        self, sequences: Sequence[PackedSequence], objective: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> None:
        """One pass; `objective` as BaseModel.run has it, for all of the sequences."""
        num_tokens = sum(len(sequence.tokens) for sequence in sequences)
        if missing := -num_tokens % _TOKEN_STEP:
            sequences = [*sequences, PackedSequence.padding(missing)]
        shape = _Shape.of(sequences)
        if shape not in self._recordings:
            self._recordings[shape] = self._record(shape)
        recording = self._recordings[shape]
        self._fill(recording, sequences)
        recording.forward.replay()
        with_gradient = torch.is_grad_enabled()
        logprobs = recording.logprobs[:num_tokens].clone().requires_grad_(with_gradient)
        total = objective(logprobs)
        if with_gradient and total is not None and total.requires_grad:
            total.backward()
            assert logprobs.grad is not None
            recording.gradient.zero_()
            recording.gradient[:num_tokens] = logprobs.grad
            recording.backward.replay()

    def _fill(self, recording: _Recording, sequences: Sequence[PackedSequence]) -> None:
        new, fixed = prepare(sequences, self._rotary, self._grouped.device), recording.inputs
        fixed.tokens.copy_(new.tokens)
        fixed.targets.copy_(new.targets)
        fixed.turns.copy_(new.turns)
        bounds = fixed.packed.cu_seqlens_q
        bounds.fill_(len(new.tokens))  # the other sequences are empty
        bounds[: len(new.packed.cu_seqlens_q)] = new.packed.cu_seqlens_q
        if recording.tables is not None:
            recording.tables.fill(segments(sequences))

    def _record(self, shape: _Shape) -> _Recording:
        inputs = self._inputs(shape)
        tables = None
        if shape.ranks is not None:
            num_tiles = shape.num_tokens // TILE_ROWS + shape.num_sequences
            tables = Tables(self._grouped, shape.num_sequences, num_tiles, shape.ranks)
        batch = tables.products if tables is not None else no_adapters
        gradient = torch.zeros_like(inputs.targets, dtype=torch.float32)
        with self._routing.using(batch, batch), torch.enable_grad():
            # Compiles kernels, and makes libraries take the memory that they keep. Without adapters, it trains nothing.
            self._forward(inputs).backward(gradient)
            torch.cuda.synchronize()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with self._recorded(forward):
                logprobs = self._forward(inputs)
            with self._recorded(backward):
                logprobs.backward(gradient)
        return _Recording(inputs, tables, logprobs.detach(), gradient, forward, backward)

    def _recorded(self, graph: torch.cuda.CUDAGraph) -> contextlib.AbstractContextManager:
        # Other threads, which send weights to samplers, may go on using the GPU.
        return torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")

    def _inputs(self, shape: _Shape) -> Inputs:
        """Memory for inputs of any pass of this shape."""
        made = prepare([PackedSequence.padding(shape.num_tokens)], self._rotary, self._grouped.device)
        bounds = torch.arange(shape.num_sequences + 1, dtype=torch.int32, device=self._grouped.device) * shape.longest
        bounds.clamp_(max=shape.num_tokens)
        lengths = [shape.longest] * (shape.num_tokens // shape.longest)
        return Inputs(made.tokens, made.targets, made.turns, packed(bounds, lengths, shape.length))
