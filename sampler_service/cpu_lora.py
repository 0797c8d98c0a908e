"""LoRA arithmetic on a CPU, in place of vLLM's, which is wrong and slow there.

vLLM's CPU operators gather one copy of the weights per token, and index -1, "no adapter", gathers the last slot: a
base request that shares a step with adapter requests is answered by somebody's adapter. Here tokens are grouped by
adapter: one small matrix product per adapter, none for tokens without one, and no row is ever multiplied by weights
that are not its own, so that one adapter's NaN stays its own.
"""

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class GroupedLoraWrapper(PunicaWrapperCPU):
    """Adds each token's own adapter to the output of a linear layer."""

    def update_metadata(self, *args, **kwargs) -> None:
        """Called when the adapters of a step's tokens change, before its layers run."""
        super().update_metadata(*args, **kwargs)
        indices = self.token_lora_indices
        # (slot, its rows), and None for the rows where all tokens are the slot's, which needs no gathering.
        self._groups: list[tuple[int, torch.Tensor | None]] = []
        for slot in indices.unique().tolist():
            if slot >= 0:
                rows = (indices == slot).nonzero().squeeze(1)
                self._groups.append((slot, None if len(rows) == len(indices) else rows))

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs,
    ) -> None:
        """y += scale * x A^T B^T, with the A and B of each row's adapter, in place.

        y [tokens, sum(output_slices)], x [tokens, in]; per slice (the layers that vLLM has fused, as q, k and v) one
        A [slots, 1, rank, in] and one B [slots, 1, slice, rank].
        """
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._groups:
            own_x = x if rows is None else x[rows]
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                delta = own_x @ a[slot, 0].T @ b[slot, 0].T
                target = y[:, start : start + width]
                if rows is None:
                    target.add_(delta, alpha=scale)
                else:
                    target.index_add_(0, rows, delta, alpha=scale)
                start += width


def use_grouped_lora() -> None:
    """Makes vLLM on a CPU build the wrapper above. To be called before the model is loaded."""
    name = f"{GroupedLoraWrapper.__module__}.{GroupedLoraWrapper.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
