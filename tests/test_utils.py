"""Flags, the choice of device and dtype, memory needed and free, the printed lines, the plan, and polite endings."""

import argparse
import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import utils
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.checkpoint import CheckpointError, open_checkpoint
from chatglm.quantization import ACTIVATIONS

GB = 10**9


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo.py")
    utils.add_model_arguments(parser)
    utils.add_generation_arguments(parser)
    return parser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "my-model"
    config = ChatGLMConfig(
        vocab_size=780,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=48,
        bos_token_id=432,
        eos_token_id=433,
        mask_token_id=428,
        gmask_token_id=429,
        pad_token_id=3,
    )
    ChatGLMForConditionalGeneration(config).save_pretrained(folder)
    vocabulary = Path(__file__).parent / "golden" / "tokenizer" / "mini_ice_text.model"
    ChatGLMTokenizer(vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def six_billion():
    """The shape of ChatGLM-6B: all in all 13.8 GB in float16, 27.6 GB in float32, 8.2 GB in INT8, 5.4 GB in INT4."""
    return utils.published_checkpoint()


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(monkeypatch, request):
    """Whether the processor multiplies in bfloat16: both cases, on every machine."""
    monkeypatch.setattr(utils, "native_bfloat16", lambda: request.param)
    return request.param


@pytest.fixture
def no_bfloat16(monkeypatch):
    monkeypatch.setattr(utils, "native_bfloat16", lambda: False)


def choose(checkpoint, free, device="auto", dtype=None, quantization_bit=None, embedding_bit=None):
    """Device, dtype and reason on a machine that has the devices of free, with so many GB free on each."""
    room = {name: size * GB for name, size in free.items()}
    return utils.choose_device(checkpoint, device, dtype, quantization_bit, embedding_bit, list(free), room.get)


# Flags ----------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones():
    args = parser().parse_args([])
    assert utils.model_options(args) == {
        "model_name_or_path": utils.DEFAULT_MODEL,
        "adapter": None,
        "revision": None,
        "device": "auto",
        "dtype": None,
        "quantization_bit": None,
        "embedding_bit": None,
        "activations": None,
        "num_gpus": None,
        "device_map": None,
    }
    assert utils.generation_options(args) == {
        "max_length": 2048,
        "max_new_tokens": None,
        "top_p": 0.7,
        "temperature": 0.95,
        "seed": None,
    }


def test_given_flags_arrive_with_their_types():
    line = (
        "--model_name_or_path M --adapter A --revision v1 --device cuda:1 --dtype bfloat16 --quantization_bit 4 "
        "--embedding_bit 16 --activations bf16 --num_gpus 2 --device_map auto --max_length 100 --max_new_tokens 7 "
        "--top_p 1 --temperature 0 --seed 3"
    )
    args = parser().parse_args(line.split())
    assert utils.model_options(args) == {
        "model_name_or_path": "M",
        "adapter": "A",
        "revision": "v1",
        "device": "cuda:1",
        "dtype": "bfloat16",
        "quantization_bit": 4,
        "embedding_bit": 16,
        "activations": "bf16",
        "num_gpus": 2,
        "device_map": "auto",
    }
    assert utils.generation_options(args) == {
        "max_length": 100,
        "max_new_tokens": 7,
        "top_p": 1.0,
        "temperature": 0.0,
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--top_p", "-0.1", "must be from 0 to 1, got -0.1"),
        ("--top_p", "nan", "must be from 0 to 1, got nan"),
        ("--temperature", "-1", "must be from 0 to 100, got -1"),
        ("--temperature", "hot", "must be from 0 to 100, got hot"),
        ("--max_length", "0", "must be a whole number from 1 to 2147483647, got 0"),
        ("--max_new_tokens", "1.5", "must be a whole number from 1 to 2147483647, got 1.5"),
        ("--device", "tpu", "must be auto, cuda, cuda:N, mps or cpu, got tpu"),
        ("--device", "cuda:one", "must be auto, cuda, cuda:N, mps or cpu, got cuda:one"),
        ("--quantization_bit", "3", "invalid choice: 3"),
        ("--embedding_bit", "2", "invalid choice: 2"),
        ("--activations", "int4", "invalid choice: 'int4'"),
        ("--seed", str(10**30), f"must be a whole number of at most 64 bits, got {10**30}"),
        ("--num_gpus", "0", "must be a whole number from 1 to 2147483647, got 0"),
        ("--device_map", "balanced", "invalid choice: 'balanced'"),
        ("--dtype", "int4", "invalid choice: 'int4'"),
    ],
)
def test_bad_value_ends_with_a_sentence_about_its_flag(capsys, flag, value, expected):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args([flag, value])
    assert caught.value.code == 2
    assert f"argument {flag}: {expected}" in capsys.readouterr().err


