"""The Triton kernels against dequantise-and-multiply: interpreted on the CPU, compiled for a GPU, and run on one.

The interpreter must be switched on before Triton is imported, so one other Python runs all interpreted cases.
"""

import copy
import itertools
import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from chatglm import kernels
from chatglm.kernels import cuda
from chatglm.quantization import dequantize_weight, set_activations
from chatglm.quantization import linear as plain_linear

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INTERPRET = """
import sys, torch
from chatglm.kernels import cuda
assert "chatglm.kernels.linear_triton" not in sys.modules  # only when a tensor arrives
cases = torch.load(sys.argv[1], weights_only=False)
torch.save({key: getattr(cuda, key[0])(*arguments) for key, arguments in cases.items()}, sys.argv[2])
"""

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One output and one byte; less than a block of anything; more than one block of outputs, and of columns, both ragged.
SHAPES = {4: [(1, 2), (7, 30), (33, 514), (9, 2050)], 8: [(1, 1), (7, 33), (33, 259), (9, 1025)]}
# One; the first and last of a block of 16, and one more; the last that are fused, and one more.
ROWS = [1, 2, 16, 17, cuda.MAX_ROWS, cuda.MAX_ROWS + 1]
PRODUCTS = [
    ("linear", bits, dtype, shape, rows)
    for bits, dtype, rows in itertools.product((4, 8), DTYPES, ROWS)
    for shape in SHAPES[bits]
]
MATRICES = [
    ("dequantize", bits, dtype, shape, scale_dtype)
    for bits, dtype, scale_dtype in itertools.product((4, 8), DTYPES, (torch.float16, torch.float32))
    for shape in SHAPES[bits]
]


