"""A Megatron layer spec from PyTorch's own operations: RMSNorm, SDPA, packed sequences; no Transformer Engine.

Shapes: T packed tokens, Q query heads, K key-value heads, D channels per head, H hidden size.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import nn


class PackedSDPA(MegatronModule):
    """Causal attention over packed sequences, one `scaled_dot_product_attention` per sequence.

    Stands where Megatron has its DotProductAttention, which takes no packed sequences.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *, softmax_scale: float | None = None, **_):
        """The other arguments of DotProductAttention do not matter here."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        # Megatron counts how many keys to the left a query sees besides its own.
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: PackedSeqParams, **_):
        """`query` [T, 1, Q, D], `key` and `value` [T, 1, K, D]; returns [T, 1, Q * D]. Sequences see only themselves."""
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        groups = query.size(1) // key.size(1)
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        outputs = [
            self._attend(query[start:end], key[start:end], value[start:end])
            for start, end in itertools.pairwise(bounds)
        ]
        return torch.cat(outputs).flatten(1)[:, None]

    def _attend(self, query, key, value):
        length = query.size(0)
        mask = None
        if self.window is not None and length > self.window:
            position = torch.arange(length, device=query.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < self.window)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return output[0].transpose(0, 1)


class LocalLayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and the linear layer after it as one module, as Transformer Engine has them.

    Bridge's tables for most model families know the norm's weight only as part of such a module, and recognise the
    module by a class name that ends like this one.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm of `x` [T, 1, H], which is what an adapter of this layer sees."""
        weight: torch.Tensor = self.layer_norm_weight
        if self.config.layernorm_zero_centered_gamma:
            weight = weight + 1
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.layernorm_epsilon)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear layer alone."""
        return super().forward(x)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and, where it is left to the caller to add, bias."""
        return self.project(self.normalize(x))


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer of a dense model with RMSNorm."""
    qk_norm = WrappedTorchNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=LocalLayerNormColumnParallelLinear,
                    core_attention=PackedSDPA,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=LocalLayerNormColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
