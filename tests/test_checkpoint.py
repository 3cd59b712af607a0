"""Every published layout, made here with small shapes, loads exactly; every broken one is refused in one sentence."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, quantization
from chatglm import checkpoint as checkpoint_module
from chatglm.checkpoint import CheckpointError, load_tokenizer, load_weights, open_checkpoint
from chatglm.quantization import LAYERS, dequantize_weight, quantize_weight

GOLDEN = Path(__file__).parent / "golden"
MINI_VOCABULARY = GOLDEN / "tokenizer" / "mini_ice_text.model"  # 772 pieces, <sop> is 432
SHAPES = {
    "vocab_size": 780,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "bos_token_id": 432,
    "eos_token_id": 433,
    "mask_token_id": 428,
    "gmask_token_id": 429,
    "pad_token_id": 3,
}
PUBLISHED = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
}
PUBLISHED_QE = {"quantization_bit": 4, "quantization_embeddings": True}
TOKENIZER = {
    "name_or_path": "THUDM/chatglm-6b",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
EMBEDDING = "transformer.word_embeddings.weight"
INPUT_IDS = torch.tensor([[5, 70, 80, 90, 429, 432, 100, 101]])


def random_weights(config: ChatGLMConfig, tied: bool = True) -> dict[str, torch.Tensor]:
    """A float16 state dict with the published names, in the published order: embedding first, head last."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = ChatGLMForConditionalGeneration(config).state_dict()
    weights = {name: (0.1 * torch.randn(tensor.shape)).half() for name, tensor in shapes.items()}
    if tied:
        weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    return weights


def quantised(weights: dict, bits: int, embeddings: bool = False) -> dict[str, torch.Tensor]:
    """The published quantised form of float16 weights: int8 beside float16 scales; embedding and head share theirs."""
    stored = {}
    ends = tuple(f"{name}.weight" for name in LAYERS) + (EMBEDDING,) * embeddings
    for name, tensor in weights.items():
        stored[name] = tensor
        if name.endswith(ends):
            stored[name], stored[f"{name}_scale"] = quantize_weight(tensor, bits)
    stored["lm_head.weight"] = stored[EMBEDDING]
    if embeddings:
        stored["lm_head.weight_scale"] = stored[f"{EMBEDDING}_scale"]
    return stored


def with_frequencies(weights: dict) -> dict:
    frequencies = torch.full((2,), 7.0).half()  # wrong on purpose: they must be ignored
    return weights | {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": frequencies for i in range(3)}


def in_parts(weights: dict, count: int) -> list[dict]:
    """Consecutive parts, so that layers straddle files and the head is alone in the last one."""
    body = [name for name in weights if not name.startswith("lm_head.")]
    cuts = [len(body) * i // (count - 1) for i in range(count)]
    parts = [body[start:end] for start, end in pairwise(cuts)] + [[name for name in weights if name not in body]]
    return [{name: weights[name] for name in part} for part in parts]


def save_sharded(folder: Path, weights: dict, count: int, save, stem: str, suffix: str) -> None:
    parts = in_parts(weights, count)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.{suffix}"
        save({name: tensor.clone() for name, tensor in part.items()}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 13744473856}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save_bin(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")


def save_bin_before_torch_1_6(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_bin_shards(folder, weights):
    save_sharded(folder, weights, 8, torch.save, "pytorch_model", "bin")
    assert len(list(folder.glob("pytorch_model-*-of-00008.bin"))) == 8


def save_safetensors(folder, weights):
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def save_safetensors_shards(folder, weights):
    save_sharded(folder, weights, 3, save_file, "model", "safetensors")


LAYOUTS = [save_bin, save_bin_before_torch_1_6, save_bin_shards, save_safetensors, save_safetensors_shards]


def make_folder(folder: Path, weights: dict, save=save_safetensors, config: dict | None = None, tokenizer=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED | (SHAPES if config is None else config)))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER if tokenizer is None else tokenizer))
    shutil.copy(MINI_VOCABULARY, folder / "ice_text.model")
    save(folder, weights)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options):
    return load_weights(open_checkpoint(folder), "cpu", dtype, **options)


