"""Adapters: what is learnt and saved, what comes back from a folder, and what is refused before it does harm."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import utils
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, quantization
from chatglm.adapters import adapter_kind, apply_adapter, merge_adapter, open_adapter, shared_copy
from chatglm.checkpoint import CheckpointError, open_checkpoint

VOCABULARY = Path(__file__).parent / "golden" / "tokenizer" / "mini_ice_text.model"
ENCODER = "transformer.prefix_encoder"
KINDS = ("prefix", "projected prefix", "LoRA")
SIZES = {
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
    "use_cache": True,
}
INPUT_IDS = torch.tensor([[9, 8, 7, 429, 432, 20, 21, 22], [30, 31, 32, 429, 432, 40, 41, 42]])
LABELS = torch.cat((torch.full((2, 4), -100), INPUT_IDS[:, 4:]), dim=-1)


def make_base(bits=0, dtype=torch.float32, **changes):
    """A model whose answers vary: its weights are larger than freshly made ones."""
    torch.manual_seed(5)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    return model.to(dtype).quantize(bits, quantize_embeddings=bool(bits)).eval()


def tune(model, kind, seed=1):
    """The model with an adapter that changes much, as if it had been trained; of LoRA peft's model."""
    torch.manual_seed(seed)
    if kind == "LoRA":
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"]))
        trained = [parameter for name, parameter in tuned.named_parameters() if "lora_" in name]
    else:
        model.add_prefix_encoder(5, kind == "projected prefix")
        tuned, trained = model, list(model.transformer.prefix_encoder.parameters())
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=1 if kind == "prefix" else 0.3)
    return tuned.eval()


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


def answers(model, **options):
    prompt = INPUT_IDS[:, :5]
    return model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, **options).tolist()


