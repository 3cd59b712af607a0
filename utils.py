"""What the scripts share: flags, loading a model onto the right devices, and ending politely.

Importing this file is instant: torch and transformers are imported when a model is loaded, so `--help` need not wait.
`python utils.py --plan` says how much memory a model needs in each form, and which flags suit this machine.
"""

import argparse
import copy
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

DEFAULT_MODEL = str(Path(__file__).resolve().parent / "chatglm" / "tiny")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes per parameter
ACTIVATIONS = ("int8", "int16", "bf16", "float32")
SMALL_MODEL = 100_000_000  # parameters
CONTEXT = 2048  # tokens of prompt + answer that memory is planned for
EMBEDDING, NORM, HEAD = "transformer.word_embeddings", "transformer.final_layernorm", "lm_head"


# Flags ----------------------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        metavar="FOLDER_OR_NAME",
        help="folder of a checkpoint, or its name on the Hugging Face hub such as THUDM/chatglm-6b "
        "(default: the small model that comes with this program)",
    )
    group.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="what tuning made of that model: folder of a P-Tuning v2 prefix or a LoRA adapter (default: none)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub checkpoint (default: its main branch)")
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="where the model runs: cuda, cuda:1 (the second GPU), mps or cpu; auto takes the first of them that is "
        "there and has room (default: auto)",
    )
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="number format of what is not quantised, and of the arithmetic (default: float16 on cuda and mps; on cpu "
        "float32 for a quantised model, float16 for one below 0.1 B parameters, else bfloat16 if the processor "
        "computes in it, or float32)",
    )
    group.add_argument(
        "--quantization_bit",
        type=int,
        choices=(4, 8),
        help="bits per weight of the linear layers: less memory, and faster on cpu (default: as the checkpoint is)",
    )
    group.add_argument(
        "--embedding_bit",
        type=int,
        choices=(4, 8, 16),
        help="bits per weight of embedding and head of a quantised model; 16 is a float format (default: as the "
        "checkpoint is; on cpu 8)",
    )
    group.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        help="how the cpu kernels of a quantised model read their input: int8 is fastest, bf16 and int16 closer, "
        "float32 exact and slow (default: int8, and int16 for layers narrower than 2048)",
    )
    group.add_argument(
        "--num_gpus", type=_positive_int, help="split the model over this many GPUs (default: it stays whole)"
    )
    group.add_argument(
        "--device_map",
        choices=("auto",),
        help="auto fills the GPUs, then main memory, then the disk, for a model that fits nowhere as a whole; slow "
        "(default: it stays whole)",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how an answer is chosen."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max_length", type=_positive_int, default=2048, help="most tokens of prompt + answer (default: 2048)"
    )
    group.add_argument(
        "--max_new_tokens",
        type=_positive_int,
        help="most tokens of the answer alone; --max_length then only decides how much history is kept "
        "(default: no limit of its own)",
    )
    group.add_argument(
        "--top_p",
        type=_probability,
        default=0.7,
        help="sample among the likeliest tokens that together reach this probability, 0 to 1 (default: 0.7)",
    )
    group.add_argument(
        "--temperature",
        type=_temperature,
        default=0.95,
        help="below 1 more predictable, above 1 more varied; 0 always takes the likeliest token (default: 0.95)",
    )
    group.add_argument(
        "--seed", type=_seed, help="whole number that makes sampled answers repeatable (default: different every time)"
    )


def model_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `load_model` that the flags stand for."""
    names = (
        *("model_name_or_path", "adapter", "revision", "device", "dtype", "quantization_bit", "embedding_bit"),
        *("activations", "num_gpus", "device_map"),
    )
    return {name: getattr(args, name) for name in names}


def generation_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `chat` and `stream_chat` that the flags stand for."""
    return {name: getattr(args, name) for name in ("max_length", "max_new_tokens", "top_p", "temperature", "seed")}


def _number(kind: type, claim: str, holds: Callable) -> Callable:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {claim}, got {text}")
        return value

    return parse


_positive_int = _number(int, "a whole number from 1 to 2147483647", lambda value: 0 < value < 2**31)
_seed = _number(int, "a whole number of at most 64 bits", lambda value: -(2**63) <= value < 2**64)
_probability = _number(float, "from 0 to 1", lambda value: 0 <= value <= 1)
_temperature = _number(float, "from 0 to 100", lambda value: 0 <= value <= 100)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cuda, cuda:N, mps or cpu, got {text}")
    return text


