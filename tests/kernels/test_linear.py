"""Multiplying by INT4 and INT8 weights in C: every form this processor has against the same arithmetic in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chatglm.quantization import dequantize_weight, unpack_weight

# Whole tiles (16 rows, 8 or 4 columns), parts of them, several groups of 128 columns, and the last group cut short.
SHAPES = ((1, 2), (3, 6), (7, 10), (5, 64), (16, 8), (24, 32), (17, 130), (33, 258), (300, 1000))
ROWS = (1, 2, 3, 5, 12, 13, 16, 17, 32, 33, 200)
# Sums of up to 1000 products in float32, relative to the sum of their magnitudes.
TOLERANCE = 2.5e-6


def draw(out, columns, bits, rows, seed=0):
    """Published bytes of any value, -8 and -128 too, scales, a bias, and activations, some fifty times the rest."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, columns * bits // 8), generator=generator).to(torch.int8)
    scale = torch.rand(out, generator=generator) * 0.01 + 0.001
    bias = torch.randn(out, generator=generator)
    x = torch.randn(rows, columns, generator=generator)
    x[:, ::37] *= 50
    return weight, scale, bias, x


def quantised(x):
    """What the int8 activations stand for, float64: round(x / scale) * scale, scale = max|x| / 127 of 128 columns."""
    groups = []
    for group in x.split(128, dim=1):
        largest = group.abs().amax(1, keepdim=True)
        steps = torch.where(largest > 0, (group * (127 / largest)).round(), 0.0)
        groups.append(steps.double() * (largest / 127).double())
    return torch.cat(groups, 1)


def rounded(x, activations):
    if activations == "bf16":
        return x.bfloat16().double()
    if activations == "int8":
        return quantised(x)
    high = quantised(x).float()  # int16: this and the rest, rounded like it
    return high.double() + quantised(x - high)


def relative_error(got, x, weight, scale, bias):
    """Largest error of x @ (weight * scale).T + bias, relative to the sum of the magnitudes that were added."""
    weight, scale, bias = weight.double(), scale.double(), bias.double()
    truth = x @ weight.T * scale + bias
    return ((got.double() - truth).abs() / (x.abs() @ weight.abs().T * scale + bias.abs())).max().item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (9, 3), (40, 129)])
def test_packing_is_undone_exactly_for_all_bytes(library, shape, bits):
    out, columns = shape
    if columns % 2 and bits == 4:
        pytest.skip("INT4 stores pairs of columns")
    weight = draw(out, columns, bits, 1)[0]
    packed = library.pack(weight, bits)
    assert packed.shape == weight.shape
    assert torch.equal(library.unpack(packed, bits), weight)


def test_a_tile_holds_the_bytes_of_the_documented_layout(library):
    # INT8: one whole step of 4 columns, one column left, one row left.
    weight = torch.arange(17 * 5).reshape(17, 5).to(torch.int8)
    packed = library.pack(weight, 8).flatten().view(torch.uint8).int()
    assert packed[:64].tolist() == [(5 * row + column) ^ 0x80 for row in range(16) for column in range(4)]
    assert packed[64:80].tolist() == [5 * row + 4 for row in range(16)]
    assert packed[80:].tolist() == weight[16].tolist()
    # INT4: columns 1 2 3 4 5 6 7 -8 become the bytes (w[b] + 8) | (w[4 + b] + 8) << 4.
    packed = library.pack(torch.tensor([[0x12, 0x34, 0x56, 0x78]] * 16, dtype=torch.int8), 4)
    assert packed.flatten()[:4].view(torch.uint8).tolist() == [0xD9, 0xEA, 0xFB, 0x0C]


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_same_arithmetic_in_float64(backend, bits, activations):
    for out, columns in SHAPES:
        weight, scale, bias, x = draw(out, columns, bits, max(ROWS))
        packed, steps, inputs = backend.pack(weight, bits), unpack_weight(weight, bits), rounded(x, activations)
        for rows in ROWS:
            got = backend.linear(x[:rows], packed, scale, bias, bits, activations)
            assert relative_error(got, inputs[:rows], steps, scale, bias) < TOLERANCE, (out, columns, rows)


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
def test_odd_widths_of_int8(backend, activations):
    for out, columns in ((9, 1), (9, 3), (40, 129)):
        weight, scale, bias, x = draw(out, columns, 8, 14)
        for rows in (1, 4, 14):
            got = backend.linear(x[:rows], backend.pack(weight, 8), scale, bias, 8, activations)
            assert relative_error(got, rounded(x[:rows], activations), weight, scale, bias) < TOLERANCE


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_more_rows_than_are_prepared_at_once(backend, bits, activations):
    weight, scale, bias, x = draw(40, 136, bits, 700)
    got = backend.linear(x, backend.pack(weight, bits), scale, bias, bits, activations)
    assert relative_error(got, rounded(x, activations), unpack_weight(weight, bits), scale, bias) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_the_way_back_equals_the_same_arithmetic_in_float64(backend, bits):
    for out, columns in (*SHAPES, (1000, 300)):
        weight, scale, _, _ = draw(out, columns, bits, 1)
        packed, matrix = backend.pack(weight, bits), unpack_weight(weight, bits).double()
        grad = torch.randn(300, out, generator=torch.Generator().manual_seed(1))
        rounded = (grad * scale).bfloat16().double()
        for rows in (*ROWS, 300):  # 300 are more than are prepared at once
            got = backend.linear_back(grad[:rows], packed, scale, bits).double()
            size = rounded[:rows].abs() @ matrix.abs()
            assert ((got - rounded[:rows] @ matrix).abs() / size.clamp(min=1e-30)).max() < TOLERANCE, (
                out,
                columns,
                rows,
            )


