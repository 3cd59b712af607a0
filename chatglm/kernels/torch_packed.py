"""Torch's own packed operators for INT4 and INT8 weights, for machines without a C compiler.

What is unusual:

* The operators are fast for a few rows of x only, and in bfloat16 only; for more rows the weights are brought into
  float32 a block at a time, in the order they have in memory, and multiplied as usual.
* Torch packs INT4 in an order of its own, which depends on the processor: within a block of rows, all the rows of one
  column lie together. The order of those rows is found by packing matrices of row numbers, so that `unpack` restores
  the published bytes; a torch that packs in another way is not used.
* The operators get scales of 1. The products of bfloat16 and small integers are exact then, and the scales multiply
  the sum in float32.
"""

from functools import lru_cache

import torch
from torch import nn

from ..quantization import unpack_weight

# As many rows of x go through the operators. Measured with INT4 weights [4096, 4096] on one Zen 4 core, in ms for 1, 32
# and 256 rows: 0.9, 13 and 100; a block at a time 16, 24 and 106; the whole matrix dequantised at once 180, 130, 210.
# Where the operators have no vector form they take 45 ms per row.
FEW_ROWS = 32 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 0
GROUPS = (256, 128, 64, 32)  # columns that share a scale, as the INT4 operator allows
UNITS = (64, 32, 16)  # rows that torch packs together, depending on the processor
BLOCK = 512  # rows of the matrix brought into float32 at a time


@lru_cache
def problem() -> str | None:
    """Why torch's operators cannot be used here, None if they can."""
    try:
        working = _unit() and _works(128, 64, 4) and _works(128, 64, 8)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch has no packed operators: {str(error).splitlines()[0]}"
    return None if working else "torch's packed operators do not give the values they should"