@contextmanager
def main_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a wrong path, value or file, or too little memory, into one line on stderr and exit code 2.

    Meant for the first steps of a `main`, such as `load_model`; Ctrl-C there ends the program with exit code 130.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split()) or 'out of memory'}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")


# Memory ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What a model takes on the device that holds it, in bytes; `total` must be free there.

    weights       of the network
    cache         keys and values of CONTEXT tokens
    working       what the layers compute with: the states of CONTEXT tokens, and a matrix made ready for its product
    loading_peak  weights, and the tensor that is being read
    """

    weights: int
    cache: int
    working: int
    loading_peak: int

    @property
    def total(self) -> int:
        return max(self.loading_peak, self.weights + self.cache + self.working)


def memory_needs(
    checkpoint, device: str, dtype: str, quantization_bit: int | None = None, embedding_bit: int | None = None
) -> Needs:
    """What `load_model` with the same arguments needs, computed from the sizes of the network."""
    config, width = checkpoint.config, DTYPES[dtype]
    embedding_bit = default_embedding_bit(config, device, quantization_bit, embedding_bit)
    memory = checkpoint.memory(width, quantization_bit or 0, embedding_bit)
    states = CONTEXT * (2 * config.inner_hidden_size + 8 * config.hidden_size)
    matrix = config.inner_hidden_size * config.hidden_size
    return Needs(
        weights=memory.weights,
        cache=CONTEXT * memory.cache_per_token,
        working=(states + 2 * matrix) * width,
        loading_peak=memory.loading_peak,
    )


def default_embedding_bit(config, device: str, quantization_bit: int | None, embedding_bit: int | None) -> int | None:
    """Bits of embedding and head for `load_weights`; without a wish, 8 on a CPU whose layers are quantised.

    The head is read for every token: in 8 bits twice as fast as in 16, and as good as equal.
    """
    quantised = quantization_bit or config.quantization_bit
    if embedding_bit is None and device == "cpu" and quantised and not config.embedding_bits:
        return 8
    return embedding_bit


def free_memory(device: str, offload_folder: str | os.PathLike | None = None) -> float:
    """Bytes that a program may still use on "cpu", "cuda:0" or "mps", or on the "disk" of offload_folder."""
    import psutil
    import torch

    if device == "disk":
        folder = _offload_parent(offload_folder)
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, _free_in_container())
    if device == "mps":  # shares the memory of the CPU, up to a limit
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return free


def peak_memory(device: str = "cpu") -> int:
    """Most bytes that this process has held on a device so far; on "cpu", of resident memory."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free_in_container(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left under the memory limit of a Linux container; infinite without one."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or its memory.max is the word "max"
        return float("inf")
    return limit - used + int(statistics.get("inactive_file", 0))  # cached files give way


# Devices --------------------------------------------------------------------------------------------------------------


def available_devices() -> list[str]:
    """The devices of this machine, best first: cuda:0, cuda:1, ..., mps, cpu."""
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return [*gpus, *["mps"] * torch.backends.mps.is_available(), "cpu"]