def stored(out_features, in_features, bits, scale_dtype=torch.float16):
    """Weight, scale and bias: every byte, also those that quantising never makes, and scales of real size."""
    generator = torch.Generator().manual_seed(out_features * in_features + bits)
    weight = torch.randint(-128, 128, (out_features, in_features * bits // 8), generator=generator).to(torch.int8)
    scale = (torch.rand(out_features, generator=generator) * 0.02 + 0.001).to(scale_dtype)
    return weight, scale, torch.randn(out_features, generator=generator)


def inputs(rows, in_features, dtype):
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)


def arguments(key):
    name, bits, dtype, shape, last = key
    if name == "dequantize":
        return *stored(*shape, bits, last)[:2], bits, dtype
    weight, scale, bias = stored(*shape, bits)
    return inputs(last, shape[1], dtype), weight, scale, bias.to(dtype), bits


def differs_by_rounding_alone(y, x, weight, scale, bias, bits, fused=True, rounding=None):
    """Compare y with the exact value, in float64. Fused: the float32 sum, in any order, and the rounding of the result.

    Not fused: also that of each weight, and of the product without bias. rounding: half a step of y's dtype by default.
    """
    rounding = rounding or torch.finfo(y.dtype).eps / 2
    matrix = dequantize_weight(weight, scale, bits, torch.float64)
    product = x.double() @ matrix.t()
    exact = product if bias is None else product + bias.double()
    magnitude = x.double().abs() @ matrix.abs().t() + (exact - product).abs()
    allowed = magnitude * (x.shape[-1] + 2) * 2.0**-24 + exact.abs() * rounding + torch.finfo(y.dtype).tiny
    if not fused:
        allowed += magnitude * rounding + product.abs() * rounding
    return bool(((y.double() - exact).abs() <= allowed).all())


def bad_row():
    x = inputs(3, 30, torch.float16)
    x[1, 4] = float("nan")
    return x


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Result of every case, from a Python in which Triton interprets; keys begin with the name of the function."""
    more = {
        ("linear", "no bias"): (inputs(3, 30, torch.float16), *stored(7, 30, 4)[:2], None, 4),
        ("linear", "float32 scale"): (inputs(3, 30, torch.float16), *stored(7, 30, 4, torch.float32), 4),
        ("linear", "strided"): (inputs(6, 60, torch.float16).view(2, 3, 60)[..., ::2], *stored(7, 30, 4), 4),
        ("linear", "no rows"): (inputs(0, 30, torch.float16), *stored(7, 30, 4), 4),
        ("linear", "bad row"): (bad_row(), *stored(7, 30, 4), 4),
        ("linear", "wide"): (inputs(1, 4096, torch.float16), *stored(64, 4096, 4), 4),
    }
    trials = {("_work", bits, dtype): (torch.device("cpu"), dtype, bits) for bits in (4, 8) for dtype in DTYPES}
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save({key: arguments(key) for key in PRODUCTS + MATRICES} | more | trials, folder / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", INTERPRET, folder / "cases.pt", folder / "results.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return torch.load(folder / "results.pt")


@needs_triton
@pytest.mark.parametrize("key", PRODUCTS, ids=str)
def test_interpreted_product_differs_from_the_exact_one_by_rounding(interpreted, key):
    _, _, dtype, shape, rows = key
    y = interpreted[key]
    assert y.shape == (rows, shape[0])
    assert y.dtype == dtype
    # The interpreter cuts to bfloat16 instead of rounding, and takes the float32 way for it.
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else None
    fused = rows <= (cuda.MAX_ROWS if dtype == torch.float16 else cuda.MAX_ROWS_WITHOUT_TENSOR_CORES)
    assert differs_by_rounding_alone(y, *arguments(key), fused, rounding)


@needs_triton
@pytest.mark.parametrize("key", MATRICES, ids=str)
def test_interpreted_matrix_is_that_of_the_truth(interpreted, key):
    _, _, dtype, _, _ = key
    expected = dequantize_weight(*arguments(key))
    if dtype == torch.bfloat16:  # cut, not rounded
        expected = dequantize_weight(*arguments(key)[:3], torch.float32)
        expected = (expected.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    assert torch.equal(interpreted[key], expected)


@needs_triton
def test_what_else_linear_takes(interpreted):
    x, (weight, scale, bias) = inputs(3, 30, torch.float16), stored(7, 30, 4)
    assert differs_by_rounding_alone(interpreted["linear", "no bias"], x, weight, scale, None, 4)
    wide = stored(7, 30, 4, torch.float32)
    assert differs_by_rounding_alone(interpreted["linear", "float32 scale"], x, *wide, 4)
    x = inputs(6, 60, torch.float16).view(2, 3, 60)[..., ::2]
    assert differs_by_rounding_alone(interpreted["linear", "strided"], x, weight, scale, bias, 4)
    assert interpreted["linear", "no rows"].shape == (0, 7)
    assert interpreted["linear", "bad row"].isnan().any(dim=1).tolist() == [False, True, False]


@needs_triton
def test_fused_product_is_closer_to_exact_than_the_truth_in_float16(interpreted):
    x, (weight, scale, bias) = inputs(1, 4096, torch.float16), stored(64, 4096, 4)
    exact = x.double() @ dequantize_weight(weight, scale, 4, torch.float64).t() + bias.double()
    published = x.double() @ dequantize_weight(weight, scale, 4, torch.float16).double().t() + bias.double()
    fused_error = (interpreted["linear", "wide"].double() - exact).square().mean().sqrt()
    published_error = (published.half().double() - exact).square().mean().sqrt()
    assert fused_error < published_error
    assert fused_error < 2.0**-11 * exact.abs().max()  # the rounding of the result, no more


@needs_triton
def test_kernels_pass_their_own_trial_in_the_interpreter(interpreted):
    assert [interpreted["_work", bits, dtype] for bits in (4, 8) for dtype in DTYPES] == [True] * 6


@needs_triton
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_compile_to_wide_loads_and_tensor_cores(bits, monkeypatch, tmp_path):
    """What the interpreter cannot tell: for an A100 every weight is loaded sixteen bytes at a time."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chatglm.kernels import linear_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("x", "bias", "y", "scale"), "*fp16") | {"weight": "*i8"}
    shared = {"BITS": bits, "FEATURES": 8, "BYTES": 512}
    few = {"BITS": bits, "ROWS": 16, "FEATURES": 32, "BYTES": 32 * bits, "HALF": True}
    ptx = {}
    for kernel, constants in (
        (linear_triton.one_row, shared),
        (linear_triton.few_rows, few),
        (linear_triton.dequantize, shared),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = [index for index, name in enumerate(names) if name not in constants and name != "num_rows"]
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton_compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "num_stages": 4})
        ptx[kernel.fn.__name__] = compiled.asm["ptx"]
        assert compiled.metadata.shared <= 48 << 10  # what every GPU gives a block without asking
    for name in ("one_row", "dequantize"):
        loads = re.findall(r"ld\.global\S*\.(\w+)\s", ptx[name])
        assert "b8" not in loads
        assert "ld.global.v4.b32" in ptx[name]
    assert "cp.async.cg.shared.global [" in ptx["few_rows"]
    assert "mma.sync" in ptx["few_rows"]


def test_no_kernels_for_tensors_that_they_do_not_take(monkeypatch):
    monkeypatch.setattr(cuda, "_kernels", lambda: object())
    monkeypatch.setattr(cuda, "_work", lambda device, dtype, bits: True)
    device = torch.device("cuda", 0)
    weight = SimpleNamespace(device=device, shape=(3, 8))

    def x(width=16, dtype=torch.float16, device=device, is_cuda=True):
        return SimpleNamespace(is_cuda=is_cuda, device=device, dtype=dtype, shape=(1, width))

    assert cuda.usable(x(), weight)
    assert cuda.usable(x(width=8), weight)
    assert not cuda.usable(x(width=9), weight)
    assert not cuda.usable(x(dtype=torch.float64), weight)
    assert not cuda.usable(x(device=torch.device("cuda", 1)), weight)
    assert not cuda.usable(x(is_cuda=False), weight)
    monkeypatch.setenv("CHATGLM_KERNELS", "none")
    assert not cuda.usable(x(), weight)


def test_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="INT4 weights of 15 bytes per row do not fit an input of width 15"):
        cuda.linear(inputs(1, 15, torch.float16), *stored(7, 30, 4), 4)


