"""`ptuning/convert.py`: merging, and the published form in both directions."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.adapters import apply_adapter
from chatglm.checkpoint import load_tokenizer, load_weights, open_checkpoint
from ptuning import convert

GOLDEN = Path(__file__).parent.parent / "golden"
VOCABULARY = GOLDEN / "tokenizer" / "mini_ice_text.model"
INPUT_IDS = torch.tensor([[9, 8, 7, 429, 432, 20, 21, 22]])
FORMS = {"prefix": False, "projected prefix": True}


def make_model():
    """A model of the shape that golden values were recorded from, with the ids of the small vocabulary."""
    torch.manual_seed(4)
    config = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))["weights"]["m64"]["config"]
    ids = {"bos_token_id": 432, "eos_token_id": 433, "mask_token_id": 428, "gmask_token_id": 429, "pad_token_id": 3}
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**config | ids | {"vocab_size": 780})).eval()


def randomise(parameters, std=0.3):
    torch.manual_seed(6)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=std)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = make_model()
    randomise([parameter for parameter in model.parameters() if parameter.dim() == 2])
    model.save_pretrained(folder)
    ChatGLMTokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("adapters")
    for name, projection in FORMS.items():
        model = load_weights(open_checkpoint(base))
        model.add_prefix_encoder(8, projection)
        randomise(model.transformer.prefix_encoder.parameters())
        model.save_pretrained(root / name)
    tuned = get_peft_model(load_weights(open_checkpoint(base)), LoraConfig(r=4, target_modules=["query_key_value"]))
    randomise(parameter for name, parameter in tuned.named_parameters() if "lora_" in name)
    tuned.save_pretrained(root / "LoRA")
    return {name: root / name for name in (*FORMS, "LoRA")}


def run(adapter, form, output, *flags):
    return convert.main(["--adapter", str(adapter), "--to", form, "--output_dir", str(output), *map(str, flags)])


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


@pytest.mark.parametrize("kind", ["prefix", "projected prefix", "LoRA"])
def test_merged_model_is_base_and_adapter_in_one_folder(tmp_path, capsys, base, folders, kind):
    assert run(folders[kind], "merged", tmp_path / "new", "--model_name_or_path", base, "--dtype", "float32") == 0
    assert f"{tmp_path / 'new'}: a whole model, float32, with " in capsys.readouterr().err
    checkpoint = open_checkpoint(tmp_path / "new")
    tuned = apply_adapter(load_weights(open_checkpoint(base)), folders[kind])
    torch.testing.assert_close(logits(load_weights(checkpoint)), logits(tuned), atol=1e-4, rtol=0)
    assert load_tokenizer(checkpoint)("你好")["input_ids"] == ChatGLMTokenizer(VOCABULARY)("你好")["input_ids"]
    assert logits(tuned).sub(logits(load_weights(open_checkpoint(base)))).abs().max() > 0.1


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_merged_model_keeps_the_number_format_of_its_base(tmp_path, folders, stored):
    make_model().to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    ChatGLMTokenizer(VOCABULARY).save_pretrained(tmp_path / "base")
    run(folders["LoRA"], "merged", tmp_path / "new", "--model_name_or_path", tmp_path / "base")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "new" / "model.safetensors").values()}
    assert dtypes == {getattr(torch, stored)}


@pytest.mark.parametrize("kind", FORMS)
def test_published_form_is_the_recorded_one(tmp_path, folders, kind):
    recorded = json.loads((GOLDEN / "text" / "ptuning_checkpoint.json").read_text(encoding="utf-8"))[str(FORMS[kind])]
    run(folders[kind], "published", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == recorded["files"]
    tensors = torch.load(tmp_path / "new" / "pytorch_model.bin", weights_only=True)
    assert {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()
    } == recorded["keys"]
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (settings["pre_seq_len"], settings["prefix_projection"]) == (recorded["config_pre_seq_len"], FORMS[kind])


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("configured", [True, False], ids=["with config.json", "without"])
def test_published_form_comes_back_bit_equal(tmp_path, base, folders, kind, configured):
    run(folders[kind], "published", tmp_path / "bin")
    if not configured:
        (tmp_path / "bin" / "config.json").unlink()
    flags = () if configured else ("--model_name_or_path", base)
    run(tmp_path / "bin", "safetensors", tmp_path / "new", *flags)
    names = {path.name for path in folders[kind].iterdir()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    for name in names - {"generation_config.json"}:
        assert (tmp_path / "new" / name).read_bytes() == (folders[kind] / name).read_bytes(), name


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_done_is_refused_in_a_line(tmp_path, capsys, base, folders):
    load_weights(open_checkpoint(base)).quantize(4).save_pretrained(tmp_path / "int4")
    ChatGLMTokenizer(VOCABULARY).save_pretrained(tmp_path / "int4")
    (tmp_path / "bare").mkdir()
    torch.save(load_file(folders["prefix"] / "model.safetensors"), tmp_path / "bare" / "pytorch_model.bin")
    new = tmp_path / "new"
    for arguments, said in {
        (folders["LoRA"], "published", new): "is in peft's form already; it can be --to merged",
        (base, "published", new): "is a whole model and no adapter",
        (folders["prefix"], "merged", new): "was made for another model",  # than the embedded one
        (tmp_path / "bare", "safetensors", new): "was made for another model",
        (folders["LoRA"], "merged", new, "--model_name_or_path", tmp_path / "int4"): "merged into quantised weights",
        (folders["prefix"], "published", base): "--output_dir must be a folder that is new or empty",
        (folders["prefix"], "published", new, "--dtype", "float16"): "--dtype is for --to merged",
    }.items():
        error = refusal(capsys, *arguments)
        assert said in error
        assert "Traceback" not in error
        assert not new.exists()


def test_prefix_is_merged_into_a_quantised_model(tmp_path, base, folders):
    load_weights(open_checkpoint(base)).quantize(4).save_pretrained(tmp_path / "int4")
    ChatGLMTokenizer(VOCABULARY).save_pretrained(tmp_path / "int4")
    run(folders["prefix"], "merged", tmp_path / "new", "--model_name_or_path", tmp_path / "int4", "--dtype", "float32")
    checkpoint = open_checkpoint(tmp_path / "new")
    assert (checkpoint.config.quantization_bit, checkpoint.config.pre_seq_len) == (4, 8)
    tuned = apply_adapter(load_weights(open_checkpoint(tmp_path / "int4")), folders["prefix"])
    torch.testing.assert_close(logits(load_weights(checkpoint)), logits(tuned), atol=1e-4, rtol=0)
