"""The network of ChatGLM-6B, top to bottom.

What is unusual (GLM, arXiv 2103.10360; GLM-130B, arXiv 2210.02414):

* The prompt, everything before `<sop>`, attends to itself in both directions; the answer is causal.
* Two position streams: the place in the prompt and the place in the answer, each rotating half of every head.
* The residual adds the *normalised* input, scaled by alpha (DeepNorm's place of the norm, without its post-norm).
* Queries, keys and values are interleaved per head in one projection.
"""

import copy
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, GrowingCache
from .chat import ChatMixin
from .configuration_chatglm import ChatGLMConfig
from .fused import FusedLayer
from .generation import ChatGLMGenerationMixin, check_hidden_mask
from .quantization import QuantizedModule, embedding_class, fast_kernels, linear_class, quantize_model, tie_scales

logger = logging.getLogger(__name__)

# The constant 28 belongs to the architecture: the residual factor does not follow config.num_layers.
ALPHA = (2 * 28) ** 0.5
PREFIX_DROPOUT = 0.1
PREFIX = "transformer.prefix_encoder."  # in front of its names in a state dict
MASKED_SCORE = -10000.0
OWN_ATTENTION = "chatglm"  # the attn_implementation of who asks for none


@lru_cache
def inverse_frequencies(rotary_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Angle per position of each channel pair, [rotary_dim // 2]. Source: RoFormer (arXiv 2104.09864), 3.2.2."""
    exponents = torch.arange(0, rotary_dim, 2, device="cpu", dtype=torch.float32) / rotary_dim
    # Rounded to float16 whatever the dtype: the released weights were trained with these values.
    return (1.0 / 10000.0**exponents).to(torch.float16).to(device=device, dtype=dtype)


def rotary_embedding(
    position_ids: torch.Tensor, rotary_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position, each [*position_ids.shape, rotary_dim] in dtype.

    In half precision positions, frequencies and angles are rounded too, as in the published use of the weights.
    """
    angles = position_ids.to(dtype)[..., None] * inverse_frequencies(rotary_dim, dtype, position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head by its positions.

    states    [..., batch, heads, seq_len, head_dim], queries and keys
    cos, sin  [batch, 1, seq_len, streams, head_dim // streams]: stream i rotates the i-th part of the head

    Returns the rotated states, same shape and dtype. Source: GLM, "2D Positional Encoding".
    """
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    parts = states.unflatten(-1, cos.shape[-2:])  # [..., batch, heads, seq_len, streams, head_dim // streams]
    first, second = parts.chunk(2, dim=-1)  # channel i turns with channel i + half, inside its part
    return (parts * cos).addcmul_(torch.cat((-second, first), dim=-1), sin).flatten(-2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: output [batch, query_len, heads, head_dim] and weights [batch, heads, query_len, kv_len].

    attention_mask is bool (True = visible) or additive. A row that sees nothing gets uniform weights, never NaN.
    """
    # Scores are divided by layer + 1 in the model dtype and multiplied back in float32: float16 overflows otherwise.
    layer_number = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / layer_number), key.transpose(2, 3))
    if attention_mask is not None:
        hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
        scores = scores.masked_fill(hidden, MASKED_SCORE)
    weights = torch.softmax(scores.float() * layer_number, dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def decode_kernel(config: ChatGLMConfig) -> Callable | None:
    """The C kernel for one query per head on a CPU, or None.

    Quantised models alone use it: it comes with their other kernels, and the rest need no compiler.
    """
    kernels = fast_kernels() if config.quantization_bit else None
    backend = kernels and kernels.cpu_backend()
    return backend and backend.attention


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Torch's sdpa except where a CPU has something better; shapes as in `eager_attention_forward`.

    On a CPU half precision is computed in float32, which is faster there (benchmarks/README.md), and `decode_kernel`
    takes steps of one token; it reads keys and values narrower than the query as they are.
    Weights are given if output_attentions asks for them, else None.
    """
    if kwargs.get("output_attentions"):
        key, value = key.to(query.dtype), value.to(query.dtype)
        return eager_attention_forward(module, query, key, value, attention_mask, scaling)
    on_cpu = query.device.type == "cpu"
    dtype = torch.promote_types(query.dtype, torch.float32) if on_cpu else query.dtype
    step = on_cpu and query.shape[2] == 1 and dtype == torch.float32 and not torch.is_grad_enabled()
    kernel = decode_kernel(module.config) if step else None
    if kernel is not None:
        mask = attention_mask if attention_mask is None else attention_mask.expand(query.shape[0], 1, 1, -1)
        output = kernel(query.to(dtype), key, value, scaling, mask)
    else:
        states = query.to(dtype), key.to(dtype), value.to(dtype)
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, attention_mask, scaling=scaling, **kwargs)
    return output.to(query.dtype), None


AttentionInterface.register(OWN_ATTENTION, attention_forward)
AttentionMaskInterface.register(OWN_ATTENTION, sdpa_mask)


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # the mask says everything; without one, nothing is hidden
        linear = linear_class(config.quantization_bit)
        self.query_key_value = linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, rotary, attention_mask=None, prefix=None, past_key_values=None, **kwargs):
        """Returns the attention output [batch, seq_len, hidden_size] and the weights (None with sdpa)."""
        batch, seq_len, _ = hidden_states.shape
        mixed = self.query_key_value(hidden_states).view(batch, seq_len, self.num_heads, 3, -1)
        mixed = mixed.permute(3, 0, 2, 1, 4)  # [3, batch, heads, seq_len, head_dim]
        query, key = apply_rotary(mixed[:2], *rotary)
        output, weights = self.attend(query, key, mixed[2], attention_mask, prefix, past_key_values, **kwargs)
        return self.dense(output), weights

    def attend(self, query, key, value, attention_mask, prefix, past_key_values, **kwargs):
        """What `forward` returns, but for `dense`: query, key and value are [batch, heads, seq_len, head_dim]."""
        if prefix is not None:  # [2, batch, heads, pre_seq_len, head_dim]; prefix keys are not rotated
            key = torch.cat((prefix[0].to(key.dtype), key), dim=2)
            value = torch.cat((prefix[1].to(value.dtype), value), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return output.flatten(2), weights


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, no gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        linear = linear_class(config.quantization_bit)
        self.dense_h_to_4h = linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.dense_h_to_4h(hidden_states)
        # In place where nothing is learned: a second copy is 64 MiB for 1024 tokens of ChatGLM-6B. A hook that keeps
        # what dense_h_to_4h gave then finds it after the GELU.
        gelu = nn.functional.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return self.dense_4h_to_h(gelu(inner, approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One transformer layer."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)
        self._fused = FusedLayer(ALPHA, SelfAttention, MLP)

    def forward(self, hidden_states, rotary, attention_mask=None, prefix=None, past_key_values=None, **kwargs):
        """Returns the new hidden states [batch, seq_len, hidden_size]."""
        fused, _weights = self._fused.get(self, hidden_states)  # the weights live at least as long as their name
        if fused is not None:
            return self._fused_forward(fused, hidden_states, rotary, attention_mask, prefix, past_key_values, **kwargs)
        # The residual starts from the normalised input; the released weights were trained this way.
        normed = self.input_layernorm(hidden_states)
        attention_output, _ = self.attention(
            normed, rotary, attention_mask, prefix=prefix, past_key_values=past_key_values, **kwargs
        )
        normed = self.post_attention_layernorm(torch.add(attention_output, normed, alpha=ALPHA))
        return torch.add(self.mlp(normed), normed, alpha=ALPHA)

    def _fused_forward(self, fused, hidden_states, rotary, attention_mask, prefix, past_key_values, **kwargs):
        """The same by CPU kernels: all of it for one new token, what lies around the attention for a prompt."""
        attention, (batch, seq_len, _) = self.attention, hidden_states.shape
        rotary = [angles.expand(batch, -1, -1, -1, -1) for angles in rotary]  # one row of positions may serve all
        own_attention = attention.config._attn_implementation == OWN_ATTENTION and not kwargs.get("output_attentions")
        if seq_len == 1 and own_attention and isinstance(past_key_values, GrowingCache):
            room = past_key_values.extend(batch, 1, attention.layer_idx)
            if room is not None:
                mask = attention_mask if attention_mask is None else attention_mask.expand(batch, 1, 1, -1)
                return fused.step(hidden_states, *rotary, *room, mask)
        normed, mixed = fused.start(hidden_states, *rotary)
        query, key, value = mixed.permute(3, 0, 2, 1, 4).unbind()  # [batch, heads, seq_len, head_dim]
        attended, _ = attention.attend(query, key, value, attention_mask, prefix, past_key_values, **kwargs)
        del mixed, query, key, value  # 48 MiB for 1024 tokens of ChatGLM-6B
        return fused.finish(attended, normed)


class PrefixEncoder(nn.Module):
    """Trainable keys and values in front of every layer. Source: P-Tuning v2 (arXiv 2110.07602), section 3.

    forward(batch, dtype) gives [num_layers, 2, batch, heads, pre_seq_len, head_dim]: key and value of each layer.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        width = config.num_layers * 2 * config.hidden_size
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, width),
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, width)
        self.dropout = nn.Dropout(PREFIX_DROPOUT)

    def forward(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        config = self.config
        prefix = self.embedding.weight  # [pre_seq_len, width]
        if config.prefix_projection:
            prefix = self.trans(prefix)
        prefix = prefix.to(dtype).expand(batch, -1, -1)
        prefix = prefix.view(
            batch, config.pre_seq_len, config.num_layers, 2, config.num_attention_heads, config.head_dim
        )
        return self.dropout(prefix).permute(2, 3, 0, 4, 1, 5)

    @torch.no_grad()
    def project_once(self) -> None:
        """Keep what the projection makes of the embedding, and nothing else: the same prefix, for use alone."""
        if self.config.prefix_projection:
            self.embedding = nn.Embedding.from_pretrained(self.trans(self.embedding.weight))
            del self.trans
            self.config.prefix_projection = False


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the family."""

    config: ChatGLMConfig
    base_model_prefix = "transformer"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("ChatGLMBlock",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ("prefix_encoder",)
    # Published checkpoints carry the rotary frequencies; they are computed, never loaded.
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$",)
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": SelfAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers; what `freeze` has frozen stays so when it is loaded.

        Raises ValueError if the files hold floats where the configuration says quantised weights, or the reverse, or a
        P-Tuning prefix alone.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model.config.pre_seq_len and any(key.endswith("final_layernorm.weight") for key in info["missing_keys"]):
            raise ValueError(
                f"{model.config.name_or_path} holds a P-Tuning prefix, not a whole model: load the model that it was "
                "trained on, and put the prefix onto it with chatglm.adapters.apply_adapter"
            )
        for kind, files_are in (("missing_keys", "not quantised"), ("unexpected_keys", "quantised")):
            scales = sorted(key for key in info[kind] if key.endswith("weight_scale"))
            if scales:
                config = model.config
                raise ValueError(
                    f"{scales[0].removesuffix('_scale')} is {files_are} in the files of {config.name_or_path}, but "
                    f"the configuration says quantization_bit {config.quantization_bit} and quantization_embeddings "
                    f"{config.quantization_embeddings}: load it as it is stored; model.quantize makes it quantised"
                )
        model.freeze()
        return (model, info) if output_loading_info else model

    def freeze(self) -> None:
        """Stop gradients to quantised weights and their scales, and, with a prefix encoder, to everything else."""
        for name, parameter in self.named_parameters():
            frozen = self.config.pre_seq_len is not None and "prefix_encoder" not in name
            if frozen or name.endswith("weight_scale"):
                parameter.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; a quantised or narrower embedding has a dtype of its own."""
        return self.base_model.final_layernorm.weight.dtype

    def _get_dtype_plan(self, dtype):
        return super()._get_dtype_plan(dtype) | {"weight_scale": None}  # loaded as it is stored

    def _init_weights(self, module):
        if not isinstance(module, QuantizedModule):  # made of zeros, to be loaded
            super()._init_weights(module)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers, with `attention_forward` where that would choose sdpa by itself."""
        chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return OWN_ATTENTION if requested_attention is None and chosen == "sdpa" else chosen

    def new_cache(self) -> GrowingCache:
        """An empty cache, as forward and generate make it.

        Where `decode_kernel` will read it, float32 keys and values are stored in float16, the precision that the
        released weights were used in.
        """
        own = self.device.type == "cpu" and self.config._attn_implementation == OWN_ATTENTION
        return GrowingCache(torch.float16 if own and decode_kernel(self.config) is not None else None)

    def get_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Positions of whole rows: [batch, 2, seq_len], or [batch, seq_len] for a model with one stream.

        input_ids       [batch, seq_len], each row with `<sop>` and with `[gMASK]` or `[MASK]`
        attention_mask  [batch, seq_len], 0 = padding; positions start behind the padding on the left

        Raises ValueError for a row without those tokens.
        """
        config = self.config
        in_answer = is_answer(input_ids, config)
        has_gmask = (input_ids == config.gmask_token_id).any(-1, keepdim=True)
        mask_token = torch.where(has_gmask, config.gmask_token_id, config.mask_token_id)
        is_mask_token = input_ids == mask_token
        if not bool((in_answer[:, -1:] & is_mask_token.any(-1, keepdim=True)).all()):
            raise ValueError(
                f"every row of input_ids needs <sop> (id {config.bos_token_id}), and [gMASK] or [MASK] "
                f"(id {config.gmask_token_id} or {config.mask_token_id}): truncate text, not these tokens"
            )
        places = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
        answer_places = in_answer.cumsum(-1)
        if attention_mask is not None:
            places = (places - (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)).clamp(min=0)
        gap = places.gather(-1, is_mask_token.int().argmax(-1, keepdim=True))  # place of the first mask token
        if config.position_encoding_2d:
            return torch.stack((torch.where(in_answer, gap, places), answer_places), dim=1)
        return torch.where(in_answer & ~has_gmask, gap, places)


def is_answer(input_ids: torch.Tensor, config: ChatGLMConfig) -> torch.Tensor:
    """True from the first `<sop>` on, [batch, seq_len]."""
    return (input_ids == config.bos_token_id).cumsum(-1) > 0


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, layers and final norm, with the prefix encoder in front of the layers if config.pre_seq_len is set."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = embedding_class(config.embedding_bits)(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()
        self.freeze()  # P-Tuning trains the prefix alone

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        """Replace the token embedding."""
        self.word_embeddings = value

    def _visible(self, input_ids, inputs_embeds, attention_mask, past_key_values, past_length) -> torch.Tensor | None:
        """Mask for the attention function: what each query may see, None if everything."""
        if attention_mask is None and inputs_embeds.shape[1] == 1:
            return None  # the usual decode step
        pre_seq_len = self.config.pre_seq_len or 0
        if attention_mask is not None and attention_mask.dim() == 4:
            check_hidden_mask(attention_mask)
            return nn.functional.pad(~attention_mask, (pre_seq_len, 0), value=True)
        blocks = None
        if past_length == 0:
            if input_ids is None:
                raise ValueError("inputs_embeds without input_ids needs a 4-D attention_mask: <sop> cannot be found")
            # One block for the prompt, seen both ways; -1 stays causal.
            blocks = torch.where(is_answer(input_ids, self.config), -1, 0)
        elif attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (pre_seq_len, 0), value=1)
        visible = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            block_sequence_ids=blocks,
            allow_is_causal_skip=False,
            **{CACHE_NAME: past_key_values},
        )
        if visible is not None and past_length == 0 and pre_seq_len:
            visible = nn.functional.pad(visible, (pre_seq_len, 0), value=visible.dtype == torch.bool)
        return visible

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, [batch, seq_len, hidden_size].

        input_ids        [batch, seq_len]
        position_ids     [batch, 2, seq_len]; made from input_ids when absent, required once the cache holds tokens
        attention_mask   [batch, seq_len], 1 = real token, 0 = padding; or bool [batch, 1, query, key], True = hidden
        past_key_values  keys and values of earlier tokens (behind the prefix, if there is one)
        cache            the same, as transformers calls it since 5.24

        Raises ValueError if positions are missing and cannot be made, for other shapes, and for a static cache.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if input_ids is None and inputs_embeds is None:
            raise ValueError("either input_ids or inputs_embeds must be given")
        if inputs_embeds is None:
            table = self.word_embeddings.weight
            moved_by_hook = hasattr(self.word_embeddings, "_hf_hook")  # of accelerate, in a model split over devices
            if table.device != input_ids.device and not table.is_meta and not moved_by_hook:
                raise ValueError(
                    f"input_ids are on {input_ids.device} and the model is on {table.device}: "
                    "move them with input_ids.to(model.device)"
                )
            # A quantised or narrower table has a dtype of its own.
            inputs_embeds = self.word_embeddings(input_ids).to(self.final_layernorm.weight.dtype)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError(f"the cache must grow, got {type(past_key_values).__name__}: use a DynamicCache or none")
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if input_ids is None or past_length:
                raise ValueError("position_ids must be given with inputs_embeds or when past_key_values holds tokens")
            padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            position_ids = self.get_position_ids(input_ids, padding)
        streams = 2 if self.config.position_encoding_2d else 1
        if position_ids.dim() == 2 and streams == 1:
            position_ids = position_ids[:, None]  # [batch, streams, seq_len]
        if position_ids.dim() != 3 or position_ids.shape[1] != streams:
            expected = "[batch, 2, seq_len]" if streams == 2 else "[batch, seq_len]"
            raise ValueError(f"position_ids must be {expected}, got {list(position_ids.shape)}")

        visible = self._visible(input_ids, inputs_embeds, attention_mask, past_key_values, past_length)
        places = position_ids.transpose(1, 2).unsqueeze(1)  # [batch, 1, seq_len, streams]
        # bfloat16 cannot tell positions above 256 apart; the published use of the weights, float16 or float32, is kept.
        dtype = torch.float32 if inputs_embeds.dtype == torch.bfloat16 else inputs_embeds.dtype
        rotary = rotary_embedding(places, self.config.head_dim // streams, dtype)
        prefix = [None] * self.config.num_layers
        if self.config.pre_seq_len is not None and past_length == 0:
            prefix = self.prefix_encoder(inputs_embeds.shape[0], inputs_embeds.dtype)

        hidden_states = inputs_embeds
        del inputs_embeds  # 16 MiB for 1024 tokens of ChatGLM-6B
        for layer, layer_prefix in zip(self.layers, prefix, strict=True):
            hidden_states = layer(
                hidden_states, rotary, visible, layer_prefix, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states),
            **{CACHE_NAME: past_key_values},
        )


def write_prefix(folder: Path, tensors: dict, config: ChatGLMConfig, generation_config, published=False) -> None:
    """Write the prefix among the tensors, in float32, and what belongs to it, but no code, into a folder.

    published  its file is pytorch_model.bin, as the original has it, not model.safetensors
    """
    prefix = {
        name: tensor.to(torch.float32, copy=True).contiguous()
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    vars(config).pop("auto_map", None)
    config.to_json_file(folder / "config.json")
    generation_config.save_pretrained(folder)
    if published:
        torch.save(prefix, folder / "pytorch_model.bin")
    else:
        save_file(prefix, folder / "model.safetensors", metadata={"format": "pt"})


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, ChatMixin, ChatGLMGenerationMixin):
    """ChatGLM-6B with its head: logits, loss, generation and chat."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = linear_class(config.embedding_bits)(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze()
        if config.embedding_bits:
            tie_scales(self)
            self.tie_weights(recompute_mapping=False)

    def quantize(self, bits: int, quantize_embeddings: bool = False, **kwargs):
        """Quantise the linear layers in place to 4 or 8 bits, one at a time, and return the model.

        quantize_embeddings  embedding and head too
        kwargs               the original's use_quantization_cache and empty_init, which change nothing here

        0 bits change nothing, and the same bits as before do not either. Raises ValueError for other bits than 4 and 8,
        for a model that has other bits already, and for widths that do not fit.
        """
        unknown = kwargs.keys() - {"use_quantization_cache", "empty_init"}
        if unknown:
            raise TypeError(f"quantize takes bits and quantize_embeddings, got {', '.join(sorted(unknown))} as well")
        config = self.config
        if bits == 0:
            return self
        if config.quantization_bit not in (0, bits):
            raise ValueError(
                f"this model is quantised to {config.quantization_bit} bits already and cannot be changed to {bits}: "
                "load the unquantised checkpoint for that"
            )
        if quantize_embeddings and config.embedding_bits not in (0, bits):
            raise ValueError(
                f"the embedding is quantised to {config.embedding_bits} bits already and cannot be changed to {bits}: "
                "leave quantize_embeddings out, or load the unquantised checkpoint"
            )
        layer_bits = bits if config.quantization_bit == 0 else 0
        embedding_bits = bits if quantize_embeddings and not config.embedding_bits else 0
        if not layer_bits and not embedding_bits:
            logger.warning("this model is quantised to %d bits already: nothing to do", bits)
        quantize_model(self, layer_bits, embedding_bits)
        if self._keys_to_ignore_on_save:
            self._save_prefix_alone()  # scales have come to the names
        return self

    def add_prefix_encoder(self, pre_seq_len: int, prefix_projection: bool = False) -> None:
        """Put a fresh P-Tuning v2 prefix in front of the layers: from now on it alone learns, and it alone is saved.

        The encoder is in float32, on the device of the embedding. `save_pretrained` then writes config.json and the
        encoder's tensors, the folder that `adapters.apply_adapter` reads; the rest stays what it was in the base.

        Raises ValueError for a length below 1, and for a model that has a prefix or another adapter already.
        """
        config = self.config
        self.check_no_adapter()
        if pre_seq_len < 1:
            raise ValueError(f"pre_seq_len must be a positive number of tokens, got {pre_seq_len}")
        config.pre_seq_len, config.prefix_projection = pre_seq_len, prefix_projection
        encoder = PrefixEncoder(config).float()  # from N(0, 1), as published; keys and values have about that size
        self.transformer.prefix_encoder = encoder.to(self.get_input_embeddings().weight.device).train(self.training)
        self.freeze()
        self._save_prefix_alone()

    def check_no_adapter(self) -> None:
        """Raises ValueError if the model has a prefix or a LoRA adapter, on top of which no other can come."""
        if self.config.pre_seq_len is not None:
            raise ValueError(f"this model has a prefix of {self.config.pre_seq_len} tokens already: use it without one")
        if getattr(self, "peft_config", None):  # as peft leaves it
            raise ValueError("this model has a LoRA adapter already: use it without one, or merge the adapter")

    def _save_prefix_alone(self) -> None:
        # Trainer, too, knows by this list that what a checkpoint lacks is not lost.
        names = [name for name, _ in self.named_parameters(remove_duplicate=False)]
        self._keys_to_ignore_on_save = {name for name in names if "prefix_encoder" not in name}

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        """As in transformers. Raises ValueError if the embedding is quantised."""
        if self.config.embedding_bits and (pad_to_multiple_of or new_num_tokens not in (None, self.config.vocab_size)):
            raise ValueError(
                "a quantised embedding cannot be resized: resize the unquantised model, then quantise it with "
                "quantize_embeddings"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """As in transformers; the folder names its code for every Auto class of this model.

        After `add_prefix_encoder` it holds the prefix alone, and no code. Raises ValueError with a LoRA adapter, which
        peft's own model saves, unless it is merged.
        """
        if getattr(self, "peft_config", None):
            raise ValueError("this model has a LoRA adapter: save that through peft's model, or merge it before")
        if self._keys_to_ignore_on_save:
            if is_main_process:
                tensors = state_dict or self.transformer.prefix_encoder.state_dict(prefix=PREFIX)
                write_prefix(Path(save_directory), tensors, self.config, self.generation_config)
            return
        source = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), source)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, seq_len, vocab_size], and the mean loss if labels [batch, seq_len] are given (-100 = ignored).

        logits_to_keep > 0 computes only the last that many positions. The other arguments are those of ChatGLMModel.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs).to(hidden_states.dtype)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
