"""Megatron layer specs from PyTorch's own operations: norms, packed attention, experts; no Transformer Engine.

Shapes: T packed tokens, Q query heads, K key-value heads, D channels per head, H hidden size.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from trainer_service.megatron import kernels
from trainer_service.megatron.families import Family

# cuDNN's attention takes batches alone: PyTorch's way to give it packed sequences computes wrong gradients. On an H100,
# forward and backward, 2 x 2048 tokens of Llama-3.1-8B take it 0.89 ms; flash attention takes 1.3 ms for the batch and
# 1.5 packed. 8 x 256 tokens take all of them the same.
_LEAST_BATCH_LENGTH = 1024
_BATCH_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def batch_length(lengths: Sequence[int]) -> int:
    """The length that all sequences have, if attention had better take them as a batch; otherwise 0."""
    return lengths[0] if len(set(lengths)) == 1 and lengths[0] >= _LEAST_BATCH_LENGTH else 0


@dataclass
class Packed(PackedSeqParams):
    """Sequences back to back, and their lengths on the host as well; batch_length as the function has it."""

    lengths: Sequence[int] = ()
    batch_length: int = 0


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences.

    Stands where Megatron has its DotProductAttention, which takes no packed sequences.
    """

    # Bridge asks these how tensor parallelism cuts the sinks: by head.
    tensor_model_parallel = True
    partition_dim = 0

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        **_,
    ):
        """`window`: keys that a query sees, itself included; None for all. `softcap`: scores go through
        softcap * tanh(score / softcap), as in Gemma 2. The other arguments of DotProductAttention do not matter here.
        """
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.window = window
        self.softcap = softcap
        # Logits, one per head, of a key that every query sees and that has no value, as in GPT-OSS.
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            num_heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`query` [T, Q, D], `key`, `value` [T, K, D]; returns [T, 1, Q * D]. Each sequence sees itself only."""
        if self.is_plain and query.is_cuda:
            if self.window is None and packed.batch_length:
                return self._attend_batch(query, key, value, packed.batch_length)
            return self._attend_packed(query, key, value, packed)
        # Sequences of one length that follow each other are one batch: [N, L, heads, D].
        batches = [(len(list(run)), length) for length, run in itertools.groupby(packed.lengths)]
        groups = query.size(1) // key.size(1)
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        stretches = [tensor.split([math.prod(shape) for shape in batches]) for tensor in (query, key, value)]
        outputs = [
            self._attend(*(stretch.unflatten(0, shape) for stretch in stretches_of_batch)).flatten(0, 1)
            for shape, *stretches_of_batch in zip(batches, *stretches, strict=True)
        ]
        return torch.cat(outputs).flatten(1)[:, None]

    @property
    def is_plain(self) -> bool:
        """Whether softmax attention with a window is all there is to it."""
        return self.softcap is None and self.softmax_offset is None

    def _attend_packed(self, query, key, value, packed):
        bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        before = -1 if self.window is None else self.window - 1
        output = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=self.softmax_scale, window_size=(before, 0)
        )
        assert isinstance(output, torch.Tensor)  # a tuple only when asked for more
        return output.flatten(1)[:, None]

    def _attend_batch(self, query, key, value, length):
        query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(_BATCH_BACKENDS, set_priority=True):
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
        return output.transpose(1, 2).flatten(0, 1).flatten(1)[:, None]

    def _attend(self, query, key, value):
        """All [N, L, heads, D]."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if self.is_plain:
            mask = self._window_mask(query.size(2), query.device)
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
            )
        else:
            output = self._explicit_attention(query, key, value)
        return output.transpose(1, 2)

    def _window_mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """True where a query may look; None where it may look at all keys before it."""
        if self.window is None or length <= self.window:
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance < self.window)

    def _explicit_attention(self, query, key, value):
        """What scaled_dot_product_attention has no arguments for, at the price of the scores' memory."""
        length = query.size(2)
        mask = self._window_mask(length, query.device)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        scale = query.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = query @ key.transpose(-1, -2) * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.softmax_offset is not None:
            sink = self.softmax_offset[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., :length]
        return weights.to(value.dtype) @ value