def assert_equal_weights(model, expected: dict[str, torch.Tensor]) -> None:
    """Same names, bytes and dtypes."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(ChatGLMConfig(**SHAPES))


@pytest.fixture(scope="module")
def source(weights):
    """The model that the published weights describe, built without any loader."""
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SHAPES, use_cache=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(weights[name])
    return model.eval()


# Layouts that load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", LAYOUTS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("frequencies", [True, False], ids=["inv_freq", "no_inv_freq"])
def test_published_layout_loads_exactly(tmp_path, weights, source, save, frequencies):
    stored = with_frequencies(weights) if frequencies else weights
    model = load(make_folder(tmp_path, stored, save))
    loaded = model.state_dict()
    assert loaded.keys() == source.state_dict().keys()
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert torch.equal(logits(model), logits(source))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_one_asked_for(tmp_path, weights, source, dtype):
    model = load(make_folder(tmp_path, weights, save_bin_shards), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == dtype
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name


def test_loaded_weights_do_not_depend_on_the_files_any_more(tmp_path, weights, source):
    folder = make_folder(tmp_path, weights, save_bin)
    model = load(folder, torch.float16)
    file = folder / "pytorch_model.bin"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(model.lm_head.weight.float(), source.lm_head.weight)


def test_first_release_with_150528_entries_needs_no_sizes_in_its_config(tmp_path):
    small = {name: SHAPES[name] for name in ("num_layers", "num_attention_heads", "inner_hidden_size")}
    small["hidden_size"] = 16
    config = ChatGLMConfig(**small)
    assert (config.vocab_size, config.bos_token_id, config.gmask_token_id) == (150528, 150004, 150001)
    weights = random_weights(config)
    model = load(make_folder(tmp_path, weights, save_bin, small), torch.float16)
    assert model.config.vocab_size == 150528
    assert (model.config.mask_token_id, model.config.bos_token_id, model.config.eos_token_id) == (
        150000,
        150004,
        150005,
    )
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("named", [True, False], ids=["named", "left_out"])
def test_first_release_tokenizer_has_20000_image_tokens(tmp_path, named):
    shifted = {
        name: 20000 + size if name.endswith("_id") or name == "vocab_size" else size for name, size in SHAPES.items()
    }
    settings = {name: value for name, value in TOKENIZER.items() if name != "num_image_tokens"}
    if named:
        settings["num_image_tokens"] = 20000
    weights = random_weights(ChatGLMConfig(**shifted))
    checkpoint = open_checkpoint(make_folder(tmp_path, weights, save_bin, shifted, settings))
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer("你好")["input_ids"][-2:] == [20429, 20432]
    assert tokenizer.decode(tokenizer("你好")["input_ids"]) == "你好"


def test_separate_head_stays_separate(tmp_path):
    weights = random_weights(ChatGLMConfig(**SHAPES), tied=False)
    model = load(make_folder(tmp_path, weights, save_bin_shards, SHAPES | {"tie_word_embeddings": False}))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].float())
    assert torch.equal(model.transformer.word_embeddings.weight, weights["transformer.word_embeddings.weight"].float())


def test_tied_checkpoint_may_lack_its_head(tmp_path, weights, source):
    headless = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    model = load(make_folder(tmp_path, headless))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(logits(model), logits(source))


def test_differing_head_of_a_tied_config_is_kept_with_a_warning(tmp_path, caplog):
    weights = random_weights(ChatGLMConfig(**SHAPES), tied=False)
    folder = make_folder(tmp_path, weights, save_bin_shards)
    with caplog.at_level(logging.WARNING, "chatglm.checkpoint"):
        model = load(folder)
    assert "differ" in caplog.text
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].float())
    assert model.config.tie_word_embeddings is False  # so that it is saved as it is
    reference = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))


def test_prefix_encoder_stays_in_float32(tmp_path):
    shapes = SHAPES | {"pre_seq_len": 4}
    weights = random_weights(ChatGLMConfig(**shapes))
    prefix = "transformer.prefix_encoder.embedding.weight"
    weights[prefix] = weights[prefix].float() + 1e-6
    model = load(make_folder(tmp_path, weights, save_bin, shapes), torch.float16)
    assert torch.equal(model.transformer.prefix_encoder.embedding.weight, weights[prefix])
    assert model.lm_head.weight.dtype == torch.float16


def test_from_pretrained_gives_the_same_model(tmp_path, weights):
    folder = make_folder(tmp_path, with_frequencies(weights), save_bin_shards)
    model, reference = load(folder), ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))
    said, meant = (
        {name: value for name, value in m.generation_config.to_dict().items() if value} for m in (model, reference)
    )
    assert said == meant
    assert model.config.to_diff_dict() == reference.config.to_diff_dict()


def test_generation_config_of_the_folder_is_used(tmp_path, weights):
    folder = make_folder(tmp_path, weights)
    (folder / "generation_config.json").write_text('{"eos_token_id": 433, "max_length": 77}')
    assert load(folder).generation_config.max_length == 77


def test_counted_parameters_are_the_real_ones(tmp_path, weights, source):
    tied = open_checkpoint(make_folder(tmp_path, weights))
    assert tied.num_parameters == sum(parameter.numel() for parameter in source.parameters())
    make_folder(tmp_path, weights, config=SHAPES | {"tie_word_embeddings": False})
    assert open_checkpoint(tmp_path).num_parameters == tied.num_parameters + 780 * 32


# Quantised layouts, and quantising while loading ----------------------------------------------------------------------


class Reversing:
    """Kernels that keep weights backwards in memory, so that a byte in the wrong order shows."""

    def supports(self, out_features, in_features, bits):
        return True

    def pack(self, weight, bits):
        return weight.flip(0, 1)

    unpack = pack

    def linear(self, x, packed, scale, bias, bits, activations):
        return quantization.linear(x, packed.flip(0, 1), scale, bias, bits)

    def embedding(self, ids, packed, scale, bits):
        return dequantize_weight(packed.flip(0, 1)[ids], scale[ids], bits, torch.float32)


@pytest.fixture(params=["kernels", "no_kernels"])
def kernels(monkeypatch, request):
    found = types.SimpleNamespace(cpu_backend=Reversing) if request.param == "kernels" else None
    monkeypatch.setattr(quantization, "fast_kernels", lambda: found)
    return found


@pytest.mark.parametrize("save", LAYOUTS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("embeddings", [False, True], ids=["", "qe"])
@pytest.mark.parametrize("bits", [8, 4])
def test_published_quantised_layout_loads_exactly(tmp_path, weights, kernels, bits, embeddings, save):
    stored = quantised(weights, bits, embeddings)
    config = SHAPES | {"quantization_bit": bits, "quantization_embeddings": embeddings}
    model = load(make_folder(tmp_path, with_frequencies(stored), save, config))
    # The very bytes, scales in the dtype in which they are stored; what is not quantised in the one asked for.
    kept = {name for name in stored if stored[name].dtype == torch.int8 or name.endswith("_scale")}
    assert_equal_weights(model, {name: t if name in kept else t.float() for name, t in stored.items()})
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in kept)
    assert (model.config.quantization_bit, model.config.embedding_bits) == (bits, bits * embeddings)

    plain = ChatGLMForConditionalGeneration(ChatGLMConfig(**SHAPES, use_cache=True)).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            scale = stored.get(f"{name}_scale")
            parameter.copy_(
                stored[name] if scale is None else dequantize_weight(stored[name], scale, bits, torch.float32)
            )
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


@pytest.mark.parametrize("embeddings", [False, True], ids=["", "qe"])
def test_tied_quantised_checkpoint_may_lack_its_head(tmp_path, weights, kernels, embeddings):
    stored = quantised(weights, 4, embeddings)
    headless = {name: tensor for name, tensor in stored.items() if not name.startswith("lm_head.")}
    config = SHAPES | {"quantization_bit": 4, "quantization_embeddings": embeddings}
    model = load(make_folder(tmp_path, headless, config=config))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    if embeddings:
        assert model.lm_head.weight_scale is model.transformer.word_embeddings.weight_scale
        assert torch.equal(model.lm_head.weight_scale, stored["lm_head.weight_scale"])


def test_differing_quantised_head_is_kept_with_a_warning(tmp_path, weights, kernels, caplog):
    stored = quantised(weights, 4, embeddings=True)
    stored["lm_head.weight_scale"] = 2 * stored["lm_head.weight_scale"]
    folder = make_folder(tmp_path, stored, config=SHAPES | {"quantization_bit": 4, "quantization_embeddings": True})
    with caplog.at_level(logging.WARNING, "chatglm.checkpoint"):
        model = load(folder)
    assert "differ" in caplog.text
    head, embedding = model.lm_head.weight_scale, model.transformer.word_embeddings.weight_scale
    assert torch.equal(head, 2 * embedding)


@pytest.mark.parametrize("save", LAYOUTS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_while_loading_equals_quantising_afterwards(tmp_path, weights, kernels, bits, dtype, save):
    folder = make_folder(tmp_path, weights, save)
    # The arithmetic is float16 if that is the dtype of the network, else float32.
    afterwards = load(folder, torch.float16 if dtype == torch.float16 else torch.float32)
    afterwards.quantize(bits, quantize_embeddings=True)
    model = load(folder, dtype, quantization_bit=bits, embedding_bit=bits)
    expected = {
        name: tensor if tensor.dtype == torch.int8 or name.endswith("_scale") else tensor.to(dtype)
        for name, tensor in afterwards.state_dict().items()
    }
    assert_equal_weights(model, expected)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.config.quantization_bit == bits and model.config.quantization_embeddings is True
    assert model.config.dtype == dtype


@pytest.mark.parametrize(("bits", "embedding_bit"), [(4, 8), (8, 4), (4, 4), (0, 8)])
def test_embedding_may_have_bits_of_its_own(tmp_path, weights, kernels, bits, embedding_bit):
    model = load(make_folder(tmp_path, weights), quantization_bit=bits, embedding_bit=embedding_bit)
    packed, scale = quantize_weight(weights[EMBEDDING].float(), embedding_bit)
    state = model.state_dict()
    for name in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(state[name], packed)
        assert torch.equal(state[f"{name}_scale"], scale)
    assert (model.config.quantization_bit, model.config.embedding_bits) == (bits, embedding_bit)
    assert logits(model).isfinite().all()


def test_embedding_is_quantised_beside_layers_that_are_already(tmp_path, weights, kernels):
    stored = quantised(weights, 4)
    folder = make_folder(tmp_path, stored, save_bin, SHAPES | {"quantization_bit": 4})
    model = load(folder, embedding_bit=8)
    state = model.state_dict()
    assert torch.equal(state[DENSE], stored[DENSE])
    assert state[f"{DENSE}_scale"].dtype == torch.float16
    assert torch.equal(state[EMBEDDING], quantize_weight(weights[EMBEDDING].float(), 8)[0])
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.config.quantization_embeddings == 8


@pytest.mark.parametrize("bits", [0, 4])
def test_embedding_may_stay_in_bfloat16_below_a_float32_network(tmp_path, weights, kernels, bits):
    folder = make_folder(tmp_path, weights)
    model = load(folder, quantization_bit=bits, embedding_bit=16)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, weights[EMBEDDING].bfloat16())
    assert model.transformer.final_layernorm.weight.dtype == torch.float32
    assert model.config.quantization_embeddings is False
    found, exact = logits(model), logits(load(folder, quantization_bit=bits))
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()  # bfloat16 has 8 bits
    half = load(folder, torch.float16, quantization_bit=bits, embedding_bit=16)
    assert half.lm_head.weight.dtype == torch.float16


def test_prefix_encoder_of_a_quantised_network_stays_in_float32(tmp_path):
    shapes = SHAPES | {"pre_seq_len": 4}
    weights = random_weights(ChatGLMConfig(**shapes))
    prefix = "transformer.prefix_encoder.embedding.weight"
    weights[prefix] = weights[prefix].float() + 1e-6
    model = load(make_folder(tmp_path, weights, save_bin, shapes), torch.float16, quantization_bit=4)
    assert torch.equal(model.transformer.prefix_encoder.embedding.weight, weights[prefix])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [prefix]


@pytest.mark.parametrize("save", [save_bin, save_bin_shards, save_safetensors_shards], ids=lambda save: save.__name__)
def test_loading_and_running_change_no_file_and_need_it_no_more(tmp_path, weights, kernels, save):
    folder = make_folder(tmp_path, quantised(weights, 4, True), save, SHAPES | PUBLISHED_QE)
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    model = load(folder)
    first = logits(model)
    model.state_dict()
    model.float()
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()} == digests
    for path in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(logits(model), first)


def test_weights_that_kernels_use_as_they_are_do_not_stay_in_the_file(tmp_path, weights, monkeypatch):
    class Keeping(Reversing):
        def pack(self, weight, bits):
            return weight

        unpack = pack

    found = types.SimpleNamespace(cpu_backend=Keeping)
    monkeypatch.setattr(quantization, "fast_kernels", lambda: found)
    stored = quantised(weights, 8)
    folder = make_folder(tmp_path, stored, config=SHAPES | {"quantization_bit": 8})
    model = load(folder)
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert isinstance(model.get_parameter(DENSE).backend, Keeping)
    assert torch.equal(model.get_parameter(DENSE), stored[DENSE])


def test_part_of_a_checkpoint_leaves_the_rest_empty(tmp_path, weights, kernels):
    checkpoint = open_checkpoint(make_folder(tmp_path, weights))
    files = {name: path for name, path in checkpoint.files.items() if name.startswith("transformer.layers.1.")}
    part = load_weights(replace(checkpoint, files=files), quantization_bit=4)
    whole = load_weights(checkpoint, quantization_bit=4).state_dict()
    for name, tensor in part.state_dict().items():
        here = name.startswith("transformer.layers.1.")
        assert tensor.is_meta != here, name
        assert not here or torch.equal(tensor, whole[name]), name


def test_weights_are_laid_out_for_kernels_while_they_are_read(tmp_path, weights, monkeypatch):
    found = types.SimpleNamespace(cpu_backend=Reversing)
    monkeypatch.setattr(quantization, "fast_kernels", lambda: found)
    stored = quantised(weights, 4, True)
    for options in ({"quantization_bit": 4, "embedding_bit": 4}, {}):
        config = SHAPES if options else SHAPES | PUBLISHED_QE
        model = load(make_folder(tmp_path, weights if options else stored, config=config), **options)
        modules = [module for module in model.modules() if isinstance(module, quantization.QuantizedModule)]
        assert len(modules) == 4 * 3 + 2
        assert all(isinstance(module.weight.backend, Reversing) for module in modules)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_onto_a_gpu_is_float16_arithmetic(tmp_path, weights, bits):
    folder = make_folder(tmp_path, weights, save_bin_shards)
    model = load_weights(open_checkpoint(folder), "cuda", torch.float16, bits, bits)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    stored = quantised(weights, bits, embeddings=True)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        # A division on a GPU may differ in the last place of a scale, and so an integer by one.
        difference = (tensor.cpu().float() - stored[name].float()).abs()
        if name.endswith("_scale"):
            assert (difference <= 0.001 * stored[name].float()).all()
        elif tensor.dtype == torch.float16:
            assert not difference.any()
    again = load_weights(
        open_checkpoint(
            make_folder(
                tmp_path / "int", stored, config=SHAPES | {"quantization_bit": bits, "quantization_embeddings": True}
            )
        ),
        "cuda",
        torch.float16,
    )
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in again.state_dict().items())
    assert again(INPUT_IDS.cuda()).logits.isfinite().all()


@pytest.mark.parametrize("shard", ["100GB", "16KB"], ids=["one_file", "shards"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["", "qe"])
def test_saving_writes_the_published_bytes_again(tmp_path, weights, kernels, embeddings, shard):
    stored = quantised(weights, 4, embeddings)
    config = SHAPES | {"quantization_bit": 4, "quantization_embeddings": embeddings}
    published = make_folder(tmp_path / "published", stored, save_bin, config)
    load(published, torch.float16).save_pretrained(tmp_path / "saved", max_shard_size=shard)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "16KB")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tied = {name: tensor for name, tensor in stored.items() if not name.startswith("lm_head.")}
    assert saved.keys() == tied.keys()
    for name, tensor in tied.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name

    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_bit"] == 4
    assert config.get("quantization_embeddings", False) is embeddings
    assert "quantization_config" not in config
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(published)))


def test_saving_what_was_quantised_here_loads_without_quantising_again(tmp_path, weights, kernels):
    model = load(make_folder(tmp_path / "plain", weights), quantization_bit=4, embedding_bit=8)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", quantization_bit=4, embedding_bit=8)
    assert_equal_weights(again, model.state_dict())
    assert again.state_dict()[f"{DENSE}_scale"].dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ((4, False), (8, None), "the model in {} is quantised to 4 bits, but 8 were asked for"),
        ((8, False), (4, None), "the model in {} is quantised to 8 bits, but 4 were asked for"),
        ((4, True), (4, 8), "the embedding in {} is quantised to 4 bits, but 8 were asked for"),
        ((4, True), (0, 16), "the embedding in {} is quantised to 4 bits, but 16 were asked for"),
    ],
)
def test_other_bits_than_stored_are_refused_naming_both(tmp_path, weights, stored, asked, expected):
    bits, embeddings = stored
    config = SHAPES | {"quantization_bit": bits, "quantization_embeddings": embeddings}
    checkpoint = open_checkpoint(make_folder(tmp_path, quantised(weights, bits, embeddings), config=config))
    for refused in (load_weights, lambda checkpoint, **options: checkpoint.memory(4, **options)):
        with pytest.raises(CheckpointError) as caught:
            refused(checkpoint, quantization_bit=asked[0], embedding_bit=asked[1])
        assert expected.format(tmp_path) in str(caught.value)
        assert f"ask for {bits}" in str(caught.value)


def test_bits_that_do_not_exist_are_refused(tmp_path, weights):
    checkpoint = open_checkpoint(make_folder(tmp_path, weights))
    with pytest.raises(ValueError, match="4 or 8 bits, got 3"):
        load_weights(checkpoint, quantization_bit=3)
    with pytest.raises(ValueError, match="embedding_bit must be 4, 8, 16 or None, got 2"):
        load_weights(checkpoint, embedding_bit=2)


def test_matrix_that_cannot_be_quantised_is_named(tmp_path, weights):
    broken = weights | {DENSE: weights[DENSE].clone()}
    broken[DENSE][3, 5] = float("inf")
    checkpoint = open_checkpoint(make_folder(tmp_path, broken))
    with pytest.raises(CheckpointError, match=rf"{DENSE} in .*model\.safetensors: .*NaN or infinite"):
        load_weights(checkpoint, quantization_bit=4)


@pytest.mark.parametrize("stored", [0, 4])
@pytest.mark.parametrize("embedding_bit", [None, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_is_that_of_the_loaded_parameters(tmp_path, weights, stored, embedding_bit, dtype):
    content = quantised(weights, 4) if stored else weights
    checkpoint = open_checkpoint(make_folder(tmp_path, content, config=SHAPES | {"quantization_bit": stored}))
    for bits in (0, 4):
        memory = checkpoint.memory(dtype.itemsize, bits, embedding_bit)
        model = load_weights(checkpoint, "cpu", dtype, bits, embedding_bit)
        real = sum(parameter.nbytes for parameter in model.parameters())
        scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_scale"))
        # The scales that are stored are smaller than those made in float32.
        assert real <= memory.weights <= real + 2 * scales
        assert memory.loading_peak == memory.weights + max(tensor.nbytes for tensor in content.values())
        # 3 layers, keys and values, 32 channels; a quantised model keeps them in float16.
        assert memory.cache_per_token == 3 * 2 * 32 * (2 if bits or stored else dtype.itemsize)


def test_parameters_of_a_quantised_checkpoint_are_those_of_the_network(tmp_path, weights, source):
    stored = quantised(weights, 4, True)
    checkpoint = open_checkpoint(make_folder(tmp_path, stored, config=SHAPES | PUBLISHED_QE))
    assert checkpoint.num_parameters == sum(parameter.numel() for parameter in source.parameters())


# Prints how many bytes quantising while loading took at its peak, and how many the model has.
PEAK = """
import resource, sys
import chatglm.quantization
import chatglm.checkpoint
from chatglm.checkpoint import load_weights, open_checkpoint

