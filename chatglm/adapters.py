"""Adapters: what tuning has made of a model, kept in a folder of its own and put onto the base it was made for.

    prefix  P-Tuning v2: config.json and the tensors of the prefix encoder, in model.safetensors or, as published, in
            pytorch_model.bin, beside which config.json may be missing
    LoRA    as peft writes it: adapter_config.json and adapter_model.safetensors

Unusual here:

* As with checkpoints, all checks read headers only, and nothing in a folder is run.
* Whatever is put onto it, the model stays a ChatGLMForConditionalGeneration, so that chat and servers need not know.
* peft is imported only when a LoRA adapter is read.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from .checkpoint import CheckpointError, find_weight_files, read_config, read_headers, read_json, read_tensors
from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import PREFIX, ChatGLMForConditionalGeneration, write_prefix
from .quantization import LAYERS, QuantizedModule

PROJECTION = tuple(f"{PREFIX}trans.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
LORA = "base_model.model."  # in front of every name in peft's files
LORA_SETTINGS = "adapter_config.json"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What a prefix has in common with the base it was made for.
SHARED_SETTINGS = (
    *("num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size", "position_encoding_2d"),
    *("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class Adapter:
    """A folder whose tensors have not been read yet.

    kind      "prefix" or "LoRA"
    path      the file of the tensors
    headers   name in that file -> tensor on the meta device
    settings  of a prefix, its config.json (None without one); of LoRA, the content of adapter_config.json
    """

    folder: Path
    kind: str
    path: Path
    headers: dict[str, torch.Tensor]
    settings: ChatGLMConfig | dict | None

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained."""
        return sum(header.numel() for header in self.headers.values())

    @property
    def pre_seq_len(self) -> int:
        """Length of a prefix, in tokens."""
        return len(self.headers[f"{PREFIX}embedding.weight"])

    @property
    def prefix_projection(self) -> bool:
        """Whether a prefix goes through a two-layer MLP."""
        return PROJECTION[0] in self.headers

    @property
    def title(self) -> str:
        """What to show: "P-Tuning v2, 64 tokens" or "LoRA, rank 8"."""
        return (
            f"P-Tuning v2, {self.pre_seq_len} tokens" if self.kind == "prefix" else f"LoRA, rank {self.settings['r']}"
        )


# Finding and checking -------------------------------------------------------------------------------------------------


