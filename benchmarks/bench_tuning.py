"""Seconds and memory of a fine-tuning step on the CPU, with random weights of the full 6B shape.

    python benchmarks/bench_tuning.py                    P-Tuning v2 on INT4 (needs 6 GB free)
    python benchmarks/bench_tuning.py --bits all --methods ptuning lora

A step is one conversation of 64 + 64 tokens: forward, way back with gradient checkpointing, AdamW. Unusual here: each
line of the table is measured in a process of its own, one after another, so that its peak memory is its own.
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

import peft
import torch

from benchmarks.bench_model import random_prompt
from benchmarks.bench_quantization import CACHE_FOLDER, GB, aligned, make_checkpoint, needed_memory, quantized_config
from utils import free_memory, load_model, main_errors, peak_memory

PROMPT, ANSWER = 64, 64  # tokens
PRE_SEQ_LEN, LORA_RANK = 128, 8
LEARNING_RATE = 1e-3
ROWS = [  # key of a result, heading, format
    ("bits", "weights", "INT{}"),
    ("method", "method", "{}"),
    ("trained", "trained, M", "{:.1f}"),
    ("forward_s", "forward, s", "{:.1f}"),
    ("backward_s", "back, s", "{:.1f}"),
    ("optimiser_s", "AdamW, s", "{:.2f}"),
    ("step_s", "step, s", "{:.1f}"),
    ("loaded_gb", "loaded, GB", "{:.2f}"),
    ("peak_gb", "peak, GB", "{:.2f}"),
]


def attach(model, method):
    """The model with fresh weights to learn for that method, everything else frozen."""
    if method == "ptuning":
        model.add_prefix_encoder(PRE_SEQ_LEN)
    else:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, target_modules=["query_key_value"])
        model = peft.get_peft_model(model, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model, steps):
    """Losses of `steps` steps on one random conversation, and the seconds of their parts, a list of triples."""
    ids = random_prompt(model.config, PROMPT)
    ids = torch.cat((ids, torch.randint(20, 500, (1, ANSWER), generator=torch.Generator().manual_seed(0))), dim=1)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses, times = [], []
    for _ in range(steps):
        clock = [time.perf_counter()]
        loss = model(ids, labels=labels, use_cache=False).loss
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        optimiser.step()
        optimiser.zero_grad()
        clock.append(time.perf_counter())
        losses.append(loss.item())
        times.append([later - earlier for earlier, later in itertools.pairwise(clock)])
    return losses, times


def measure(folder, bits, method, steps, threads=None):
    """Load that checkpoint in this process and train it; one dictionary. The first step is not in the medians."""
    if threads:
        torch.set_num_threads(threads)
    model, _ = load_model(folder, device="cpu")
    loaded = peak_memory()
    model = attach(model, method)
    losses, times = train(model, steps + 1)
    medians = [statistics.median(part) for part in zip(*times[1:], strict=True)]
    return {
        "bits": bits,
        "method": method,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        **dict(zip(("forward_s", "backward_s", "optimiser_s"), medians, strict=True)),
        "step_s": statistics.median(map(sum, times[1:])),
        "loaded_gb": loaded / GB,
        "peak_gb": peak_memory() / GB,
        "losses": losses,
    }


def build_parser():
    parser = argparse.ArgumentParser(description="Measure a step of fine-tuning on the CPU.")
    add = parser.add_argument
    add("--bits", choices=["4", "8", "all"], default="4", help="bits per weight (default: 4)")
    add(
        "--methods",
        nargs="+",
        choices=["ptuning", "lora"],
        default=["ptuning"],
        help=f"P-Tuning v2 with {PRE_SEQ_LEN} tokens; LoRA of rank {LORA_RANK} (default: ptuning)",
    )
    add(
        "--folder",
        type=Path,
        default=CACHE_FOLDER,
        help="where checkpoints of random weights are made and kept: 4 GB for INT4, 7 for INT8 (default: %(default)s)",
    )
    add("--steps", type=int, default=3, help="steps behind each median (default: 3)")
    add("--threads", type=int, help="threads of torch (default: its own choice)")
    add("--json", action="store_true", help="print the numbers as JSON instead of a table")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    all_bits = [4, 8] if args.bits == "all" else [int(args.bits)]
    needed, free = max(needed_memory(bits, ["default"]) for bits in all_bits), free_memory("cpu")
    if free < needed:
        parser.error(f"a step needs {needed / GB:.1f} GB of free memory, and {free / GB:.1f} GB are free")
    results = []
    spawn = multiprocessing.get_context("spawn")
    with main_errors(parser):
        for bits in all_bits:
            folder = make_checkpoint(args.folder / f"6b-int{bits}", quantized_config(bits))
            for method in args.methods:
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    results.append(pool.submit(measure, folder, bits, method, args.steps, args.threads).result())
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        lines = [[style.format(result[key]) for key, _, style in ROWS] for result in results]
        print(aligned([[heading for _, heading, _ in ROWS], *lines], left=2))


if __name__ == "__main__":
    main()
