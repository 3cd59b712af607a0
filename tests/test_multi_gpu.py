"""A model over several devices is the same model: maps, loading part by part, offloading, and clear errors.

There is no second GPU here. The disk and the CPU are two places with real numbers; and two devices of a made-up kind,
whose tensors have no content, refuse every operation on tensors of both, as real GPUs do.
"""

import gc
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

ROOT = Path(utils.__file__).parent
VOCABULARY = Path(__file__).parent / "golden" / "tokenizer" / "mini_ice_text.model"
ENDS = (utils.EMBEDDING, utils.NORM, utils.HEAD)
PREFIX = "transformer.prefix_encoder"
SIZES = {
    "vocab_size": 780,
    "hidden_size": 32,
    "num_layers": 5,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "bos_token_id": 432,
    "eos_token_id": 433,
    "mask_token_id": 428,
    "gmask_token_id": 429,
    "pad_token_id": 3,
}


def layer(index):
    return f"transformer.layers.{index}"


def empty(**changes):
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(ChatGLMConfig(**{**SIZES, **changes}))


def saved(folder, **changes):
    torch.manual_seed(0)
    ChatGLMForConditionalGeneration(ChatGLMConfig(**{**SIZES, **changes})).save_pretrained(folder)
    ChatGLMTokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def prefix_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("prefix"), pre_seq_len=3, tie_word_embeddings=False)


def by_device(device_map):
    devices = {}
    for name, device in device_map.items():
        devices.setdefault(device, []).append(name)
    return devices


# Maps -----------------------------------------------------------------------------------------------------------------


def test_map_of_the_published_shape_for_two_gpus():
    expected = {**dict.fromkeys(ENDS, 0), **{layer(index): int(index >= 13) for index in range(28)}}
    assert utils.auto_configure_device_map(2) == expected


@pytest.mark.parametrize(("num_gpus", "layers"), [(1, [28]), (3, [8, 10, 10]), (4, [4, 8, 8, 8]), (8, [0, *[4] * 7])])
def test_embedding_counts_as_the_layers_it_weighs(num_gpus, layers):
    device_map = utils.auto_configure_device_map(num_gpus)
    numbers = [device_map[layer(index)] for index in range(28)]
    assert numbers == sorted(numbers)
    counts = [numbers.count(gpu) for gpu in range(num_gpus)]
    assert counts == layers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 7, "tie_word_embeddings": False},
        {"num_layers": 6, "pre_seq_len": 40},
        {"num_layers": 6, "quantization_bit": 4},
        {"num_layers": 6, "vocab_size": 450, "quantization_bit": 8, "quantization_embeddings": True},
    ],
    ids=["tied", "untied", "prefix", "int4", "int8 embedding"],
)
def test_no_other_split_into_runs_of_layers_is_more_even(changes):
    model = empty(**changes)
    sizes = utils.module_sizes(model)
    assert sum(sizes.values()) == sum(parameter.nbytes for parameter in model.parameters())
    num_layers = model.config.num_layers
    rest = sum(size for name, size in sizes.items() if "layers" not in name)
    for num_gpus in range(1, num_layers + 1):
        device_map = utils.auto_configure_device_map(num_gpus, model)
        assert device_map.keys() == sizes.keys()
        assert {device_map[name] for name in sizes if "layers" not in name} == {0}
        used = by_device(device_map)
        assert sorted(used) == list(range(num_gpus))
        fullest = max(sum(sizes[name] for name in names) for names in used.values())

        def fullest_of(cuts):
            runs = zip((0, *cuts), (*cuts, num_layers), strict=True)
            totals = [sum(sizes[layer(index)] for index in range(*run)) for run in runs]
            return max(totals[0] + rest, *totals)

        cuts = itertools.combinations_with_replacement(range(num_layers + 1), num_gpus - 1)
        each_has_some = (cut for cut in cuts if all(a < b for a, b in itertools.pairwise((*cut, num_layers))))
        assert fullest == min(map(fullest_of, each_has_some))


def test_prefix_encoder_stays_with_the_embedding():
    assert utils.auto_configure_device_map(3, empty(pre_seq_len=4))[PREFIX] == 0


@pytest.mark.parametrize("num_gpus", [0, -1, 6])
def test_number_of_gpus_must_fit_the_layers(num_gpus):
    with pytest.raises(ValueError, match=rf"a model of 5 layers can be split over 1 to 5 GPUs, got {num_gpus}"):
        utils.auto_configure_device_map(num_gpus, empty())


