"""One pass of the model over data of many adapters, shared out among copies of the model."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed

from service_common import errors
from service_common.errors import ServiceError
from trainer_service import losses
from trainer_service.batch import Datum
from trainer_service.lora.arena import Arena
from trainer_service.losses import Loss, LossConfig
from trainer_service.parallel import Place

if TYPE_CHECKING:
    from trainer_service.megatron.model import BaseModel


@dataclass(frozen=True)
class Part:
    """What one pass computes of one Forward or ForwardBackward: all of its data, or some when it takes several."""

    adapter_id: str  # empty for the bare base model
    data: Sequence[Datum]
    loss: Loss
    config: LossConfig
    backward: bool
    is_last: bool = True


@dataclass(frozen=True)
class PartResult:
    """Log-probabilities per datum, float32 [N] each, and sums that `losses.metrics` turns into metrics.

    `refusal` says why the part came to nothing: the gradient must be taken back to what it was before the call began.
    """

    logprobs: list[np.ndarray]
    sums: dict[str, float]
    refusal: ServiceError | None = None


_Key = tuple[int, int]  # part, datum in it


@dataclass
class _Share:
    """What one copy of the model has computed."""

    logprobs: dict[_Key, np.ndarray] = field(default_factory=dict)
    sums: dict[int, dict[str, float]] = field(default_factory=dict)  # by part


def run(
    model: "BaseModel", place: Place, device: torch.device, parts: Sequence[Part], arenas: Sequence[Arena | None]
) -> list[PartResult]:
    """Computes all parts, `arenas` being theirs, and differentiates each one's loss into its arena if it wants that."""
    keys = [(index, datum) for index, part in enumerate(parts) for datum in range(len(part.data))]
    # In turn, so that all copies of the model get about equally many tokens.
    share = _run_share(model, device, parts, arenas, keys[place.data.index :: place.data.size])
    shares = [share]
    if place.world is not None:
        speaks = place.tensor.is_first and place.pipeline.is_last
        gathered: list[_Share | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, share if speaks else None, group=place.world)
        shares = [share for share in gathered if share]
    return [_merge(index, part, shares) for index, part in enumerate(parts)]


def _run_share(
    model: "BaseModel",
    device: torch.device,
    parts: Sequence[Part],
    arenas: Sequence[Arena | None],
    keys: Sequence[_Key],
) -> _Share:
    from trainer_service.megatron.model import PackedSequence  # noqa: PLC0415  (imports Megatron)

    logprobs: dict[_Key, torch.Tensor] = {}
    sums: dict[int, dict[str, torch.Tensor]] = {}

    def objective(packed: torch.Tensor, indices: Sequence[int]) -> torch.Tensor | None:
        chosen = [keys[index] for index in indices]
        computed = dict(zip(chosen, packed.split([len(parts[p].data[d]) for p, d in chosen]), strict=True))
        total: torch.Tensor | None = None
        for index, group in itertools.groupby(chosen, key=lambda key: key[0]):
            part, members = parts[index], list(group)
            inputs = {name: torch.cat([loss_inputs[key][name] for key in members]) for name in losses.INPUTS[part.loss]}
            logprobs_of_part = torch.cat([computed[key] for key in members])
            result = losses.evaluate(part.loss, part.config, logprobs_of_part, inputs)
            kept = sums.setdefault(index, {})
            for name, value in result.sums.items():
                kept[name] = kept[name] + value if name in kept else value
            if part.backward:
                # Left out on the device: asking the host would make it wait. Rows of other parts don't see its NaN.
                finite = torch.where(result.total.isfinite(), result.total, 0.0)
                total = finite if total is None else total + finite
        logprobs.update((key, value.detach()) for key, value in computed.items())
        return total

    if keys:
        loss_inputs = _loss_inputs(parts, keys, device)
        sequences = [
            PackedSequence(arenas[part], parts[part].data[datum].tokens, parts[part].data[datum].target_tokens)
            for part, datum in keys
        ]
        with torch.set_grad_enabled(any(part.backward for part in parts)):
            model.run(sequences, objective)
    return _to_host(logprobs, sums)


def _loss_inputs(
    parts: Sequence[Part], keys: Sequence[_Key], device: torch.device
) -> dict[_Key, dict[str, torch.Tensor]]:
    """What the loss takes beside the log-probabilities, by datum and name.

    In one copy, before the pass: a copy waits for all that the device has been told to do, and the device would then
    wait for the loss to be launched.
    """
    wanted = [(key, name) for key in keys for name in losses.INPUTS[parts[key[0]].loss]]
    arrays = [parts[part].data[datum].inputs[name] for (part, datum), name in wanted]
    moved = torch.from_numpy(np.concatenate(arrays)).to(device).split([len(array) for array in arrays])
    inputs: dict[_Key, dict[str, torch.Tensor]] = {key: {} for key in keys}
    for (key, name), values in zip(wanted, moved, strict=True):
        inputs[key][name] = values
    return inputs


def _to_host(logprobs: dict[_Key, torch.Tensor], sums: dict[int, dict[str, torch.Tensor]]) -> _Share:
    """In one copy: each would wait for the device."""
    if not logprobs:
        return _Share()
    scalars = [value for kept in sums.values() for value in kept.values()]
    host = torch.cat([*(value.double() for value in logprobs.values()), torch.stack(scalars)]).cpu()
    values, rest = host[: -len(scalars)].float().numpy(), iter(host[-len(scalars) :].tolist())
    ends = np.cumsum([len(value) for value in logprobs.values()])
    return _Share(
        dict(zip(logprobs, np.split(values, ends[:-1]), strict=True)),
        {index: {name: next(rest) for name in kept} for index, kept in sums.items()},
    )


def _merge(index: int, part: Part, shares: Sequence[_Share]) -> PartResult:
    sums: dict[str, float] = {}
    logprobs: dict[int, np.ndarray] = {}
    for share in shares:
        for name, value in share.sums.get(index, {}).items():
            sums[name] = sums.get(name, 0.0) + value
        logprobs |= {datum: values for (at, datum), values in share.logprobs.items() if at == index}
    refusal = None
    if part.backward and not math.isfinite(sums["loss"]):
        refusal = errors.failed_precondition(
            "LOSS_NOT_FINITE",
            f"the loss of adapter {part.adapter_id!r} is {sums['loss']}; its gradient is what it was before this call. "
            "Either its weights have diverged (load a checkpoint, train with a lower learning rate) or the loss inputs "
            "are extreme",
            adapter_id=part.adapter_id,
        )
    return PartResult([logprobs[datum] for datum in range(len(part.data))], sums, refusal)