@lru_cache
def _works(out_features: int, in_features: int, bits: int) -> bool:
    """Whether bytes survive packing and products are right, for matrices of that width and a like number of rows."""
    # Whole numbers whose sums float32 holds exactly; each output is rounded to bfloat16 once, at its end.
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        shape = (out_features, in_features * bits // 8)
        weight = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        x = torch.randint(0, 2, (2, in_features), generator=generator).float() * 2 - 1
        scale = torch.ones(out_features, dtype=torch.float32)
    expected = x @ unpack_weight(weight, bits).float().T
    kernels = TorchPacked("")
    packed = kernels.pack(weight, bits)
    few = kernels.linear(x, packed, scale, None, bits)
    many = kernels.linear(x.repeat(20, 1), packed, scale, None, bits)
    return (
        torch.equal(kernels.unpack(packed, bits), weight)
        and torch.allclose(few, expected, rtol=2**-8, atol=0)
        and torch.equal(many, expected.repeat(20, 1))
    )


def _pack_integers(integers: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 [out, in], int32, in torch's order: bytes [out, in // 2], uint8."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)


@lru_cache
def _row_order(rows: int) -> torch.Tensor | None:
    """Which row each nibble of a column belongs to, low nibbles first, when `rows` rows are packed: int64 [rows]."""
    numbers = torch.arange(rows, dtype=torch.int32, device="cpu")[:, None].expand(rows, 32)
    low, high = (_nibbles(_pack_integers(digit.contiguous()), rows) for digit in (numbers % 16, numbers // 16))
    order = (low + 16 * high).long()[0]  # [columns, rows]
    found = torch.equal(order, order[:1].expand_as(order)) and order[0].sort().values.tolist() == list(range(rows))
    return order[0] if found else None


def _nibbles(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Bytes of blocks of rows -> their integers 0..15, uint8 [blocks, in, rows] in torch's order of rows."""
    packed = packed.view(torch.uint8).view(-1, packed.shape[1] * 2, rows // 2)
    return torch.cat((packed & 15, packed >> 4), dim=-1)


@lru_cache
def _unit() -> int:
    """How many rows torch packs together; 0 if in no known way."""
    return next((rows for rows in UNITS if _row_order(rows) is not None), 0)


def _blocks(out_features: int):
    """The parts of a matrix with the same order: (rows from, to, rows of a unit)."""
    unit = _unit()
    whole = out_features // unit * unit
    parts = [(start, min(start + BLOCK, whole), unit) for start in range(0, whole, BLOCK)]
    return parts + [(whole, out_features, out_features - whole)] * (whole < out_features)


class TorchPacked:
    """The interface of `cpu.CpuKernels` with torch's operators; there is no attention.

    x is rounded to bfloat16 for up to 32 rows and kept in float32 beyond, or if activations are to be "int16".
    """

    attention = None

    def __init__(self, reason: str):
        self.name = "torch's packed operators"
        self.reason = reason

    def supports(self, out_features: int, in_features: int, bits: int) -> bool:
        """INT4: multiples of 16 outputs and 32 columns. INT8: multiples of 32 columns; with others torch may crash."""
        if (
            bits not in (4, 8)
            or in_features % 32
            or (bits == 4 and out_features % 16)
            or not in_features * out_features
        ):
            return False
        # One unit and the odd rest behave as the whole.
        return bits == 8 or _works(_unit() + out_features % _unit(), in_features, bits)

    def pack(self, weight: torch.Tensor, bits: int) -> torch.Tensor:
        """Published bytes int8 [out, in * bits // 8] in torch's order, same shape. INT8 stays as it is."""
        if bits == 8:
            return weight
        result = torch.empty_like(weight)
        for start, end, _ in _blocks(len(weight)):
            integers = unpack_weight(weight[start:end], bits).int() + 8
            result[start:end] = _pack_integers(integers).view(torch.int8)
        return result

    def unpack(self, packed: torch.Tensor, bits: int) -> torch.Tensor:
        """The published bytes again, exactly."""
        if bits == 8:
            return packed
        result = torch.empty_like(packed)
        for start, end, unit in _blocks(len(packed)):
            nibbles = _nibbles(packed[start:end], unit).transpose(1, 2)[:, _row_order(unit).argsort()]
            nibbles = nibbles.reshape(end - start, -1) ^ 8  # from w + 8 to the two's complement of w
            result[start:end] = (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).view(torch.int8)
        return result

    def linear(self, x, packed, scale, bias, bits, activations="int8"):
        """x [..., in] times the dequantised matrix, plus bias [out]: [..., out] in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW_ROWS or activations == "int16":
            y = self._many_rows(rows.float(), packed, bits)
        elif bits == 8:
            ones = scale.new_ones(len(packed), dtype=torch.bfloat16)
            y = torch._weight_int8pack_mm(rows.bfloat16().contiguous(), packed, ones).float()
        else:
            group = next(size for size in GROUPS if x.shape[-1] % size == 0)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.bfloat16().contiguous(),
                packed.view(torch.uint8),
                group,
                _unit_scales(x.shape[-1] // group, len(packed)),
            ).float()
        y = y * scale if bias is None else torch.addcmul(bias.float(), y, scale.float())
        return y.to(x.dtype).view(*x.shape[:-1], len(packed))

    def _many_rows(self, rows, packed, bits):
        if bits == 8:
            return torch.cat([rows @ part.float().T for part in packed.split(BLOCK)], dim=1)
        y = torch.empty(len(rows), len(packed), dtype=torch.float32, device="cpu")
        for start, end, unit in _blocks(len(packed)):
            weight = _nibbles(packed[start:end], unit).float().sub_(8)  # [blocks, in, rows of a block]
            part = torch.matmul(rows, weight).transpose(0, 1)
            y[:, start:end].view(len(rows), -1, unit)[:, :, _row_order(unit)] = part
        return y

    def linear_back(self, grad, packed, scale, bits):
        """grad [..., out] times the dequantised matrix, [..., in]: what `linear` gives back to its x."""
        rows = grad.reshape(-1, len(packed)).float() * scale.float()
        if bits == 8:
            y = sum(
                part @ weight.float() for part, weight in zip(rows.split(BLOCK, 1), packed.split(BLOCK), strict=True)
            )
        else:
            y = rows.new_zeros(len(rows), packed.shape[1] * 2)
            for start, end, unit in _blocks(len(packed)):
                weight = _nibbles(packed[start:end], unit).float().sub_(8)  # [blocks, in, rows of a block]
                part = rows[:, start:end].view(len(rows), -1, unit)[:, :, _row_order(unit)]
                y += torch.matmul(part.transpose(0, 1), weight.transpose(1, 2)).sum(0)
        return y.to(grad.dtype).view(*grad.shape[:-1], -1)

    def embedding(self, ids, packed, scale, bits):
        """Rows ids [...] of the dequantised matrix: float32 [..., in]. Raises IndexError beyond it."""
        scale = nn.functional.embedding(ids, scale.float()[:, None])
        if bits == 8:
            return packed[ids].float() * scale
        integers = torch.empty(*ids.shape, packed.shape[1] * 2, dtype=torch.float32, device="cpu")
        whole = len(packed) // _unit() * _unit()
        for start, end, unit in ((0, whole, _unit()), (whole, len(packed), len(packed) - whole)):
            here = (ids >= start) & (ids < end)
            if bool(here.any()):
                row = ids[here] - start
                place = _row_order(unit).argsort()[row % unit]  # among the nibbles of a column
                columns = packed[start:end].view(torch.uint8).view(-1, packed.shape[1] * 2, unit // 2)
                pairs = columns[row // unit, :, place % (unit // 2)]
                integers[here] = torch.where(place[:, None] < unit // 2, pairs & 15, pairs >> 4).float() - 8
        return integers * scale


@lru_cache
def _unit_scales(groups: int, out_features: int) -> torch.Tensor:
    """Scale 1 and zero point 0 for each group of each row: bfloat16 [groups, out, 2]."""
    return torch.tensor([1, 0], dtype=torch.bfloat16, device="cpu").repeat(groups, out_features, 1)