chatglm.quantization.fast_kernels = lambda: None
chatglm.checkpoint.MAPPED = 8_000_000
checkpoint = open_checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_weights(checkpoint, quantization_bit=4, embedding_bit=4)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (after - before), sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.parametrize("save", [save_bin, save_bin_before_torch_1_6, save_bin_shards], ids=lambda save: save.__name__)
def test_bin_file_is_opened_anew_after_so_many_bytes(tmp_path, weights, kernels, monkeypatch, save):
    folder = make_folder(tmp_path, weights, save)
    expected = load(folder, quantization_bit=4).state_dict()
    opened = []
    read = checkpoint_module._read_pickle
    monkeypatch.setattr(checkpoint_module, "_read_pickle", lambda *args: opened.append(args) or read(*args))
    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(checkpoint_module, "MAPPED", 10_000)
    opened.clear()
    assert_equal_weights(load_weights(checkpoint, quantization_bit=4), expected)
    # For comparing head and embedding; then behind the embedding (50 kB) and in every layer (15 kB) at least once.
    assert len(opened) >= 1 + 4 if save is not save_bin_before_torch_1_6 else len(opened) == 1 + 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("save", [save_safetensors, save_bin], ids=lambda save: save.__name__)
def test_quantising_while_loading_needs_little_beside_the_quantised_model(tmp_path, save):
    shapes = SHAPES | {"vocab_size": 4000, "hidden_size": 512, "num_layers": 10, "inner_hidden_size": 2048}
    weights = random_weights(ChatGLMConfig(**shapes))
    folder = make_folder(tmp_path, weights, save, shapes)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    taken, quantised_size = map(int, result.stdout.split())
    size = sum(tensor.nbytes for name, tensor in weights.items() if name != "lm_head.weight")
    # The largest matrix is 4 MB, and is held in a few forms at once; 8 MB of a .bin file are mapped.
    assert taken < quantised_size + 35e6 < 0.8 * size