def test_help_says_the_default_of_every_flag():
    text = " ".join(parser().format_help().split())
    for action in parser()._actions[1:]:
        assert "(default: " in action.help, action.option_strings
    assert "most tokens of prompt + answer (default: 2048)" in text


def test_flag_offers_the_activations_that_there_are():
    assert utils.ACTIVATIONS == ACTIVATIONS


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, utils; print({'torch', 'transformers', 'psutil', 'chatglm'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(utils.__file__).parent, capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


# Device, dtype and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "bits", "free", "expected"),
    [
        ("auto", None, None, {"cpu": 64}, ("cpu", "float32")),
        ("auto", None, None, {"cpu": 24}, ("cpu", "bfloat16")),
        ("auto", None, None, {"cuda:0": 24, "cpu": 64}, ("cuda:0", "float16")),
        ("auto", None, None, {"cuda:0": 6, "cpu": 64}, ("cpu", "float32")),
        ("auto", None, None, {"cuda:0": 6, "cuda:1": 24, "cpu": 64}, ("cuda:1", "float16")),
        ("auto", None, None, {"mps": 16, "cpu": 16}, ("mps", "float16")),
        ("auto", "bfloat16", None, {"cuda:0": 24, "cpu": 64}, ("cuda:0", "bfloat16")),
        ("auto", "float32", None, {"cuda:0": 24, "cpu": 64}, ("cpu", "float32")),
        ("cpu", None, None, {"cuda:0": 24, "cpu": 64}, ("cpu", "float32")),
        ("cpu", "float16", None, {"cpu": 64}, ("cpu", "float16")),
        ("cuda:1", None, None, {"cuda:0": 0, "cuda:1": 24, "cpu": 64}, ("cuda:1", "float16")),
        ("auto", None, 8, {"cuda:0": 9, "cpu": 64}, ("cuda:0", "float16")),
        ("auto", None, 4, {"cuda:0": 6, "cpu": 64}, ("cuda:0", "float16")),
        ("auto", None, 4, {"cuda:0": 4, "cpu": 6}, ("cpu", "float32")),
    ],
)
@pytest.mark.usefixtures("no_bfloat16")
def test_device_and_dtype_that_fit_are_chosen(six_billion, device, dtype, bits, free, expected):
    assert choose(six_billion, free, device, dtype, bits)[:2] == expected


def test_cpu_computes_in_bfloat16_only_where_the_processor_does(six_billion, bfloat16):
    assert choose(six_billion, {"cpu": 64}) == ("cpu", "bfloat16" if bfloat16 else "float32", "")
    assert choose(six_billion, {"cpu": 64}, quantization_bit=8) == ("cpu", "float32", "")


def test_small_model_on_a_cpu_stays_in_the_format_of_its_file(six_billion, bfloat16):
    small = dataclasses.replace(six_billion, num_parameters=20_000_000)
    assert choose(small, {"cpu": 64}) == ("cpu", "float16", "")


def test_instructions_decide_what_is_native(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for has, expected in [
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx2": True, "bf16": False}, False),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert utils.native_bfloat16() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})  # such as Apple's, which torch leaves
    assert utils.native_bfloat16() is False


@pytest.mark.usefixtures("no_bfloat16")
def test_second_choice_says_why(six_billion):
    reason = choose(six_billion, {"cuda:0": 6, "cpu": 24})[2]
    assert reason == (
        "float16 on cuda:0 needs 13.8 GB, 6.0 GB are free; float32 on cpu needs 27.6 GB, 24.0 GB are free"
    )
    assert choose(six_billion, {"cuda:0": 6, "cpu": 24}, "cpu", "bfloat16")[2] == ""
    assert choose(six_billion, {"cuda:0": 4, "cpu": 24}, quantization_bit=4)[2] == (
        "INT4 on cuda:0 needs 5.4 GB, 4.0 GB are free"
    )


@pytest.mark.parametrize(
    ("flags", "free", "advice"),
    [
        ("", {"cuda:0": 9, "cpu": 8}, "--quantization_bit 8 would fit"),
        ("", {"cpu": 6}, "--quantization_bit 4 would fit"),
        ("--quantization_bit 8", {"cpu": 6}, "--quantization_bit 4 would fit"),
        ("--device cpu --dtype float32", {"cpu": 24}, "--device cpu --dtype bfloat16 would fit"),
        ("--device cuda:0", {"cuda:0": 6, "cpu": 64}, "--device cuda:0 --quantization_bit 4 would fit"),
        ("--device cuda:0", {"cuda:0": 4, "cpu": 64}, "--device cpu would fit"),
        ("--device cuda:0", {"cuda:0": 4, "cpu": 9}, "--device cpu --quantization_bit 8 would fit"),
        (
            "--device cuda:0 --quantization_bit 4",
            {"cuda:0": 4, "cpu": 6},
            "--device cpu --quantization_bit 4 would fit",
        ),
        ("--device cuda:0 --dtype float32", {"cuda:0": 24, "cpu": 8}, "--device cuda:0 --dtype float16 would fit"),
        ("", {"cuda:0": 4, "cpu": 4}, "add --device_map auto, which leaves a part on disk and is slow"),
        (
            "--device cpu",
            {"cpu": 4},
            "or replace --device cpu by --device_map auto, which leaves a part on disk and is slow",
        ),
    ],
)
@pytest.mark.usefixtures("no_bfloat16")
def test_too_little_memory_names_what_would_fit(six_billion, flags, free, advice):
    args = parser().parse_args(flags.split())
    with pytest.raises(MemoryError) as caught:
        choose(six_billion, free, args.device, args.dtype, args.quantization_bit)
    message = str(caught.value)
    assert message.startswith("too little memory for 6.2 B parameters: ")
    assert message.endswith(advice)
    if advice.startswith("--"):  # then it can be typed, and what was typed fits
        args = parser().parse_args(advice.removesuffix(" would fit").split())
        choose(six_billion, free, args.device, args.dtype, args.quantization_bit)


def test_memory_needed_is_that_of_the_tensors_and_the_cache(six_billion):
    needs = utils.memory_needs(six_billion, "cuda:0", "float16")
    assert six_billion.num_parameters == 6_173_286_400
    assert needs.weights == 2 * 6_173_286_400
    assert needs.cache == 2 * 28 * 2048 * 4096 * 2  # keys and values, layers, tokens, channels, float16
    assert needs.total == needs.weights + needs.cache + needs.working
    # INT4 halves a byte per weight of the layers; embedding and head stay one float16 matrix, on a CPU one of INT8.
    layers, embedding, rows = 28 * 12 * 4096**2, 130528 * 4096, 28 * (3 + 1 + 4 + 1) * 4096
    floats = 28 * 4 * 4096 + 2 * 4096 + 2 * rows  # norms; biases and scales
    assert utils.memory_needs(six_billion, "cuda:0", "float16", 4).weights == layers // 2 + 2 * (embedding + floats)
    on_cpu = utils.memory_needs(six_billion, "cpu", "float32", 4)
    assert on_cpu.weights == layers // 2 + embedding + 4 * (130528 + floats)
    assert on_cpu.cache == needs.cache  # float16 even where the arithmetic is float32


def test_model_takes_the_memory_that_was_computed(folder):
    for bits in (None, 8, 4):
        model, _ = utils.load_model(folder, device="cpu", dtype="float32", quantization_bit=bits)
        taken = sum(parameter.nbytes for parameter in model.parameters())
        assert taken == utils.memory_needs(open_checkpoint(folder), "cpu", "float32", bits).weights


def test_free_memory_of_this_machine_is_plausible():
    assert 10**7 < utils.free_memory("cpu") < 10**14


def test_disk_is_measured_where_the_layers_would_go(tmp_path):
    assert utils.free_memory("disk", tmp_path / "not" / "yet") > 0
    assert not (tmp_path / "not").exists()


def test_memory_limit_of_a_container_counts(tmp_path):
    assert utils._free_in_container(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 1500\n")
    assert utils._free_in_container(tmp_path) == 4500
    (tmp_path / "memory.max").write_text("max\n")
    assert utils._free_in_container(tmp_path) == float("inf")


# Loading --------------------------------------------------------------------------------------------------------------


def test_load_model_says_on_stderr_what_it_loaded(capsys, folder):
    model, tokenizer = utils.load_model(folder, device="cpu")
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"loaded my-model   0\.0 M parameters   float16   0\.00 GB   cpu   \d+\.\d s\n", output.err)
    assert not model.training
    assert model.device.type == "cpu" and model.dtype == torch.float16
    assert tokenizer("你好")["input_ids"][-2:] == [429, 432]
    assert model.config.name_or_path == str(folder.resolve())


@pytest.mark.parametrize(
    ("options", "form", "kinds"),
    [
        ({"quantization_bit": 4}, "int4, embedding int8, float32", (4, 8)),
        ({"quantization_bit": 8}, "int8, float32", (8, 8)),
        ({"quantization_bit": 8, "embedding_bit": 4}, "int8, embedding int4, float32", (8, 4)),
        ({"quantization_bit": 4, "embedding_bit": 16}, "int4, embedding bfloat16, float32", (4, 0)),
    ],
)
def test_quantised_model_has_the_bits_that_were_asked_for(capsys, folder, options, form, kinds):
    model, tokenizer = utils.load_model(folder, device="cpu", activations="bf16", **options)
    loaded, kernels = capsys.readouterr().err.splitlines()
    assert f"   {form}   " in loaded and re.fullmatch(r"kernels: .+ \(.+\)", kernels)
    assert (model.config.quantization_bit, model.config.embedding_bits) == kinds
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    assert (layer.bits, layer.activations, layer.weight.dtype) == (options["quantization_bit"], "bf16", torch.int8)
    embedding = model.transformer.word_embeddings.weight
    assert embedding.dtype == (torch.int8 if kinds[1] else torch.bfloat16)
    assert model.lm_head.weight is embedding
    model.chat(tokenizer, "你好", temperature=0, max_new_tokens=2)


def test_kernels_line_tells_what_computes_and_why(monkeypatch):
    from chatglm import kernels

    monkeypatch.setattr(kernels, "cpu_backend", lambda: SimpleNamespace(name="C kernels, AVX2", reason="gcc built it"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert utils.cpu_kernels() == "C, AVX2, 8 threads (gcc built it)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert utils.cpu_kernels() == "C, AVX2, 1 thread (gcc built it)"
    monkeypatch.setattr(
        kernels, "cpu_backend", lambda: SimpleNamespace(name="C kernels, plain C, one thread", reason="no OpenMP")
    )
    assert utils.cpu_kernels() == "C, plain C, one thread (no OpenMP)"
    monkeypatch.setattr(kernels, "cpu_backend", lambda: None)
    monkeypatch.setattr(kernels, "cpu_reason", lambda: "there is no C compiler")
    assert utils.cpu_kernels() == "plain torch (there is no C compiler)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:7"}, r"device cuda:7 is not there: this machine has "),
        ({"device": "tpu"}, r"device tpu is not there: this machine has "),
        ({"dtype": "int8"}, r"dtype must be one of float32, bfloat16, float16, got int8"),
        ({"quantization_bit": 5}, r"4 or 8 bits, got 5"),
        ({"embedding_bit": 8}, r"embedding_bit is for a model whose layers are quantised: add quantization_bit 4 or 8"),
        ({"quantization_bit": 4, "embedding_bit": 3}, r"embedding_bit must be 4, 8, 16 or None, got 3"),
        ({"activations": "int4"}, r"activations must be one of int8, int16, bf16, float32, got int4"),
        ({"device": "cpu", "num_gpus": 2}, r"device, num_gpus and device_map each say where the model goes: give one"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_weight_is_read(monkeypatch, folder, options, message):
    monkeypatch.setattr("chatglm.checkpoint.load_weights", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        utils.load_model(folder, **options)


def test_cuda_alone_means_the_first_gpu(monkeypatch, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cuda:0", "cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda *device: 10 * GB)
    monkeypatch.setattr("chatglm.checkpoint.load_weights", lambda checkpoint, device, *rest: pytest.fail(device))
    with pytest.raises(pytest.fail.Exception, match=r"^cuda:0$"):
        utils.load_model(folder, device="cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_taken_as_a_name_or_a_torch_dtype(folder, dtype):
    assert utils.load_model(str(folder), device="cpu", dtype=dtype)[0].dtype == torch.bfloat16


def test_line_gives_the_reason_of_a_second_choice(monkeypatch, capsys, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cpu"])
    monkeypatch.setattr(utils, "native_bfloat16", lambda: False)
    monkeypatch.setattr(utils, "SMALL_MODEL", 0)
    checkpoint = open_checkpoint(folder)
    needed = [utils.memory_needs(checkpoint, "cpu", dtype).total for dtype in ("bfloat16", "float32")]
    monkeypatch.setattr(utils, "free_memory", lambda *device: sum(needed) // 2)
    assert utils.load_model(folder)[0].dtype == torch.bfloat16
    assert capsys.readouterr().err.splitlines()[0].endswith("(float32 on cpu needs 0.0 GB, 0.0 GB are free)")


def test_memory_is_checked_before_any_weight_is_read(monkeypatch, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda *device: 1000)
    monkeypatch.setattr("chatglm.checkpoint.load_weights", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(MemoryError, match="too little memory"):
        utils.load_model(folder)


def test_embedded_checkpoint_is_the_default(model):
    assert model.config.name_or_path == utils.DEFAULT_MODEL
    assert utils.model_title(model) == "ChatGLM-Tiny"


@pytest.mark.parametrize(
    ("source", "title"),
    [
        (utils.DEFAULT_MODEL, "ChatGLM-Tiny"),
        ("THUDM/chatglm-6b", "ChatGLM-6B"),
        ("/data/chatglm-6b/", "ChatGLM-6B"),
        ("C:\\models\\ChatGLM-6B", "ChatGLM-6B"),
        ("THUDM/chatglm-6b-int4", "ChatGLM-6B-INT4"),
        ("/data/my-lawyer", "my-lawyer"),
        ("", "ChatGLM"),
    ],
)
def test_title_follows_the_checkpoint(source, title):
    assert utils.model_title(SimpleNamespace(config=SimpleNamespace(name_or_path=source))) == title


# Plan -----------------------------------------------------------------------------------------------------------------


def advice(checkpoint, **free):
    """The line below the plan's table, on a machine with so many GB free on its devices (gpu0 = cuda:0)."""
    room = {name.replace("gpu", "cuda:"): size * GB for name, size in free.items()}
    devices = [name for name in room if name != "disk"]
    return utils.plan(checkpoint, devices, room.get)[1]


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ({"gpu0": 16, "cpu": 8}, "(unquantised on cuda:0)"),
        ({"gpu0": 12, "cpu": 64}, "--quantization_bit 8   (INT8 on cuda:0)"),
        ({"gpu0": 6, "cpu": 64}, "--quantization_bit 4   (INT4 on cuda:0)"),
        ({"gpu0": 12, "gpu1": 12, "cpu": 64}, "--num_gpus 2   (unquantised, split over 2 GPUs)"),
        ({"mps": 10, "cpu": 10}, "--quantization_bit 8   (INT8 on mps)"),
        ({"cpu": 64}, "--quantization_bit 8   (INT8 on cpu: INT4 is faster, and less exact)"),
        ({"cpu": 6}, "--quantization_bit 4   (INT4 on cpu)"),
        ({"cpu": 4, "disk": 50}, "--quantization_bit 4 --device_map auto   (slow: cpu (13 layers), disk (15 layers))"),
    ],
)
def test_plan_recommends_the_most_exact_form_that_fits_and_a_fast_one_on_a_cpu(six_billion, free, expected):
    line = advice(six_billion, **free)
    assert line == f"use: python cli_demo.py --model_name_or_path THUDM/chatglm-6b {expected}".replace("6b (", "6b   (")


def test_plan_without_room_says_so(six_billion):
    assert advice(six_billion, cpu=1, disk=1) == "no form of it fits here: close other programs"


def test_plan_of_a_quantised_checkpoint_offers_no_other_bits(six_billion):
    config = six_billion.config_for(4)
    config.name_or_path = "/models/chatglm-6b-int4"
    stored = dataclasses.replace(six_billion, config=config, name=config.name_or_path)
    assert advice(stored, cpu=64) == (
        "use: python cli_demo.py --model_name_or_path /models/chatglm-6b-int4   (INT4 on cpu)"
    )
    assert [form for form, _, _ in utils.forms(stored, "cuda:0")] == ["INT4"]
    assert advice(stored, gpu0=5, gpu1=5, cpu=64).endswith(" --num_gpus 2   (INT4, split over 2 GPUs)")


def test_plan_shows_any_name_as_it_is(six_billion):
    config = six_billion.config_for()
    config.name_or_path = "/models/my [red] model"
    named = dataclasses.replace(six_billion, config=config, name=config.name_or_path)
    table, line = utils.plan(named, ["cpu"], lambda device: 64 * GB)
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert "my [red] model: computed, in GB" in console.file.getvalue()
    assert " --model_name_or_path '/models/my [red] model' " in line


@pytest.mark.slow
def test_plan_command_prints_the_embedded_and_the_published_model_into_a_pipe():
    run = subprocess.run(
        [sys.executable, "utils.py", "--plan"],
        cwd=Path(utils.__file__).parent,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.index("ChatGLM-Tiny") < run.stdout.index("ChatGLM-6B")
    assert "\x1b" not in run.stdout
    lines = run.stdout.splitlines()
    assert "python cli_demo.py without flags" in run.stdout
    assert any("cpu" in line and "INT4" in line and "3.36" in line and "0.94" in line for line in lines)
    assert max(map(len, lines[: lines.index("")])) <= 120


def test_plan_of_a_folder_is_about_that_folder(capsys, folder):
    assert utils.main(["--plan", "--model_name_or_path", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "my-model" in output and "ChatGLM-6B" not in output


def test_plan_of_a_hub_name_needs_its_configuration_only(monkeypatch, six_billion):
    asked = []

    def from_pretrained(name, revision):
        asked.append((name, revision))
        return ChatGLMConfig(vocab_size=130528, **fields)

    monkeypatch.setattr(ChatGLMConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr("chatglm.checkpoint.open_checkpoint", lambda *args: pytest.fail("weights were asked for"))
    fields = {"quantization_bit": 4}
    checkpoint = utils.planned_checkpoint("someone/lawyer-int4", "v2")
    assert asked == [("someone/lawyer-int4", "v2")]
    assert checkpoint.num_parameters == six_billion.num_parameters
    assert utils.memory_needs(checkpoint, "cpu", "float32") == utils.memory_needs(six_billion, "cpu", "float32", 4)
    fields = {"multi_query_attention": True}
    with pytest.raises(ValueError, match="THUDM/chatglm2-6b is of the second generation"):
        utils.planned_checkpoint("THUDM/chatglm2-6b")


def test_plan_of_a_missing_folder_ends_in_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        utils.main(["--plan", "--model_name_or_path", str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# Ending ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("config.json is broken:\n  download it again"),
        ValueError("config.json is broken: download it again"),
        MemoryError("config.json is broken: download it again"),
        PermissionError("config.json is broken: download it again"),
    ],
)
def test_mistake_of_the_user_ends_in_one_line_and_code_2(capsys, error):
    with pytest.raises(SystemExit) as caught, utils.main_errors(parser()):
        raise error
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "demo.py: error: config.json is broken: download it again\n"


def test_wrong_path_on_the_command_line_ends_in_one_line(capsys, tmp_path):
    args = parser().parse_args(["--model_name_or_path", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as caught, utils.main_errors(parser()):
        utils.load_model(**utils.model_options(args))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bugs_are_not_hidden():
    with pytest.raises(KeyError), utils.main_errors(parser()):
        raise KeyError("bug")


def test_interrupt_while_loading_ends_quietly():
    with pytest.raises(SystemExit) as caught, utils.main_errors(parser()):
        raise KeyboardInterrupt
    assert caught.value.code == 130