def native_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16, and torch makes use of it."""
    import torch

    instructions = ("avx512_bf16", "amx_bf16", "bf16")  # the last ones are ARM's
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(has.get(name) for name in instructions)


def default_dtypes(device: str, num_parameters: int, quantised: bool = False) -> tuple[str, ...]:
    """The number formats to try on a device, best first.

    float16 is what the published weights are and were used in. A CPU reads it twice as fast as float32, which decides
    the speed of a small model, but multiplies large matrices slowly in it (benchmarks/README.md): larger models get
    bfloat16 where the processor has it, else float32. Quantised layers compute in float32 on a CPU, as published.
    """
    if device != "cpu":
        return ("float16",)
    if quantised:
        return ("float32",)
    if num_parameters < SMALL_MODEL:
        return ("float16",)
    return ("bfloat16",) if native_bfloat16() else ("float32", "bfloat16")


def forms(checkpoint, device: str) -> list[tuple[str, str, int | None]]:
    """The forms a checkpoint can be loaded in on a device: name, dtype and quantization_bit of each, largest first."""
    stored, count = checkpoint.config.quantization_bit, checkpoint.num_parameters
    quantised = default_dtypes(device, count, quantised=True)[0]
    if stored:
        return [(f"INT{stored}", quantised, None)]
    floats = [(dtype, dtype, None) for dtype in default_dtypes(device, count)]
    return floats + [(f"INT{bits}", quantised, bits) for bits in (8, 4)]


def choose_device(
    checkpoint,
    device: str,
    dtype: str | None,
    quantization_bit: int | None,
    embedding_bit: int | None,
    devices: list[str],
    free: Callable[[str], float],
) -> tuple[str, str, str]:
    """Device and dtype for a checkpoint, and the reason if they are not the first choice (else "").

    device            "auto", or a device of `devices`
    dtype             a name of DTYPES, or None for what suits the device
    quantization_bit  4, 8, or None for what the checkpoint is; embedding_bit likewise
    devices           the devices that exist, best first
    free              device -> bytes free on it

    Raises MemoryError if no choice fits, naming what would.
    """
    stored, count = checkpoint.config.quantization_bit, checkpoint.num_parameters
    quantised = quantization_bit or stored
    wanted = devices if device == "auto" else [device]
    rejected = []
    for place in wanted:
        for format_ in (dtype,) if dtype else default_dtypes(place, count, bool(quantised)):
            need, room = memory_needs(checkpoint, place, format_, quantization_bit, embedding_bit).total, free(place)
            if need <= room:
                return place, format_, "; ".join(rejected)
            form = f"INT{quantised}" if quantised else format_
            rejected.append(f"{form} on {place} needs {need / 1e9:.1f} GB, {max(room, 0) / 1e9:.1f} GB are free")

    # What would fit: another number format, fewer bits, or another device.
    fitting = [
        (place, format_, bits)
        for place in [*wanted, *(place for place in devices if place not in wanted)]
        for _, format_, bits in forms(checkpoint, place)
        if (stored or (bits or 16) <= (quantization_bit or 16))
        and memory_needs(checkpoint, place, format_, bits, embedding_bit).total <= free(place)
    ]
    change = "add" if device == "auto" else f"replace --device {device} by"
    advice = f"close other programs, or {change} --device_map auto, which leaves a part on disk and is slow"
    if fitting:
        place, format_, bits = fitting[0]
        flags = [f"--device {place}"] * (device != "auto") + [f"--dtype {format_}"] * (dtype not in (None, format_))
        advice = " ".join([*flags, *[f"--quantization_bit {bits}"] * bool(bits), "would fit"])
    raise MemoryError(f"too little memory for {count / 1e9:.1f} B parameters: {'; '.join(rejected)}: {advice}")


# Several devices ------------------------------------------------------------------------------------------------------


def choose_places(
    checkpoint,
    num_gpus: int | None,
    device_map: str | Mapping | None,
    dtype: str | None,
    quantization_bit: int,
    embedding_bit: int | None,
    devices: list[str],
    free: Callable[[str], float],
) -> tuple[dict[str, str], str]:
    """Where each part of a split model goes, and its dtype; the arguments are those of `load_model`.

    devices  the devices that exist, best first
    free     a device, or "disk" -> bytes free on it

    Raises ValueError for GPUs that are not there and maps that do not fit, MemoryError for parts that do not.
    """
    gpus = [device for device in devices if device.startswith("cuda")]
    if num_gpus is not None and num_gpus > len(gpus):
        asked = "1 GPU was" if num_gpus == 1 else f"{num_gpus} GPUs were"
        raise ValueError(f"{asked} asked for, but this machine has {len(gpus)}: {_brief(devices)}")
    if isinstance(device_map, str) and device_map != "auto":
        raise ValueError(f"device_map must be auto or a map from modules to devices, got {device_map}")

    def empty(home: str, dtype: str):
        bits = quantization_bit, default_embedding_bit(checkpoint.config, home, quantization_bit, embedding_bit)
        return _empty_model(checkpoint.config_for(*bits), dtype)

    home = devices[0]  # where the embedding is, and so the input
    if isinstance(device_map, Mapping):
        home = expand_device_map(device_map, module_sizes(empty(home, "float16")), devices)[EMBEDDING]
    quantised = bool(quantization_bit or checkpoint.config.quantization_bit)
    dtype = dtype or default_dtypes(home, checkpoint.num_parameters, quantised)[-1]  # the smallest: room is short
    model = empty(home, dtype)
    sizes = module_sizes(model)
    needs = memory_needs(checkpoint, home, dtype, quantization_bit, embedding_bit)
    beside = needs.cache + needs.working + sizes["transformer.layers.0"]  # one layer comes from elsewhere to be used
    if device_map == "auto":
        computing = devices[:1] if home == "mps" else devices  # mps and cpu share one memory
        places = fill_device_map(sizes, {place: free(place) - beside for place in computing})
    else:
        places = expand_device_map(device_map or auto_configure_device_map(num_gpus, model), sizes, devices)
    for place in dict.fromkeys(places.values()):
        need = sum(sizes[name] for name in sizes if places[name] == place) + (beside if place != "disk" else 0)
        if need > free(place):
            raise MemoryError(
                f"too little memory: the part of the model on {place} needs {need / 1e9:.1f} GB, "
                f"{free(place) / 1e9:.1f} GB are free: "
                + ("use fewer bits or more devices" if quantised else "add --quantization_bit 8 or 4, or more devices")
            )
    return places, dtype


def _empty_model(config, dtype: str):
    """The network of a configuration on the meta device, in a dtype."""
    import torch

    from chatglm import ChatGLMForConditionalGeneration

    with torch.device("meta"):
        return ChatGLMForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))


def module_sizes(model) -> dict[str, int]:
    """Bytes of each part that a device map places: embedding, prefix encoder, every layer, final norm, head.

    A part whose matrix belongs to an earlier one, such as a tied head, counts 0. The model may be on the meta device.
    """
    sizes = {EMBEDDING: 0, NORM: 0, HEAD: 0}
    for name, parameter in model.named_parameters():
        part = re.match(r"transformer\.layers\.\d+|transformer\.\w+|\w+", name)[0]
        sizes[part] = sizes.get(part, 0) + parameter.nbytes
    return sizes


def auto_configure_device_map(num_gpus: int, model=None) -> dict[str, int]:
    """A map from the parts of a model to GPUs 0 to num_gpus - 1, so that the fullest of them holds as little as can be.

    model  a ChatGLMForConditionalGeneration, best on the meta device; None stands for the published ChatGLM-6B

    Embedding, prefix encoder, final norm and head stay together on GPU 0; each of the others gets a run of layers.
    Raises ValueError for no GPU, or more GPUs than layers.
    """
    sizes = module_sizes(model or _empty_model(published_checkpoint().config, "float16"))
    layers = [name for name in sizes if name.startswith("transformer.layers.")]
    if not 1 <= num_gpus <= len(layers):
        raise ValueError(f"a model of {len(layers)} layers can be split over 1 to {len(layers)} GPUs, got {num_gpus}")
    rest = sum(size for name, size in sizes.items() if name not in layers)
    layer = sizes[layers[0]]  # they are all alike
    others = num_gpus - 1

    def fullest(first: int) -> int:
        """Bytes of the fullest GPU when GPU 0 takes the first layers and the others share those behind."""
        return max(rest + first * layer, math.ceil((len(layers) - first) / others) * layer)

    first = min(range(len(layers) - others + 1), key=fullest) if others else len(layers)
    behind = {name: 1 + index * others // (len(layers) - first) for index, name in enumerate(layers[first:])}
    return {name: behind.get(name, 0) for name in sizes}


def fill_device_map(sizes: Mapping[str, int], room: Mapping[str, float]) -> dict[str, str]:
    """A map that fills one device after the other and leaves the last layers on the disk: `device_map="auto"`.

    sizes  bytes of the parts, as `module_sizes` gives them
    room   device -> bytes for weights there, best first

    Raises MemoryError if embedding, prefix encoder, final norm and head fit on no device.
    """
    layers = [name for name in sizes if name.startswith("transformer.layers.")]
    rest = sum(size for name, size in sizes.items() if name not in layers)
    home = next((device for device in room if rest <= room[device]), None)
    if home is None:
        raise MemoryError(
            f"embedding and head need {rest / 1e9:.1f} GB beside the room for computing, which no device has: "
            "close other programs, or add --quantization_bit 4 --embedding_bit 4"
        )
    places = dict.fromkeys(sizes, home)
    devices, left = list(room), {**room, home: room[home] - rest}
    for name in layers:
        while devices and sizes[name] > left[devices[0]]:
            del devices[0]
        places[name] = devices[0] if devices else "disk"
        if devices:
            left[devices[0]] -= sizes[name]
    return places


def expand_device_map(device_map: Mapping, sizes: Mapping[str, int], devices: list[str]) -> dict[str, str]:
    """Where each part goes by a map as accelerate takes it, checked: keys may stand for several parts.

    device_map  name of a module (its parts included), "" for all -> number of a GPU, device, "cpu" or "disk"

    Raises ValueError for parts without a place, names that are none of the model, places that do not exist, and
    embedding, final norm and head that are apart or on the disk.
    """
    for key, place in device_map.items():
        inside = [name for name in sizes if key.startswith(name + ".")]
        if inside:
            raise ValueError(f"device_map names {key}, which cannot be apart from the rest of {inside[0]}: name that")
        if key and key not in sizes and not any(name.startswith(key + ".") for name in sizes):
            raise ValueError(f"device_map names {key}, which this model does not have: its parts are {_brief(sizes)}")
        if _place(place) not in (*devices, "disk"):
            raise ValueError(
                f"device_map puts {key or 'the model'} on {place}, but there are {_brief(devices)} and disk"
            )
    expanded, missing = {}, []
    for name in sizes:
        keys = [key for key in device_map if key in ("", name) or name.startswith(key + ".")]
        if keys:
            expanded[name] = _place(device_map[max(keys, key=len)])
        else:
            missing.append(name)
    if missing:
        raise ValueError(f"device_map has no place for {_brief(missing)}: add {'it' if len(missing) == 1 else 'them'}")
    ends = {expanded[name] for name in (EMBEDDING, NORM, HEAD)}
    if len(ends) > 1 or ends == {"disk"}:
        raise ValueError(
            f"{EMBEDDING}, {NORM} and {HEAD} must be together on one device that computes, but device_map puts them on "
            f"{_brief(sorted(ends))}"
        )
    return expanded


def _place(place) -> str:
    """A place of a device map as a device of `available_devices`, or "disk"."""
    place = f"cuda:{place}" if isinstance(place, int) else str(place)
    return "cuda:0" if place == "cuda" else place


def _brief(names) -> str:
    names = list(names)
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])


def _load_split(checkpoint, device_map: dict[str, str], offload_folder, *options):
    """The network of a checkpoint with every part at its place and accelerate's hooks that connect them.

    device_map  from `expand_device_map`; options are those of `load_weights` behind the device

    Each tensor goes from its file straight to its device. Layers for the disk are written, one after the other and
    quantised if they are to be, into a folder that goes when the model goes.
    """
    from accelerate import dispatch_model

    from chatglm.checkpoint import load_weights

    groups: dict[str, list[str]] = {}  # what is read together: all for a device, one layer for the disk
    for name, place in device_map.items():
        groups.setdefault(name if place == "disk" else place, []).append(name)
    model, folder, index = None, None, {}
    for names in groups.values():  # the first one has the embedding
        place = device_map[names[0]]
        prefixes = tuple(f"{name}." for name in names)
        files = {tensor: path for tensor, path in checkpoint.files.items() if tensor.startswith(prefixes)}
        part = load_weights(replace(checkpoint, files=files), "cpu" if place == "disk" else place, *options)
        model = model or part
        if place == "disk":
            if folder is None:
                parent = _offload_parent(offload_folder)
                parent.mkdir(parents=True, exist_ok=True)
                folder = tempfile.mkdtemp(prefix="offload-", dir=parent)
                weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
            index.update(_move_to_disk(part.get_submodule(names[0]), names[0], folder))
        for name in names:
            model.set_submodule(name, part.get_submodule(name))
    return dispatch_model(
        model,
        device_map,
        main_device=device_map[EMBEDDING],
        offload_index=index or None,
        skip_keys=model._skip_keys_device_placement,
    )


def _move_to_disk(module, name: str, folder: str) -> dict[str, dict[str, str]]:
    """Leave a module empty and its tensors in a file of folder; returns where each is, in accelerate's form."""
    from safetensors.torch import save_file

    path = os.path.join(folder, f"{name}.safetensors")
    tensors = module.state_dict()
    save_file(tensors, path)
    module.to("meta")
    return {f"{name}.{key}": {"safetensors_file": path, "weight_name": key} for key in tensors}


