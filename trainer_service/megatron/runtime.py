"""Makes Megatron importable and initialised on this host: with or without a GPU, without Transformer Engine.

Import this module before anything from `megatron`.
"""

import datetime
import importlib.machinery
import importlib.util
import sys
import warnings

import torch
from torch import distributed

from trainer_service.parallel import Axis, Layout, Place
from trainer_service.ranks import NEVER, Process

_NEEDS_TE = "megatron.bridge.peft.lora_layers"


class _WithoutTransformerEngine(importlib.machinery.SourceFileLoader):
    """Loads Bridge's one module that cannot be imported without Transformer Engine, without it.

    Nothing here uses that module, but `megatron.bridge` imports it. A stand-in for the whole package
    `transformer_engine` would not do: Megatron-Core would take it for the real one.
    """

    def get_code(self, fullname):
        """Compiles the source with the import replaced and annotations, which use it, left unevaluated."""
        source = self.get_data(self.path).replace(b"import transformer_engine.pytorch as te", b"te = None")
        return self.source_to_code(b"from __future__ import annotations\n" + source, self.path)


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname != _NEEDS_TE:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _WithoutTransformerEngine(fullname, spec.origin)
        return spec


if importlib.util.find_spec("transformer_engine") is None:
    sys.meta_path.insert(0, _Finder)

if not torch.cuda.is_available():
    # Megatron-Core asks for the current CUDA device wherever it makes a tensor, in rotary embeddings for one.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

warnings.filterwarnings("ignore", message="Apex is not installed")
warnings.filterwarnings("ignore", message="ModelProviderMixin-based model configuration is deprecated")


def initialize(device: torch.device, layout: Layout) -> Place:
    """Sets Megatron's parallel state up and says where in it this rank is. Joins a world of one unless the process
    has joined another. INVALID_ARGUMENT when the layout does not fit the world.
    """
    from megatron.core import parallel_state, tensor_parallel  # noqa: PLC0415  (after the import hook above)

    Process.from_environment().join(device)
    world_size = distributed.get_world_size()
    layout.data(world_size)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            distributed_timeout_minutes=NEVER // datetime.timedelta(minutes=1),
        )
        # The inference tracker's fork() does nothing; the default one needs CUDA, and nothing here is random.
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    return Place(
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        model=_axis(parallel_state.get_model_parallel_group()),
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        world=distributed.new_group(backend="gloo", timeout=NEVER) if world_size > 1 else None,
    )


def _axis(group: distributed.ProcessGroup) -> Axis:
    ranks = tuple(distributed.get_process_group_ranks(group))
    return Axis(ranks.index(distributed.get_rank()), len(ranks), group, ranks)
