"""A layer in one call: the C kernel against float64 and against its parts, and where the model uses it."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, kernels
from chatglm.fused import FusedLayer
from chatglm.kernels.cpu import CpuLayer
from chatglm.modeling_chatglm import ALPHA, rotary_embedding
from chatglm.quantization import QuantizedLinear, quantize_weight, set_activations

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOS, EOS, MASK, GMASK = 60, 61, 58, 59
# hidden_size, heads, head_dim, inner: no multiples of 16, more than one group of 128 columns, and the usual head.
SHAPES = ((36, 3, 20, 100), (130, 2, 8, 50), (22, 1, 128, 264))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# The kernel -----------------------------------------------------------------------------------------------------------


def make(backend, shape=SHAPES[0], bits=4, activations="int16", bias=True, seed=0):
    """A layer of random numbers; every product keeps the size of what it gets. `layer` is the kernels' form of it."""
    width, heads, dim, inner = shape
    generator = torch.Generator().manual_seed(seed)

    def matrix(out, columns):
        weight = torch.randn(out, columns, generator=generator) / columns**0.5
        packed, scale = quantize_weight(weight, bits)
        offset = torch.randn(out, generator=generator) if bias else None
        return backend.pack(packed, bits), scale, offset, bits, activations

    norms = [
        (torch.rand(width, generator=generator) + 0.5, torch.randn(width, generator=generator), 1e-5) for _ in range(2)
    ]
    matrices = [
        matrix(3 * heads * dim, width), matrix(width, heads * dim), matrix(inner, width), matrix(width, inner)
    ]  # fmt: skip
    layer = backend.layer(norms, matrices, heads, ALPHA, dim**-0.5)
    return SimpleNamespace(layer=layer, norms=norms, matrices=matrices, shape=shape, generator=generator)