# Foreign code ---------------------------------------------------------------------------------------------------------


def test_code_inside_a_checkpoint_is_never_run(tmp_path, weights, source):
    folder = make_folder(tmp_path, weights)
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "__init__.py"):
        (folder / name).write_text("raise RuntimeError('code of a checkpoint was run')\n")
    known = set(sys.modules)
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint)
    model = load_weights(checkpoint)
    assert type(model) is ChatGLMForConditionalGeneration
    assert type(tokenizer).__module__ == "chatglm.tokenization_chatglm"
    assert torch.equal(logits(model), logits(source))
    assert not [name for name in set(sys.modules) - known if name.startswith("transformers_modules")]


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path, weights):
    trace = tmp_path / "trace"
    folder = make_folder(tmp_path / "model", weights | {"lm_head.weight": Intruder(trace)}, save_bin)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        open_checkpoint(folder)
    assert not trace.exists()


# Folders that are refused ---------------------------------------------------------------------------------------------

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a69c242ce014c88c2b26089\nsize 2706249\n"


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])


def edit_json_and_weights(folder: Path, missing: str) -> None:
    """Say in the configuration that the weights are quantised, and remove one of them."""
    edit_json(folder / "config.json", quantization_bit=4)
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors")


def replace_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    weights = random_weights(ChatGLMConfig(**SHAPES))
    change(weights)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)


