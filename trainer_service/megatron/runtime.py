"""Makes Megatron importable and initialised on this host: with or without a GPU, without Transformer Engine.

Import this module before anything from `megatron`.
"""

import importlib.machinery
import importlib.util
import sys
import warnings

import torch
import torch.distributed

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


def initialize(device: torch.device) -> None:
    """Joins the process group and sets Megatron's parallel state up. Does nothing the second time."""
    from megatron.core import parallel_state, tensor_parallel  # noqa: PLC0415  (after the import hook above)

    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # The inference tracker's fork() does nothing; the default one needs CUDA, and nothing here is random.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
