"""Speed and memory of one conversation: load, prefill, decode, and what Python adds to each token.

    python benchmarks/bench_model.py                     the embedded checkpoint
    python benchmarks/bench_model.py --shape all         and random weights of the full 6B shape (needs 16 GiB)

Unusual here: each shape runs in a process of its own, so that its peak memory is its own; the 6B network is laid out
without memory first and then filled in place, so that it never exists twice.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.cache import CACHE_NAME
from utils import DEFAULT_MODEL, load_model, peak_memory

CONTEXTS = (32, 256, 1024)  # prompt lengths, tokens
GIB = 2**30
FULL_SHAPE_PARAMETERS = 6.17e9
WORKING_GIB = 2.0  # what the program, its activations and a cache of 1024 tokens need beside the weights
ROWS = [  # key of a result, label, unit, format
    ("parameters", "parameters", "M", ",.1f"),
    ("load_s", "load", "s", ".2f"),
    ("memory_loaded_gib", "memory after loading", "GiB", ".2f"),
    ("memory_peak_gib", "peak memory", "GiB", ".2f"),
    *((f"prefill_{n}_tok_s", f"prefill, {n} tokens", "tokens/s", ",.1f") for n in CONTEXTS),
    (f"decode_{CONTEXTS[0]}_tok_s", f"decode after {CONTEXTS[0]} tokens", "tokens/s", ",.1f"),
    (f"decode_{CONTEXTS[-1]}_tok_s", f"decode after {CONTEXTS[-1]} tokens", "tokens/s", ",.1f"),
    ("stream_chat_tok_s", "decode through stream_chat", "tokens/s", ",.1f"),
    ("step_linear_ms", "one step: its matrix products", "ms", ".3f"),
    ("step_forward_ms", "one step: forward", "ms", ".3f"),
    ("step_stream_chat_ms", "one step: stream_chat", "ms", ".3f"),
    ("overhead_forward_ms", "forward - matrix products", "ms", ".3f"),
    ("overhead_stream_chat_ms", "stream_chat - forward", "ms", ".3f"),
]


class NeverEnd(LogitsProcessor):
    """Keeps the end token from being chosen, so that every answer has the same length.

    Finite: an infinite score would look like a broken one to the model's own guard.
    """

    def __init__(self, eos_token_id):
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids, scores):
        scores[:, self.eos_token_id] = -1e4
        return scores


def full_config(tokenizer):
    """Sizes of the published ChatGLM-6B with the special ids of the given tokenizer, which can then drive it."""
    return ChatGLMConfig(vocab_size=130528, use_cache=True, **tokenizer.config_ids)


def build_random(config, dtype):
    """A network of that config with cheap random weights on the CPU, built without a second copy of anything.

    Drawing 6 billion normal values takes minutes and changes no timing: one block is drawn and repeated.
    """
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            piece = flat[start : start + block.numel()]
            piece.copy_(block[: piece.numel()])
    return model.eval()


def median_time(function, repeats):
    """Median seconds of function() over repeats calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def random_prompt(config, length):
    """ids [1, length] of ordinary pieces that end in [gMASK] <sop>."""
    ids = torch.randint(20, min(config.vocab_size, 5000), (1, length), generator=torch.Generator().manual_seed(length))
    ids[0, -2:] = torch.tensor([config.gmask_token_id, config.bos_token_id])
    return ids


def decode_times(model, length, steps):
    """Seconds of each of `steps` bare forwards of one token, behind a prompt of `length` tokens."""
    output = model(random_prompt(model.config, length), use_cache=True, logits_to_keep=1)
    times = []
    for step in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        position_ids = torch.tensor([[[length - 2], [step + 2]]])  # place of [gMASK]; place in the answer, <sop> is 1
        start = time.perf_counter()
        output = model(
            token,
            position_ids=position_ids,
            past_key_values=output[CACHE_NAME],
            use_cache=True,
            logits_to_keep=1,
        )
        times.append(time.perf_counter() - start)
    return times


def stream_chat_times(model, tokenizer, steps):
    """Seconds from the call to each yielded step of one streamed answer, with the default sampling."""
    never_end = LogitsProcessorList([NeverEnd(model.config.eos_token_id)])
    answer = model.stream_chat(tokenizer, "你好", logits_processor=never_end, max_new_tokens=steps + 1, seed=0)
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in answer]