def adapter_kind(folder) -> str | None:
    """What a folder holds: "prefix", "LoRA", or None for a whole model.

    Raises CheckpointError if it is none of them.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that it is in")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give the folder of an adapter")
    if (folder / LORA_SETTINGS).is_file():
        return "LoRA"
    if not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        steps = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        advice = f"give one of the checkpoints in it, such as {steps[-1]}" if steps else "give the folder of an adapter"
        raise CheckpointError(
            f"no adapter in {folder}: expected config.json with model.safetensors or pytorch_model.bin (P-Tuning v2), "
            f"or {LORA_SETTINGS} with {LORA_FILES[0]} (LoRA): {advice}"
        )
    paths = find_weight_files(folder)
    names = [name for path in paths for name in read_headers(path)]
    return "prefix" if len(paths) == 1 and names and all(name.startswith(PREFIX) for name in names) else None


def open_adapter(folder) -> Adapter:
    """Find out what an adapter is, and check that it is whole; no tensor is read.

    Raises CheckpointError if the folder holds no adapter, or if its files are missing, damaged or do not fit together.
    """
    kind = adapter_kind(folder)
    folder = Path(folder).expanduser()
    if kind is None:
        raise CheckpointError(f"{folder} is a whole model and no adapter: give it as --model_name_or_path")
    return _open_prefix(folder) if kind == "prefix" else _open_lora(folder)


def _open_prefix(folder: Path) -> Adapter:
    (path,) = find_weight_files(folder)
    headers = read_headers(path)
    names = {f"{PREFIX}embedding.weight", *(PROJECTION if PROJECTION[0] in headers else ())}
    if headers.keys() != names or not all(header.is_floating_point() for header in headers.values()):
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(headers))}, which is no prefix of ChatGLM-6B: "
            f"expected {PREFIX}embedding.weight, with a projection also {', '.join(PROJECTION)}, as floats"
        )
    settings = read_config(folder) if (folder / "config.json").exists() else None
    adapter = Adapter(folder, "prefix", path, headers, settings)
    for name in ("pre_seq_len", "prefix_projection"):
        # Who copies the config.json of the base beside a published file has one without a prefix.
        if settings is not None and settings.pre_seq_len and getattr(settings, name) != getattr(adapter, name):
            raise CheckpointError(
                f"{folder / 'config.json'} says {name} {getattr(settings, name)}, but {path.name} holds a prefix with "
                f"{name} {getattr(adapter, name)}: take both files from the same adapter"
            )
    return adapter


def _open_lora(folder: Path) -> Adapter:
    settings = read_json(folder / LORA_SETTINGS)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder / LORA_SETTINGS} says peft_type {settings.get('peft_type')!r}: of peft's adapters, this program "
            "reads LoRA alone"
        )
    path = next((folder / name for name in LORA_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has an {LORA_SETTINGS}, but no {LORA_FILES[0]}: copy it there")
    headers = read_headers(path)
    if not headers or not isinstance(settings.get("r"), int):
        raise CheckpointError(f"{folder} is no LoRA adapter that can be used: train or save it again")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(
            f"{folder / LORA_SETTINGS} says bias {settings['bias']!r}, so biases of the base were changed too, which "
            "is not supported: train it with bias 'none'"
        )
    return Adapter(folder, "LoRA", path, headers, settings)


def check_adapter(
    adapter: Adapter, model: ChatGLMForConditionalGeneration, device_map: Mapping[str, object] | None = None
) -> None:
    """Raises CheckpointError unless the adapter fits the model, ValueError if the model has an adapter already.

    model       may be on the meta device
    device_map  where its parts are or will be; None = as they are
    """
    model.check_no_adapter()
    check = _check_prefix if adapter.kind == "prefix" else _check_lora
    check(adapter, model)
    places = set((device_map or getattr(model, "hf_device_map", {})).values())
    if adapter.kind == "LoRA" and len(places) > 1 and places & {"cpu", "disk"}:
        raise ValueError(
            "a LoRA adapter needs all layers on GPUs, and some would be in main memory or on disk: use fewer bits, or "
            "merge the adapter into the model (ptuning/convert.py --to merged)"
        )


def check_mergeable(adapter: Adapter, model: ChatGLMForConditionalGeneration) -> None:
    """As check_adapter, for `merge_adapter`. Raises ValueError, too, for LoRA that the weights cannot take up."""
    check_adapter(adapter, model)
    if adapter.kind == "prefix":
        return
    ends = (f"{LORA}lm_head", f"{LORA}transformer.word_embeddings")
    if model.config.tie_word_embeddings and any(name.startswith(ends) for name in adapter.headers):
        raise ValueError("LoRA on embedding or head cannot be merged: in this model they are one matrix")
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError(
            "LoRA cannot be merged into quantised weights, which would round most of it away: merge it into the "
            "unquantised model, and quantise that"
        )


def _another_base(adapter: Adapter, why: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter {adapter.folder} was made for another model: {why}: give the base that it was trained on as "
        "--model_name_or_path"
    )


def _check_prefix(adapter: Adapter, model: ChatGLMForConditionalGeneration) -> None:
    config, settings = model.config, adapter.settings
    if settings is not None:
        pairs = {name: (getattr(settings, name), getattr(config, name)) for name in SHARED_SETTINGS}
        different = [
            f"{name} is {there} there and {here} here" for name, (there, here) in pairs.items() if there != here
        ]
        if different:
            raise _another_base(adapter, ", ".join(different))
    hidden, width = config.hidden_size, 2 * config.num_layers * config.hidden_size
    expected = {f"{PREFIX}embedding.weight": [adapter.pre_seq_len, hidden if adapter.prefix_projection else width]}
    expected |= zip(PROJECTION, ([hidden, hidden], [hidden], [width, hidden], [width]), strict=True)
    for name, header in adapter.headers.items():
        if list(header.shape) != expected[name]:
            raise _another_base(
                adapter,
                f"{name} has shape {list(header.shape)} there, and {config.num_layers} layers with hidden_size "
                f"{hidden} need {expected[name]} here",
            )


def _check_lora(adapter: Adapter, model: ChatGLMForConditionalGeneration) -> None:
    layers = set()
    for key, header in adapter.headers.items():
        match = re.fullmatch(rf"{re.escape(LORA)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            _check_other_part(adapter, model, key)
            continue
        name, matrix = match.groups()
        try:
            module = model.get_submodule(name)
            sizes = {"A": (1, module.in_features), "B": (0, module.out_features)}
        except AttributeError as error:
            raise _another_base(
                adapter,
                f"it tunes {name}, which is no linear layer here, where there are {model.config.num_layers} "
                f"transformer.layers with {', '.join(LAYERS)}",
            ) from error
        axis, size = sizes[matrix]
        if header.dim() != 2 or header.shape[axis] != size:
            here = f"{name} has {module.in_features} inputs and {module.out_features} outputs here"
            raise _another_base(adapter, f"{here}, and its lora_{matrix} has shape {list(header.shape)} there")
        layers.update(map(int, re.findall(r"^transformer\.layers\.(\d+)\.", name)))
    if layers and _tunes_every_layer(adapter.settings) and len(layers) != model.config.num_layers:
        raise _another_base(adapter, f"num_layers is {len(layers)} there and {model.config.num_layers} here")


def _check_other_part(adapter: Adapter, model: ChatGLMForConditionalGeneration, key: str) -> None:
    """Of embeddings and of norms that were trained as a whole, peft knows; what stands for or scales a whole matrix
    (modules_to_save, DoRA) would meet integers in a quantised one."""
    name, _, part = key.removeprefix(LORA).rpartition(".")
    module = dict(model.named_modules()).get(name)
    if isinstance(module, QuantizedModule) and not part.startswith("lora_embedding_"):
        raise CheckpointError(
            f"the adapter {adapter.folder} changes all of {name} (with {part}), which is quantised here: use it on the "
            "unquantised model, or merge it into that (ptuning/convert.py --to merged) and quantise the result"
        )


def _tunes_every_layer(settings: dict) -> bool:
    """False if some layers may have been chosen: by layers_to_transform, a pattern, or targets such as layers.2.mlp."""
    targets = settings.get("target_modules")
    by_name = isinstance(targets, list) and not any(re.search(r"(^|\.)\d+\.", target) for target in targets)
    return by_name and settings.get("layers_to_transform") is None


# Using ----------------------------------------------------------------------------------------------------------------


def apply_adapter(model: ChatGLMForConditionalGeneration, folder, trainable: bool = False):
    """Put the adapter of a folder onto a model, in place; returns the model in eval mode.

    trainable  the adapter goes on learning. A prefix does so in the model, which is returned; of LoRA, peft's PeftModel
               around the model is returned, which knows how to save it

    A prefix with a projection is projected once, now, unless it is trainable: for use, what comes out is all it is.
    Raises CheckpointError if the folder holds no adapter or one for another base, or if the model has one already.
    """
    adapter = open_adapter(folder)
    check_adapter(adapter, model)
    if adapter.kind == "LoRA":
        tuned = _load_lora(model, adapter, trainable)
        return tuned if trainable else tuned.get_base_model()
    model.add_prefix_encoder(adapter.pre_seq_len, adapter.prefix_projection)
    encoder = model.transformer.prefix_encoder
    encoder.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in _read(adapter).items()})
    if not trainable:
        encoder.project_once()
        model.requires_grad_(False).eval()
    return model


def merge_adapter(model: ChatGLMForConditionalGeneration, folder) -> ChatGLMForConditionalGeneration:
    """Make the adapter of a folder a part of the model, in place: save_pretrained then writes one whole model.

    LoRA matrices are added to those of the model, rounded to its dtype; a prefix comes to lie beside them.
    Raises what `apply_adapter` does, and ValueError for LoRA on quantised layers, which cannot take it up.
    """
    adapter = open_adapter(folder)
    if adapter.kind == "prefix":
        model = apply_adapter(model, folder)
        model._keys_to_ignore_on_save = set()
        return model
    check_mergeable(adapter, model)
    return _load_lora(model, adapter, trainable=False).merge_and_unload()


def _read(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, as stored. Raises CheckpointError if they are not finite."""
    tensors = dict(read_tensors(adapter.path, adapter.headers))
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{adapter.path} holds NaN or infinite numbers in {name}: train the adapter again")
    return tensors


