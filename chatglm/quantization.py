"""INT8 and INT4 weights: the arithmetic in plain torch, which is the truth, and the modules that hold them.

What is unusual:

* A row has one scale; INT4 puts two neighbouring columns into one byte, the even one in the high four bits.
* Checkpoints and state dicts always hold these published bytes. On a CPU the fast kernels keep them in another order,
  so that there is one copy in memory; state dicts, copies, casts and moves get the published order back, and only
  `weight` itself is what lies in memory.
* `kernels` is looked up, never required: a folder loaded with trust_remote_code brings this file alone.
"""

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable

LAYERS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
ACTIVATIONS = ("int8", "int16", "bf16", "float32")
# Below this width 8-bit activations change answers (benchmarks/README.md), and 16-bit ones cost little.
NARROW = 2048
# Matrix entries handled at a time, which bounds what a large matrix needs beside itself. On a CPU, blocks that stay in
# its cache make the plain product of one row ten times as fast.
BLOCK, CPU_BLOCK = 1 << 24, 1 << 19

_packing = threading.Lock()


# The truth ------------------------------------------------------------------------------------------------------------


def check_bits(bits: int, in_features: int = 0) -> None:
    """Raises ValueError unless bits is 4 or 8 and rows of in_features entries can be stored in them."""
    if bits not in (4, 8):
        raise ValueError(f"weights are quantised to 4 or 8 bits, got {bits}")
    if bits == 4 and in_features % 2:
        raise ValueError(f"INT4 stores two columns per byte, so the width must be even, got {in_features}: use 8 bits")