# Loading --------------------------------------------------------------------------------------------------------------


def load_model(
    model_name_or_path: str | os.PathLike = DEFAULT_MODEL,
    *,
    adapter: str | os.PathLike | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype=None,
    quantization_bit: int | None = None,
    embedding_bit: int | None = None,
    activations: str | None = None,
    num_gpus: int | None = None,
    device_map: str | Mapping | None = None,
    offload_folder: str | os.PathLike | None = None,
):
    """Model (in eval mode) and tokenizer of a checkpoint; says on stderr what was loaded, in a line or two.

    model_name_or_path  folder, or `owner/name` on the Hugging Face hub; code inside the checkpoint is never run
    adapter             folder of a P-Tuning v2 prefix or a LoRA adapter that was trained on this model
    revision            branch, tag or commit on the hub
    device              "auto" (first of cuda:0, cuda:1, ..., mps, cpu that has room) or one of these
    dtype               "float32", "bfloat16", "float16" or the torch dtype; None takes what suits the device (see
                        `default_dtypes`)
    quantization_bit    bits per weight of the linear layers, 4 or 8: an unquantised checkpoint is quantised while it
                        is read; None = as the checkpoint is
    embedding_bit       bits of embedding and head beside quantised layers, 4, 8 or 16 (floats); None = as the
                        checkpoint is, but 8 on a CPU
    activations         how CPU kernels read the input of a quantised layer: "int8", "int16", "bf16" or "float32"
                        (exact, slow); None = "int8", and "int16" for layers narrower than 2048
    num_gpus            split over that many GPUs by `auto_configure_device_map`
    device_map          "auto" fills GPUs, then main memory, then the disk; or a map, see `expand_device_map`
    offload_folder      where layers for the disk are written, until the model goes; None = ~/.cache/chatglm

    Raises ValueError (CheckpointError for what is wrong with the files) or MemoryError, before any weight is read.
    """
    started = time.monotonic()
    # Huge pages for large tensors on Linux. torch reads this at its first allocation. Without them the allocator keeps
    # holes between the tensors of a long prompt: 0.3 GB and more for 1024 tokens of ChatGLM-6B.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from chatglm.adapters import apply_adapter, check_adapter, open_adapter
    from chatglm.checkpoint import load_tokenizer, load_weights, open_checkpoint
    from chatglm.quantization import set_activations

    if activations not in (None, *ACTIVATIONS):
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations}")
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    device, devices = _place(device), available_devices()
    if device not in ("auto", *devices):
        raise ValueError(f"device {device} is not there: this machine has {_brief(devices)}")
    if (device != "auto") + (num_gpus is not None) + (device_map is not None) > 1:
        raise ValueError("device, num_gpus and device_map each say where the model goes: give one of them")

    checkpoint = open_checkpoint(model_name_or_path, revision)
    opened = None if adapter is None else open_adapter(adapter)
    if embedding_bit is not None and not (quantization_bit or checkpoint.config.quantization_bit):
        raise ValueError("embedding_bit is for a model whose layers are quantised: add quantization_bit 4 or 8")
    bits, reason = quantization_bit or 0, ""
    config = checkpoint.config_for(bits, embedding_bit)  # refuses what the files cannot be

    def free(place: str) -> float:
        return free_memory(place, offload_folder) - (4 * opened.num_parameters if opened else 0)

    if num_gpus is None and device_map is None:
        device, dtype, reason = choose_device(checkpoint, device, dtype, quantization_bit, embedding_bit, devices, free)
        places = {"": device}
    else:
        places, dtype = choose_places(checkpoint, num_gpus, device_map, dtype, bits, embedding_bit, devices, free)
        device = next(iter(places.values()))
    embedding_bit = default_embedding_bit(checkpoint.config, device, bits, embedding_bit)
    if opened:
        check_adapter(opened, _empty_model(config, dtype), places)

    tokenizer = load_tokenizer(checkpoint)
    options = getattr(torch, dtype), bits, embedding_bit
    if len(set(places.values())) == 1:
        model = load_weights(checkpoint, device, *options)
    else:
        model = _load_split(checkpoint, places, offload_folder, *options)
    if activations:
        set_activations(model, activations)
    if opened:
        model = apply_adapter(model, adapter)

    count = checkpoint.num_parameters
    facts = [
        f"loaded {model_title(model)}" + (f" + {opened.folder} ({opened.title})" if opened else ""),
        f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters",
        _form(model, dtype),
        f"{sum(parameter.nbytes for parameter in model.parameters()) / 1e9:.2f} GB",
        _where(places),
        f"{time.monotonic() - started:.1f} s",
    ]
    print("   ".join(facts + [f"({reason})"] * bool(reason)), file=sys.stderr)
    if model.config.quantization_bit and device == "cpu":  # layers in main memory beside a GPU are computed on the GPU
        print(f"kernels: {cpu_kernels()}", file=sys.stderr)
    return model, tokenizer


