"""Checkpoints: find the files, check them before any weight is read, load them shard by shard.

Unusual here:

* Code inside a checkpoint is never run: this package's classes are used whatever `auto_map` says, `.py` files are not
  downloaded, and `.bin` files go through the weights-only unpickler.
* Every check reads headers only, so a wrong or half-downloaded folder is refused within a second.
* A model is never partly random: a weight that the configuration needs and the files lack is an error, and so is a
  weight in the files that the configuration has no place for. Exceptions: `inv_freq` (computed, never loaded) and the
  head of a tied model.
"""

import copy
import json
import logging
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from .configuration_chatglm import SIZES, ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration
from .tokenization_chatglm import VOCAB_FILE_NAME, ChatGLMTokenizer

logger = logging.getLogger(__name__)

# In the order of from_pretrained: the first that exists is loaded.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HEAD, EMBEDDING, PREFIX = "lm_head.weight", "transformer.word_embeddings.weight", "transformer.prefix_encoder."
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
SECOND_GENERATION_FIELDS = {"ffn_hidden_size", "multi_query_attention", "padded_vocab_size", "rmsnorm"}
UNQUANTISED_ONLY = "this version loads unquantised checkpoints only, such as THUDM/chatglm-6b"
FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FIRST_RELEASE_IMAGE_TOKENS = 20000  # ids in front of the text ids; its tokenizer_config.json may not say so


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message is one sentence that names the file and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder whose weights have not been read yet.

    name            what the user asked for: a folder or a hub name
    folder          where the files are
    config          sizes of the network
    files           tensor name -> the weight file that holds it
    num_parameters  parameters of the network, a tied head counted once
    """

    name: str
    folder: Path
    config: ChatGLMConfig
    files: dict[str, Path]
    num_parameters: int


def open_checkpoint(name: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Find and check a local folder or hub repository; no weight is read.

    name      folder, or `owner/name` on the Hugging Face hub (downloaded into its cache when it is not there yet)
    revision  branch, tag or commit of a hub repository

    Raises CheckpointError if the configuration is not that of a ChatGLM-6B, or if the weights are absent, incomplete,
    damaged, quantised or of other shapes than the configuration says.
    """
    folder = _find_folder(str(name), revision)
    config = _read_config(folder)
    config.name_or_path = str(folder) if Path(name).expanduser().is_dir() else str(name)

    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    files = _check_weights(folder, config, {key: tensor.shape for key, tensor in model.state_dict().items()})
    return Checkpoint(config.name_or_path, folder, config, files, model.num_parameters())


def load_tokenizer(checkpoint: Checkpoint) -> ChatGLMTokenizer:
    """The tokenizer of a checkpoint.

    Raises CheckpointError if the vocabulary file is absent, damaged, of another model, or does not fit config.json.
    """
    folder, config = checkpoint.folder, checkpoint.config
    path = folder / VOCAB_FILE_NAME
    if not path.is_file():
        other = " (tokenizer.model is for ChatGLM2 and later)" if (folder / "tokenizer.model").exists() else ""
        raise CheckpointError(
            f"no vocabulary file {VOCAB_FILE_NAME} in {folder}: copy it there from the model's repository{other}"
        )
    _refuse_pointer(path)
    settings_file = folder / "tokenizer_config.json"
    settings = _read_json(settings_file) if settings_file.exists() else {}
    try:
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
        shifted = tokenizer.bos_token_id + FIRST_RELEASE_IMAGE_TOKENS
        if "num_image_tokens" not in settings and config.bos_token_id == shifted:
            tokenizer = ChatGLMTokenizer.from_pretrained(folder, num_image_tokens=FIRST_RELEASE_IMAGE_TOKENS)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(_one_line(error)) from error

    facts = {field: getattr(tokenizer, field) for field in ("bos_token_id", "gmask_token_id", "mask_token_id")}
    for field, found in facts.items():
        if found != getattr(config, field):
            raise CheckpointError(
                f"{path} has {field} {found}, but {folder / 'config.json'} says {getattr(config, field)}: "
                "take both files from the same model"
            )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} entries, but {folder / 'config.json'} says vocab_size "
            f"{config.vocab_size}: take both files from the same model"
        )
    return tokenizer


def load_weights(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ChatGLMForConditionalGeneration:
    """The network of a checkpoint on `device` in `dtype`, in eval mode.

    Each tensor goes from its memory-mapped file straight to its place, so that the peak is the network itself plus the
    one file that is open. A prefix encoder stays in float32. A head that differs from the embedding of a model declared
    as tied is kept, with a warning, as from_pretrained does.
    """
    config, files = copy.deepcopy(checkpoint.config), checkpoint.files
    if config.tie_word_embeddings and HEAD in files and not _head_equals_embedding(files):
        logger.warning("%s and %s differ: loaded as separate matrices", HEAD, EMBEDDING)
        config.tie_word_embeddings = False
    config.dtype = dtype

    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    skipped = {HEAD} if config.tie_word_embeddings else set()
    for path in dict.fromkeys(files.values()):
        logger.info("reading %s", path)
        weights = {
            name: tensor.to(device, torch.float32 if name.startswith(PREFIX) else dtype, copy=True)
            for name, tensor in _read_tensors(path).items()
            if files.get(name) == path and name not in skipped
        }
        model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.eval()


# Finding the files ----------------------------------------------------------------------------------------------------


def _find_folder(name: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub repository is downloaded without its code."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the folder that holds it, with config.json and the vocabulary")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(f"there is no folder {name}: give an existing folder or a hub name like THUDM/chatglm-6b")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.model", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=["*.bin"])
        return folder
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on the Hugging Face hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is neither a folder {name} nor a public repository of that name on the Hugging Face hub: "
            "check the spelling"
        ) from error
    except (ConnectionError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"there is no folder {name}, and the Hugging Face hub could not be reached for a repository of that name: "
            "check the spelling or the connection, or give a folder that exists"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} could not be downloaded: {_one_line(error)}") from error