@torch.no_grad()
def measure(model, tokenizer, contexts=CONTEXTS, repeats=5, steps=64):
    """Speeds of a loaded model on its device, a dictionary of numbers whose keys end in their unit."""
    results = {"parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6}
    for length in contexts:
        prompt = random_prompt(model.config, length)
        seconds = median_time(lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1), repeats)
        results[f"prefill_{length}_tok_s"] = length / seconds

    forward = {}
    for length in (contexts[0], contexts[-1]):
        decode_times(model, length, 2)
        forward[length] = statistics.median(decode_times(model, length, steps))
        results[f"decode_{length}_tok_s"] = 1 / forward[length]

    stream_chat_times(model, tokenizer, 2)
    runs = [stream_chat_times(model, tokenizer, steps) for _ in range(repeats)]
    results["stream_chat_tok_s"] = statistics.median(len(run) / run[-1] for run in runs)
    step = statistics.median(later - earlier for run in runs for earlier, later in itertools.pairwise(run))

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(1, linear.in_features).to(linear.weight.dtype) for linear in linears]
    products = median_time(lambda: [linear(x) for linear, x in zip(linears, inputs, strict=True)], max(repeats, 3))

    results["step_linear_ms"] = 1000 * products
    results["step_forward_ms"] = 1000 * forward[contexts[0]]
    results["step_stream_chat_ms"] = 1000 * step
    results["overhead_forward_ms"] = results["step_forward_ms"] - results["step_linear_ms"]
    results["overhead_stream_chat_ms"] = results["step_stream_chat_ms"] - results["step_forward_ms"]
    return results


def run_shape(shape, dtype, threads, repeats, steps):
    """Load one model in this process and measure it; returns the results with title, dtype and threads."""
    if threads:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    if shape == "tiny":
        model, tokenizer = load_model(device="cpu", dtype=dtype)
    else:
        tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
        model = build_random(full_config(tokenizer), getattr(torch, dtype or "bfloat16"))
    loaded = {"load_s": time.perf_counter() - start, "memory_loaded_gib": psutil.Process().memory_info().rss / GIB}
    dtype = str(model.dtype).removeprefix("torch.")
    results = {"shape": shape, "dtype": dtype, "threads": torch.get_num_threads(), **loaded}
    results.update(measure(model, tokenizer, repeats=repeats, steps=steps))
    results["memory_peak_gib"] = peak_memory() / GIB
    return results


def table(results):
    """The results side by side, one column per model."""
    lines = [["", "", *(f"{result['shape']} {result['dtype']}" for result in results)]]
    for key, label, unit, style in ROWS:
        lines.append([label, unit, *(format(result[key], style) for result in results)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([label.ljust(widths[0]), unit.ljust(widths[1]), *map(str.rjust, cells, widths[2:])])
        for label, unit, *cells in lines
    )


def build_parser():
    parser = argparse.ArgumentParser(description="Measure load time, memory and speed on the CPU.")
    parser.add_argument(
        "--shape",
        choices=["tiny", "6b", "all"],
        default="tiny",
        help="tiny = the embedded checkpoint, 6b = random weights of the full shape, all = both (default: tiny)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the weights (default: what load_model chooses for tiny, bfloat16 for 6b)",
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats behind each median (default: 5)")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each decode measurement (default: 64)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of a table")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, least in (("repeats", 1), ("steps", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    shapes = ["tiny", "6b"] if args.shape == "all" else [args.shape]
    if "6b" in shapes:
        needed = FULL_SHAPE_PARAMETERS * getattr(torch, args.dtype or "bfloat16").itemsize / GIB + WORKING_GIB
        free = psutil.virtual_memory().available / GIB
        if free < needed:
            parser.error(f"the 6b shape needs {needed:.1f} GiB of free memory, and {free:.1f} GiB are free")

    results = []
    for shape in shapes:
        # A process per shape: its peak memory is its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            run = process.submit(run_shape, shape, args.dtype, args.threads, args.repeats, args.steps)
            results.append(run.result())
    print(json.dumps(results, indent=2) if args.json else table(results))


if __name__ == "__main__":
    main()
