"""The base model: passes of packed sequences through a Megatron GPTModel, over all ranks that hold it together.

Shapes: T packed tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import distributed

from service_common.checkpoint import Checkpoint
from trainer_service.lora import layers
from trainer_service.lora.arena import Shard
from trainer_service.lora.grouped import Grouped
from trainer_service.lora.products import looped
from trainer_service.lora.routing import Routing
from trainer_service.megatron import inputs, loading, logprobs
from trainer_service.megatron.graphs import Graphs
from trainer_service.megatron.inputs import Inputs, PackedSequence
from trainer_service.megatron.layer_spec import DenseMLP
from trainer_service.megatron.rotary import PackedRotary
from trainer_service.parallel import Place

Objective = Callable[[torch.Tensor, Sequence[int]], torch.Tensor | None]
"""What to differentiate: called with logprobs, float32 [T], of the sequences whose indices follow, back to back."""


class BaseModel:
    """A frozen base model with adapted linear layers; this rank's part of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        place: Place,
        report: Callable[[str], None],
        recompute_activations: bool = False,
    ):
        """See loading.load; `recompute_activations`: see Engine."""
        self._device = device
        self._dtype = dtype
        self._place = place
        loading.check_divisible(checkpoint, place)
        self._model = loading.load(checkpoint, device, dtype, place, report)
        tensor = place.tensor
        adaptable = layers.adaptable(self._model)
        grouped = Grouped(adaptable, device) if device.type == "cuda" else None
        shares_tokens = (tensor.index, tensor.size) if place.sequence_parallel else ()
        self._routing = Routing(grouped.batch if grouped else looped, *shares_tokens)
        layers.adapt(self._model, adaptable, self._routing)
        attention = self._model.decoder.layers[0].self_attention
        self._rotary = PackedRotary(self._model.rotary_pos_emb, attention._yarn_concentration_factor)
        self._model.rotary_pos_emb = self._rotary
        if place.pipeline.is_last:
            logprobs.keep_logits_in_float32(self._model.output_layer)
        if recompute_activations:
            layers.recompute(self._model, self._routing)
        self._graphs = None
        if grouped and not recompute_activations and self._can_be_graphed():
            self._graphs = Graphs(self._compute, grouped, self._routing, self._rotary)
        numbers = [layer.layer_number - 1 for layer in self._model.decoder.layers]
        self.shard = Shard(range(numbers[0], numbers[-1] + 1), tensor.index, tensor.size)

    def run(self, sequences: Sequence[PackedSequence], objective: Objective) -> None:
        """One pass. Sequences of one adapter that follow each other become one stretch.

        `objective` is called on the ranks of the last stage, once for each of the pieces that a pipeline works on. If
        it returns a scalar, that is differentiated, which adds to the gradients of the sequences' arenas.
        """
        if self._graphs is not None and self._graphs.take(sequences):
            self._graphs.run(sequences, lambda packed: objective(packed, range(len(sequences))))
            return
        pieces = _split_evenly([len(sequence.tokens) for sequence in sequences], self._place.pipeline.size)
        running = []
        for piece in pieces:
            chosen = [sequences[index] for index in piece]
            received = self._receive_hidden(chosen)
            output = self._forward(chosen, received, logprobs.process)
            if self._place.pipeline.is_last:
                output = objective(output[: sum(len(sequence.tokens) for sequence in chosen)], piece)
            else:
                self._send(output.detach(), self._place.pipeline.next)
            running.append((received, output))
        if not torch.is_grad_enabled():
            return
        for received, output in running:
            if self._place.pipeline.is_last:
                if output is not None and output.requires_grad:
                    output.backward()
                gradient = None if received is None else received.grad
            else:
                torch.autograd.backward(output, self._receive(output, self._place.pipeline.next))
                gradient = None if received is None else received.grad
            if received is not None:
                self._send(torch.zeros_like(received) if gradient is None else gradient, self._place.pipeline.previous)

    def logits(self, sequences: Sequence[PackedSequence]) -> torch.Tensor:
        """Float32 [T, V], for comparing models; training never makes them all. One stage only."""
        return self._forward(sequences, None, _logits)[: sum(len(sequence.tokens) for sequence in sequences)]

    def _forward(self, sequences, received, output_processor):
        sequences = [*sequences, *self._padding(sequences)]
        if received is not None:
            self._model.set_input_tensor(received)
        with self._routing.use(inputs.segments(sequences)):
            return self._compute(inputs.prepare(sequences, self._rotary, self._device), output_processor)

    def _compute(self, read: Inputs, output_processor=logprobs.process) -> torch.Tensor:
        tokens = read.tokens[None]
        with self._rotary.use(read.turns):
            return self._model(
                tokens,
                torch.zeros_like(tokens),  # positions, which `turns` knows
                attention_mask=None,
                packed_seq_params=read.packed,
                output_processor=output_processor,
                output_processor_context=read.targets,
            )

    def _padding(self, sequences) -> list[PackedSequence]:
        """Ranks that share the tokens need equally many."""
        missing = -sum(len(sequence.tokens) for sequence in sequences) % self._routing.parts
        return [PackedSequence.padding(missing)] if missing else []

    def _can_be_graphed(self) -> bool:
        """Whether a pass is the same kernels for any tokens, which those of experts and explicit attention aren't."""
        layers = self._model.decoder.layers
        return self._place.model.size == 1 and all(
            layer.self_attention.core_attention.is_plain and isinstance(layer.mlp, DenseMLP) for layer in layers
        )

    def _receive_hidden(self, sequences) -> torch.Tensor | None:
        if self._place.pipeline.is_first:
            return None
        num_tokens = sum(len(sequence.tokens) for sequence in [*sequences, *self._padding(sequences)])
        hidden = torch.empty(
            num_tokens // self._routing.parts, 1, self._model.config.hidden_size, dtype=self._dtype, device=self._device
        )
        return self._receive(hidden, self._place.pipeline.previous).requires_grad_(torch.is_grad_enabled())

    def _receive(self, like: torch.Tensor, rank: int) -> torch.Tensor:
        buffer = torch.empty_like(like, requires_grad=False)
        distributed.recv(buffer, rank, group=self._place.pipeline.group)
        return buffer

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        distributed.send(tensor.contiguous(), rank, group=self._place.pipeline.group)


def _split_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Cuts 0..len(lengths) in order into at most `parts` pieces of about equally many tokens."""
    pieces: list[list[int]] = [[]]
    share = sum(lengths) / parts
    done = 0
    for index, length in enumerate(lengths):
        if pieces[-1] and done + length / 2 > share * len(pieces):
            pieces.append([])
        pieces[-1].append(index)
        done += length
    return pieces


def _logits(hidden_states, output_layer, output_weight, **_):
    logits = output_layer(hidden_states, weight=output_weight)[0]
    return gather_from_tensor_model_parallel_region(logits).squeeze(1)
