"""What the scripts share: flags, loading a model onto the right device, and ending politely.

Importing this file is instant: torch and transformers are imported when a model is loaded, so `--help` need not wait.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_MODEL = str(Path(__file__).resolve().parent / "chatglm" / "tiny")
DEVICES = ("cuda", "mps", "cpu")  # in the order of preference
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes per parameter
SMALL_MODEL = 100_000_000  # parameters
WORKING_ROOM = 1.1  # keys and values of 2048 tokens and the activations take up to a tenth of the weights


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
    group.add_argument("--revision", help="branch, tag or commit of a hub checkpoint (default: its main branch)")
    group.add_argument(
        "--device",
        choices=("auto", *DEVICES),
        default="auto",
        help="where the model runs; auto takes the first of cuda, mps, cpu that is there and has room (default: auto)",
    )
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="number format of the weights (default: float16 on cuda and mps, and on cpu for a model below 0.1 B "
        "parameters; else on cpu float32, or bfloat16 when float32 does not fit into memory)",
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
        "--seed", type=int, help="whole number that makes sampled answers repeatable (default: different every time)"
    )


def model_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `load_model` that the flags stand for."""
    return {name: getattr(args, name) for name in ("model_name_or_path", "revision", "device", "dtype")}


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


_positive_int = _number(int, "a whole number above 0", lambda value: value > 0)
_probability = _number(float, "from 0 to 1", lambda value: 0 <= value <= 1)
_temperature = _number(float, "from 0 to 100", lambda value: 0 <= value <= 100)


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


# Loading --------------------------------------------------------------------------------------------------------------


def free_memory(device: str) -> int:
    """Bytes that a program may still use on "cpu", "cuda", "cuda:1" or "mps"."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, _free_in_container())
    if device == "mps":  # shares the memory of the CPU, up to a limit
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return free


def _free_in_container(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left under the memory limit of a Linux container; infinite without one."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or its memory.max is the word "max"
        return float("inf")
    return limit - used + int(statistics.get("inactive_file", 0))  # cached files give way


def available_devices() -> list[str]:
    """The devices of this machine, best first."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [device for device in DEVICES if there[device]]


def default_dtypes(device: str, num_parameters: int) -> tuple[str, ...]:
    """The number formats to try on a device, best first.

    float16 is what the published weights are and were used in. A CPU reads it twice as fast as float32, which decides
    the speed of a small model, but multiplies large matrices slowly in it (benchmarks/README.md): larger models get
    float32, or bfloat16.
    """
    if device.startswith("cpu") and num_parameters >= SMALL_MODEL:
        return ("float32", "bfloat16")
    return ("float16",)


def choose_device(
    num_parameters: int, device: str, dtype: str | None, devices: list[str], free: Callable[[str], int]
) -> tuple[str, str, str]:
    """Device and dtype for a model of num_parameters, and the reason if they are not the first choice (else "").

    device   "auto" or a device as torch spells it
    dtype    a name of DTYPES, or None for what suits the device
    devices  the devices that exist, best first
    free     device -> bytes free on it

    Raises ValueError if the device does not exist, MemoryError if no choice fits, naming what would.
    """
    kind = device.split(":")[0]
    if device != "auto" and kind not in devices:
        raise ValueError(f"device {device} is not available here: use {' or '.join(['auto', *devices])}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")

    wanted = devices if device == "auto" else [device]
    rejected = []
    for place in wanted:
        room = free(place)
        for format_ in (dtype,) if dtype else default_dtypes(place, num_parameters):
            need = num_parameters * DTYPES[format_] * WORKING_ROOM
            if need <= room:
                return place, format_, "; ".join(rejected)
            rejected.append(f"{format_} on {place} needs {need / 1e9:.1f} GB, {max(room, 0) / 1e9:.1f} GB are free")

    fitting = [
        f"--device {place} --dtype {format_}"
        for place in devices
        for format_ in default_dtypes(place, num_parameters)
        if num_parameters * DTYPES[format_] * WORKING_ROOM <= free(place)
    ]
    advice = f"{fitting[0]} would fit" if fitting else "close other programs or use a smaller model"
    raise MemoryError(f"too little memory for {num_parameters / 1e9:.1f} B parameters: {'; '.join(rejected)}: {advice}")


def load_model(
    model_name_or_path: str | os.PathLike = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype=None,
):
    """Model (in eval mode) and tokenizer of a checkpoint; prints one line about them to stderr.

    model_name_or_path  folder, or `owner/name` on the Hugging Face hub; code inside the checkpoint is never run
    revision            branch, tag or commit on the hub
    device              "auto" (first of cuda, mps, cpu that has room) or a device as torch spells it
    dtype               "float32", "bfloat16", "float16" or the torch dtype; None takes what suits the device (see
                        `default_dtypes`)

    Raises ValueError (CheckpointError for what is wrong with the files) or MemoryError, before any weight is read.
    """
    started = time.monotonic()
    import torch

    from chatglm.checkpoint import load_tokenizer, load_weights, open_checkpoint

    checkpoint = open_checkpoint(model_name_or_path, revision)
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    device, dtype, reason = choose_device(
        checkpoint.num_parameters, str(device), dtype, available_devices(), free_memory
    )
    tokenizer = load_tokenizer(checkpoint)
    model = load_weights(checkpoint, device, getattr(torch, dtype))

    count = checkpoint.num_parameters
    facts = [
        f"loaded {model_title(model)}",
        f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters",
        dtype,
        f"{count * DTYPES[dtype] / 1e9:.2f} GB",
        device,
        f"{time.monotonic() - started:.1f} s",
    ]
    print("   ".join(facts + [f"({reason})"] * bool(reason)), file=sys.stderr)
    return model, tokenizer


def model_title(model) -> str:
    """The name to show for a loaded model: "ChatGLM-Tiny", "ChatGLM-6B", or the name of its folder."""
    source = model.config.name_or_path or "ChatGLM"
    if source == DEFAULT_MODEL:
        return "ChatGLM-Tiny"
    name = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    published = re.fullmatch(r"chatglm-6b(.*)", name, re.IGNORECASE)
    return f"ChatGLM-6B{published[1].upper()}" if published else name