def load_model_on_gpus(
    model_name_or_path: str | os.PathLike, num_gpus: int = 2, device_map: Mapping | None = None, **options
):
    """Model of a checkpoint, split over num_gpus GPUs, or as device_map says; options are those of `load_model`.

    Raises ValueError if there are fewer GPUs, more GPUs than layers, or a map that does not fit the model.
    """
    where = {"num_gpus": num_gpus} if device_map is None else {"device_map": device_map}
    return load_model(model_name_or_path, **where, **options)[0]


def _offload_parent(folder: str | os.PathLike | None) -> Path:
    """Where the folder for offloaded layers is made. Not the system's temporary folder: that may be memory itself."""
    return Path(folder or "~/.cache/chatglm").expanduser().absolute()


def cpu_kernels() -> str:
    """What computes on the CPU, and why that: "C, AVX-512 VNNI, 2 threads (compiled by gcc)"."""
    import torch

    from chatglm import kernels

    backend = kernels.cpu_backend()
    if backend is None:
        return f"plain torch ({kernels.cpu_reason()})"
    name = backend.name.replace("C kernels", "C")
    count = torch.get_num_threads()
    threads = "" if name.endswith("one thread") else f", {count} thread{'s' * (count != 1)}"
    return f"{name}{threads} ({backend.reason})"