def quantize_weight(
    weight: torch.Tensor, bits: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored integers [out, in * bits // 8], int8, and scales [out] of a matrix [out, in].

    The arithmetic, and so the dtype of the scales, is `dtype`; by default that of the weight, and float32 for bfloat16.
    The published checkpoints were made in float16, which is why the exact bytes depend on it.

    Raises ValueError for other bits than 4 or 8, an odd width with 4 bits, and entries that are not finite.
    """
    check_bits(bits, weight.shape[1])
    dtype = dtype or scale_dtype(weight.dtype)
    largest = 2 ** (bits - 1) - 1
    packed = torch.empty(weight.shape[0], weight.shape[1] * bits // 8, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    for rows in _row_blocks(weight, weight.shape[1]):
        block = weight[rows].to(dtype)
        scale[rows] = torch.maximum(block.amax(dim=1), -block.amin(dim=1)).abs() / largest
        divisor = torch.where(scale[rows] == 0, 1, scale[rows])[:, None]  # a row of zeros has scale 0
        integers = (block / divisor).round_().clamp_(-largest, largest).to(torch.int8)
        packed[rows] = integers if bits == 8 else (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)
    if not bool(scale.isfinite().all()):
        raise ValueError("a matrix with NaN or infinite entries cannot be quantised: the weights are damaged")
    return packed, scale


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a matrix of that dtype is quantised in, and so the dtype of its scales."""
    return torch.float16 if dtype == torch.float16 else torch.float32


def unpack_weight(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The signed integers of stored bytes, int8: [..., in * bits // 8] -> [..., in]."""
    if bits == 8:
        return packed
    even, odd = packed >> 4, ((packed & 15) ^ 8) - 8
    return torch.stack((even, odd), dim=-1).flatten(-2)


def dequantize_weight(packed: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [..., in] in dtype that stored bytes [..., in * bits // 8] and scales [...] stand for."""
    wide = torch.promote_types(scale.dtype, dtype)
    return (unpack_weight(packed, bits).to(wide) * scale.to(wide)[..., None]).to(dtype)


class _DequantizedProduct(torch.autograd.Function):
    """x W^T. The matrix is made for the product and made again for the gradient of x; it takes no gradient itself."""

    @staticmethod
    def forward(ctx, x, packed, scale, bits):
        ctx.save_for_backward(packed, scale)
        ctx.bits, ctx.dtype = bits, x.dtype
        parts = [
            nn.functional.linear(x, dequantize_weight(packed[rows], scale[rows], bits, x.dtype))
            for rows in _row_blocks(packed, x.shape[-1])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad_output):
        packed, scale = ctx.saved_tensors
        grad = sum(
            grad_output[..., rows] @ dequantize_weight(packed[rows], scale[rows], ctx.bits, grad_output.dtype)
            for rows in _row_blocks(packed, packed.shape[1] * 8 // ctx.bits)
        )
        return grad.to(ctx.dtype), None, None, None


def linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """x [..., in] times the dequantised matrix, plus bias: [..., out] in the dtype of x; x and bias get gradients.

    packed [out, in * bits // 8] and scale [out] as `quantize_weight` gives them.
    """
    product = _DequantizedProduct.apply(x, packed, scale, bits)
    return product if bias is None else product + bias


class _KernelProduct(torch.autograd.Function):
    """What `CpuKernels.linear` gives, with gradients for x and bias: those of the product before x was rounded."""

    @staticmethod
    def forward(ctx, x, bias, packed, scale, bits, activations, kernels):
        ctx.save_for_backward(packed, scale)
        ctx.bits, ctx.kernels = bits, kernels
        return kernels.linear(x, packed, scale, bias, bits, activations)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        packed, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.kernels.linear_back(grad_output, packed, scale, ctx.bits)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, None, None, None, None


def _row_blocks(matrix: torch.Tensor, columns: int) -> list[slice]:
    step = max(1, (CPU_BLOCK if matrix.device.type == "cpu" else BLOCK) // max(1, columns))
    return [slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step)]


# Modules --------------------------------------------------------------------------------------------------------------


class QuantizedModule(nn.Module):
    """A matrix in 4 or 8 bits: `weight` int8 and `weight_scale`, one scale per row. Neither takes gradients.

    The order of the bytes in memory belongs to the Parameter, which an embedding and a head may share: its attribute
    `backend` names the CPU kernels that have laid it out, and is absent while the bytes are in published order.
    """

    def _make_weight(self, rows: int, columns: int, bits: int, device, dtype) -> None:
        check_bits(bits, columns)
        self.bits = bits
        self.weight = nn.Parameter(
            torch.zeros(rows, columns * bits // 8, dtype=torch.int8, device=device), requires_grad=False
        )
        scale = torch.zeros(rows, dtype=scale_dtype(dtype or torch.get_default_dtype()), device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def _fill(self, weight: torch.Tensor) -> None:
        """Take over a float matrix; one on the meta device has nothing to take."""
        if not weight.is_meta:
            packed, scale = quantize_weight(weight.detach(), self.bits)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def stored(self):
        """The bytes as they lie in memory, and the kernels that have laid them out, None for published order."""
        return stored_together([self])[0]

    def pack(self):
        """Lay the weight out for the CPU kernels of this machine, if there are any for it; returns as `stored`."""
        weight, backend = self.stored()
        if backend is not None:
            return weight, backend
        kernels = fast_kernels()
        backend = kernels and kernels.cpu_backend()
        columns = weight.shape[1] * 8 // self.bits
        if backend is None or not backend.supports(weight.shape[0], columns, self.bits):
            return weight, None
        # Outside inference mode: a tensor made there could never take part in training.
        with _packing, torch.inference_mode(False), torch.no_grad():
            if getattr(self.weight, "backend", None) is None:
                self._replace(backend.pack(self.weight.data, self.bits))
                self.weight.backend = backend
            return self.weight.data, self.weight.backend

    def publish(self) -> torch.Tensor:
        """Bring the weight back into published order and return it; a later `pack` leaves what is returned alone."""
        with _packing, torch.inference_mode(False), torch.no_grad():
            backend = getattr(self.weight, "backend", None)
            if backend is not None:
                self._replace(backend.unpack(self.weight.data, self.bits))
                del self.weight.backend
            return self.weight.data

    def _replace(self, data: torch.Tensor) -> None:
        # In a model that is split over devices, accelerate knows shared weights by their address, which another tensor
        # may have from now on.
        hook = getattr(self, "_hf_hook", None)
        if not getattr(hook, "offload", True) and hook.tied_params_map:
            hook.tied_params_map.pop(self.weight.data_ptr(), None)
        self.weight.data = data

    def _apply(self, fn, recurse=True):
        self.publish()
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:  # casts, such as half(), leave the scales as they are stored
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        weight = self.publish()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # a step in another thread may have packed it again in between
            destination[prefix + "weight"] = weight

    def _load_from_state_dict(self, *args, **kwargs):
        self.publish()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):  # of copy and pickle
        self.publish()
        return self.__dict__


def stored_together(modules) -> list:
    """`stored` of each quantised module."""
    weights = [module._parameters["weight"] for module in modules]
    with _packing:  # bytes and kernels belong together, also while another thread changes the order
        return [(weight.data, getattr(weight, "backend", None)) for weight in weights]


class QuantizedLinear(QuantizedModule, nn.Linear):
    """A linear layer with quantised weights.

    activations says how the CPU kernels read the input: "int8" or "int16" with a scale for each 128 columns, "bf16", or
    "float32", which is no kernel but the plain product with the dequantised matrix, on every device.
    """

    def __init__(self, in_features, out_features, bias=True, bits=8, device=None, dtype=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.activations = "int16" if in_features < NARROW else "int8"
        self._make_weight(out_features, in_features, bits, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, source: nn.Linear, bits: int) -> "QuantizedLinear":
        """The quantised form of a linear layer, on its device; the bias is shared. On the meta device it is empty."""
        has_bias = source.bias is not None
        module = cls(source.in_features, source.out_features, has_bias, bits, "meta", source.weight.dtype)
        module._fill(source.weight)
        module.bias = source.bias
        return module.train(source.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the same dtype."""
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )
        if self.activations != "float32" and x.device.type == "cpu":
            weight, backend = self.pack()
            if backend is not None and needs_grad:
                arguments = weight, self.weight_scale, self.bits, self.activations, backend
                return _KernelProduct.apply(x, self.bias, *arguments)
            if backend is not None:
                return backend.linear(x, weight, self.weight_scale, self.bias, self.bits, self.activations)
        if self.activations != "float32" and x.device.type == "cuda" and not needs_grad:
            kernels = fast_kernels()
            if kernels and kernels.cuda.usable(x, self.weight):
                return kernels.cuda.linear(x, self.weight, self.weight_scale, self.bias, self.bits)
        # In published order from here on: the way back may need the bytes of every layer at once.
        return linear(x, self.publish(), self.weight_scale, self.bias, self.bits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, activations={self.activations}"


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """A table of quantised rows; a quantised head may share its Parameters."""

    def __init__(self, num_embeddings, embedding_dim, bits=8, device=None, dtype=None):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self._make_weight(num_embeddings, embedding_dim, bits, device, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., embedding_dim] in float32, from which every dtype rounds as its own product would."""
        weight, backend = self.stored()
        if backend is not None:
            return backend.embedding(ids, weight, self.weight_scale, self.bits)
        return dequantize_weight(weight[ids], self.weight_scale[ids], self.bits, torch.float32)


class CastLinear(nn.Linear):
    """A linear layer whose weights are narrower than its input, such as a bfloat16 head of a float32 network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the same dtype; the product is in that of the weights."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def fast_kernels():
    """The package `chatglm.kernels`; None where only files of a checkpoint are at hand."""
    try:
        from chatglm import kernels
    except ImportError:
        return None
    return kernels


# Whole models ---------------------------------------------------------------------------------------------------------


def linear_class(bits: int) -> Callable[..., nn.Linear]:
    """What makes a linear layer of that many bits; 0 means float weights."""
    return partial(QuantizedLinear, bits=bits) if bits else nn.Linear


def embedding_class(bits: int) -> Callable[..., nn.Embedding]:
    """The same for an embedding."""
    return partial(QuantizedEmbedding, bits=bits) if bits else nn.Embedding


def quantize_model(model: nn.Module, bits: int, embedding_bits: int = 0) -> None:
    """Quantise the linear layers of a ChatGLMForConditionalGeneration in place, and its embedding and head if asked.

    bits             4 or 8; 0 leaves the layers as they are
    embedding_bits   the same for embedding and head, which stay one matrix when they are tied

    One matrix at a time, so that the peak is the model plus one matrix. The dtype of each weight is that of the
    arithmetic (see `quantize_weight`). A model on the meta device gets empty modules, to load stored weights into.
    Raises ValueError before anything changes if bits or widths do not fit, or if a part of the model is offloaded.
    """
    config = model.config
    if len({parameter.is_meta for parameter in model.parameters()}) > 1:
        raise ValueError("a model that is offloaded in part cannot be quantised: quantise it before, or while it loads")
    layers = model.transformer.layers if bits else ()
    for layer in layers:
        for name in LAYERS:
            source = layer.get_submodule(name)
            if not isinstance(source, nn.Linear):
                raise ValueError(
                    f"{name} is a {type(source).__name__}: quantise the model before adding adapters to it"
                )
            check_bits(bits, source.in_features)
    if embedding_bits:
        check_bits(embedding_bits, config.hidden_size)

    for layer in layers:
        for name in LAYERS:
            layer.set_submodule(name, QuantizedLinear.from_linear(layer.get_submodule(name), bits))
    if embedding_bits:
        _quantize_embeddings(model, embedding_bits)
    config.set_quantization(bits or config.quantization_bit, embedding_bits or config.embedding_bits)


def _quantize_embeddings(model: nn.Module, bits: int) -> None:
    table, head = model.transformer.word_embeddings, model.lm_head
    embedding = QuantizedEmbedding(table.num_embeddings, table.embedding_dim, bits, "meta", table.weight.dtype)
    embedding._fill(table.weight)
    model.transformer.word_embeddings = embedding
    if head.weight is not table.weight:
        model.lm_head = QuantizedLinear.from_linear(head, bits)
        return
    model.lm_head = QuantizedLinear(head.in_features, head.out_features, False, bits, "meta")
    model.lm_head.weight, model.lm_head.weight_scale = embedding.weight, embedding.weight_scale
    tie_scales(model)


def tie_scales(model: nn.Module) -> None:
    """Tell transformers that a quantised head shares its scales, too, with the embedding."""
    model._tied_weights_keys = {
        **model._tied_weights_keys,
        "lm_head.weight_scale": "transformer.word_embeddings.weight_scale",
    }
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()


def set_activations(model: nn.Module, activations: str) -> None:
    """Choose how the quantised layers of a model read their input, see QuantizedLinear."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations}")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = activations
