"""Flags, the choice of device and dtype, the memory check, the printed line, and polite endings."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.checkpoint import CheckpointError

GB = 10**9
SIX_BILLION = 6_173_286_400  # ChatGLM-6B: 12.3 GB in float16, 24.7 GB in float32


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


# Flags ----------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones():
    args = parser().parse_args([])
    assert utils.model_options(args) == {
        "model_name_or_path": utils.DEFAULT_MODEL,
        "revision": None,
        "device": "auto",
        "dtype": None,
    }
    assert utils.generation_options(args) == {
        "max_length": 2048,
        "max_new_tokens": None,
        "top_p": 0.7,
        "temperature": 0.95,
        "seed": None,
    }


def test_given_flags_arrive_with_their_types():
    line = "--model_name_or_path M --revision v1 --device cpu --dtype bfloat16 --max_length 100 --max_new_tokens 7"
    args = parser().parse_args([*line.split(), "--top_p", "1", "--temperature", "0", "--seed", "3"])
    assert utils.model_options(args) == {
        "model_name_or_path": "M",
        "revision": "v1",
        "device": "cpu",
        "dtype": "bfloat16",
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
        ("--max_length", "0", "must be a whole number above 0, got 0"),
        ("--max_new_tokens", "1.5", "must be a whole number above 0, got 1.5"),
        ("--device", "tpu", "invalid choice: 'tpu'"),
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


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, utils; print({'torch', 'transformers', 'psutil', 'chatglm'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(utils.__file__).parent, capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


# Device, dtype and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "free", "expected"),
    [
        ("auto", None, {"cpu": 64}, ("cpu", "float32")),
        ("auto", None, {"cpu": 24}, ("cpu", "bfloat16")),
        ("auto", None, {"cuda": 24, "cpu": 64}, ("cuda", "float16")),
        ("auto", None, {"cuda": 6, "cpu": 64}, ("cpu", "float32")),
        ("auto", None, {"mps": 16, "cpu": 16}, ("mps", "float16")),
        ("auto", "bfloat16", {"cuda": 24, "cpu": 64}, ("cuda", "bfloat16")),
        ("auto", "float32", {"cuda": 24, "cpu": 64}, ("cpu", "float32")),
        ("cpu", None, {"cuda": 24, "cpu": 64}, ("cpu", "float32")),
        ("cpu", "float16", {"cpu": 64}, ("cpu", "float16")),
        ("cuda:1", None, {"cuda": 0, "cuda:1": 24, "cpu": 64}, ("cuda:1", "float16")),
    ],
)
def test_device_and_dtype_that_fit_are_chosen(device, dtype, free, expected):
    devices = [name for name in free if ":" not in name]
    chosen = utils.choose_device(SIX_BILLION, device, dtype, devices, lambda name: free[name] * GB)
    assert chosen[:2] == expected


def test_small_model_on_a_cpu_stays_in_the_format_of_its_file():
    chosen = utils.choose_device(20_000_000, "auto", None, ["cpu"], lambda device: 64 * GB)
    assert chosen == ("cpu", "float16", "")


def test_second_choice_says_why():
    free = {"cuda": 6 * GB, "cpu": 24 * GB}
    reason = utils.choose_device(SIX_BILLION, "auto", None, ["cuda", "cpu"], free.get)[2]
    assert reason == ("float16 on cuda needs 13.6 GB, 6.0 GB are free; float32 on cpu needs 27.2 GB, 24.0 GB are free")
    assert utils.choose_device(SIX_BILLION, "cpu", "bfloat16", ["cuda", "cpu"], free.get)[2] == ""


@pytest.mark.parametrize(
    ("device", "dtype", "free", "advice"),
    [
        ("cpu", "float32", {"cpu": 24}, "--device cpu --dtype bfloat16 would fit"),
        ("cuda", None, {"cuda": 6, "cpu": 24}, "--device cpu --dtype bfloat16 would fit"),
        ("cuda", None, {"cuda": 6, "cpu": 64}, "--device cpu --dtype float32 would fit"),
        ("cuda", "float32", {"cuda": 24, "cpu": 8}, "--device cuda --dtype float16 would fit"),
        ("auto", None, {"cuda": 6, "cpu": 8}, "close other programs or use a smaller model"),
    ],
)
def test_too_little_memory_names_what_would_fit(device, dtype, free, advice):
    with pytest.raises(MemoryError) as caught:
        utils.choose_device(SIX_BILLION, device, dtype, list(free), lambda name: free[name] * GB)
    message = str(caught.value)
    assert message.startswith("too little memory for 6.2 B parameters: ")
    assert message.endswith(advice)
    if advice.startswith("--"):  # then it can be typed, and what was typed fits
        args = parser().parse_args(advice.removesuffix(" would fit").split())
        chosen = utils.choose_device(SIX_BILLION, args.device, args.dtype, list(free), lambda name: free[name] * GB)
        assert chosen == (args.device, args.dtype, "")


def test_absent_device_and_unknown_dtype_are_refused():
    with pytest.raises(ValueError, match="device cuda is not available here: use auto or cpu"):
        utils.choose_device(1, "cuda", None, ["cpu"], lambda device: GB)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        utils.choose_device(1, "cpu", "int8", ["cpu"], lambda device: GB)


def test_free_memory_of_this_machine_is_plausible():
    assert 10**7 < utils.free_memory("cpu") < 10**14


def test_memory_limit_of_a_container_counts(tmp_path):
    assert utils._free_in_container(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 1500\n")
    assert utils._free_in_container(tmp_path) == 4500
    (tmp_path / "memory.max").write_text("max\n")
    assert utils._free_in_container(tmp_path) == float("inf")


# Loading --------------------------------------------------------------------------------------------------------------


def test_load_model_prints_one_line_on_stderr(capsys, folder):
    model, tokenizer = utils.load_model(folder, device="cpu")
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"loaded my-model   0\.0 M parameters   float16   0\.00 GB   cpu   \d+\.\d s\n", output.err)
    assert not model.training
    assert model.device.type == "cpu" and model.dtype == torch.float16
    assert tokenizer("你好")["input_ids"][-2:] == [429, 432]
    assert model.config.name_or_path == str(folder.resolve())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_taken_as_a_name_or_a_torch_dtype(folder, dtype):
    assert utils.load_model(str(folder), device="cpu", dtype=dtype)[0].dtype == torch.bfloat16


def test_line_gives_the_reason_of_a_second_choice(monkeypatch, capsys, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda device: 120_000)
    monkeypatch.setattr(utils, "SMALL_MODEL", 0)
    assert utils.load_model(folder)[0].dtype == torch.bfloat16
    assert capsys.readouterr().err.endswith("(float32 on cpu needs 0.0 GB, 0.0 GB are free)\n")


def test_memory_is_checked_before_any_weight_is_read(monkeypatch, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda device: 1000)
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