def _form(model, dtype: str) -> str:
    """How the weights of a model are held: "float16", "int8, float32", "int4, embedding int8, float32"."""
    bits, embedding_bits = model.config.quantization_bit, model.config.embedding_bits
    if embedding_bits == bits:
        return f"int{bits}, {dtype}" if bits else dtype
    floats = str(model.transformer.word_embeddings.weight.dtype).removeprefix("torch.")
    return f"int{bits}, embedding {f'int{embedding_bits}' if embedding_bits else floats}, {dtype}"


def _where(places: Mapping[str, str]) -> str:
    """The devices of a model; of a split one with the number of layers on each."""
    if len(set(places.values())) == 1:
        return next(iter(places.values()))
    layers = [place for name, place in places.items() if name.startswith("transformer.layers.")]
    counts = {place: layers.count(place) for place in dict.fromkeys(places.values())}
    return ", ".join(f"{place} ({count} layer{'s' * (count != 1)})" for place, count in counts.items())


def model_title(model) -> str:
    """The name to show for a loaded model: "ChatGLM-Tiny", "ChatGLM-6B", or the name of its folder."""
    source = model.config.name_or_path or "ChatGLM"
    if source == DEFAULT_MODEL:
        return "ChatGLM-Tiny"
    name = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    published = re.fullmatch(r"chatglm-6b(.*)", name, re.IGNORECASE)
    return f"ChatGLM-6B{published[1].upper()}" if published else name