def test_filling_goes_from_the_best_device_to_the_disk():
    sizes = {**dict.fromkeys(ENDS, 10), **{layer(index): 10 for index in range(6)}}
    device_map = utils.fill_device_map(sizes, {"cuda:0": 52, "cpu": 19})
    assert by_device(device_map) == {
        "cuda:0": [*ENDS, layer(0), layer(1)],
        "cpu": [layer(2)],
        "disk": [layer(3), layer(4), layer(5)],
    }
    assert set(utils.fill_device_map(sizes, {"cuda:0": 90, "cpu": 90}).values()) == {"cuda:0"}
    # The ends need a place to compute; a device too small for them can still take layers.
    small = utils.fill_device_map(sizes, {"cuda:0": 25, "cpu": 100})
    assert small[utils.EMBEDDING] == "cpu" and small[layer(1)] == "cuda:0" and small[layer(2)] == "cpu"
    with pytest.raises(MemoryError, match=r"embedding and head need 0.0 GB beside the room for computing"):
        utils.fill_device_map(sizes, {"cuda:0": 25, "cpu": -5})


def test_keys_of_a_map_may_stand_for_many_parts():
    sizes = utils.module_sizes(empty(pre_seq_len=2))
    expanded = utils.expand_device_map({"": "cpu", layer(3): 1, "transformer.layers": "disk"}, sizes, ["cuda:1", "cpu"])
    assert expanded[utils.EMBEDDING] == expanded[PREFIX] == "cpu"
    assert expanded[layer(3)] == "cuda:1" and expanded[layer(2)] == "disk"
    assert list(expanded) == list(sizes)
    same = utils.expand_device_map({"": torch.device("cuda", 0)}, sizes, ["cuda:0"])
    assert set(same.values()) == {"cuda:0"}
    assert set(utils.expand_device_map({"": "cuda"}, sizes, ["cuda:0"]).values()) == {"cuda:0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({layer(2): None}, "device_map has no place for transformer.layers.2: add it"),
        (
            {utils.HEAD: None, utils.NORM: None},
            "device_map has no place for transformer.final_layernorm, lm_head: add them",
        ),
        ({"transformer.layer.2": 0}, "device_map names transformer.layer.2, which this model does not have"),
        ({layer(9): 0}, "device_map names transformer.layers.9, which this model does not have"),
        ({layer(2) + ".mlp": 0}, "cannot be apart from the rest of transformer.layers.2: name that"),
        ({layer(2): 2}, r"device_map puts transformer.layers.2 on 2, but there are cuda:0, cuda:1, cpu and disk"),
        ({layer(2): "cuda:5"}, "device_map puts transformer.layers.2 on cuda:5"),
        ({utils.HEAD: 1}, "must be together on one device that computes, but device_map puts them on cuda:0, cuda:1"),
        (dict.fromkeys(ENDS, "disk"), "must be together on one device that computes, but device_map puts them on disk"),
    ],
)
def test_map_that_does_not_fit_is_refused(changes, message):
    sizes = utils.module_sizes(empty())
    device_map = {**dict.fromkeys(sizes, 0), **changes}
    device_map = {name: place for name, place in device_map.items() if place is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        utils.expand_device_map(device_map, sizes, ["cuda:0", "cuda:1", "cpu"])


# The same model -------------------------------------------------------------------------------------------------------


def logits_and_answer(model, tokenizer):
    """Logits of a batch with padding, and a greedy answer through the cache."""
    batch = tokenizer(["你好", "晚上睡不着应该怎么办"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits, model.chat(tokenizer, "你好", temperature=0, max_new_tokens=8)[0]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("source", ["folder", "prefix_folder"])
def test_split_model_equals_whole_model_bit_for_bit(request, tmp_path, source, bits):
    folder = request.getfixturevalue(source)
    options = {"dtype": "float32", "quantization_bit": bits, "activations": "float32"}
    whole, tokenizer = utils.load_model(folder, device="cpu", **options)
    device_map = {"": "cpu", layer(1): "disk", layer(2): "disk", layer(4): "disk"}
    split, _ = utils.load_model(folder, device_map=device_map, offload_folder=tmp_path, **options)
    assert split.transformer.layers[2].mlp.dense_h_to_4h.weight.is_meta
    assert not split.transformer.layers[3].mlp.dense_h_to_4h.weight.is_meta
    assert split.config.quantization_bit == (bits or 0)
    logits, answer = logits_and_answer(whole, tokenizer)
    split_logits, split_answer = logits_and_answer(split, tokenizer)
    assert torch.equal(split_logits, logits)
    assert split_answer == answer


def test_saved_quantised_model_can_be_split(folder, tmp_path):
    whole, tokenizer = utils.load_model(folder, device="cpu", quantization_bit=4, activations="float32")
    whole.save_pretrained(tmp_path / "int4")
    tokenizer.save_pretrained(tmp_path / "int4")
    split, _ = utils.load_model(
        tmp_path / "int4", device_map={"": "cpu", layer(4): "disk"}, offload_folder=tmp_path, activations="float32"
    )
    assert torch.equal(logits_and_answer(split, tokenizer)[0], logits_and_answer(whole, tokenizer)[0])
    with pytest.raises(ValueError, match="is quantised to 4 bits, but 8 were asked for"):
        utils.load_model(tmp_path / "int4", quantization_bit=8)


def test_split_model_computes_with_the_kernels_too(folder, tmp_path):
    whole, tokenizer = utils.load_model(folder, device="cpu", quantization_bit=4)
    device_map = {"": "cpu", layer(1): "disk"}
    split, _ = utils.load_model(folder, device_map=device_map, offload_folder=tmp_path, quantization_bit=4)
    # Layers with accelerate's hooks are computed module by module, the others in one call: equal to float32 rounding.
    logits = [logits_and_answer(model, tokenizer)[0] for model in (split, whole)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_layers_on_disk_are_quantised_and_go_with_the_model(folder, tmp_path):
    model, _ = utils.load_model(
        folder, device_map={"": "cpu", layer(0): "disk"}, offload_folder=tmp_path / "new", quantization_bit=8
    )
    (file,) = (tmp_path / "new").rglob("*.safetensors")
    layer_bytes = utils.module_sizes(empty(quantization_bit=8))[layer(0)]
    assert layer_bytes <= file.stat().st_size <= layer_bytes + 4096  # a header comes on top
    del model
    gc.collect()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(("home", "named"), [("cpu", True), ("cuda:0", False)])
def test_kernels_are_named_only_where_the_cpu_computes(monkeypatch, capsys, folder, home, named):
    places = {utils.EMBEDDING: home, layer(0): "cpu", layer(1): "disk"}
    monkeypatch.setattr(utils, "choose_places", lambda *args: (places, "float32"))
    monkeypatch.setattr(utils, "_load_split", lambda *args: empty(quantization_bit=8))
    utils.load_model(folder, device_map="auto", quantization_bit=8)
    assert ("kernels: " in capsys.readouterr().err) is named  # beside a GPU, main memory only holds layers for it


def test_auto_leaves_on_disk_what_memory_cannot_hold(monkeypatch, capsys, folder, tmp_path):
    from chatglm.checkpoint import open_checkpoint

    needs = utils.memory_needs(open_checkpoint(folder), "cpu", "float32")
    sizes = utils.module_sizes(empty())
    room = needs.cache + needs.working + sizes[utils.EMBEDDING] + sizes[utils.NORM] + int(3.5 * sizes[layer(0)])
    monkeypatch.setattr(utils, "available_devices", lambda: ["cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda place, offload_folder=None: 10**9 if place == "disk" else room)
    model, tokenizer = utils.load_model(folder, device_map="auto", dtype="float32", offload_folder=tmp_path)
    assert "   cpu (2 layers), disk (3 layers)   " in capsys.readouterr().err
    monkeypatch.setattr(utils, "free_memory", lambda place, offload_folder=None: 10**12)
    whole, _ = utils.load_model(folder, device_map="auto", dtype="float32")
    assert not hasattr(whole, "hf_device_map")  # one place: nothing to connect
    assert torch.equal(logits_and_answer(model, tokenizer)[0], logits_and_answer(whole, tokenizer)[0])

    monkeypatch.setattr(utils, "free_memory", lambda place, offload_folder=None: 0 if place == "disk" else room)
    with pytest.raises(MemoryError, match=r"the part of the model on disk needs 0.0 GB, 0.0 GB are free"):
        utils.load_model(folder, device_map="auto", dtype="float32", offload_folder=tmp_path)


TWO_DEVICES = """
import sys
from pathlib import Path
import torch
import torch.utils.backend_registration
from torch._subclasses.fake_tensor import FakeTensorMode

torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
import utils
from chatglm import checkpoint

folder = sys.argv[1]
files = set(checkpoint.open_checkpoint(folder).files.values())
headers = {name: header for file in files for name, header in checkpoint.read_headers(file).items()}
checkpoint.read_tensors = lambda path, names: ((name, torch.empty_like(headers[name], device="cpu")) for name in names)
utils.available_devices = lambda: ["gpu:0", "gpu:1", "cpu"]
utils.free_memory = lambda place, offload_folder=None: 10**12
with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
    model = utils._empty_model(checkpoint.open_checkpoint(folder).config, "float16")
    device_map = {name: f"gpu:{gpu}" for name, gpu in utils.auto_configure_device_map(2, model).items()}
    model = utils.load_model_on_gpus(folder, device_map=device_map)
    for name, parameter in model.named_parameters():
        part = next(part for part in device_map if name.startswith(part + "."))
        assert str(parameter.device) == device_map[part], name
    for device in ("gpu:0", "gpu:1", "cpu"):  # wherever the input is, it is brought where it belongs
        input_ids = torch.zeros(1, 4, dtype=torch.long, device=device)
        position_ids = torch.zeros(1, 2, 4, dtype=torch.long, device=device)
        hidden = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=device)
        output = model(input_ids, position_ids=position_ids, attention_mask=hidden, use_cache=False)
        assert str(output.logits.device) == device, output.logits.device
    try:
        torch.zeros(2, device="gpu:0") + torch.zeros(2, device="gpu:1")
    except RuntimeError as error:
        assert "same device" in str(error)
        print(len({*device_map.values()}), "devices")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "prefix"])
def test_no_operation_mixes_devices(request, tmp_path, kind):
    folder = (
        request.getfixturevalue("prefix_folder") if kind == "prefix" else saved(tmp_path, tie_word_embeddings=False)
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWO_DEVICES, str(folder)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "CHATGLM_KERNELS": "none"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "2 devices\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_with_layers_in_main_memory_and_on_disk_equals_the_gpu_alone(folder, tmp_path):
    for bits in (None, 4):
        options = {"dtype": "float32", "quantization_bit": bits, "embedding_bit": bits, "activations": "float32"}
        whole, tokenizer = utils.load_model(folder, device="cuda:0", **options)
        device_map = {"": 0, layer(1): "cpu", layer(3): "disk"}
        split, _ = utils.load_model(folder, device_map=device_map, offload_folder=tmp_path, **options)
        assert torch.equal(logits_and_answer(split, tokenizer)[0], logits_and_answer(whole, tokenizer)[0])


# Asking for GPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "asked"), [(0, 1), (1, 2)])
def test_fewer_gpus_than_asked_for_are_named(monkeypatch, folder, gpus, asked):
    there = [*(f"cuda:{index}" for index in range(gpus)), "cpu"]
    monkeypatch.setattr(utils, "available_devices", lambda: there)
    message = rf"{asked} GPUs? (was|were) asked for, but this machine has {gpus}: {', '.join(there)}"
    with pytest.raises(ValueError, match=message):
        utils.load_model_on_gpus(folder, num_gpus=asked)


def test_more_gpus_than_layers_are_refused_before_loading(monkeypatch, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: [*(f"cuda:{index}" for index in range(8)), "cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda place, offload_folder=None: 10**12)
    with pytest.raises(ValueError, match="a model of 5 layers can be split over 1 to 5 GPUs, got 6"):
        utils.load_model_on_gpus(folder, num_gpus=6)


def test_part_that_does_not_fit_names_its_gpu_and_a_remedy(monkeypatch, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda place, offload_folder=None: 0 if place == "cuda:1" else 10**12)
    with pytest.raises(MemoryError, match=r"on cuda:1 needs 0.0 GB, 0.0 GB are free: add --quantization_bit 8 or 4"):
        utils.load_model_on_gpus(folder, num_gpus=2)


def test_each_gpu_reads_its_own_part_only(monkeypatch, folder):
    monkeypatch.setattr(utils, "available_devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr(utils, "free_memory", lambda place, offload_folder=None: 10**12)
    read = {}

    def load(checkpoint, device, dtype, *bits):
        read[device] = set(checkpoint.files)
        assert dtype == torch.float16 and bits == (8, None)
        return empty(quantization_bit=8)

    def dispatch(model, device_map, main_device, **rest):
        assert main_device == "cuda:0" and set(device_map.values()) == {"cuda:0", "cuda:1"}
        return model

    monkeypatch.setattr("chatglm.checkpoint.load_weights", load)
    monkeypatch.setattr("accelerate.dispatch_model", dispatch)
    utils.load_model_on_gpus(folder, num_gpus=2, quantization_bit=8)
    assert utils.EMBEDDING + ".weight" in read["cuda:0"] and layer(4) + ".mlp.dense_h_to_4h.weight" in read["cuda:1"]
    assert not read["cuda:0"] & read["cuda:1"]
    assert len(read["cuda:0"] | read["cuda:1"]) == 5 * 12 + 3
