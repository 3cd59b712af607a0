"""Checkpoints: find the files, check them before any weight is read, load them shard by shard.

Unusual here:

* Code inside a checkpoint is never run: this package's classes are used whatever `auto_map` says, `.py` files are not
  downloaded, and `.bin` files go through the weights-only unpickler.
* Every check reads headers only, so a wrong or half-downloaded folder is refused within a second.
* A model is never partly random: a weight that the configuration needs and the files lack is an error, and so is a
  weight in the files that the configuration has no place for. Exceptions: `inv_freq` (computed, never loaded) and the
  head of a tied model.
* A quantised model never exists in floats: stored integers go straight to their modules, and the matrices of an
  unquantised checkpoint are quantised one at a time as they are read.
"""

import copy
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig

from .configuration_chatglm import SIZES, ChatGLMConfig
from .modeling_chatglm import PREFIX, ChatGLMForConditionalGeneration
from .quantization import CastLinear, QuantizedModule, check_bits, quantize_weight, scale_dtype
from .tokenization_chatglm import VOCAB_FILE_NAME, ChatGLMTokenizer

logger = logging.getLogger(__name__)

# In the order of from_pretrained: the first that exists is loaded.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HEAD, EMBEDDING = "lm_head.", "transformer.word_embeddings."
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
SECOND_GENERATION_FIELDS = {"ffn_hidden_size", "multi_query_attention", "padded_vocab_size", "rmsnorm"}
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
}
MAPPED = 1 << 28  # bytes
FIRST_RELEASE_IMAGE_TOKENS = 20000  # ids in front of the text ids; its tokenizer_config.json may not say so


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message is one sentence that names the file and the remedy."""


@dataclass(frozen=True)
class Memory:
    """What a model takes, in bytes.

    weights          of the loaded network, a tied head counted once
    loading_peak     while it is loaded; pages of a file that the system may drop at any time are not counted
    cache_per_token  keys and values of one token
    """

    weights: int
    loading_peak: int
    cache_per_token: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder whose weights have not been read yet.

    name            what the user asked for: a folder or a hub name
    folder          where the files are
    config          sizes of the network
    files           tensor name -> the weight file that holds it
    num_parameters  parameters of the network, a tied head counted once, however many bits each is stored in
    largest_tensor  bytes of the largest tensor in the files
    """

    name: str
    folder: Path
    config: ChatGLMConfig
    files: dict[str, Path]
    num_parameters: int
    largest_tensor: int

    def config_for(self, quantization_bit: int = 0, embedding_bit: int | None = None) -> ChatGLMConfig:
        """The configuration of the network that `load_weights` makes with the same arguments; raises as it does."""
        config = copy.deepcopy(self.config)
        config.set_quantization(*bits_to_load(config, quantization_bit, embedding_bit))
        return config

    def memory(self, dtype_bytes: int, quantization_bit: int = 0, embedding_bit: int | None = None) -> Memory:
        """What `load_weights` with the same arguments and a dtype of dtype_bytes needs; raises as `config_for`."""
        config = self.config_for(quantization_bit, embedding_bit)
        weights = 0
        for name, empty in _empty_model(config).named_parameters():
            if empty.dtype == torch.int8:
                size = 1
            elif name.startswith(PREFIX):
                size = 4
            elif name.startswith((EMBEDDING, HEAD)) and embedding_bit == 16:
                size = 2
            else:
                size = dtype_bytes
            weights += empty.numel() * size
        # Keys and values of a quantised model are kept in float16 even where the arithmetic is float32.
        cached = 2 if config.quantization_bit else dtype_bytes
        return Memory(weights, weights + self.largest_tensor, 2 * config.num_layers * config.hidden_size * cached)


def bits_to_load(config: ChatGLMConfig, quantization_bit: int, embedding_bit: int | None) -> tuple[int, int]:
    """Bits per weight of the linear layers, and of embedding and head, 0 = floats: as stored, or else as asked for.

    quantization_bit  4, 8, or 0 = as stored
    embedding_bit     4, 8, 16 = floats, or None = as stored

    Raises CheckpointError if other bits are stored than are asked for, ValueError for bits that do not exist.
    """
    if quantization_bit:
        check_bits(quantization_bit)
    if embedding_bit not in (None, 4, 8, 16):
        raise ValueError(f"embedding_bit must be 4, 8, 16 or None, got {embedding_bit}")
    asked = {"the model": quantization_bit or None, "the embedding": embedding_bit}
    stored = {"the model": config.quantization_bit, "the embedding": config.embedding_bits}
    for part, bits in stored.items():
        if bits and asked[part] not in (None, bits):
            raise CheckpointError(
                f"{part} in {config.name_or_path} is quantised to {bits} bits, but {asked[part]} were asked for: "
                f"ask for {bits}, or use a checkpoint that is not quantised"
            )
    bits, embedding_bits = stored.values()
    return bits or quantization_bit, embedding_bits or (embedding_bit if embedding_bit in (4, 8) else 0)