# Plan -----------------------------------------------------------------------------------------------------------------


def plan(checkpoint, devices: list[str], free: Callable[[str], float]):
    """A rich table of what a checkpoint needs on each device in each form, and a line with the flags to use.

    devices  the devices that exist, best first
    free     device -> bytes free on it
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table("where", "form", title=f"{escape(model_title(checkpoint))}: computed, in GB", title_justify="left")
    for column in ("weights", f"cache, {CONTEXT} tokens", "loading peak", "all in all", "free"):
        table.add_column(column, justify="right")
    table.add_column("fits")
    fitting = []
    for device in devices:
        room = free(device)
        for form, dtype, bits in forms(checkpoint, device):
            needs = memory_needs(checkpoint, device, dtype, bits)
            figures = (needs.weights, needs.cache, needs.loading_peak, needs.total, room)
            fits = needs.total <= room
            table.add_row(device, form, *(f"{figure / 1e9:.2f}" for figure in figures), "yes" if fits else "no")
            fitting += [(device, bits)] * fits

    advice = _advice(checkpoint, devices, free, fitting)
    if advice is None:
        return table, "no form of it fits here: close other programs"
    flags, why = advice
    if checkpoint.name != DEFAULT_MODEL:
        flags = [f"--model_name_or_path {shlex.quote(checkpoint.name)}", *flags]
    return table, f"use: python cli_demo.py {' '.join(flags) or 'without flags'}   ({why})"


def _advice(checkpoint, devices, free, fitting: list) -> tuple[list[str], str] | None:
    """The flags to use, and why, when the (device, bits) in `fitting` fit, best device first; None if nothing helps."""
    stored = checkpoint.config.quantization_bit
    unchanged = f"INT{stored}" if stored else "unquantised"

    def split(num_gpus, device_map, bits):
        try:
            return choose_places(checkpoint, num_gpus, device_map, None, bits, None, devices, free)[0]
        except (MemoryError, ValueError):
            return None

    if not any(device != "cpu" and bits is None for device, bits in fitting):
        for num_gpus in range(2, 1 + sum(device.startswith("cuda") for device in devices)):
            if split(num_gpus, None, 0):
                return [f"--num_gpus {num_gpus}"], f"{unchanged}, split over {num_gpus} GPUs"
    if fitting:
        # The most exact form on the best device; but a CPU wins much speed by INT8, and loses next to nothing.
        device, bits = fitting[0]
        if device == "cpu" and checkpoint.num_parameters >= SMALL_MODEL and (device, 8) in fitting:
            bits = 8
        form = f"INT{bits}" if bits else unchanged
        faster = ": INT4 is faster, and less exact" if device == "cpu" and bits == 8 else ""
        return [f"--quantization_bit {bits}"] * bool(bits), f"{form} on {device}{faster}"
    bits = 0 if stored else 4
    places = split(None, "auto", bits)
    if places is None:
        return None
    return [*[f"--quantization_bit {bits}"] * bool(bits), "--device_map auto"], f"slow: {_where(places)}"


def planned_checkpoint(name: str, revision: str | None = None):
    """The checkpoint to plan for: a folder, or a name on the hub, of which only config.json is downloaded."""
    from chatglm import ChatGLMConfig
    from chatglm.checkpoint import SECOND_GENERATION_FIELDS, open_checkpoint

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).expanduser().exists():
        return open_checkpoint(name)
    config = ChatGLMConfig.from_pretrained(name, revision=revision)
    if SECOND_GENERATION_FIELDS & vars(config).keys():
        raise ValueError(f"{name} is of the second generation (ChatGLM2 or later): give the name of a ChatGLM-6B")
    return _shape(name, config)


def published_checkpoint():
    """A checkpoint of the shape of the published ChatGLM-6B, without files, for planning."""
    from chatglm import ChatGLMConfig

    return _shape("THUDM/chatglm-6b", ChatGLMConfig(vocab_size=130528))


def _shape(name: str, config):
    """A checkpoint of which only the configuration is known."""
    from chatglm.checkpoint import Checkpoint

    config.name_or_path = name
    unquantised = copy.deepcopy(config)
    unquantised.set_quantization(0, 0)
    count = _empty_model(unquantised, "float16").num_parameters()
    return Checkpoint(name, Path(), config, {}, count, 2 * config.vocab_size * config.hidden_size)


def main(argv=None):
    """Print the plan for a model; without a name, for the embedded one and for the published ChatGLM-6B."""
    parser = argparse.ArgumentParser(description="What a model needs, what this machine has, which flags to use.")
    parser.add_argument("--plan", action="store_true", required=True, help="print the plan (default: nothing is done)")
    parser.add_argument(
        "--model_name_or_path",
        metavar="FOLDER_OR_NAME",
        help="folder of a checkpoint, or its name on the Hugging Face hub (default: the embedded model, and the "
        "published ChatGLM-6B)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub checkpoint (default: its main branch)")
    args = parser.parse_args(argv)
    with main_errors(parser):
        if args.model_name_or_path:
            checkpoints = [planned_checkpoint(args.model_name_or_path, args.revision)]
        else:
            checkpoints = [planned_checkpoint(DEFAULT_MODEL), published_checkpoint()]

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width
    for checkpoint in checkpoints:
        table, advice = plan(checkpoint, available_devices(), free_memory)
        console.print(table)
        console.print(advice, soft_wrap=True, markup=False)
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
