"""What `save_pretrained` writes loads alone elsewhere; here, the Auto classes never run code of a folder."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, quantization

VOCABULARY = Path(__file__).parent / "golden" / "tokenizer" / "mini_ice_text.model"

# A stranger's program: nothing of ours but the folder.
STRANGER = """
import json, sys
import torch, transformers

folder = sys.argv[1]
try:
    import chatglm
    raise SystemExit("the package must not be within reach here")
except ImportError:
    pass
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
auto_models = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM, transformers.AutoModel)
models = [auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32) for auto in auto_models]
model = models[-1]
response, history = model.chat(tokenizer, "你好", history=[("a", "b")], max_new_tokens=12, temperature=0)
streamed = [text for text, _ in model.stream_chat(tokenizer, "你好", max_new_tokens=12, seed=7)]
batch = tokenizer(["你好", "hello world"], padding=True, return_tensors="pt")
json.dump(
    {
        "classes": [type(thing).__module__.split(".")[0] for thing in (config, tokenizer, *models)],
        "bits": model.config.quantization_bit if model.lm_head.weight.dtype == torch.int8 else 0,
        "ids": tokenizer("你好，\\n\\t世界   !")["input_ids"],
        "response": response,
        "history": history,
        "streamed": streamed,
        "generated": model.generate(**batch, max_new_tokens=6, do_sample=False).tolist(),
        "logits": model(**tokenizer("你好", return_tensors="pt")).logits.tolist(),
    },
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
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
        use_cache=True,
    )
    model = ChatGLMForConditionalGeneration(config)
    with torch.no_grad():  # larger than freshly made ones, so that answers vary
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "my-chatglm"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["float32", "int4"])
def saved(request, tmp_path, monkeypatch, model, tokenizer, folder):
    """A model and the folder that it was saved to."""
    if request.param == "float32":
        return model, folder
    # A stranger has no kernels but plain torch: so has the model that it is compared with.
    monkeypatch.setattr(quantization, "fast_kernels", lambda: None)
    quantised = copy.deepcopy(model).quantize(4, quantize_embeddings=True)
    quantised.save_pretrained(tmp_path / "my-int4")
    tokenizer.save_pretrained(tmp_path / "my-int4")
    return quantised, tmp_path / "my-int4"


def test_folder_holds_everything(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "ice_text.model", "tokenizer_config.json"} <= names
    assert {"configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py"} <= names
    assert (folder / "ice_text.model").read_bytes() == VOCABULARY.read_bytes()
    assert json.loads((folder / "tokenizer_config.json").read_text())["num_image_tokens"] == 0


def test_saved_config_names_no_path_of_this_machine(folder):
    assert str(folder) not in (folder / "config.json").read_text()
    assert str(VOCABULARY.parent) not in (folder / "tokenizer_config.json").read_text()


@pytest.mark.slow
def test_stranger_with_trust_remote_code_gets_the_same_answers(tmp_path, saved, tokenizer):
    model, folder = saved
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout)
    assert answer["classes"] == ["transformers_modules"] * 5
    assert answer["bits"] == model.config.quantization_bit

    response, history = model.chat(tokenizer, "你好", history=[("a", "b")], max_new_tokens=12, temperature=0)
    assert len(response) > 3
    assert answer["response"] == response
    assert answer["history"] == [list(pair) for pair in history]
    assert answer["streamed"] == [text for text, _ in model.stream_chat(tokenizer, "你好", max_new_tokens=12, seed=7)]
    batch = tokenizer(["你好", "hello world"], padding=True, return_tensors="pt")
    assert answer["generated"] == model.generate(**batch, max_new_tokens=6, do_sample=False).tolist()
    assert answer["ids"] == tokenizer("你好，\n\t世界   !")["input_ids"]
    with torch.no_grad():
        logits = model(**tokenizer("你好", return_tensors="pt")).logits
    assert torch.equal(torch.tensor(answer["logits"]), logits)


@pytest.mark.parametrize("auto_model", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_auto_classes_use_the_package_and_run_no_code_of_the_folder(tmp_path, model, tokenizer, auto_model):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.write_text("raise RuntimeError('code of a checkpoint was run')\n")
    loaded = auto_model.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is ChatGLMForConditionalGeneration
    assert type(AutoConfig.from_pretrained(tmp_path)) is ChatGLMConfig
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ChatGLMTokenizer
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_saving_again_what_was_loaded_changes_nothing(tmp_path, folder):
    ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
    ChatGLMTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert again.keys() == first.keys()
    settings, first_settings = (json.loads(files.pop("tokenizer_config.json")) for files in (again, first))
    assert settings | first_settings == settings  # transformers adds notes on where it was loaded from
    for name in first:
        assert again[name] == first[name], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_survives_saving_and_loading(tmp_path, folder, dtype):
    half = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    half.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, tensor in half.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_separate_head_survives_saving_and_loading(tmp_path, model):
    config = ChatGLMConfig(**(model.config.to_diff_dict() | {"tie_word_embeddings": False}))
    separate = ChatGLMForConditionalGeneration(config)
    separate.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.word_embeddings.weight)
    assert torch.equal(loaded.lm_head.weight, separate.lm_head.weight)