DENSE = "transformer.layers.1.mlp.dense_h_to_4h.weight"
FIRST_SHARD = "pytorch_model-00001-of-00008.bin"
INDEX = "pytorch_model.bin.index.json"

# name: (layout, what breaks the folder, what the sentence must say)
BROKEN = {
    "weights are a pointer": (
        save_bin_shards,
        lambda f: (f / FIRST_SHARD).write_text(LFS_POINTER),
        [FIRST_SHARD, "Git-LFS pointer", "git lfs pull"],
    ),
    "safetensors is a pointer": (
        save_safetensors,
        lambda f: (f / "model.safetensors").write_text(LFS_POINTER),
        ["model.safetensors", "Git-LFS pointer", "git lfs pull"],
    ),
    "bin is cut off": (save_bin, lambda f: cut(f / "pytorch_model.bin"), ["pytorch_model.bin", "cut off", "download"]),
    "old bin is cut off": (
        save_bin_before_torch_1_6,
        lambda f: cut(f / "pytorch_model.bin"),
        ["pytorch_model.bin", "cut off", "download"],
    ),
    "bin shard is cut off": (save_bin_shards, lambda f: cut(f / FIRST_SHARD), [FIRST_SHARD, "cut off", "download"]),
    "safetensors is cut off": (
        save_safetensors,
        lambda f: cut(f / "model.safetensors"),
        ["model.safetensors", "cut off", "download"],
    ),
    "safetensors header is cut off": (
        save_safetensors,
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
        ["model.safetensors", "cut off", "download"],
    ),
    "bin is empty": (
        save_bin,
        lambda f: (f / "pytorch_model.bin").write_bytes(b""),
        ["pytorch_model.bin", "(0 bytes)", "download"],
    ),
    "bin is a web page": (
        save_bin,
        lambda f: (f / "pytorch_model.bin").write_text("<!DOCTYPE html><title>404</title>"),
        ["pytorch_model.bin", "damaged", "download"],
    ),
    "bin is a list": (
        save_bin,
        lambda f: torch.save([1, 2], f / "pytorch_model.bin"),
        ["pytorch_model.bin", "not a table of tensors"],
    ),
    "two shards are missing": (
        save_bin_shards,
        lambda f: [(f / f"pytorch_model-0000{i}-of-00008.bin").unlink() for i in (3, 5)],
        [INDEX, "pytorch_model-00003-of-00008.bin, pytorch_model-00005-of-00008.bin are missing", "download"],
    ),
    "index is missing": (
        save_bin_shards,
        lambda f: (f / INDEX).unlink(),
        ["no weights", ".index.json that belongs to the shards", FIRST_SHARD],
    ),
    "index is broken": (save_bin_shards, lambda f: cut(f / INDEX), [INDEX, "not valid JSON", "download"]),
    "index has no map": (
        save_bin_shards,
        lambda f: edit_json(f / INDEX, weight_map=...),
        [INDEX, "weight_map", "download"],
    ),
    "index leads outside": (
        save_bin_shards,
        lambda f: edit_json(f / INDEX, weight_map={"lm_head.weight": "../other.bin"}),
        [INDEX, "outside its own folder"],
    ),
    "no weights": (
        save_bin,
        lambda f: (f / "pytorch_model.bin").unlink(),
        ["no weights in", "model.safetensors", "pytorch_model.bin", "found config.json, ice_text.model"],
    ),
    "no config": (save_bin, lambda f: (f / "config.json").unlink(), ["no config.json in", "copy it"]),
    "config is broken": (save_bin, lambda f: cut(f / "config.json"), ["config.json is not valid JSON", "download"]),
    "config is a list": (
        save_bin,
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json", "not a JSON object"],
    ),
    "config is a pointer": (
        save_bin,
        lambda f: (f / "config.json").write_text(LFS_POINTER),
        ["config.json", "Git-LFS pointer"],
    ),
    "config of a llama": (
        save_bin,
        lambda f: edit_json(f / "config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        ["config.json", "'llama'", "ChatGLM-6B"],
    ),
    "config without a type": (
        save_bin,
        lambda f: edit_json(f / "config.json", model_type=...),
        ["config.json", "model_type"],
    ),
    "config of ChatGLM2": (
        save_bin,
        lambda f: edit_json(f / "config.json", multi_query_attention=True, ffn_hidden_size=96, rmsnorm=True),
        ["config.json", "ChatGLM2", "ChatGLM-6B"],
    ),
    "config of quantised weights": (
        save_bin,
        lambda f: edit_json(f / "config.json", quantization_bit=4),
        [
            "pytorch_model.bin holds transformer.layers.0.attention.query_key_value.weight",
            "not quantised",
            "config.json says quantization_bit 4",
            "same model",
        ],
    ),
    "config of quantised embeddings": (
        lambda f, weights: save_safetensors(f, quantised(weights, 4)),
        lambda f: edit_json(f / "config.json", **PUBLISHED_QE),
        ["model.safetensors holds", "not quantised", "says quantization_bit 4 and quantization_embeddings true"],
    ),
    "config of other bits": (
        lambda f, weights: save_safetensors(f, quantised(weights, 4)),
        lambda f: edit_json(f / "config.json", quantization_bit=8),
        ["model.safetensors holds transformer.layers.", "config.json says quantization_bit 8, which asks for"],
    ),
    "config of bits that do not exist": (
        save_bin,
        lambda f: edit_json(f / "config.json", quantization_bit=3),
        ["config.json is not usable", "quantization_bit must be 0, 4 or 8, got 3"],
    ),
    "config with a word for a number": (
        save_bin,
        lambda f: edit_json(f / "config.json", hidden_size="large"),
        ["config.json", "hidden_size 'large'", "whole number above 0"],
    ),
    "config whose heads do not divide": (
        save_bin,
        lambda f: edit_json(f / "config.json", num_attention_heads=5),
        ["config.json", "num_attention_heads 5"],
    ),
    "quantised weights": (
        save_safetensors,
        lambda f: replace_weights(f, lambda weights: weights.update({DENSE: weights[DENSE].to(torch.int8)})),
        ["model.safetensors", DENSE, "quantised", "config.json says quantization_bit 0", "same model"],
    ),
    "quantised embedding": (
        lambda f, weights: save_safetensors(f, quantised(weights, 4, True)),
        lambda f: edit_json(f / "config.json", quantization_bit=4),
        ["holds", "so it is quantised", "says quantization_bit 4 and quantization_embeddings false"],
    ),
    "scale is missing": (
        lambda f, weights: save_safetensors(f, quantised(weights, 4)),
        lambda f: edit_json_and_weights(f, f"{DENSE}_scale"),
        ["model.safetensors lacks 1", f"{DENSE}_scale"],
    ),
    "whole numbers of another kind": (
        lambda f, weights: save_safetensors(f, weights | {DENSE: weights[DENSE].to(torch.int32)}),
        lambda f: None,
        ["model.safetensors", DENSE, "neither as floats nor as int8"],
    ),
    "wrong shape": (
        save_safetensors,
        lambda f: edit_json(f / "config.json", inner_hidden_size=64),
        ["model.safetensors", "transformer.layers.0.mlp.dense_", "48", "64", "config.json", "same model"],
    ),
    "too few layers": (
        save_safetensors,
        lambda f: edit_json(f / "config.json", num_layers=4),
        ["model.safetensors lacks 12", "transformer.layers.3.", "download"],
    ),
    "too many layers": (
        save_safetensors,
        lambda f: edit_json(f / "config.json", num_layers=2),
        ["model.safetensors", "transformer.layers.2.", "no place", "config.json"],
    ),
    "one weight is missing": (
        save_safetensors,
        lambda f: replace_weights(f, lambda weights: weights.pop(DENSE)),
        ["model.safetensors lacks 1", DENSE, "download"],
    ),
    "embedding is missing": (
        save_safetensors,
        lambda f: replace_weights(f, lambda weights: weights.pop(EMBEDDING)),
        ["model.safetensors lacks 1", EMBEDDING, "download"],
    ),
    "separate head is missing": (
        save_safetensors,
        lambda f: (
            replace_weights(f, lambda weights: weights.pop("lm_head.weight")),
            edit_json(f / "config.json", tie_word_embeddings=False),
        ),
        ["model.safetensors lacks 1", "lm_head.weight"],
    ),
    "prefix without its model": (
        save_safetensors,
        lambda f: (
            save_file({"transformer.prefix_encoder.embedding.weight": torch.ones(4, 192)}, f / "model.safetensors"),
            edit_json(f / "config.json", pre_seq_len=4),
        ),
        ["model.safetensors lacks", "P-Tuning prefix: give it as --adapter"],
    ),
    "prefix that the config does not know": (
        save_safetensors,
        lambda f: replace_weights(
            f, lambda weights: weights.update({"transformer.prefix_encoder.embedding.weight": torch.ones(4, 192)})
        ),
        ["model.safetensors", "transformer.prefix_encoder.embedding.weight", "no place"],
    ),
    "no vocabulary": (
        save_bin,
        lambda f: (f / "ice_text.model").unlink(),
        ["no vocabulary file ice_text.model in", "copy it"],
    ),
    "vocabulary of ChatGLM2": (
        save_bin,
        lambda f: (f / "ice_text.model").rename(f / "tokenizer.model"),
        ["no vocabulary file ice_text.model in", "tokenizer.model is for ChatGLM2"],
    ),
    "vocabulary is a pointer": (
        save_bin,
        lambda f: (f / "ice_text.model").write_text(LFS_POINTER),
        ["ice_text.model", "Git-LFS pointer", "git lfs pull"],
    ),
    "vocabulary is cut off": (save_bin, lambda f: cut(f / "ice_text.model"), ["ice_text.model", "download"]),
    "vocabulary is text": (
        save_bin,
        lambda f: (f / "ice_text.model").write_text("hello\nworld\n"),
        ["ice_text.model", "not a SentencePiece model", "download"],
    ),
    "vocabulary is empty": (
        save_bin,
        lambda f: (f / "ice_text.model").write_bytes(b""),
        ["ice_text.model", "not a SentencePiece model", "download"],
    ),
    "vocabulary of another model": (
        save_bin,
        lambda f: write_plain_vocabulary(f / "ice_text.model"),
        ["ice_text.model", "<sop>", "checkpoint"],
    ),
    "vocabulary with other ids": (
        save_bin,
        lambda f: edit_json(f / "config.json", bos_token_id=500),
        ["ice_text.model", "bos_token_id 432", "config.json says 500", "same model"],
    ),
    "vocabulary too large": (
        save_bin,
        lambda f: edit_json(f / "tokenizer_config.json", num_image_tokens=20000),
        ["ice_text.model", "20432", "config.json says 432"],
    ),
    "tokenizer settings are broken": (
        save_bin,
        lambda f: cut(f / "tokenizer_config.json"),
        ["tokenizer_config.json is not valid JSON", "download"],
    ),
}


def write_plain_vocabulary(path: Path) -> None:
    """A SentencePiece model without ChatGLM's special pieces, like tokenizer.model of ChatGLM2."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "how are you"] * 4),
        model_writer=model,
        vocab_size=16,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_refused_in_one_sentence(tmp_path, weights, case):
    save, damage, expected = BROKEN[case]
    folder = make_folder(tmp_path, weights, save)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(open_checkpoint(folder))
    message = str(caught.value)
    for part in expected:
        assert part in message, message
    assert "\n" not in message and len(message) < 600
    assert str(folder) in message  # the full path, to be copied


def test_too_many_pieces_are_refused(tmp_path):
    shapes = SHAPES | {"vocab_size": 771}
    checkpoint = open_checkpoint(make_folder(tmp_path, random_weights(ChatGLMConfig(**shapes)), config=shapes))
    with pytest.raises(CheckpointError, match=r"ice_text\.model has 772 entries.*config\.json says vocab_size 771"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./no/such/folder", "there is no folder ./no/such/folder"),
        ("~/no-such-folder", "there is no folder ~/no-such-folder"),
        ("chatglm-6b-of-mine", "there is no folder chatglm-6b-of-mine"),
        (
            "someone/no-such-model",
            "there is no folder someone/no-such-model, and the Hugging Face hub could not be reached",
        ),
    ],
)
def test_absent_folder_and_unreachable_hub_are_told_apart(tmp_path, monkeypatch, name, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert str(caught.value).startswith(expected)


def test_file_instead_of_folder_is_refused(tmp_path, weights):
    folder = make_folder(tmp_path, weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file: give the folder"):
        open_checkpoint(folder / "model.safetensors")


def test_hub_name_is_fetched_without_code_and_with_one_kind_of_weights(tmp_path, monkeypatch, weights):
    calls = []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(make_folder(tmp_path, weights, save_bin))

    monkeypatch.setattr("chatglm.checkpoint.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("THUDM/chatglm-6b", revision="v1.1.0")
    assert calls == [
        ("THUDM/chatglm-6b", "v1.1.0", ["*.json", "*.model", "*.safetensors"]),
        ("THUDM/chatglm-6b", "v1.1.0", ["*.bin"]),
    ]
    assert load_weights(checkpoint).config.name_or_path == "THUDM/chatglm-6b"


def test_failed_download_says_why(monkeypatch):
    def snapshot_download(name, revision, allow_patterns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chatglm.checkpoint.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"THUDM/chatglm-6b could not be downloaded: .*No space left on device"):
        open_checkpoint("THUDM/chatglm-6b")