def _read_config(folder: Path) -> ChatGLMConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {folder}: copy it there from the model's repository")
    fields = _read_json(path)
    model_type = fields.get("model_type")
    if model_type != "chatglm":
        raise CheckpointError(
            f"{path} is of a model of type {model_type!r}: this program loads ChatGLM-6B, whose model_type is 'chatglm'"
        )
    if SECOND_GENERATION_FIELDS & fields.keys():
        raise CheckpointError(
            f"{path} is of the second generation (ChatGLM2, CodeGeeX2, ChatGLM3), another network: "
            "use a checkpoint of ChatGLM-6B"
        )
    if fields.get("quantization_bit"):
        raise CheckpointError(
            f"{path} is of weights quantised to {fields['quantization_bit']} bits: {UNQUANTISED_ONLY}"
        )
    for field in SIZES:
        size = fields.get(field, 1)
        if not isinstance(size, int) or size < 1:
            raise CheckpointError(
                f"{path} says {field} {size!r}, which must be a whole number above 0: download it again"
            )
    try:
        return ChatGLMConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not usable: {_one_line(error)}") from error


def _find_weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, all of them present."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        shards = any("-of-" in name for name in found)
        raise CheckpointError(
            f"no weights in {folder}: expected model.safetensors or pytorch_model.bin"
            + (", or the .index.json that belongs to the shards" if shards else ", or shards with their .index.json")
            + f"; found {', '.join(found[:12])}{' ...' if len(found) > 12 else ''}"
        )
    if first.suffix != ".json":
        return [first]
    weight_map = _read_json(first).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{first} has no weight_map from tensors to files: download it again")
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{first} names weight files outside its own folder: download it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{first} names {len(names)} weight files, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: download what is missing into the same folder"
        )
    return [folder / name for name in names]


# Reading the files ----------------------------------------------------------------------------------------------------


def _check_weights(folder: Path, config: ChatGLMConfig, expected: dict[str, torch.Size]) -> dict[str, Path]:
    """Tensor name -> file for every weight of the network, after comparing names, shapes and types with `expected`."""
    paths, config_file = _find_weight_files(folder), folder / "config.json"
    files: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _read_tensors(path, headers_only=True).items():
            if IGNORED.search(name):
                continue
            if not tensor.is_floating_point():
                raise CheckpointError(f"{path} holds {name} as whole numbers, so it is quantised: {UNQUANTISED_ONLY}")
            if name not in expected:
                raise CheckpointError(
                    f"{path} holds {name}, for which {config_file} has no place: take both files from the same model"
                )
            if tensor.shape != expected[name]:
                raise CheckpointError(
                    f"{path} holds {name} with shape {list(tensor.shape)}, but {config_file} asks for "
                    f"{list(expected[name])}: take both files from the same model"
                )
            files[name] = path
    missing = [name for name in expected if name not in files and not IGNORED.search(name)]
    if config.tie_word_embeddings and HEAD in missing:
        missing.remove(HEAD)
    if missing:
        prefix_only = files and all(name.startswith(PREFIX) for name in files)
        raise CheckpointError(
            f"{paths[0] if len(paths) == 1 else folder} lacks {len(missing)} of the model's weights, the first being "
            f"{missing[0]}: "
            + (
                "it is a P-Tuning prefix, not a whole model"
                if prefix_only
                else "take config.json and the weights from the same model, or download them again"
            )
        )
    return files


def _read_tensors(path: Path, headers_only: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of one weight file, memory-mapped and not yet read; with headers_only on the meta device.

    Raises CheckpointError if the file is a Git-LFS pointer, damaged, or holds anything else than tensors.
    """
    _refuse_pointer(path)
    damaged = f"{path} is damaged or cut off ({path.stat().st_size:,} bytes): download it again"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                read = _header if headers_only else type(file).get_tensor
                names = file.keys()
                return {name: read(file, name) for name in names}
        tensors = torch.load(
            path,
            map_location="meta" if headers_only else "cpu",
            mmap=zipfile.is_zipfile(path),  # the format before torch 1.6 cannot be mapped
            weights_only=True,
        )
    except (EOFError, KeyError, OSError, RuntimeError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        if "Unsupported global" in str(error):
            damaged = f"{path} holds more than tensors, and opening it could run foreign code: do not use it"
        raise CheckpointError(damaged) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a table of tensors: use the weight files of the model's repository")
    return tensors


def _header(file, name: str) -> torch.Tensor:
    part = file.get_slice(name)
    dtype = FLOAT_DTYPES.get(part.get_dtype(), torch.int8)  # which other dtype it is does not matter
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def _head_equals_embedding(files: dict[str, Path]) -> bool:
    return torch.equal(_read_tensors(files[HEAD])[HEAD], _read_tensors(files[EMBEDDING])[EMBEDDING])


def _read_json(path: Path) -> dict:
    _refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({_one_line(error)}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return content


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise CheckpointError(
                f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` there or download it"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
