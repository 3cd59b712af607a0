"""Quantised linear layers on a CUDA device: fused Triton kernels that read the published bytes.

The truth is dequantise-and-multiply, `linear` in quantization.py. There every weight is rounded to the dtype of x
before the product; here the stored integers are multiplied, and their float32 sum is scaled at its end and rounded
once. That is closer to the exact value; the two differ by no more than the rounding of the weights (relative 2**-11 in
float16, 2**-8 in bfloat16) and of the result.

Triton is imported when the first CUDA tensor arrives. Where it is missing or does not work, `usable` says why, once,
and returns False.
"""

import logging
import os
from functools import lru_cache

import torch
from torch import nn

from ..quantization import unpack_weight

logger = logging.getLogger(__name__)

# Most rows of x for the fused kernels, which unpack the weights once per 16 rows. Beyond, it is cheaper to dequantise
# once, although that moves nine times the bytes of INT4. Computed from counts of instructions and bytes, not measured.
MAX_ROWS = 64
MAX_ROWS_WITHOUT_TENSOR_CORES = 16
BLOCK = 1 << 26  # matrix entries dequantised at a time: the largest matrix of a layer at once, a head in parts


def usable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` can multiply x [..., in_features] by stored weights [out_features, bytes].

    The first call for a device, dtype and bits compiles the kernels and tries them on a small matrix.
    CHATGLM_KERNELS=torch and CHATGLM_KERNELS=none turn them off.
    """
    if not (x.is_cuda and x.device == weight.device and x.dtype in (torch.float16, torch.bfloat16, torch.float32)):
        return False
    if os.environ.get("CHATGLM_KERNELS") in ("torch", "none"):
        return False
    bits = weight.shape[1] * 8 // x.shape[-1]
    return bits in (4, 8) and _kernels() is not None and _work(x.device, x.dtype, bits)


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """x [..., in_features] times dequantised weights, plus bias: [..., out_features] in the dtype of x, no gradients.

    weight [out_features, in_features * bits // 8] int8, scale [out_features] and bias [out_features] of any float type.
    Raises ValueError if the widths do not fit.
    """
    out_features, row_bytes = weight.shape
    if row_bytes * 8 != x.shape[-1] * bits:
        raise ValueError(f"INT{bits} weights of {row_bytes} bytes per row do not fit an input of width {x.shape[-1]}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tensor_cores = _tensor_cores(x)
    if len(rows) > (MAX_ROWS if tensor_cores else MAX_ROWS_WITHOUT_TENSOR_CORES):
        step = max(1, BLOCK // x.shape[-1])
        parts = [
            nn.functional.linear(x, dequantize(some_weight, some_scale, bits, x.dtype))
            for some_weight, some_scale in zip(weight.split(step), scale.split(step), strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias.to(x.dtype)
    y = rows.new_empty(len(rows), out_features)
    launch = {"BITS": bits, "num_warps": 4, "enable_fp_fusion": True}
    weight = weight.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if len(rows) == 1:
            # 512 bytes: each thread of a warp loads 16 at once. 8 features: 512 programs for 4096 outputs, enough to
            # fill a large GPU without splitting the columns.
            kernel = _kernels().one_row[(_blocks(out_features, 8),)]
            kernel(rows, weight, scale, bias, y, out_features, row_bytes, FEATURES=8, BYTES=512, **launch)
        elif len(rows):
            # As many columns per step as fit into registers; loads run three steps ahead.
            columns = 256 if tensor_cores else 64
            kernel = _kernels().few_rows[(_blocks(len(rows), 16), _blocks(out_features, 32))]
            kernel(
                rows,
                weight,
                scale,
                bias,
                y,
                len(rows),
                out_features,
                row_bytes,
                ROWS=16,
                FEATURES=32,
                BYTES=columns * bits // 8,
                HALF=tensor_cores,
                num_stages=4,
                **launch,
            )
    return y.view(*x.shape[:-1], out_features)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out_features, in_features] in dtype that stored weights stand for.

    Equal bit for bit to dequantize_weight of quantization.py, in one pass over memory instead of five and without
    matrices beside the result.
    """
    out_features, row_bytes = weight.shape
    y = torch.empty(out_features, row_bytes * 8 // bits, dtype=dtype, device=weight.device)
    grid = (_blocks(out_features, 8), _blocks(row_bytes, 256))
    with torch.cuda.device_of(weight):
        _kernels().dequantize[grid](
            weight.contiguous(),
            scale,
            y,
            out_features,
            row_bytes,
            BITS=bits,
            FEATURES=8,
            BYTES=256,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y


def _blocks(total: int, size: int) -> int:
    return -(-total // size)


def _tensor_cores(x: torch.Tensor) -> bool:
    """Whether Triton multiplies matrices of this dtype on tensor cores: half precision, from Ampere on.

    Without them products are taken in float32. Triton's interpreter, on a CPU, multiplies no bfloat16 matrices.
    """
    if not x.is_cuda:
        return x.dtype == torch.float16
    return x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0)


@lru_cache
def _kernels():
    """The Triton kernels, or None after a warning."""
    try:
        from . import linear_triton
    except Exception as error:  # a damaged installation raises anything from OSError to AttributeError
        _warn(f"Triton cannot be imported ({_reason(error)}); `pip install triton` brings it to Linux")
        return None
    return linear_triton


@lru_cache
def _work(device: torch.device, dtype: torch.dtype, bits: int) -> bool:
    """Whether the kernels compile and are right on this device, told by whole numbers small enough for exact sums."""
    try:
        weight = (torch.arange(32 * 64, device=device) % 255 - 127).to(torch.int8).view(32, 64)
        scale = torch.ones(32, dtype=torch.float16, device=device)
        matrix = dequantize(weight, scale, bits, dtype)
        x = (torch.arange(2 * matrix.shape[1], device=device) % 3 - 1).to(dtype).view(2, -1)
        steps = unpack_weight(weight.cpu(), bits)
        expected = x.cpu().double() @ steps.double().t()
        right = torch.equal(matrix.cpu(), steps.to(dtype)) and all(
            torch.equal(linear(rows, weight, scale, None, bits).cpu(), expected[: len(rows)].to(dtype))
            for rows in (x[:1], x)
        )
        reason = "they give wrong results"
    except Exception as error:  # no C compiler, an old driver or an old device: Triton has an exception for each
        right, reason = False, _reason(error)
    if not right:
        _warn(f"the Triton kernels do not work on {device} ({reason})")
    return right


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@lru_cache
def _warn(problem: str) -> None:
    logger.warning("%s: quantised layers multiply in plain torch there, which is right but slower", problem)
