"""from_pretrained with a quantization_config: what it makes, saves and refuses, and training on top of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, Trainer, TrainingArguments

from chatglm import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMModel,
    ChatGLMQuantizationConfig,
    quantization,
)
from chatglm.checkpoint import load_weights, open_checkpoint
from chatglm.quantization import QuantizedEmbedding, QuantizedLinear

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "bos_token_id": 92,
    "eos_token_id": 93,
    "gmask_token_id": 91,
    "mask_token_id": 90,
    "pad_token_id": 3,
}
IDS = torch.tensor([[5, 6, 7, 91, 92, 8, 9]])
LAYER = "transformer.layers.1.mlp.dense_h_to_4h.weight"


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Plain torch, which is exact; that kernels agree is proved in tests/kernels."""
    monkeypatch.setattr(quantization, "fast_kernels", lambda: None)


def random_model(**fields) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(1)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SIZES, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An unquantised float16 checkpoint."""
    folder = tmp_path_factory.mktemp("float16")
    random_model().half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int4(tmp_path_factory, folder) -> Path:
    """The same in INT4, with float16 scales as published."""
    saved = tmp_path_factory.mktemp("int4")
    load_weights(open_checkpoint(folder), "cpu", torch.float16, 4).save_pretrained(saved)
    return saved


def from_pretrained(folder, bits=4, embedding_bits=0, dtype=torch.float32, **options):
    config = ChatGLMQuantizationConfig(bits=bits, embedding_bits=embedding_bits)
    return AutoModel.from_pretrained(folder, quantization_config=config, dtype=dtype, **options)


def assert_equal_weights(model, other) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# Quantising while transformers loads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "embedding_bits"), [(4, 0), (8, 0), (4, 4), (4, 8)])
def test_model_is_the_one_that_load_weights_makes(folder, bits, embedding_bits, dtype):
    model = from_pretrained(folder, bits, embedding_bits, dtype)
    assert_equal_weights(model, load_weights(open_checkpoint(folder), "cpu", dtype, bits, embedding_bits or None))
    assert type(model.get_submodule(LAYER.removesuffix(".weight"))) is QuantizedLinear
    assert (type(model.transformer.word_embeddings) is QuantizedEmbedding) == (embedding_bits > 0)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert (model.config.quantization_bit, model.config.embedding_bits) == (bits, embedding_bits)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith(LAYER))


def test_the_quantiser_leaves_no_trace_on_the_model(folder):
    model = from_pretrained(folder)
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    assert "quantization_config" not in model.config.to_dict()
    assert model.half().dtype == torch.float16  # transformers refuses this for models that it thinks quantised


def test_bin_shards_with_both_names_of_a_tied_matrix(tmp_path, folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = from_pretrained(tmp_path, 4, 8)
    assert_equal_weights(model, from_pretrained(folder, 4, 8))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.lm_head.weight_scale is model.transformer.word_embeddings.weight_scale


def test_separate_head_is_quantised_on_its_own(tmp_path):
    model = random_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, 8, 8)
    assert_equal_weights(loaded, model.quantize(8, quantize_embeddings=True))
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.word_embeddings.weight)


def test_config_may_be_a_dictionary(folder):
    config = ChatGLMQuantizationConfig(bits=8, embedding_bits=4).to_dict()
    assert config == {"quant_method": "chatglm", "bits": 8, "embedding_bits": 4}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert_equal_weights(model, from_pretrained(folder, 8, 4))


def test_device_map_places_a_model_that_is_quantised_while_it_loads(folder):
    pytest.importorskip("accelerate")
    plain = from_pretrained(folder)
    for device_map in ("auto", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}):
        assert_equal_weights(from_pretrained(folder, device_map=device_map), plain)


def test_automatic_device_map_counts_quantised_sizes(folder):
    pytest.importorskip("accelerate")
    model = from_pretrained(folder, 4, 4)
    quantised, floats = (sum(parameter.nbytes for parameter in model.parameters()) for model in (model, random_model()))
    assert quantised < 0.3 * floats
    options = {"device_map": "auto", "max_memory": {"cpu": 2 * quantised}}
    assert_equal_weights(from_pretrained(folder, 4, 4, **options), model)
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):  # where "auto" puts what is too much
        from_pretrained(folder, 4, 4, device_map="auto", max_memory={"cpu": quantised // 2})


def test_disk_is_refused_for_a_model_that_is_quantised_while_it_loads_only(tmp_path, folder, int4):
    pytest.importorskip("accelerate")
    device_map = {
        "transformer.word_embeddings": "cpu",
        "transformer.layers.0": "cpu",
        "transformer.layers.1": "disk",
        "transformer.final_layernorm": "cpu",
        "lm_head": "cpu",
    }
    options = {"device_map": device_map, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match="cannot be offloaded to disk: save it quantised"):
        from_pretrained(folder, **options)
    whole = from_pretrained(int4)
    for split in (from_pretrained(int4, **options), AutoModel.from_pretrained(int4, dtype=torch.float32, **options)):
        assert split.get_parameter(LAYER).is_meta
        assert torch.equal(logits(split), logits(whole))


# Saving and loading again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "embedding_bits"), [(4, 0), (8, 8), (4, 8)])
def test_saved_model_loads_without_quantising_again(tmp_path, folder, monkeypatch, bits, embedding_bits):
    model = from_pretrained(folder, bits, embedding_bits)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_bit"] == bits
    assert "quantization_config" not in config

    def refuse(*args):
        raise AssertionError("quantised again")

    for module in ("quantization", "quantizer", "checkpoint"):
        monkeypatch.setattr(f"chatglm.{module}.quantize_weight", refuse)
    assert_equal_weights(load_weights(open_checkpoint(tmp_path)), model)
    assert_equal_weights(AutoModel.from_pretrained(tmp_path), model)
    assert_equal_weights(from_pretrained(tmp_path, bits), model)
    assert_equal_weights(from_pretrained(tmp_path, bits, embedding_bits), model)


def test_published_folder_loads_with_no_quantization_config(int4):
    model = AutoModel.from_pretrained(int4)
    assert model.config.quantization_bit == 4
    stored = load_file(int4 / "model.safetensors")
    assert stored[f"{LAYER}_scale"].dtype == torch.float16
    state = model.state_dict()
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    wide = load_weights(open_checkpoint(int4))
    assert torch.equal(logits(AutoModel.from_pretrained(int4, dtype=torch.float32)), logits(wide))


def test_embedding_is_quantised_beside_stored_layers(int4):
    model = from_pretrained(int4, 4, 8)
    expected = load_weights(open_checkpoint(int4), embedding_bit=8)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.quantization_embeddings == 8


@pytest.mark.parametrize("shard", ["100GB", "16KB"], ids=["one_file", "shards"])
def test_saved_files_hold_the_bytes_they_were_loaded_from(tmp_path, int4, shard):
    AutoModel.from_pretrained(int4).save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "16KB")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    stored = load_file(int4 / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name


# What is refused ------------------------------------------------------------------------------------------------------


def test_other_bits_than_stored_are_refused_naming_both(tmp_path, int4, folder):
    with pytest.raises(ValueError, match="is quantised to 4 bits, but 8 were asked for: ask for 4"):
        from_pretrained(int4, 8)
    from_pretrained(folder, 4, 8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the embedding .* is quantised to 8 bits, but 4 were asked for: ask for 8"):
        from_pretrained(tmp_path, 4, 4)


def test_floats_and_integers_are_not_taken_for_each_other(tmp_path, folder):
    """In INT8 they have the same shapes."""
    with pytest.raises(ValueError, match=r"weight is not quantised in the files of .*quantization_bit 8 and"):
        AutoModel.from_pretrained(folder, quantization_bit=8)
    from_pretrained(folder, 8, 8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight is quantised in the files of .*quantization_bit 0 and"):
        AutoModel.from_pretrained(tmp_path, quantization_bit=0, quantization_embeddings=False)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.quantization_bit == 8 and not any(info.values())


@pytest.mark.parametrize("bits", [(3, 0), (0, 0), (4, 5)])
def test_config_refuses_bits_that_do_not_exist(bits):
    with pytest.raises(ValueError, match="to 4 or 8 bits, got"):
        ChatGLMQuantizationConfig(*bits)


def test_other_networks_are_refused(tmp_path, folder):
    config = ChatGLMQuantizationConfig(bits=4)
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only a ChatGLMForConditionalGeneration can be quantised, got BertModel"):
        BertModel.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="got ChatGLMModel"):
        ChatGLMModel.from_pretrained(folder, quantization_config=config)


# Training on top ------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank addition to a linear layer, as LoRA makes it."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.1 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def test_adapter_gets_the_gradients_of_the_dequantised_model(folder):
    quantised = from_pretrained(folder)
    plain = random_model()
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, QuantizedLinear):
                matrix = quantization.dequantize_weight(module.weight, module.weight_scale, 4, torch.float32)
                plain.get_parameter(f"{name}.weight").copy_(matrix)
        for name, parameter in quantised.named_parameters():
            if parameter.is_floating_point() and not name.endswith("_scale"):
                plain.get_parameter(name).copy_(parameter)
    gradients = []
    for model in (quantised, plain):
        model.requires_grad_(False)
        torch.manual_seed(0)
        for layer in model.transformer.layers:
            layer.attention.query_key_value = Adapter(layer.attention.query_key_value)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 4 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-4, name
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_trainer_tunes_a_prefix_on_a_quantised_model_and_nothing_else(tmp_path):
    pytest.importorskip("accelerate")
    random_model(pre_seq_len=3).save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base")
    model.requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    examples = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    loss = Trainer(model, arguments, train_dataset=examples).train().training_loss
    assert 0 < loss < 20
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == ["transformer.prefix_encoder.embedding.weight"]


def test_plain_from_pretrained_keeps_stored_scales_and_takes_no_gradients_to_them(int4, tmp_path):
    model = AutoModel.from_pretrained(int4, dtype=torch.float32)
    scales = {name: p for name, p in model.named_parameters() if name.endswith("weight_scale")}
    assert len(scales) == 4 * SIZES["num_layers"]
    assert {(p.dtype, p.requires_grad) for p in scales.values()} == {(torch.float16, False)}
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path)
    saved, stored = load_file(tmp_path / "model.safetensors"), load_file(int4 / "model.safetensors")
    for name in (name for name in stored if ".attention.dense.weight" in name):
        assert saved[name].dtype == stored[name].dtype and torch.equal(saved[name], stored[name])


def test_prefix_alone_takes_gradients_after_from_pretrained(tmp_path):
    random_model(pre_seq_len=3).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["transformer.prefix_encoder.embedding.weight"]


def test_dtype_of_a_model_is_that_of_its_arithmetic(folder):
    model = from_pretrained(folder, 4, 8, torch.float32)
    assert model.half().dtype == torch.float16
    quantised = load_weights(open_checkpoint(folder), "cpu", torch.float32, embedding_bit=16)
    assert quantised.dtype == torch.float32 and quantised.lm_head.weight.dtype == torch.bfloat16