def draw(parts, batch, seq_len=1, streams=2):
    """Hidden states, and cosine and sine of random positions."""
    width, _, dim, _ = parts.shape
    x = torch.randn(batch, seq_len, width, generator=parts.generator) * 3 + 1
    places = torch.randint(0, 2048, (batch, 1, seq_len, streams), generator=parts.generator)
    return x, *rotary_embedding(places, dim // streams, torch.float32)


def draw_cache(parts, batch, kv_len, dtype):
    """Keys and values at the front of buffers with room behind; positions of the values lie first in memory."""
    _, heads, dim, _ = parts.shape
    keys = torch.randn(batch, heads, kv_len + 5, dim, generator=parts.generator).to(dtype)
    values = torch.randn(kv_len + 5, batch, heads, dim, generator=parts.generator).to(dtype).permute(1, 2, 0, 3)
    return keys.narrow(2, 0, kv_len), values.narrow(2, 0, kv_len)


def norm(x, parameters):
    weight, bias, epsilon = parameters
    return nn.functional.layer_norm(x, (x.shape[-1],), weight.double(), bias.double(), epsilon)


def rotate(states, cos, sin):
    """float64 [batch, seq, heads, dim]: channels i and i + half of each part of a head are a complex number."""
    streams, half = cos.shape[-2], cos.shape[-1] // 2
    cos, sin = (part[:, 0, :, None, :, :half].double() for part in (cos, sin))  # [batch, seq, 1, streams, half]
    first, second = states.double().unflatten(-1, (streams, 2, half)).unbind(-2)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.stack((turned.real, turned.imag), dim=-2).flatten(-3)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("activations", ["int16", "bf16", "int8"])
def test_start_is_norm_product_and_rotation(backend, activations, streams):
    for shape, bits in zip((*SHAPES, (17, 1, 4, 33)), (4, 8, 4, 8), strict=True):
        parts = make(backend, shape, bits, activations, bias=shape[1] != 2)
        for batch, seq_len in ((1, 1), (2, 1), (1, 5), (3, 100)):
            x, cos, sin = draw(parts, batch, seq_len, streams)
            normed, mixed = parts.layer.start(x, cos, sin)
            # Sums of at most 130 numbers up to 14 in float32, divided by their spread of 3.
            torch.testing.assert_close(normed.double(), norm(x.double(), parts.norms[0]), atol=5e-6, rtol=1e-6)
            product = backend.linear(normed, *parts.matrices[0]).view_as(mixed)
            assert torch.equal(mixed[..., 2, :], product[..., 2, :])
            for kind in (0, 1):  # two products and a sum of numbers up to 6: three roundings of 2**-22 at most
                expected = rotate(product[..., kind, :], cos, sin)
                torch.testing.assert_close(mixed[..., kind, :].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("activations", ["int16", "bf16", "int8"])
def test_finish_is_two_residuals_around_the_mlp(backend, activations):
    """The states between the products differ from float64 in the last bit, and may so be rounded to the next step.

    That happens to one number in some ten thousand (int8), thousand (bf16) or hundred (int16); the step is a 127th of
    the largest of 128 numbers, a 256th of the number itself, or a 32000th of the largest. So most rows are as exact as
    float32, and the others are off by little more than one step in a root of the width.
    """
    one_step = {"int8": 2e-3, "bf16": 1e-3, "int16": 1e-5}[activations]
    for shape, bits in zip((*SHAPES, (17, 1, 4, 33)), (4, 8, 4, 8), strict=True):
        parts = make(backend, shape, bits, activations, bias=shape[1] != 2)
        width, heads, dim, _ = shape
        _, dense, up, down = parts.matrices
        for batch, seq_len in ((1, 1), (2, 1), (1, 5), (3, 100)):
            attended = torch.randn(batch, seq_len, heads * dim, generator=parts.generator)
            normed = torch.randn(batch, seq_len, width, generator=parts.generator)
            # The residuals would drown the rest: norm and output keep only a seventh of it beside them.
            state = norm(backend.linear(attended, *dense).double() + ALPHA * normed.double(), parts.norms[1])
            wide = gelu(backend.linear(state.float(), *up).double())
            expected = backend.linear(wide.float(), *down).double() + ALPHA * state
            got = parts.layer.finish(attended, normed.clone()).double()
            error = (got - expected).norm(dim=-1).flatten() / expected.norm(dim=-1).flatten()
            assert error.max() < one_step
            assert error.median() < 1e-6


def test_gelu_of_every_size(backend):
    """The bias of the first product passes the GELU, and the second one, of one 1 per row, hands it on."""
    values = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -1e4, -0.0, 1e-30, -1e-8, 1e4, 1e30])))
    width = 4
    weight = backend.pack(torch.ones(width, 1, dtype=torch.int8), 8)  # 1 to all outputs
    zeros = backend.pack(torch.zeros(1, width, dtype=torch.int8), 8)
    one, none = torch.ones(width), torch.zeros(width)
    square = (backend.pack(torch.zeros(width, width, dtype=torch.int8), 8), one, None, 8, "int16")
    query_key_value = (
        backend.pack(torch.zeros(3 * width, width, dtype=torch.int8), 8),
        torch.ones(12),
        None,
        8,
        "int16",
    )
    norms = [(none, none, 1e-5)] * 2  # every state is 0
    got = []
    for value in values.split(1):
        up, down = (zeros, torch.ones(1), value, 8, "int16"), (weight, one, None, 8, "int16")
        layer = backend.layer(norms, [query_key_value, square, up, down], 1, ALPHA, 1.0)
        got.append(layer.finish(torch.zeros(1, 1, width), torch.zeros(1, 1, width))[0, 0, 0])
    # One rounding of the activations to 15 bits, of which a single number loses nothing but float32's rounding.
    torch.testing.assert_close(torch.stack(got).double(), gelu(values.double()), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_its_parts_bit_for_bit(backend, dtype, masked):
    for shape, streams, batch in ((SHAPES[0], 2, 3), (SHAPES[0], 1, 1), (SHAPES[1], 2, 6), (SHAPES[2], 2, 3)):
        for activations, kv_len in (("int16", 1), ("bf16", 64), ("int8", 131)):
            parts = make(backend, shape, activations=activations)
            x, cos, sin = draw(parts, batch, streams=streams)
            keys, values = draw_cache(parts, batch, kv_len, dtype)
            mask = None
            if masked:
                mask = torch.rand(batch, 1, 1, kv_len, generator=parts.generator) > 0.4
                mask[0], mask[-1] = True, False  # the last row sees nothing at all
            normed, mixed = parts.layer.start(x, cos, sin)
            query, key, value = mixed.permute(3, 0, 2, 1, 4)
            all_keys, all_values = keys.clone(), values.clone()
            all_keys[:, :, -1:], all_values[:, :, -1:] = key, value  # torch rounds them to dtype
            attended = backend.attention(query, all_keys, all_values, shape[2] ** -0.5, mask)
            expected = parts.layer.finish(attended.flatten(2), normed)
            buffers, before = (
                [tensor._base if tensor._base is not None else tensor for tensor in (keys, values)],
                x.clone(),
            )
            behind = [buffer.clone() for buffer in buffers]
            assert torch.equal(parts.layer.step(x, cos, sin, keys, values, mask), expected)
            assert torch.equal(keys, all_keys) and torch.equal(values, all_values)
            assert torch.equal(x, before)
            for buffer, old, places in zip(buffers, behind, (2, 0), strict=True):  # nothing else was written
                changed = (buffer != old).movedim(places, 0).flatten(1).any(1).nonzero().flatten().tolist()
                assert changed == [kv_len - 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_step_stores_is_rounded_as_torch_does(backend, dtype):
    """With weights of 0 the values are the bias, whatever bits it has."""
    width, heads, dim = 4, 100, 20
    special = [
        1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-23, -1 - 2**-11, 2048.5, 65504.0, 65519.996, 65520.0, 65536.0,
        -65520.0, 1e5, -3e38, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-40, 3 * 2.0**-25, 5 * 2.0**-25, 2.0**-26, 2.0**-14,
        2.0**-14 - 2.0**-25, 2.0**-14 - 2.0**-26, 6e-5, 1e-40, 1e-45, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23,
        3.3895313e38, 3.39e38, 3.4028235e38, 2.0**-133, 3 * 2.0**-134, float("inf"), -float("inf"), float("nan"),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (heads * dim,), generator=generator).to(torch.int32).view(torch.float32)
    near = torch.randn(heads * dim // 2, generator=generator) * 10.0 ** torch.randint(-9, 6, (heads * dim // 2,))
    patterns[: len(near)] = near
    patterns[-len(special) :] = torch.tensor(special)

    bias = torch.zeros(heads, 3, dim)
    bias[:, 1], bias[:, 2] = patterns.nan_to_num(1.5, 2.0, 3.0).view(heads, dim), patterns.view(heads, dim)
    nothing, one = torch.zeros(width), torch.ones(width)

    def zeros(out, columns, offset=None):
        packed = backend.pack(torch.zeros(out, columns, dtype=torch.int8), 8)
        return packed, torch.ones(out), offset, 8, "int16"

    matrices = [
        zeros(heads * 3 * dim, width, bias.flatten()),
        zeros(width, heads * dim),
        zeros(6, width),
        zeros(width, 6),
    ]
    layer = backend.layer([(one, nothing, 1e-5)] * 2, matrices, heads, ALPHA, 1.0)
    keys, values = torch.zeros(2, 2, heads, 3, dim, dtype=dtype)
    cos, sin = torch.ones(2, 1, 1, 1, dim), torch.zeros(2, 1, 1, 1, dim)  # keys are not turned
    layer.step(torch.randn(2, 1, width), cos, sin, keys, values, None)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for row in range(2):
        for stored, exact in ((keys[row, :, 2], bias[:, 1]), (values[row, :, 2], bias[:, 2])):
            expected = (exact + 0.0).to(dtype)  # -0.0 + 0.0, the sum of the products, is 0.0
            broken = exact.isnan()
            assert torch.equal(stored.isnan(), broken)
            assert torch.equal(stored[~broken].view(integers), expected[~broken].view(integers))
    assert not keys[:, :, :2].any() and not values[:, :, :2].any()


def test_the_number_of_threads_changes_no_bit(backend):
    parts, before, results = make(backend), torch.get_num_threads(), []
    prompt, token = draw(parts, 2, 40), draw(parts, 3)
    cache = draw_cache(parts, 3, 70, torch.float16)
    attended = torch.randn(2, 40, 60, generator=parts.generator)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            normed, mixed = parts.layer.start(*prompt)
            first = normed.clone()
            step = parts.layer.step(*token, *cache, None)
            results.append((first, mixed, parts.layer.finish(attended, normed), step, cache[0].clone()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("activations", ["int16", "bf16", "int8"])
def test_a_broken_row_leaves_the_others_alone(backend, activations):
    """The guard of generation looks for NaN in the scores of a row: it must come through, and stay in the row."""
    parts = make(backend, activations=activations)
    for rows in (3, 20):
        x, cos, sin = draw(parts, rows)
        spoilt, row = x.clone(), rows // 2
        spoilt[row, 0, 7] = float("nan")
        others = torch.arange(rows) != row
        cache = draw_cache(parts, rows, 9, torch.float16)
        expected = *parts.layer.start(x, cos, sin), parts.layer.step(x, cos, sin, *cache, None)
        got = *parts.layer.start(spoilt, cos, sin), parts.layer.step(spoilt, cos, sin, *cache, None)
        for after, before in zip(got, expected, strict=True):
            assert torch.equal(after[others], before[others])
            assert not after[row].isfinite().any()
        attended = torch.randn(rows, 1, 60, generator=parts.generator)
        before = parts.layer.finish(attended, expected[0].clone())
        attended[row, 0, 3] = float("inf")
        after = parts.layer.finish(attended, expected[0].clone())
        assert torch.equal(after[others], before[others]) and not after[row].isfinite().any()


def test_calls_from_several_threads_do_not_disturb_each_other(library):
    parts = make(library)
    jobs = [(draw(parts, batch), draw_cache(parts, batch, 40, torch.float16)) for batch in (1, 2, 3, 5)]
    expected = [parts.layer.step(*token, *cache, None) for token, cache in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = pool.map(lambda job: parts.layer.step(*job[0], *job[1], None), jobs)
            assert all(map(torch.equal, got, expected))


def test_scales_in_half_precision_are_read_where_they_are(backend):
    parts = make(backend)
    matrices = [(packed, scale.half(), *rest) for packed, scale, *rest in parts.matrices]
    token, cache = draw(parts, 2), draw_cache(parts, 2, 9, torch.float16)
    results = []
    for convert in (torch.Tensor.half, torch.Tensor.float):
        operands = [(packed, convert(scale), *rest) for packed, scale, *rest in matrices]
        layer = backend.layer(parts.norms, operands, 3, ALPHA, 0.2)
        results.append(layer.step(*token, *cache, None))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda norms, matrices: norms[0].__setitem__(0, torch.ones(35)),
            r"a norm must have contiguous float32 \[36\]",
        ),
        (
            lambda norms, matrices: norms[1].__setitem__(1, torch.ones(36).half()),
            r"a norm must have .* got torch.float16",
        ),
        (lambda norms, matrices: norms[1].__setitem__(1, torch.ones(36, device="meta")), "a norm must have .* on meta"),
        (lambda norms, matrices: norms[0].__setitem__(0, torch.ones(36, 2)[:, 0]), "a norm must have contiguous"),
        (
            lambda norms, matrices: matrices[0].__setitem__(1, torch.ones(180).bfloat16()),
            "read scales in float16 or float32",
        ),
        (lambda norms, matrices: matrices[0].__setitem__(1, torch.ones(180, 2)[:, 0]), "read scales .* contiguous"),
        (lambda norms, matrices: matrices[1].__setitem__(2, torch.ones(36).half()), "read .* biases in float32"),
        (lambda norms, matrices: matrices[1].__setitem__(2, torch.ones(36, 2)[:, 0]), "read .* biases .* contiguous"),
        (lambda norms, matrices: matrices[0].__setitem__(1, torch.ones(179)), r"scales must be floats \[180\]"),
        (lambda norms, matrices: matrices[1].__setitem__(2, torch.ones(35)), r"bias must be \[36\] on the CPU"),
        (lambda norms, matrices: matrices[1].__setitem__(2, torch.ones(36, device="meta")), r"bias must be .* on meta"),
        (lambda norms, matrices: matrices[2].__setitem__(3, 2), "weights must be int8 .* with 2 bits"),
        (lambda norms, matrices: matrices[2].__setitem__(4, "float32"), "activations must be int8, int16 or bf16"),
        (lambda norms, matrices: matrices.__setitem__(slice(2, 4), matrices[:1:-1]), "do not fit each other"),
        (lambda norms, matrices: matrices.__setitem__(0, matrices[2]), "do not fit each other"),
    ],
)
def test_operands_that_do_not_fit_are_refused(library, change, message):
    parts = make(library)
    norms, matrices = [list(norm) for norm in parts.norms], [list(matrix) for matrix in parts.matrices]
    change(norms, matrices)
    with pytest.raises(ValueError, match=message):
        library.layer(norms, matrices, 3, ALPHA, 0.2)


def test_heads_that_do_not_divide_the_width_are_refused(library):
    parts = make(library)
    with pytest.raises(ValueError, match="matrices of 7 heads do not fit each other"):
        library.layer(parts.norms, parts.matrices, 7, ALPHA, 0.2)


BAD_STEPS = {
    "x too narrow": ({"x": torch.ones(2, 1, 35)}, r"states must be float32 \[batch, seq_len, 36\]"),
    "x in half": ({"x": torch.ones(2, 1, 36).half()}, "states must be .* got torch.float16"),
    "x on meta": ({"x": torch.ones(2, 1, 36, device="meta")}, "states must be .* on meta"),
    "x without a batch": ({"x": torch.ones(36)}, "must be"),
    "two tokens": (
        {"x": torch.ones(2, 2, 36)} | dict.fromkeys(("cos", "sin"), torch.ones(2, 1, 2, 2, 10)),
        "of one token",
    ),
    "cos of one row": (
        {"cos": torch.ones(1, 1, 1, 2, 10), "sin": torch.ones(1, 1, 1, 2, 10)},
        r"cos and sin must be \[2, 1, 1, streams, part\]",
    ),
    "sin of another shape": ({"sin": torch.ones(2, 1, 1, 1, 20)}, "cos and sin must"),
    "cos without parts": ({"cos": torch.ones(40), "sin": torch.ones(40)}, "cos and sin must"),
    "cos of odd parts": ({"cos": torch.ones(2, 1, 1, 4, 5), "sin": torch.ones(2, 1, 1, 4, 5)}, "cos and sin must"),
    "cos on meta": ({"cos": torch.ones(2, 1, 1, 2, 10, device="meta")}, "cos and sin must"),
    "batch of the cache": ({"keys": torch.ones(1, 3, 4, 20)}, r"keys and values must be \[2, 3, kv_len, 20\]"),
    "heads of the cache": ({"keys": torch.ones(2, 4, 4, 20)}, "keys and values must be"),
    "width of the cache": ({"keys": torch.ones(2, 3, 4, 16)}, "keys and values must be"),
    "three dimensions": ({"keys": torch.ones(2, 3, 4)}, "keys and values must be"),
    "no position": ({"keys": torch.ones(2, 3, 0, 20), "values": torch.ones(2, 3, 0, 20)}, "keys and values must"),
    "values shorter": ({"values": torch.ones(2, 3, 3, 20)}, "keys and values must be"),
    "two dtypes": ({"values": torch.ones(2, 3, 4, 20).half()}, "keys and values must have one float dtype"),
    "float64": (dict.fromkeys(("keys", "values"), torch.ones(2, 3, 4, 20).double()), "must have one float dtype"),
    "strided": ({"keys": torch.ones(2, 3, 20, 4).transpose(2, 3)}, "keys and values must"),
    "keys on meta": (dict.fromkeys(("keys", "values"), torch.ones(2, 3, 4, 20, device="meta")), "keys and values must"),
    "mask of floats": ({"mask": torch.ones(2, 1, 1, 4)}, r"mask must be bool \[2, 1, 1, 4\]"),
    "mask too short": ({"mask": torch.ones(2, 1, 1, 3, dtype=torch.bool)}, "mask must be bool"),
    "mask on meta": ({"mask": torch.ones(2, 1, 1, 4, dtype=torch.bool, device="meta")}, "mask must be bool"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_with_wrong_tensors_is_refused(library, name):
    parts = make(library)
    x, cos, sin = draw(parts, 2)
    keys, values = torch.zeros(2, 2, 3, 4, 20)
    arguments = {"x": x, "cos": cos, "sin": sin, "keys": keys, "values": values, "mask": None}
    changed, message = BAD_STEPS[name]
    with pytest.raises(ValueError, match=message):
        parts.layer.step(**(arguments | changed))


def test_start_and_finish_with_wrong_tensors_are_refused(library):
    parts = make(library)
    x, cos, sin = draw(parts, 2, 3)
    with pytest.raises(ValueError, match=r"states must be float32 \[batch, seq_len, 36\]"):
        parts.layer.start(x[..., :35], cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin must be \[2, 1, 3, streams, part\]"):
        parts.layer.start(x, cos[:, :, :2], sin[:, :, :2])
    attended = torch.ones(2, 3, 60)
    for wrong in (attended[..., :59], attended.double(), attended.to("meta")):
        with pytest.raises(ValueError, match=r"states must be float32 \[batch, seq_len, 60\] on the CPU"):
            parts.layer.finish(wrong, x)
    for wrong in (x[:1], torch.ones(2, 36, 3).transpose(1, 2)):
        with pytest.raises(ValueError, match="normed must be as start gave it, for 6 rows"):
            parts.layer.finish(attended, wrong)


def test_no_rows_give_no_rows(library):
    parts = make(library)
    x, cos, sin = draw(parts, 2, 0)
    normed, mixed = parts.layer.start(x, cos, sin)
    assert (normed.shape, mixed.shape) == ((2, 0, 36), (2, 0, 3, 3, 20))
    assert parts.layer.finish(mixed.new_empty(2, 0, 60), normed).shape == (2, 0, 36)


# In the model ---------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([[3, 3, 7, 8, GMASK, BOS], [9, 10, 11, 12, GMASK, BOS]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
TOKENS = torch.tensor([[20, 21, 22], [30, 31, 32]])
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
INNER = (*LINEARS, "attention", "mlp", "input_layernorm", "post_attention_layernorm")
# Two ways to round the same sums, and what 15 bits of the activations and the float16 of the cache, 2**-11 of a number,
# make of that, in scores of about 5.
CLOSE = {"atol": 0.01, "rtol": 0.0}


def small_model(bits=8, **fields):
    torch.manual_seed(5)
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=96,
        bos_token_id=BOS, eos_token_id=EOS, mask_token_id=MASK, gmask_token_id=GMASK, pad_token_id=3, use_cache=True,
        **fields,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "layernorm.weight" in name else 0.0, std=0.3)
    return model.quantize(bits)


@pytest.fixture
def used(library, monkeypatch):
    """What models in this process have called of their fused layers; their kernels are the C ones."""
    seen = []

    def recorded(name, method):
        def call(self, *args):
            seen.append(name)
            return method(self, *args)

        return call

    for name in ("start", "step"):
        monkeypatch.setattr(CpuLayer, name, recorded(name, getattr(CpuLayer, name)))
    monkeypatch.setattr(kernels, "cpu_backend", lambda: library)
    return seen


@contextmanager
def unfused():
    """Modules are called one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedLayer, "get", lambda self, *_: (None, None))
        yield


def talk(model, rows=ROWS, padding=PADDING, **options):
    """Logits of a prompt and three more tokens, [batch, seq_len + 3, vocab_size]."""
    cache, logits, mask = None, [], padding
    for number, ids in enumerate((rows, *TOKENS[: len(rows)].split(1, dim=1))):
        if number:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            gap = (padding.sum(1, keepdim=True) - 2)[:, None]
            answer = torch.full_like(gap, number + 1)
            if model.config.position_encoding_2d:
                options["position_ids"] = torch.cat((gap, answer), dim=1)
            else:
                options["position_ids"] = gap[:, 0] + number + 1
        output = model(ids, attention_mask=mask, past_key_values=cache, **options)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def assert_fused(model, used):
    """The model is right, and its layers are fused."""
    del used[:]
    got = talk(model)
    assert used == ["start"] * 2 + ["step"] * 6
    with unfused():
        torch.testing.assert_close(got, talk(model), **CLOSE)
    return got


def assert_not_fused(model, used, layers=(), **options):
    """The model gives exactly what its modules give, and calls nothing fused but in these layers of it."""
    del used[:]
    got = talk(model, **options)
    assert len(used) == 4 * len(layers)
    with unfused():
        expected = talk(model, **options)
    torch.testing.assert_close(got, expected, **(CLOSE if layers else {"atol": 0, "rtol": 0}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 4},
        {"pre_seq_len": 3},
        {"position_encoding_2d": False},
        {"prefix_projection": True, "pre_seq_len": 2},
    ],
)
def test_fused_layers_answer_as_their_modules_do(used, fields):
    model = small_model(**fields)
    assert_fused(model, used)
    del used[:]
    options = {"attention_mask": PADDING, "do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    answers = [model.generate(ROWS, **options), model.generate(ROWS, num_beams=3, **options)]
    alone = model.generate(ROWS[1:], do_sample=False, max_new_tokens=10, eos_token_id=None)
    assert used == 3 * (["start"] * 2 + ["step"] * 18)
    assert torch.equal(answers[0][1:], alone)
    with unfused():
        assert torch.equal(answers[0], model.generate(ROWS, **options))
        assert torch.equal(answers[1], model.generate(ROWS, num_beams=3, **options))
    assert len(set(answers[0].flatten().tolist())) > 8  # a model that says something


def test_steps_read_the_cache_in_its_dtype(used):
    """What is stored for the steps is float16, as it is without fused layers, and the same but for its rounding."""
    model, caches = small_model(), []
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True}
    caches.append(model.generate(ROWS, **options).past_key_values)
    with unfused():
        caches.append(model.generate(ROWS, **options).past_key_values)
    for fused, plain in zip(*(cache.layers for cache in caches), strict=True):
        assert fused.keys.dtype == fused.values.dtype == torch.float16
        assert fused.keys.shape == plain.keys.shape == (2, 4, 9, 16)
        torch.testing.assert_close(fused.keys, plain.keys, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(fused.values, plain.values, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("rows", ["position_ids", "attention_mask"])
def test_one_row_of_positions_or_of_the_mask_serves_the_whole_batch(used, rows):
    model = small_model()
    places, hidden = torch.tensor([[[4], [2]]] * 2), torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    hidden[..., 1] = True
    logits = []
    for count in (2, 1):
        options = {"position_ids": places, "attention_mask": hidden}
        options[rows] = options[rows][:count]
        logits.append(model(TOKENS[:, :1], past_key_values=model(ROWS).past_key_values, **options).logits)
    torch.testing.assert_close(*logits, **CLOSE)


def test_a_step_that_is_refused_leaves_the_cache_as_it_was(used):
    model = small_model()
    cache = model(ROWS[:1]).past_key_values
    with pytest.raises(ValueError, match="keys"):
        model(TOKENS[:, :1], past_key_values=cache, position_ids=torch.tensor([[[4], [2]]] * 2))
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6]


@pytest.mark.parametrize("name", INNER)
def test_hooks_on_a_module_inside_are_called(used, name):
    model = small_model()
    assert_fused(model, used)
    module, calls = model.transformer.layers[0].get_submodule(name), []
    forward = module.forward

    def replaced(*args, **kwargs):
        calls.append(module)
        return forward(*args, **kwargs)

    def with_hook(register, **options):
        handle = register(lambda *args: calls.append(module), **options)
        try:
            yield
        finally:
            handle.remove()

    def with_replaced_forward():
        module.forward = replaced
        try:
            yield
        finally:
            del module.forward

    for change in (
        with_hook(module.register_forward_hook),
        with_hook(module.register_forward_hook, with_kwargs=True),
        with_hook(module.register_forward_pre_hook),
        with_replaced_forward(),
    ):
        with contextmanager(lambda change=change: change)():
            assert_not_fused(model, used, layers=(1,))
            assert len(calls) == 2 * 4  # a prompt and three steps, twice
        del calls[:]
    assert_fused(model, used)
    assert calls == []


def test_a_hook_that_changes_what_a_module_gives_is_heeded(used):
    model = small_model()
    before = assert_fused(model, used)
    handle = model.transformer.layers[1].mlp.dense_h_to_4h.register_forward_hook(
        lambda module, args, output: output * 2
    )
    assert (talk(model) - before).abs().max() > 0.1
    handle.remove()
    assert torch.equal(talk(model), before)


def test_hooks_on_all_modules_of_torch_are_called(used):
    model, calls = small_model(), []
    assert_fused(model, used)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: calls.append(type(module)))
    try:
        assert_not_fused(model, used)
    finally:
        handle.remove()
    assert calls.count(QuantizedLinear) == 2 * 4 * 8
    assert_fused(model, used)


def test_hooks_on_a_block_change_nothing_inside(used):
    model, states = small_model(), []
    handle = model.transformer.layers[0].register_forward_hook(lambda module, args, output: states.append(output))
    assert_fused(model, used)
    handle.remove()
    assert [tuple(state.shape) for state in states[:2]] == [(2, 6, 64), (2, 1, 64)]


def test_gradients_take_the_modules(used):
    model = small_model(pre_seq_len=3)
    with torch.enable_grad():
        model(ROWS, attention_mask=PADDING, labels=ROWS).loss.backward()
        embeddings = model.transformer.word_embeddings(ROWS).detach().requires_grad_()
        model(ROWS, inputs_embeds=embeddings).logits.sum().backward()
    assert used == []
    assert embeddings.grad.abs().max() > 0
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().max() > 0
    assert_fused(model, used)


def test_attentions_and_hidden_states_are_given_on_request(used):
    model = small_model()
    assert_fused(model, used)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    fused, outputs = model(ROWS, attention_mask=PADDING), []
    for _ in range(2):
        prompt = model(ROWS, attention_mask=PADDING, **wanted)
        places = torch.tensor([[[2], [2]], [[4], [2]]])
        outputs += prompt, model(TOKENS[:, :1], past_key_values=prompt.past_key_values, position_ids=places, **wanted)
        if not outputs[2:]:
            torch.testing.assert_close(prompt.logits, fused.logits, **CLOSE)
    for output, shape in zip(outputs, 2 * ((2, 4, 6, 6), (2, 4, 1, 7)), strict=True):
        assert [tuple(weights.shape) for weights in output.attentions] == [shape] * 2
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, shape[2], 64)] * 3
        torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(shape[:-1]))
    states = model(ROWS, attention_mask=PADDING, output_hidden_states=True).hidden_states
    with unfused():
        plain = model(ROWS, attention_mask=PADDING, output_hidden_states=True).hidden_states
    for got, expected in zip(states, plain, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_stands_between_fused_parts(used, attention):
    model = small_model(attn_implementation=attention)
    got = talk(model)
    assert used == ["start"] * 2 * 4
    with unfused():
        torch.testing.assert_close(got, talk(model), **CLOSE)


def test_without_a_cache_and_with_one_of_another_kind(used):
    from transformers import DynamicCache

    model = small_model()
    whole = torch.cat((ROWS, TOKENS), dim=1)
    results = []
    for context in (contextmanager(lambda: (yield)), unfused):
        with context():
            cache = DynamicCache(config=model.config)
            model(ROWS, past_key_values=cache)
            places = torch.tensor([[[4], [2]]] * 2)
            step = model(TOKENS[:, :1], past_key_values=cache, position_ids=places).logits
            results.append((model(whole, use_cache=False).logits, step))
    assert used == ["start"] * 6
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, **CLOSE)


@pytest.mark.parametrize("activations", ["bf16", "int8", "float32"])
def test_activations_are_those_that_were_chosen(used, activations):
    model = small_model()
    before = assert_fused(model, used)
    set_activations(model, activations)
    got = talk(model)
    with unfused():
        plain = talk(model)
    # A number on the border between two steps may fall to either side: a part of what other activations change.
    assert (got - plain).abs().max() <= 0.7 * (plain - before).abs().max()
    assert not torch.equal(got, before)
    if activations == "float32":
        assert_not_fused(model, used)
    set_activations(model, "int16")
    assert torch.equal(assert_fused(model, used), before)


class Adapter(QuantizedLinear):
    """A layer with something beside it, as adapters make them."""

    def forward(self, x):
        return super().forward(x) * 1.5


class Wrapper(nn.Module):
    """An adapter around a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) * 1.5


@pytest.mark.parametrize("kind", [nn.Linear, Adapter, Wrapper])
@pytest.mark.parametrize("name", LINEARS)
def test_other_layers_in_the_place_of_a_quantised_one_are_called(used, name, kind):
    model = small_model()
    before = assert_fused(model, used)
    block = model.transformer.layers[1]
    old = block.get_submodule(name)
    if kind is Wrapper:
        new = Wrapper(old)
    else:
        new = kind(old.in_features, old.out_features)
        if kind is Adapter:
            new.load_state_dict(old.state_dict())
    block.set_submodule(name, new)
    assert_not_fused(model, used, layers=(0,))
    assert (talk(model) - before).abs().max() > 0.1
    block.set_submodule(name, old)
    assert torch.equal(assert_fused(model, used), before)


class DoubleNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "replace",
    [
        lambda block: setattr(block, "input_layernorm", DoubleNorm(64)),
        lambda block: setattr(block, "post_attention_layernorm", nn.RMSNorm(64)),
        lambda block: setattr(block, "input_layernorm", nn.LayerNorm(64, bias=False)),
        lambda block: setattr(block, "input_layernorm", nn.LayerNorm(64, elementwise_affine=False)),
        lambda block: setattr(block, "post_attention_layernorm", Wrapper(nn.LayerNorm(64))),
        lambda block: setattr(block, "mlp", nn.Identity()),
        lambda block: setattr(block, "mlp", Wrapper(block.mlp)),
    ],
)
def test_other_modules_in_a_block_are_called(used, replace):
    model = small_model()
    before = assert_fused(model, used)
    replace(model.transformer.layers[1])
    assert_not_fused(model, used, layers=(0,))
    assert (talk(model) - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_take_the_modules(used, dtype):
    model = small_model()
    assert_fused(model, used)
    assert_not_fused(model.to(dtype), used)
    assert_fused(model.float(), used)


# Changes


def change_bias(model):
    model.transformer.layers[0].mlp.dense_h_to_4h.bias.data = torch.randn(96)


def change_bias_in_place(model):
    model.transformer.layers[1].attention.dense.bias.mul_(-3)


def change_bias_parameter(model):
    model.transformer.layers[1].attention.query_key_value.bias = nn.Parameter(torch.randn(192))


def drop_bias(model):
    model.transformer.layers[1].attention.query_key_value.bias = None


def change_norm(model):
    model.transformer.layers[0].input_layernorm.weight = nn.Parameter(torch.rand(64))


def change_epsilon(model):
    model.transformer.layers[0].post_attention_layernorm.eps = 100


def change_strides(model):
    model.transformer.layers[0].input_layernorm.bias = nn.Parameter(torch.randn(64, 2)[:, 0])
    model.transformer.layers[0].mlp.dense_4h_to_h.bias = nn.Parameter(torch.randn(64, 2)[:, 0])


def change_scale(model):
    scale = model.transformer.layers[0].mlp.dense_4h_to_h.weight_scale
    scale.data = scale.data * 2


def change_scale_dtype(model):
    for name in LINEARS:
        scale = model.transformer.layers[1].get_submodule(name).weight_scale
        scale.data = (scale.data * 1.1).bfloat16()


def change_weight(model):
    layer = model.transformer.layers[1].mlp.dense_h_to_4h
    layer.weight = nn.Parameter(layer.publish().flip(0).clone(), requires_grad=False)


def change_packed_weight(model):
    """The kernels are the same, and only the address is another one."""
    layer = model.transformer.layers[0].mlp.dense_4h_to_h
    layer.weight = nn.Parameter(layer.publish().flip(0).clone(), requires_grad=False)
    layer.pack()


def load(assign):
    def change(model):
        generator = torch.Generator().manual_seed(1)
        state = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for key, value in model.state_dict().items()
            if "weight_scale" not in key
        }
        model.load_state_dict(state, strict=False, assign=assign)

    return change


def replace_layer(model):
    torch.manual_seed(8)
    new = QuantizedLinear.from_linear(nn.Linear(64, 96), 8)
    model.transformer.layers[0].set_submodule("mlp.dense_h_to_4h", new)


def swap_blocks(model):
    model.transformer.layers[0].mlp, model.transformer.layers[1].mlp = (
        block.mlp for block in model.transformer.layers[::-1]
    )


@pytest.mark.parametrize(
    "change",
    [
        change_bias, change_bias_in_place, change_bias_parameter, drop_bias, change_norm, change_epsilon,
        change_strides, change_scale, change_scale_dtype, change_weight, change_packed_weight, load(assign=False),
        load(assign=True), replace_layer, swap_blocks,
    ],
)  # fmt: skip
def test_the_next_step_uses_what_was_changed(used, change):
    model = small_model()
    before = assert_fused(model, used)
    change(model)
    rubbish = [torch.full((size,), 1e3) for size in (64, 96, 192) for _ in range(16)]  # where something freed may lie
    got = talk(model)
    with unfused():
        torch.testing.assert_close(got, talk(model), **CLOSE)
    assert (got - before).abs().max() > 0.1
    del rubbish


@pytest.mark.parametrize("publish", [lambda model: model.state_dict(), lambda model: model.half().float()])
def test_weights_that_moved_are_found_again(used, publish):
    model = small_model()
    before = assert_fused(model, used)
    for linear in (model.transformer.layers[0].get_submodule(name) for name in LINEARS):
        assert linear.stored()[1] is not None
    kept = publish(model)
    for linear in (model.transformer.layers[0].get_submodule(name) for name in LINEARS):
        assert linear.stored()[1] is None
    after = assert_fused(model, used)
    torch.testing.assert_close(after, before, atol=0.5, rtol=0)  # half() has rounded norms and offsets
    assert kept is model or torch.equal(after, before)


def test_another_variant_of_the_kernels_is_used_at_once(used, library):
    model, before = small_model(), library.variant
    assert_fused(model, used)
    try:
        library.variant = "plain"
        assert_fused(model, used)
    finally:
        library.variant = before


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_a_model_that_has_spoken_go_their_own_ways(used, copied):
    model = small_model()
    before = assert_fused(model, used)
    twin = copied(model)
    assert torch.equal(assert_fused(twin, used), before)
    twin.transformer.layers[0].mlp.dense_h_to_4h.bias.data += 1
    change_norm(twin)
    changed = assert_fused(twin, used)
    assert (changed - before).abs().max() > 0.01
    assert torch.equal(assert_fused(model, used), before)
    del model
    assert torch.equal(talk(twin), changed)


def test_first_steps_of_several_threads_at_once(used):
    """Each round is a new model, whose layers are looked at by all threads at the same time."""
    expected = talk(small_model())
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            model, together = small_model(), threading.Barrier(4)

            def first(_, model=model, together=together):
                together.wait(30)
                with torch.no_grad():
                    return talk(model)

            assert all(torch.equal(logits, expected) for logits in pool.map(first, range(4)))


@pytest.mark.parametrize("promise", ["answers", "state dicts"])
def test_threads_answer_while_another_one_publishes_the_weights(used, promise):
    """Whoever has taken addresses keeps alive what lies there, and a state dict always holds the published bytes."""
    model = small_model()
    state, expected, ended = model.state_dict(), talk(model), threading.Event()

    def answer(_):
        with torch.no_grad():
            return [torch.equal(talk(model), expected) for _ in range(12)]

    def publish():
        right = []
        while not ended.is_set():
            taken = model.state_dict()
            right.append(all(torch.equal(taken[name], tensor) for name, tensor in state.items()))
        return right

    with ThreadPoolExecutor(3) as pool:
        publishing = pool.submit(publish)
        try:
            answers = [result for results in pool.map(answer, range(2)) for result in results]
        finally:
            ended.set()
        dicts = publishing.result(30)
    assert used.count("step") > 100
    if promise == "answers":
        assert answers == [True] * 24
    else:
        assert dicts and all(dicts), f"{dicts.count(False)} of {len(dicts)} state dicts hold other bytes"