@pytest.fixture
def base():
    return make_base()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    ChatGLMTokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of each kind, for the base."""
    root = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        tune(make_base(), kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def changed(folder, target, settings=None, tensors=None):
    """A copy of an adapter folder with other settings, and tensors changed by a function on their table."""
    shutil.copytree(folder, target)
    name = "adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"
    content = json.loads((target / name).read_text()) | (settings or {})
    (target / name).write_text(json.dumps(content))
    (path,) = target.glob("*.safetensors")
    table = load_file(path)
    if tensors:
        tensors(table)
    save_file(table, path)
    return target


# A fresh prefix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
def test_fresh_prefix_learns_alone_in_float32(projection):
    model = make_base(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_prefix_encoder(7, projection)
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = ["embedding.weight", *(f"trans.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))]
    assert list(learnt) == [f"{ENCODER}.{name}" for name in names[: None if projection else 1]]
    assert {parameter.dtype for parameter in learnt.values()} == {torch.float32}
    assert learnt[f"{ENCODER}.embedding.weight"].shape == (7, 32 if projection else 2 * 3 * 32)
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (7, projection)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_model_with_an_added_prefix_is_the_model_built_with_one(base):
    built = ChatGLMForConditionalGeneration(ChatGLMConfig(**SIZES, pre_seq_len=5))
    tuned = tune(base, "prefix")
    built.load_state_dict(tuned.state_dict())
    assert torch.equal(logits(built.eval()), logits(tuned))
    assert logits(tuned).sub(logits(make_base())).abs().max() > 1  # it does something


def test_fresh_prefix_is_of_the_size_of_keys_and_values_and_the_same_for_the_same_seed():
    weights = []
    for _ in range(2):
        model = make_base()
        torch.manual_seed(3)
        model.add_prefix_encoder(40)
        weights.append(model.transformer.prefix_encoder.embedding.weight)
    assert torch.equal(*weights)
    assert weights[0].std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("length", [0, -1])
def test_prefix_has_a_length(base, length):
    with pytest.raises(ValueError, match=f"pre_seq_len must be a positive number of tokens, got {length}"):
        base.add_prefix_encoder(length)
    assert base.config.pre_seq_len is None


@pytest.mark.parametrize("first", ["prefix", "LoRA"])
@pytest.mark.parametrize("second", KINDS)
def test_second_adapter_is_refused(base, folders, first, second):
    model = apply_adapter(base, folders[first])
    before = logits(model)
    with pytest.raises(ValueError, match=r"has a (prefix of 5 tokens|LoRA adapter) already"):
        apply_adapter(model, folders[second])
    with pytest.raises(ValueError, match="already"):
        model.add_prefix_encoder(3)
    assert torch.equal(logits(model), before)


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_folder_holds_the_prefix_alone(tmp_path, bits, projection):
    model = tune(make_base(bits), "projected prefix" if projection else "prefix")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    expected = {f"{ENCODER}.{key}": value for key, value in model.transformer.prefix_encoder.state_dict().items()}
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert len(tensors) == (5 if projection else 1)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name])
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.items() >= (SIZES | {"pre_seq_len": 5, "prefix_projection": projection}).items()
    assert "auto_map" not in settings


def test_trainer_knows_that_nothing_is_lost_in_a_prefix_folder(tmp_path):
    model = tune(make_base(), "prefix").quantize(4, quantize_embeddings=True)
    model.save_pretrained(tmp_path)
    result = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert set(result.missing_keys) == set(model._keys_to_ignore_on_save)
    assert not result.unexpected_keys


def test_model_with_lora_is_saved_by_peft_or_not_at_all(tmp_path, base, folders):
    with pytest.raises(ValueError, match="save that through peft's model, or merge it before"):
        apply_adapter(base, folders["LoRA"]).save_pretrained(tmp_path)


def test_from_pretrained_makes_no_random_model_of_a_prefix(folders):
    with pytest.raises(ValueError, match="holds a P-Tuning prefix, not a whole model"):
        ChatGLMForConditionalGeneration.from_pretrained(folders["prefix"])


# Using ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
def test_adapter_comes_back_as_it_was_trained(tmp_path, kind, bits):
    tuned = tune(make_base(bits), kind)
    tuned.save_pretrained(tmp_path)
    model = apply_adapter(make_base(bits), tmp_path)
    assert type(model) is ChatGLMForConditionalGeneration
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(tuned))
    assert logits(model).sub(logits(make_base(bits))).abs().max() > 0.5


def test_projection_is_gone_when_a_prefix_is_used(base, folders):
    model = apply_adapter(base, folders["projected prefix"])
    assert [name for name, _ in model.named_parameters() if name.startswith(ENCODER)] == [f"{ENCODER}.embedding.weight"]
    assert not model.config.prefix_projection


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
def test_steps_with_the_cache_equal_the_whole_text(folders, kind, bits, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(quantization, "fast_kernels", lambda: None)
    model = apply_adapter(make_base(bits), folders[kind])
    ids = torch.tensor(answers(model, use_cache=False))
    if not bits:
        assert answers(model) == ids.tolist()
    positions, cache, steps = model.get_position_ids(ids), model.new_cache(), []
    with torch.no_grad():
        whole = model(ids).logits
        for part in (slice(5), *(slice(place, place + 1) for place in range(5, 25))):
            steps.append(model(ids[:, part], positions[..., part], past_key_values=cache).logits)
    # Quantised models keep keys and values in float16; what is lost without the adapter is of another size.
    difference = (torch.cat(steps, dim=1) - whole).abs().max()
    assert difference < (0.2 if bits else 2e-3)
    with torch.no_grad():
        assert (make_base(bits)(ids).logits - whole).abs().max() > 2


def test_half_precision_base_keeps_adapters_in_float32(folders, kind):
    model = apply_adapter(make_base(dtype=torch.float16), folders[kind])
    own = [p.dtype for name, p in model.named_parameters() if "lora_" in name or name.startswith(ENCODER)]
    assert set(own) == {torch.float32}
    assert model.dtype == torch.float16
    exact = logits(apply_adapter(make_base(), folders[kind]))
    assert logits(model).float().sub(exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("kind", ["prefix", "projected prefix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_file_needs_no_configuration(tmp_path, base, folders, kind, dtype):
    tensors = load_file(folders[kind] / "model.safetensors")
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "ice_text.model").touch()
    assert adapter_kind(tmp_path) == "prefix"
    model = apply_adapter(base, tmp_path)
    assert model.config.pre_seq_len == 5
    exact = logits(apply_adapter(make_base(), folders[kind]))
    torch.testing.assert_close(logits(model), exact, atol=0 if dtype == torch.float32 else 0.05, rtol=0)


def test_titles(folders):
    assert open_adapter(folders["prefix"]).title == "P-Tuning v2, 5 tokens"
    assert open_adapter(folders["LoRA"]).title == "LoRA, rank 4"
    assert open_adapter(folders["LoRA"]).num_parameters == 3 * 4 * (32 + 96)
    assert open_adapter(folders["projected prefix"]).num_parameters == 5 * 32 + 33 * 32 + 33 * 192


# Learning on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
def test_trainable_adapter_learns_and_nothing_else(folders, kind, bits):
    model = apply_adapter(make_base(bits), folders[kind], trainable=True)
    expected = load_file(next(folders[kind].glob("*.safetensors")))
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.replace(".default", "") for name in learnt} == expected.keys()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(learnt.values(), lr=0.03 if kind == "LoRA" else 0.3)
    losses = []
    for _ in range(8):
        loss = model(INPUT_IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == learnt.keys()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": INPUT_IDS[index % 2], "labels": LABELS[index % 2]}


@pytest.mark.parametrize("bits", [0, 4])
def test_trainer_resumes_from_a_folder_of_the_adapter_alone(tmp_path, caplog, kind, bits):
    def train(steps, resume=None):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
            use_cpu=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            lr_scheduler_type="constant", per_device_train_batch_size=2, seed=1,
        )  # fmt: skip
        model = tune(make_base(bits), kind)
        trainer = Trainer(model, arguments, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = train(4)
    written = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert not any(name.endswith(".py") for name in written)
    assert "model.safetensors" in written or "adapter_model.safetensors" in written
    with caplog.at_level("WARNING"):
        resumed = train(4, tmp_path / "checkpoint-2")
    assert not [record for record in caplog.records if "keys" in record.message]
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


# Two models on one set of weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
def test_base_and_tuned_share_their_weights(folders, kind, bits):
    model = make_base(bits)
    before, own = answers(model), {id(parameter) for parameter in model.parameters()}
    tuned = apply_adapter(shared_copy(model), folders[kind])
    added = [name for name, parameter in tuned.named_parameters() if id(parameter) not in own]
    assert all("lora_" in name or name.startswith(ENCODER) for name in added)
    assert model.config.pre_seq_len is None
    alone = answers(apply_adapter(make_base(bits), folders[kind]))
    for _ in range(2):  # one after the other, and again
        assert answers(model) == before
        assert answers(tuned) == alone


def test_copy_of_a_split_model_is_refused(base):
    base.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="split over devices"):
        shared_copy(base)


# Merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["query_key_value"], list(quantization.LAYERS), ["dense", "lm_head"]])
def test_merged_lora_is_the_same_model_without_peft(tmp_path, targets):
    base = make_base(tie_word_embeddings=False)
    torch.manual_seed(2)
    tuned = get_peft_model(shared_copy(base), LoraConfig(r=4, target_modules=targets)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    before = logits(tuned)
    merged = merge_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=0)
    assert not any("lora" in name for name, _ in merged.named_modules())
    merged.save_pretrained(tmp_path / "whole")
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("bits", [0, 4])
def test_merged_prefix_lies_in_the_folder_of_the_whole_model(tmp_path, folders, bits):
    model = merge_adapter(make_base(bits), folders["prefix"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_chatglm.py").exists()
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(apply_adapter(make_base(bits), folders["prefix"])))


def test_lora_on_a_tied_head_is_not_merged(tmp_path, base):
    get_peft_model(shared_copy(base), LoraConfig(r=4, target_modules=["lm_head"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embedding or head cannot be merged: in this model they are one matrix"):
        merge_adapter(base, tmp_path)


def test_lora_is_not_merged_into_quantised_weights(folders):
    model = make_base(4)
    before = logits(model)
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        merge_adapter(model, folders["LoRA"])
    assert torch.equal(logits(model), before)


# Refusing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 2}, ["num_layers is 3 there and 2 here"]),
        ({"hidden_size": 64, "num_attention_heads": 8}, ["hidden_size is 32 there and 64", "heads is 4 there and 8"]),
        ({"vocab_size": 790}, ["vocab_size is 780 there and 790 here"]),
        ({"bos_token_id": 435, "gmask_token_id": 430}, ["bos_token_id is 432 there and 435", "gmask_token_id is 429"]),
    ],
    ids=["layers", "width", "vocabulary", "special ids"],
)  # fmt: skip
def test_prefix_of_another_base_is_refused_with_both_values(folders, changes, said):
    model = make_base(**changes)
    with pytest.raises(CheckpointError) as error:
        apply_adapter(model, folders["prefix"])
    for part in (str(folders["prefix"]), "was made for another model", "--model_name_or_path", *said):
        assert part in str(error.value)
    assert model.config.pre_seq_len is None
    assert not any("prefix" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("prefix", {"num_layers": 2}, r"shape \[5, 192\] there, and 2 layers with hidden_size 32 need \[5, 128\] here"),
        ("projected prefix", {"hidden_size": 64}, r"has shape \[5, 32\] there, .* need \[5, 64\] here"),
    ],
)
def test_prefix_without_configuration_is_refused_by_its_shapes(tmp_path, folders, kind, changes, said):
    torch.save(load_file(folders[kind] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=said):
        apply_adapter(make_base(**changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 2}, "layers.2.attention.query_key_value, which is no linear layer here, where there are 2"),
        ({"num_layers": 4}, "num_layers is 3 there and 4 here"),
        ({"hidden_size": 64}, r"has 64 inputs and 192 outputs here, and its lora_A has shape \[4, 32\] there"),
    ],
)  # fmt: skip
def test_lora_of_another_base_is_refused_with_both_values(folders, changes, said):
    model = make_base(**changes)
    before = logits(model)
    with pytest.raises(CheckpointError, match=said):
        apply_adapter(model, folders["LoRA"])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.1\..*query_key_value"},
        {"target_modules": ["layers.2.attention.query_key_value"]},
        {"target_modules": ["query_key_value"], "layers_to_transform": [1]},
    ],
    ids=["pattern", "names", "layers_to_transform"],
)
def test_lora_on_some_layers_fits(tmp_path, base, settings):
    tuned = get_peft_model(shared_copy(base), LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    tuned.save_pretrained(tmp_path)
    before = logits(base)
    assert torch.equal(logits(apply_adapter(base, tmp_path)), logits(tuned))
    assert not torch.equal(logits(tuned), before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, r"changes all of transformer.layers.0.attention.query_key_value \(with lora_magnitude"),
        ({"modules_to_save": ["lm_head"]}, r"changes all of lm_head \(with weight\), which is quantised here"),
    ],
    ids=["DoRA", "modules_to_save"],
)
def test_what_changes_whole_matrices_is_kept_from_quantised_ones(tmp_path, bits, settings, said):
    config = LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False, **settings)
    tuned = get_peft_model(make_base(tie_word_embeddings=False), config).eval()
    tuned.save_pretrained(tmp_path)
    assert torch.equal(logits(apply_adapter(make_base(tie_word_embeddings=False), tmp_path)), logits(tuned))
    with pytest.raises(CheckpointError, match=said):
        apply_adapter(make_base(bits, tie_word_embeddings=False), tmp_path)


def renamed(table):
    for name in list(table):
        table[name.replace("query_key_value", "q_proj")] = table.pop(name)


def poisoned(table):
    table[sorted(table)[0]][0, 0] = float("nan")


BROKEN = {
    "target names": ("LoRA", {}, renamed, "q_proj, which is no linear layer here"),
    "another kind": ("LoRA", {"peft_type": "IA3"}, None, "peft_type 'IA3': of peft's adapters,"),
    "biases": ("LoRA", {"bias": "all"}, None, "bias 'all', so biases of the base were changed"),
    "no rank": ("LoRA", {"r": None}, None, "is no LoRA adapter that can be used"),
    "lost tensor": ("LoRA", {}, lambda table: table.pop(sorted(table)[-1]), "lacks some of its own tensors"),
    "NaN in LoRA": ("LoRA", {}, poisoned, "holds NaN or infinite numbers in base_model.model.transformer.layers.0"),
    "NaN in a prefix": ("prefix", {}, poisoned, "holds NaN or infinite numbers in transformer.prefix_encoder"),
    "other length": ("prefix", {"pre_seq_len": 6}, None, "says pre_seq_len 6, but .* a prefix with pre_seq_len 5"),
    "other form": ("prefix", {"prefix_projection": True}, None, "says prefix_projection True, but"),
    "half a projection": (
        "projected prefix", {}, lambda table: table.pop(f"{ENCODER}.trans.2.bias"), "which is no prefix of ChatGLM-6B",
    ),
    "integers": (
        "prefix", {}, lambda table: table.update({name: t.to(torch.int8) for name, t in table.items()}), "as floats",
    ),
    "another family": ("prefix", {"model_type": "llama"}, None, "is of a model of type 'llama'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter_is_refused(tmp_path, base, folders, case):
    kind, settings, tensors, said = BROKEN[case]
    folder = changed(folders[kind], tmp_path / "adapter", settings, tensors)
    with pytest.raises(CheckpointError, match=said):
        apply_adapter(base, folder)


def test_configuration_of_the_base_beside_a_prefix_will_do(tmp_path, base, folders):
    folder = changed(folders["prefix"], tmp_path / "adapter", {"pre_seq_len": None})
    assert apply_adapter(base, folder).config.pre_seq_len == 5


def test_file_cut_off_is_refused(tmp_path, base, folders, kind):
    folder = shutil.copytree(folders[kind], tmp_path / "adapter")
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or cut off"):
        apply_adapter(base, folder)


def test_what_is_no_adapter_is_refused(tmp_path, base, base_folder, folders):
    (tmp_path / "empty").mkdir()
    (tmp_path / "running" / "checkpoint-20").mkdir(parents=True)
    shutil.copytree(folders["LoRA"], tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    for folder, said in {
        base_folder: "is a whole model and no adapter: give it as --model_name_or_path",
        tmp_path / "nowhere": "there is no folder",
        folders["prefix"] / "model.safetensors": "is a file: give the folder that it is in",
        tmp_path / "empty": "no adapter in .*: give the folder of an adapter",
        tmp_path / "running": "give one of the checkpoints in it, such as .*running/checkpoint-20",
        tmp_path / "half": "has an adapter_config.json, but no adapter_model.safetensors",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            apply_adapter(base, folder)
    assert adapter_kind(base_folder) is None


def test_adapter_given_as_a_model_is_told_its_flag(folders, kind):
    with pytest.raises(CheckpointError, match="give it as --adapter, and the model that it was trained on"):
        open_checkpoint(folders[kind])


# load_model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"quantization_bit": 4}], ids=["float32", "int4"])
def test_load_model_puts_the_adapter_on_and_says_so(capsys, base_folder, folders, kind, options):
    model, tokenizer = utils.load_model(base_folder, adapter=folders[kind], device="cpu", **options)
    title = open_adapter(folders[kind]).title
    assert f"loaded {base_folder.name} + {folders[kind]} ({title})   " in capsys.readouterr().err
    base, _ = utils.load_model(base_folder, device="cpu", **options)
    assert answers(model) == answers(apply_adapter(base, folders[kind]))
    assert len(model.chat(tokenizer, "你好", max_new_tokens=5, temperature=0)[0]) > 0


def test_mismatch_is_found_before_weights_are_read(tmp_path, folders, monkeypatch, kind):
    make_base(num_layers=2).save_pretrained(tmp_path)
    monkeypatch.setattr("chatglm.checkpoint.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="was made for another model"):
        utils.load_model(tmp_path, adapter=folders[kind], device="cpu")


def test_adapter_counts_as_memory(base_folder, folders, monkeypatch):
    need = utils.memory_needs(open_checkpoint(base_folder), "cpu", "float32").total
    monkeypatch.setattr(utils, "free_memory", lambda *_: need + 4 * 5 * 192 - 1)
    utils.load_model(base_folder, device="cpu", dtype="float32")
    with pytest.raises(MemoryError):
        utils.load_model(base_folder, adapter=folders["prefix"], device="cpu", dtype="float32")


SPLIT = {"": "cpu", "transformer.layers.1": "disk"}


def test_prefix_on_a_split_model(tmp_path, base_folder, folders):
    split, _ = utils.load_model(
        base_folder, adapter=folders["prefix"], device_map=SPLIT, dtype="float32", offload_folder=tmp_path
    )
    assert answers(split) == answers(apply_adapter(make_base(), folders["prefix"]))


def test_lora_beside_layers_on_disk_is_refused_before_loading(base_folder, folders, monkeypatch):
    monkeypatch.setattr(utils, "_load_split", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="a LoRA adapter needs all layers on GPUs"):
        utils.load_model(base_folder, adapter=folders["LoRA"], device_map=SPLIT, dtype="float32")
