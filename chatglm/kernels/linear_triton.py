"""GPU kernels in Triton: a float matrix times INT4 or INT8 weights, and the weights as floats.

What is unusual: the weights are read in their published bytes, one scale per output row (INT4: the high nibble is the
even column). Four-bit steps stay sixteen times too large, because `byte & -16` and `byte << 4` need no further shift to
extend the sign; a sixteenth of the scale undoes that exactly.

Importing this file imports Triton, so only `cuda.py` does, when the first CUDA tensor arrives. TRITON_INTERPRET=1, set
before Python starts, runs the kernels on CPU tensors, for tests.
"""

import triton
import triton.language as tl


@triton.jit
def unpack(packed, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes [rows, n] -> steps [rows, n * 8 // BITS]: the weights for INT8, sixteen times the weights for INT4.

    Steps have at most 8 bits, so every float type holds them exactly.
    """
    if BITS == 8:
        steps = packed.to(DTYPE)
    else:
        pairs = tl.join((packed & -16).to(DTYPE), (packed << 4).to(DTYPE))
        steps = pairs.reshape(packed.shape[0], 2 * packed.shape[1])
    return steps


@triton.jit
def step_scale(scale, features, inside, BITS: tl.constexpr):
    """What one step of `unpack` is worth in each row, float32 [features]."""
    worth = tl.load(scale + features, mask=inside, other=0.0).to(tl.float32)
    if BITS == 4:
        worth *= 0.0625
    return worth


@triton.jit
def one_row(
    x, weight, scale, bias, y, out_features, row_bytes, BITS: tl.constexpr, FEATURES: tl.constexpr, BYTES: tl.constexpr
):
    """y [out_features] = x [in_features] times weight [out_features, row_bytes] and scale, plus bias.

    A program makes FEATURES outputs. Products are added in float32: per thread first, across threads at the end.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = features < out_features
    start = weight + features.to(tl.int64)[:, None] * row_bytes
    total = tl.zeros([FEATURES, PER_BYTE * BYTES], tl.float32)
    for first in range(0, row_bytes, BYTES):
        places = first + tl.arange(0, BYTES)
        columns = PER_BYTE * first + tl.arange(0, PER_BYTE * BYTES)
        packed = tl.load(start + places[None, :], mask=inside[:, None] & (places < row_bytes)[None, :], other=0)
        values = tl.load(x + columns, mask=columns < PER_BYTE * row_bytes, other=0.0).to(tl.float32)
        total += unpack(packed, BITS, tl.float32) * values[None, :]
    result = tl.sum(total, axis=1) * step_scale(scale, features, inside, BITS)
    if bias is not None:
        result += tl.load(bias + features, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + features, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows(
    x,
    weight,
    scale,
    bias,
    y,
    num_rows,
    out_features,
    row_bytes,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    BYTES: tl.constexpr,
    HALF: tl.constexpr,
):
    """The same for num_rows rows at once: y [num_rows, out_features]. A program makes ROWS x FEATURES outputs.

    Programs that share weights run side by side, so each byte comes from memory once and then from the cache.
    HALF: multiply in the dtype of x, for tensor cores; else in float32.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = features < out_features
    start = weight + features.to(tl.int64)[:, None] * row_bytes
    DTYPE: tl.constexpr = x.dtype.element_ty if HALF else tl.float32
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for first in range(0, row_bytes, BYTES):
        places = first + tl.arange(0, BYTES)
        columns = PER_BYTE * first + tl.arange(0, PER_BYTE * BYTES)
        packed = tl.load(start + places[None, :], mask=inside[:, None] & (places < row_bytes)[None, :], other=0)
        present = (rows < num_rows)[:, None] & (columns < PER_BYTE * row_bytes)[None, :]
        values = tl.load(x + rows[:, None] * (PER_BYTE * row_bytes) + columns[None, :], mask=present, other=0.0).to(
            DTYPE
        )
        total = tl.dot(values, unpack(packed, BITS, DTYPE).trans(), total, input_precision="ieee")
    result = total * step_scale(scale, features, inside, BITS)[None, :]
    if bias is not None:
        result += tl.load(bias + features, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = y + rows.to(tl.int64)[:, None] * out_features + features[None, :]
    tl.store(place, result.to(y.dtype.element_ty), mask=(rows < num_rows)[:, None] & inside[None, :])


@triton.jit
def dequantize(
    weight, scale, y, out_features, row_bytes, BITS: tl.constexpr, FEATURES: tl.constexpr, BYTES: tl.constexpr
):
    """y [out_features, in_features] = weight times scale: float32 products, rounded once to the dtype of y."""
    PER_BYTE: tl.constexpr = 8 // BITS
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = features < out_features
    places = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    columns = tl.program_id(1) * (PER_BYTE * BYTES) + tl.arange(0, PER_BYTE * BYTES)
    start = features.to(tl.int64)[:, None] * row_bytes
    packed = tl.load(weight + start + places[None, :], mask=inside[:, None] & (places < row_bytes)[None, :], other=0)
    result = unpack(packed, BITS, tl.float32) * step_scale(scale, features, inside, BITS)[:, None]
    present = inside[:, None] & (columns < PER_BYTE * row_bytes)[None, :]
    tl.store(y + start * PER_BYTE + columns[None, :], result.to(y.dtype.element_ty), mask=present)