@pytest.fixture
def fresh():
    """Forget what was tried and said before, and afterwards what the test made up."""
    for function in (cuda._kernels, cuda._work, cuda._warn):
        function.cache_clear()
    yield
    for function in (cuda._kernels, cuda._work, cuda._warn):
        function.cache_clear()


def test_without_triton_plain_torch_is_used_and_said_once(fresh, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "chatglm.kernels.linear_triton", raising=False)
    monkeypatch.delattr(kernels, "linear_triton", raising=False)
    device = torch.device("cuda", 0)
    weight = SimpleNamespace(device=device, shape=(3, 8))
    x = SimpleNamespace(is_cuda=True, device=device, dtype=torch.float16, shape=(1, 16))
    with caplog.at_level(logging.WARNING):
        assert not cuda.usable(x, weight)
        assert not cuda.usable(x, weight)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Triton cannot be imported (ModuleNotFoundError:")
    assert caplog.messages[0].endswith("quantised layers multiply in plain torch there, which is right but slower")


class Fake:
    """Stands for the kernels of linear_triton: all of them do the same."""

    def __init__(self, do):
        self.one_row = self.few_rows = self.dequantize = self
        self.do = do

    def __getitem__(self, grid):
        return self.do


def fail(*arguments, **options):
    raise RuntimeError("Failed to find C compiler.\nA long explanation")


@pytest.mark.parametrize(
    ("do", "reason"),
    [(fail, "RuntimeError: Failed to find C compiler."), (lambda *_, **__: None, "they give wrong results")],
)
def test_kernels_that_do_not_work_are_left_alone_with_one_warning(do, reason, fresh, monkeypatch, caplog):
    fake = Fake(do)
    monkeypatch.setitem(sys.modules, "chatglm.kernels.linear_triton", fake)
    monkeypatch.setattr(kernels, "linear_triton", fake, raising=False)
    with caplog.at_level(logging.WARNING):
        assert not cuda._work(torch.device("cpu"), torch.float16, 4)
        assert not cuda._work(torch.device("cpu"), torch.float16, 8)
    assert caplog.messages == [
        f"the Triton kernels do not work on cpu ({reason}): "
        "quantised layers multiply in plain torch there, which is right but slower"
    ]


def on_device(arguments):
    return [item.cuda() if torch.is_tensor(item) else item for item in arguments]


def fused_on_device(dtype, rows):
    tensor_cores = dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0)
    return rows <= (cuda.MAX_ROWS if tensor_cores else cuda.MAX_ROWS_WITHOUT_TENSOR_CORES)


@needs_triton
@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_product_on_the_device_differs_from_the_exact_one_by_rounding(bits, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)  # more rows than the fused kernel takes
    layers = [(4096, 4096), (4096, 16384)]
    cases = [key for key in PRODUCTS if key[1:3] == (bits, dtype)]
    cases += [("linear", bits, dtype, shape, rows) for shape in layers for rows in (1, 5, 40)]
    for key in cases:
        x, weight, scale, bias, _ = on_device(arguments(key))
        assert cuda.usable(x, weight)
        y = cuda.linear(x, weight, scale, bias, bits)
        assert differs_by_rounding_alone(y, x, weight, scale, bias, bits, fused_on_device(dtype, len(x))), key
        assert torch.equal(y, cuda.linear(x, weight, scale, bias, bits)), key  # and the same each time


@needs_triton
@needs_cuda
@pytest.mark.gpu
def test_matrix_on_the_device_is_that_of_the_truth():
    for key in MATRICES:
        values = on_device(arguments(key))
        assert torch.equal(cuda.dequantize(*values), dequantize_weight(*values)), key


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_model_on_the_device_equals_the_truth_on_the_cpu(model, tokenizer, bits):
    quantized = copy.deepcopy(model).quantize(bits)
    questions = tokenizer(["你好", "What can you do?"], return_tensors="pt", padding=True)
    results = []
    for device, activations in (("cpu", "float32"), ("cuda", "int8")):  # the plain product; the fused kernels
        quantized.to(device)
        set_activations(quantized, activations)
        with torch.no_grad():
            logits = quantized(**questions.to(device)).logits.cpu()
            answers = quantized.generate(**questions.to(device), do_sample=False, max_new_tokens=12).cpu()
            one = quantized.generate(input_ids=questions.input_ids[1:], do_sample=False, max_new_tokens=12).cpu()
        results.append((logits, answers, one))
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-3, rtol=1e-3)
    assert results[1][1].tolist() == results[0][1].tolist()
    assert results[1][2].tolist() == results[0][2].tolist()


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_on_the_device_are_those_on_the_cpu(bits):
    weight, scale, bias = stored(33, 514, bits)
    results = []
    for device in ("cpu", "cuda"):
        x = inputs(5, 514, torch.float32).to(device).requires_grad_()
        b = bias.to(device).requires_grad_()
        plain_linear(x, weight.to(device), scale.to(device), b, bits).square().sum().backward()
        results.append((x.grad.cpu(), b.grad.cpu()))
    torch.testing.assert_close(results[1], results[0], atol=1e-2, rtol=1e-4)