@pytest.mark.parametrize("bits", [4, 8])
def test_the_way_back_keeps_rows_apart_and_does_not_depend_on_threads(backend, bits):
    weight, scale, _, _ = draw(300, 130, bits, 1)
    packed, grad, before = backend.pack(weight, bits), torch.randn(3, 2, 300), torch.get_num_threads()
    want = backend.linear_back(grad, packed, scale, bits)
    assert want.shape == (3, 2, 130) and backend.linear_back(grad.half(), packed, scale, bits).dtype == torch.float16
    grad[1, 0, 7] = float("nan")
    try:
        torch.set_num_threads(1)
        got = backend.linear_back(grad, packed, scale.double(), bits)
    finally:
        torch.set_num_threads(before)
    assert not got[1, 0].isfinite().any()
    got[1, 0] = want[1, 0]
    assert torch.equal(got, want)


def test_the_way_back_of_nothing_and_of_other_widths(library):
    weight, scale, _, _ = draw(20, 200, 8, 1)
    packed = library.pack(weight, 8)
    assert library.linear_back(torch.ones(0, 20), packed, scale, 8).shape == (0, 200)
    assert not library.linear_back(torch.ones(3, 0), packed[:0], scale[:0], 8).any()
    assert library.linear_back(torch.ones(3, 20), library.pack(weight[:, :0], 8), scale, 8).shape == (3, 0)
    with pytest.raises(ValueError, match=r"grad must be \[..., 20\] on the CPU, got \[3, 200\]"):
        library.linear_back(torch.ones(3, 200), packed, scale, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_weights_and_activations_do_not_overflow(backend, bits):
    scale, bias = torch.ones(32), torch.zeros(32)
    for byte in (-128, 0x77 if bits == 4 else 127, -0x78):  # INT4: -8 and 0, 7 and 7, -8 and -8
        weight = torch.full((32, 256 * bits // 8), byte, dtype=torch.int8)
        steps = unpack_weight(weight, bits)
        for sign in (1.0, -1.0):
            for rows in (1, 2, 4, 13):
                x = torch.full((rows, 256), sign)
                for activations in ("int8", "int16", "bf16"):
                    got = backend.linear(x, backend.pack(weight, bits), scale, bias, bits, activations)
                    torch.testing.assert_close(got, (x @ steps.float().T), rtol=1e-6, atol=0)


def test_scales_in_float16_and_no_bias(backend):
    weight, scale, _, x = draw(33, 258, 4, 5)
    packed, scale = backend.pack(weight, 4), scale.half()
    scale[0] = 6e-8  # a subnormal
    got = backend.linear(x, packed, scale, None, 4, "bf16")
    assert torch.equal(got, backend.linear(x, packed, scale.float(), None, 4, "bf16"))
    assert relative_error(got, x.bfloat16().double(), unpack_weight(weight, 4), scale, torch.zeros(33)) < TOLERANCE


def test_scales_of_any_float_dtype_and_layout(library):
    weight, scale, bias, x = draw(33, 258, 4, 5)
    packed, ids = library.pack(weight, 4), torch.tensor([32, 0])
    scale = scale.bfloat16().float()
    for other in (scale.bfloat16(), scale.double(), torch.stack((scale, bias), 1)[:, 0]):
        assert torch.equal(library.linear(x, packed, other, bias, 4), library.linear(x, packed, scale, bias, 4))
        assert torch.equal(library.embedding(ids, packed, other, 4), library.embedding(ids, packed, scale, 4))


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_number_of_threads_changes_nothing(backend, bits, activations):
    weight, scale, bias, x = draw(300, 1000, bits, 33)
    packed, before = backend.pack(weight, bits), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(backend.pack(weight, bits), packed)
            results.append([backend.linear(x[:rows], packed, scale, bias, bits, activations) for rows in (1, 33)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_form_has_the_same_quantised_activations(backend, bits):
    weight, scale, bias, x = draw(48, 1000, bits, 3)
    packed = backend.pack(weight, bits)
    got = backend.linear(x, packed, scale, bias, bits)
    backend.variant = "plain"
    want = backend.linear(x, packed, scale, bias, bits)
    size = quantised(x).abs() @ unpack_weight(weight, bits).double().abs().T * scale
    # One step of one activation more or less would be 1e-5 or more of this.
    assert ((got - want).abs() / size).max() < 5e-7


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spoil_their_own_row_only(backend, bits, activations, value):
    for rows in (1, 3, 17):
        weight, scale, bias, x = draw(20, 200, bits, rows)
        packed, spoilt, row = backend.pack(weight, bits), x.clone(), rows // 2
        spoilt[row, 150] = value
        want = backend.linear(x, packed, scale, bias, bits, activations)
        got = backend.linear(spoilt, packed, scale, bias, bits, activations)
        assert not got[row].isfinite().any()
        others = torch.arange(rows) != row
        assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
def test_rows_of_zeros_and_of_tiny_values_give_the_bias(backend, activations):
    weight, scale, bias, x = draw(20, 200, 8, 2)
    x[0], x[1] = 0, 1e-38
    got = backend.linear(x, backend.pack(weight, 8), scale, bias, 8, activations)
    assert torch.equal(got, bias.expand(2, 20))


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
def test_no_rows_no_outputs_and_no_columns(backend, activations):
    weight, scale, bias, x = draw(20, 200, 8, 3)
    packed = backend.pack(weight, 8)
    assert backend.linear(x[:0], packed, scale, bias, 8, activations).shape == (0, 20)
    assert backend.linear(x, packed[:0], scale[:0], None, 8, activations).shape == (3, 0)
    got = backend.linear(x[:, :0], backend.pack(weight[:, :0], 8), scale, bias, 8, activations)
    assert torch.equal(got, bias.expand(3, 20))


@pytest.mark.parametrize("activations", ["int8", "int16", "bf16"])
def test_calls_from_several_threads_do_not_disturb_each_other(library, activations):
    weight, scale, bias, x = draw(300, 1000, 4, 40)
    packed, parts = library.pack(weight, 4), x.split([1, 2, 4, 33])
    want = [library.linear(part, packed, scale, bias, 4, activations) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = pool.map(lambda part: library.linear(part, packed, scale, bias, 4, activations), parts)
            assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_is_a_row_of_the_dequantised_matrix(library, shape, bits):
    weight, scale, _, _ = draw(*shape, bits, 1)
    packed, ids = library.pack(weight, bits), torch.arange(shape[0] - 1, -1, -1)
    for exact in (scale, scale.half()):
        want = dequantize_weight(weight, exact, bits, torch.float32)
        assert torch.equal(library.embedding(ids, packed, exact, bits), want[ids])


@pytest.mark.parametrize("bits", [4, 8])
def test_error_from_rounding_activations_with_outliers(backend, bits):
    """8 of 4096 columns are 50 times the others, as in real models.

    Error of the outputs relative to their size: int8 0.024 (one scale for the whole row: 0.09), bf16 0.0017,
    int16 0.0001.
    """
    generator = torch.Generator().manual_seed(0)
    weight, scale, _, _ = draw(64, 4096, bits, 1)
    x = torch.randn(40, 4096, generator=generator)
    x[:, torch.randperm(4096, generator=generator)[:8]] *= 50
    exact = x.double() @ dequantize_weight(weight, scale, bits, torch.float64).T
    packed, error = backend.pack(weight, bits), {}
    for activations in ("int8", "int16", "bf16"):
        got = backend.linear(x, packed, scale, None, bits, activations).double()
        error[activations] = ((got - exact).norm() / exact.norm()).item()
    assert error["int8"] < 0.03
    assert error["bf16"] < 0.002
    assert error["int16"] < 0.00012