def open_checkpoint(name: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Find and check a local folder or hub repository; no weight is read.

    name      folder, or `owner/name` on the Hugging Face hub (downloaded into its cache when it is not there yet)
    revision  branch, tag or commit of a hub repository

    Raises CheckpointError if the configuration is not that of a ChatGLM-6B, or if the weights are absent, incomplete,
    damaged, or of other shapes or bits than the configuration says.
    """
    folder = _find_folder(str(name), revision)
    config = read_config(folder)
    config.name_or_path = str(folder) if Path(name).expanduser().is_dir() else str(name)

    headers, files = _check_weights(folder, config)
    unquantised = copy.deepcopy(config)
    unquantised.set_quantization(0, 0)
    return Checkpoint(
        name=config.name_or_path,
        folder=folder,
        config=config,
        files=files,
        num_parameters=_empty_model(unquantised).num_parameters(),
        largest_tensor=max(header.nbytes for header in headers.values()),
    )


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
    settings = read_json(settings_file) if settings_file.exists() else {}
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
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization_bit: int = 0,
    embedding_bit: int | None = None,
) -> ChatGLMForConditionalGeneration:
    """The network of a checkpoint on `device` in `dtype`, in eval mode.

    quantization_bit  4 or 8 bits per weight of the linear layers; 0 = as the checkpoint says
    embedding_bit     4 or 8 bits per weight of embedding and head, 16 = a 16-bit float format (bfloat16 if dtype is
                      float32); None = as the checkpoint says, `dtype` if they are not quantised

    Each tensor goes from its memory-mapped file straight to its place, quantised on the way if it has to be, so that
    the peak is the network itself plus the tensor at hand. Matrices are quantised in float16 arithmetic if dtype is
    float16, else in float32; stored scales keep their dtype, and a prefix encoder stays in float32. On a CPU quantised
    weights are laid out for its kernels at once. A head that differs from the embedding of a model declared as tied is
    kept, with a warning, as from_pretrained does. Of a checkpoint with fewer `files` the rest stays on the meta device.

    Raises CheckpointError if the checkpoint is quantised to other bits, or if it cannot be quantised.
    """
    config, files = checkpoint.config_for(quantization_bit, embedding_bit), checkpoint.files
    if config.tie_word_embeddings and not _head_equals_embedding(files):
        logger.warning("%sweight and %sweight differ: loaded as separate matrices", HEAD, EMBEDDING)
        config.tie_word_embeddings = False
    config.dtype = dtype

    model = _empty_model(config)
    narrow = embedding_bit == 16 and dtype == torch.float32
    if narrow:
        with torch.device("meta"):
            model.lm_head = CastLinear(config.hidden_size, config.vocab_size, bias=False)
    skipped = HEAD if config.tie_word_embeddings else ()
    for path in dict.fromkeys(files.values()):
        logger.info("reading %s", path)
        names = [name for name, file in files.items() if file == path and not name.startswith(skipped)]
        # The largest first: what they need while they are read then comes on top of an empty network.
        names.sort(key=lambda name: not name.startswith((EMBEDDING, HEAD)))
        for name, stored in read_tensors(path, names):
            own_dtype = dtype
            if name.startswith(PREFIX):
                own_dtype = torch.float32
            elif narrow and name.startswith((EMBEDDING, HEAD)):
                own_dtype = torch.bfloat16
            _fill(model, name, stored, device, own_dtype, path)
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.eval()


def _empty_model(config: ChatGLMConfig) -> ChatGLMForConditionalGeneration:
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(config)


def _fill(
    model: nn.Module, name: str, stored: torch.Tensor, device: str | torch.device, dtype: torch.dtype, path: Path
) -> None:
    """Give a parameter of an empty model its value; `stored` is memory mapped from `path` and must not stay in use."""
    parent, _, kind = name.rpartition(".")
    module = model.get_submodule(parent)

    def put(kind: str, value: torch.Tensor) -> None:
        setattr(module, kind, nn.Parameter(value, requires_grad=getattr(module, kind).requires_grad))

    if kind == "weight_scale":
        put(kind, stored.to(device, copy=True))
    elif kind != "weight" or not isinstance(module, QuantizedModule):
        put(kind, stored.to(device, dtype, copy=True))
    else:
        if stored.is_floating_point():
            try:
                weight, scale = quantize_weight(stored.to(device), module.bits, scale_dtype(dtype))
            except ValueError as error:
                raise CheckpointError(f"{name} in {path}: {error}") from error
            put("weight_scale", scale)
            put(kind, weight)
        else:
            put(kind, stored.to(device).contiguous())
        if torch.device(device).type == "cpu":
            module.pack()
            if module.weight.data_ptr() == stored.data_ptr():  # no kernels, or such as read the published order
                module.weight.data = stored.clone()


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


def read_config(folder: Path) -> ChatGLMConfig:
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter: give it as --adapter, and the model that it was trained on as "
            "--model_name_or_path"
        )
    if not path.is_file():
        raise CheckpointError(f"no config.json in {folder}: copy it there from the model's repository")
    fields = read_json(path)
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


def find_weight_files(folder: Path) -> list[Path]:
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
    weight_map = read_json(first).get("weight_map")
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


def _check_weights(folder: Path, config: ChatGLMConfig) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """Header and file of every weight of the network, by name, after comparing names, shapes and kinds of numbers."""
    paths, config_file = find_weight_files(folder), folder / "config.json"
    expected = _empty_model(config).state_dict()
    headers: dict[str, torch.Tensor] = {}
    files: dict[str, Path] = {}
    for path in paths:
        for name, header in read_headers(path).items():
            if IGNORED.search(name):
                continue
            _check_weight(path, name, header, expected, config, config_file)
            headers[name], files[name] = header, path
    missing = [name for name in expected if name not in files and not IGNORED.search(name)]
    if config.tie_word_embeddings:
        missing = [name for name in missing if not name.startswith(HEAD)]
    if missing:
        prefix_only = files and all(name.startswith(PREFIX) for name in files)
        raise CheckpointError(
            f"{paths[0] if len(paths) == 1 else folder} lacks {len(missing)} of the model's weights, the first being "
            f"{missing[0]}: "
            + (
                "it is a P-Tuning prefix: give it as --adapter, and the model that it was trained on as "
                "--model_name_or_path"
                if prefix_only
                else "take config.json and the weights from the same model, or download them again"
            )
        )
    return headers, files


def _check_weight(
    path: Path,
    name: str,
    header: torch.Tensor,
    expected: dict[str, torch.Tensor],
    config: ChatGLMConfig,
    config_file: Path,
) -> None:
    """Compare one header with what the configuration expects."""
    place = expected.get(name.removesuffix("_scale"))
    if place is None:
        raise CheckpointError(
            f"{path} holds {name}, for which {config_file} has no place: take both files from the same model"
        )
    if header.dtype == torch.bool:
        raise CheckpointError(f"{path} holds {name} neither as floats nor as int8: download it again")
    says = f"{config_file} says quantization_bit {config.quantization_bit}"
    if name.startswith((EMBEDDING, HEAD)):
        says += f" and quantization_embeddings {json.dumps(config.quantization_embeddings)}"
    is_quantised = header.dtype == torch.int8 or name.endswith("_scale")
    if is_quantised != (place.dtype == torch.int8):
        raise CheckpointError(
            f"{path} holds {name}, so it is {'' if is_quantised else 'not '}quantised, but {says}: "
            "take both files from the same model"
        )
    if header.shape != expected[name].shape:
        raise CheckpointError(
            f"{path} holds {name} with shape {list(header.shape)}, but {says if is_quantised else config_file}"
            f"{', which' * is_quantised} asks for {list(expected[name].shape)}: take both files from the same model"
        )


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Turn what a broken weight file makes its reader raise into one sentence."""
    try:
        yield
    except (EOFError, KeyError, OSError, RuntimeError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        if "Unsupported global" in str(error):
            message = f"{path} holds more than tensors, and opening it could run foreign code: do not use it"
        else:
            message = f"{path} is damaged or cut off ({path.stat().st_size:,} bytes): download it again"
        raise CheckpointError(message) from error


def read_headers(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one weight file, on the meta device.

    Raises CheckpointError if the file is a Git-LFS pointer, damaged, or holds anything else than tensors.
    """
    _refuse_pointer(path)
    if path.suffix != ".safetensors":
        return _read_pickle(path, "meta")
    with _damage_explained(path), safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.bool), device="meta")
            for name, part in parts.items()
        }


def read_tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and content of some tensors of a file, memory-mapped and not yet read, one after the other.

    What was read of a mapping counts as used memory until all of it is closed: the file is opened anew, .safetensors
    for each tensor, .bin when MAPPED bytes have been read of it.
    """
    if path.suffix == ".safetensors":
        for name in names:
            with _damage_explained(path), safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
            yield name, tensor
            del tensor
    else:
        tensors, read, mappable = {}, 0, zipfile.is_zipfile(path)
        for name in names:
            if not tensors or (mappable and read > MAPPED):
                tensors, read = _read_pickle(path, "cpu"), 0
            read += tensors[name].nbytes
            yield name, tensors[name]


def _read_pickle(path: Path, device: str) -> dict[str, torch.Tensor]:
    with _damage_explained(path):
        tensors = torch.load(
            path,
            map_location=device,
            mmap=zipfile.is_zipfile(path),  # the format before torch 1.6 cannot be mapped
            weights_only=True,
        )
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a table of tensors: use the weight files of the model's repository")
    return tensors


def _head_equals_embedding(files: dict[str, Path]) -> bool:
    """Whether what the files hold of the head, if anything, is what they hold of the embedding."""
    for name in files:
        if name.startswith(HEAD):
            other = name.replace(HEAD, EMBEDDING)
            if files[name] == files[other] and files[name].suffix != ".safetensors":
                tensors = _read_pickle(files[name], "cpu")  # published as one storage under two names
            else:
                tensors = dict(pair for part in (name, other) for pair in read_tensors(files[part], [part]))
            if not torch.equal(tensors[name], tensors[other]):
                return False
    return True


def read_json(path: Path) -> dict:
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
