"""Torch's packed operators give the values of quantization.py and the published bytes back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatglm.kernels import torch_packed
from chatglm.quantization import dequantize_weight, quantize_weight

pytestmark = pytest.mark.skipif(torch_packed.problem() is not None, reason=str(torch_packed.problem()))

ROOT = Path(__file__).parents[2]
# One unit of torch's, several, several with a rest, blocks with a rest; as wide as ChatGLM-6B.
SHAPES = [(16, 32), (64, 64), (112, 96), (528, 1024), (48, 4096)]


@pytest.fixture
def kernels():
    return torch_packed.TorchPacked("for a test")


def stored_matrix(out_features, in_features, bits):
    torch.manual_seed(0)
    packed = torch.randint(-128, 128, (out_features, in_features * bits // 8), dtype=torch.int8)  # -8 and -128, too
    return packed, torch.rand(out_features).half() / 50


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_unpacking_gives_the_published_bytes(kernels, shape, bits):
    weight, _ = stored_matrix(*shape, bits)
    assert kernels.supports(*shape, bits)
    packed = kernels.pack(weight, bits)
    assert packed.shape == weight.shape and packed.dtype == torch.int8
    assert torch.equal(kernels.unpack(packed, bits), weight)


@pytest.mark.parametrize("rows", [1, 5, 32, 33])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_dequantised_matrix(kernels, shape, bits, rows):
    weight, scale = stored_matrix(*shape, bits)
    x, bias = torch.randn(rows, shape[1]), torch.randn(shape[0])
    matrix = dequantize_weight(weight, scale, bits, torch.float32)
    y = kernels.linear(x, kernels.pack(weight, bits), scale, bias, bits)
    # Each factor of x and each sum is rounded to bfloat16: by 1 part in 256 at most.
    bound = (x.abs() @ matrix.T.abs()) / 256 + (x @ matrix.T).abs() / 256 + 1e-4
    if rows > torch_packed.FEW_ROWS:
        bound = 1e-5 * (x.abs() @ matrix.T.abs()) + 1e-5  # float32
    assert ((y - (x @ matrix.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_back_is_through_the_dequantised_matrix(kernels, shape, bits):
    weight, scale = stored_matrix(*shape, bits)
    grad = torch.randn(2, 3, shape[0])
    want = grad @ dequantize_weight(weight, scale, bits, torch.float32)
    got = kernels.linear_back(grad, kernels.pack(weight, bits), scale, bits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert kernels.linear_back(grad.bfloat16(), kernels.pack(weight, bits), scale, bits).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_is_exactly_the_dequantised_row(kernels, bits):
    weight, scale = stored_matrix(112, 96, bits)
    ids = torch.randint(0, 112, (2, 30))
    rows = kernels.embedding(ids, kernels.pack(weight, bits), scale, bits)
    assert torch.equal(rows, dequantize_weight(weight, scale, bits, torch.float32)[ids])
    for wrong in (-1, 112):
        with pytest.raises(IndexError):
            kernels.embedding(torch.tensor([wrong]), kernels.pack(weight, bits), scale, bits)


def test_input_keeps_its_leading_shape_and_dtype(kernels):
    weight, scale = stored_matrix(32, 64, 4)
    x = torch.randn(2, 3, 64).bfloat16()
    y = kernels.linear(x, kernels.pack(weight, 4), scale, None, 4)
    assert y.shape == (2, 3, 32) and y.dtype == torch.bfloat16
    assert kernels.linear(x[:, :0], kernels.pack(weight, 4), scale, None, 4).shape == (2, 0, 32)


def test_shapes_that_torch_cannot_do_are_left_to_plain_torch(kernels):
    refused = [(17, 32, 4), (16, 34, 4), (16, 48, 4), (16, 40, 8), (0, 32, 4), (16, 0, 8), (16, 32, 3)]
    assert [shape for shape in refused if kernels.supports(*shape)] == []
    assert kernels.supports(17, 32, 8)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_bytes_and_values_are_right_on_lesser_processors(capability):
    """Torch packs in another order there, and below AVX2 its operators are too slow to use."""
    program = """
import torch
from chatglm.kernels import torch_packed as t
from chatglm.quantization import dequantize_weight, quantize_weight
assert t.problem() is None
kernels = t.TorchPacked("")
x = torch.randn(3, 96)
for bits in (4, 8):
    weight, scale = quantize_weight(torch.randn(112, 96), bits)
    packed = kernels.pack(weight, bits)
    assert kernels.supports(112, 96, bits) and torch.equal(kernels.unpack(packed, bits), weight)
    matrix = dequantize_weight(weight, scale, bits, torch.float32)
    assert (kernels.linear(x, packed, scale, None, bits) - x @ matrix.T).abs().max() < 0.3
    assert torch.equal(kernels.embedding(torch.arange(112), packed, scale, bits), matrix)
print(torch.backends.cpu.get_cpu_capability(), t.FEW_ROWS)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    name, few = result.stdout.split()
    assert int(few) == (32 if name in ("AVX2", "AVX512") else 0)


@pytest.fixture
def fresh():
    """Forget what was found out about this torch, before and after a test."""
    caches = (torch_packed.problem, torch_packed._works, torch_packed._row_order, torch_packed._unit)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize(
    ("change", "unit"),
    [
        (lambda packed: packed.flip(1), torch_packed._unit()),  # other columns: row numbers do not show it, products do
        (torch.zeros_like, 0),  # no order of rows at all
    ],
)
def test_torch_that_packs_in_an_unknown_way_is_not_used(fresh, monkeypatch, change, unit):
    pack = torch_packed._pack_integers
    monkeypatch.setattr(torch_packed, "_pack_integers", lambda integers: change(pack(integers)))
    assert torch_packed._unit() == unit
    assert torch_packed.problem() == "torch's packed operators do not give the values they should"


def test_quantised_matrix_keeps_its_precision(kernels):
    torch.manual_seed(0)
    matrix, x = torch.randn(64, 256), torch.randn(4, 256)
    weight, scale = quantize_weight(matrix, 8)
    y = kernels.linear(x, kernels.pack(weight, 8), scale, None, 8)
    assert (y - x @ matrix.T).abs().max() < 0.01 * (x @ matrix.T).abs().max()