def _load_lora(model: ChatGLMForConditionalGeneration, adapter: Adapter, trainable: bool):
    """peft's PeftModel of a model and an adapter."""
    from peft import PeftModel

    _read(adapter)
    with warnings.catch_warnings():
        # What is missing in the file would stay untrained.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            tuned = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=trainable, torch_device="cpu")
        except UserWarning as error:
            raise CheckpointError(f"{adapter.path} lacks some of its own tensors: save the adapter again") from error
        except (RuntimeError, TypeError, ValueError) as error:  # settings that contradict the tensors, or the model
            raise CheckpointError(f"{adapter.folder} cannot be put onto this model: {error}") from error
    return tuned.train(trainable)


def shared_copy(model: ChatGLMForConditionalGeneration) -> ChatGLMForConditionalGeneration:
    """Another model on the same tensors: an adapter can be put onto one of the two, while the other stays what it was.

    Raises ValueError for a model that is split over devices.
    """
    if hasattr(model, "hf_device_map"):
        raise ValueError("a model that is split over devices cannot be used with and without an adapter at once")
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def export_prefix(adapter: Adapter, base: ChatGLMConfig | None, folder, published: bool) -> None:
    """Write a prefix into a new folder: as pytorch_model.bin if it is to be `published`, else as model.safetensors.

    base  configuration of the base, for an adapter without config.json
    """
    config = copy.deepcopy(adapter.settings or base)
    config.pre_seq_len, config.prefix_projection = adapter.pre_seq_len, adapter.prefix_projection
    write_prefix(Path(folder), _read(adapter), config, GenerationConfig.from_model_config(config), published)