def normalized(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: TransformerConfig
) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dimension, whichever the model has."""
    shape, epsilon = (x.size(-1),), config.layernorm_epsilon
    if config.layernorm_zero_centered_gamma:
        # In float32, as the weights' distance from one is what is stored, and bfloat16 would round 1 + w.
        exact = None if bias is None else bias.float()
        return _norm(x.float(), shape, weight.float() + 1, exact, epsilon, config).to(x.dtype)
    return _norm(x, shape, weight, bias, epsilon, config)


def _norm(x, shape, weight, bias, epsilon, config):
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, shape, weight, epsilon)
    return F.layer_norm(x, shape, weight, bias, epsilon)


def _norm_parameters(config: TransformerConfig, width: int) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight = nn.Parameter(torch.ones(width, dtype=config.params_dtype))
    if config.normalization == "RMSNorm":
        return weight, None
    return weight, nn.Parameter(torch.zeros(width, dtype=config.params_dtype))


class Norm(nn.Module):
    """The model's norm as a module of its own."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_):
        super().__init__()
        self.config = config
        self.weight, self.bias = _norm_parameters(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension of `x`."""
        return normalized(x, self.weight, self.bias, self.config)


class AllHeadsNorm(Norm):
    """A q/k norm over the channels of all heads together, as in OLMoE."""

    def __init__(self, config: TransformerConfig, hidden_size: int, *, num_heads: int, **_):
        """`hidden_size`: channels of one head."""
        super().__init__(config, num_heads * hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., heads, D]."""
        return super().forward(x.flatten(-2)).unflatten(-1, x.shape[-2:])


class LocalLayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm and the linear layer after it as one module, as Transformer Engine has them.

    Bridge's tables for most model families know the norm's weight only as part of such a module, and recognise the
    module by a class name that ends like this one.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(config, input_size)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of `x` [T, 1, H], which is what an adapter of this layer sees."""
        return normalized(x, self.layer_norm_weight, self.layer_norm_bias, self.config)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear layer alone."""
        return super().forward(x)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and, where it is left to the caller to add, bias."""
        return self.project(self.normalize(x))


class PostNormRowParallelLinear(RowParallelLinear):
    """A linear layer that keeps, under the name Bridge has for it, the weight of the norm after it.

    It does not apply the norm: an adapter's delta comes in between, so the module that owns both does.
    """

    # Without these Bridge would take the layer, by its name, for a norm, which is whole on every rank.
    tensor_model_parallel = True
    partition_dim = 1

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = Norm(config, output_size)


class Attention(SelfAttention):
    """Self-attention over packed sequences. It may normalise its output, and choose between two rotary embeddings."""

    def __init__(self, *args, two_rotary_bases: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._two_rotary_bases = two_rotary_bases
        no_rotary = self.config.no_rope_freq
        self._has_rotary = not (no_rotary and no_rotary[self.layer_number - 1])
        # Kept here as well, since adapters put another module in linear_proj's place.
        self.post_norm = getattr(self.linear_proj, "post_layernorm", None)

    def forward(self, hidden_states, attention_mask, *, rotary_pos_emb=None, packed_seq_params: Packed, **_):
        """`hidden_states` [T, 1, H]; `rotary_pos_emb`: what `kernels.rotate` takes, with two bases those of the layers
        with a sliding window, then the others'. Returns output and, where it is left to the caller to add, bias.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed = mixed[:, 0].unflatten(-1, (groups, -1, width))
        query, key, value = mixed.split([mixed.size(2) - 2, 1, 1], dim=2)
        if self.config.qk_layernorm:
            shape = query.shape
            query, key = self.q_layernorm(query.flatten(1, 2)).view(shape), self.k_layernorm(key[:, :, 0])[:, :, None]
        if self._two_rotary_bases:
            rotary_pos_emb = rotary_pos_emb[0 if self.core_attention.window else 1]
        if rotary_pos_emb is not None and self._has_rotary:
            interleaved = self.config.rotary_interleaved
            query, key = (kernels.rotate(heads, rotary_pos_emb, interleaved) for heads in (query, key))
        output, bias = self.linear_proj(
            self.core_attention(query.flatten(1, 2), key[:, :, 0], value[:, :, 0], packed_seq_params)
        )
        return output if self.post_norm is None else self.post_norm(output), bias


class DenseMLP(MLP):
    """An MLP that may normalise its output."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Kept here as well, as in Attention.
        self.post_norm = getattr(self.linear_fc2, "post_layernorm", None)
        self._is_swiglu = self.config.gated_linear_unit and self.activation_func is F.silu

    def forward(self, hidden_states, *args, **kwargs):
        """As MLP's."""
        if self._is_swiglu and not self.config.add_bias_linear:
            output, bias = self.linear_fc2(kernels.swiglu(self.linear_fc1(hidden_states)[0]))
        else:
            output, bias = super().forward(hidden_states, *args, **kwargs)
        return output if self.post_norm is None else self.post_norm(output), bias


class ExpertLinear(nn.Module):
    """One linear layer per expert. Bridge knows the tensors as weight0, weight1, ..., bias0, bias1, ..."""

    # Bridge asks these how tensor parallelism cuts the weights.
    tensor_model_parallel = True

    def __init__(self, num_experts: int, input_size: int, output_size: int, config: TransformerConfig, partition_dim):
        """Sizes are this rank's; `partition_dim`: 0 where ranks share the outputs, 1 where they share the inputs."""
        super().__init__()
        self.partition_dim = partition_dim
        for expert in range(num_experts):
            weight = torch.empty(output_size, input_size, dtype=config.params_dtype)
            bias = torch.empty(output_size, dtype=config.params_dtype) if config.add_bias_linear else None
            self.register_parameter(f"weight{expert}", nn.Parameter(weight))
            self.register_parameter(f"bias{expert}", None if bias is None else nn.Parameter(bias))

    def forward(self, x: torch.Tensor, tokens_per_expert: list[int]) -> torch.Tensor:
        """`x` [tokens, in], sorted by expert; returns [tokens, out]."""
        stretches = x.split(tokens_per_expert)
        return torch.cat(
            [
                F.linear(stretch, getattr(self, f"weight{expert}"), getattr(self, f"bias{expert}"))
                for expert, stretch in enumerate(stretches)
            ]
        )


class Experts(MegatronModule):
    """The frozen, gated experts of a mixture-of-experts layer. No token is dropped, and none sees another."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, *, pg_collection, **_):
        super().__init__(config=config)
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = ExpertLinear(num_local_experts, config.hidden_size, 2 * width, config, partition_dim=0)
        self.linear_fc2 = ExpertLinear(num_local_experts, width, config.hidden_size, config, partition_dim=1)

    def forward(self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor):
        """`hidden_states` [tokens, H], sorted by expert; `probs` [tokens]. Returns output [tokens, H] and no bias."""
        counts = tokens_per_expert.tolist()
        gate, up = self.linear_fc1(hidden_states, counts).chunk(2, dim=-1)
        limit = self.config.activation_func_clamp_value
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        activated = self.config.activation_func(gate) * (up + self.config.glu_linear_offset)
        return self.linear_fc2(activated, counts) * probs[:, None].to(hidden_states.dtype), None


def decoder_spec(
    config: TransformerConfig, vp_stage: int | None = None, *, family: Family, windows: Sequence[int | None]
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage. `windows`: see PackedAttention, for each layer of the whole model."""
    first = get_transformer_layer_offset(config, vp_stage)
    local = range(first, first + get_num_layers_to_build(config, vp_stage))
    specs = [_layer_spec(config, family, windows[layer], _has_experts(config, layer)) for layer in local]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    if config.num_moe_experts is None:
        return False
    if isinstance(config.moe_layer_freq, int):
        return layer % config.moe_layer_freq == 0
    return bool(config.moe_layer_freq[layer])


def _layer_spec(config: TransformerConfig, family: Family, window: int | None, has_experts: bool) -> ModuleSpec:
    before = LocalLayerNormColumnParallelLinear if family.norms != "after" else ColumnParallelLinear
    after = PostNormRowParallelLinear if family.norms != "before" else RowParallelLinear
    if has_experts:
        shared = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = MoESubmodules(experts=Experts, shared_experts=partial(SharedExpertMLP, submodules=shared))
        mlp = partial(MoELayer, submodules=experts)
    else:
        mlp = partial(DenseMLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=before, linear_fc2=after))
    attention = SelfAttentionSubmodules(
        linear_qkv=before,
        core_attention=partial(PackedAttention, window=window, softcap=getattr(config, "attn_logit_softcapping", None)),
        linear_proj=after,
        q_layernorm=_qk_norm(config, family, config.num_attention_heads),
        k_layernorm=_qk_norm(config, family, config.num_query_groups),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=Attention,
                params={"attn_mask_type": AttnMaskType.causal, "two_rotary_bases": family.two_rotary_bases},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            # The linear layers of an MLP bring their norm; a router and its experts share one.
            pre_mlp_layernorm=Norm if has_experts else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _qk_norm(config: TransformerConfig, family: Family, num_heads: int):
    if not config.qk_layernorm:
        return IdentityOp
    return partial(AllHeadsNorm, num_heads=num_heads) if family.qk_norm_over_all_heads else Norm
