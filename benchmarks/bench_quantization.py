"""Speed, memory and quality of INT4 and INT8 weights on the CPU, whole model end to end.

    python benchmarks/bench_quantization.py                  INT4, random weights of the full 6B shape (needs 6 GB free)
    python benchmarks/bench_quantization.py --bits all --candidates default bf16
    python benchmarks/bench_quantization.py --quality        perplexity and answers of the embedded model

Unusual here: every candidate lives in a process of its own, so that its peak memory is its own, and all of them stay
alive and take turns, one at a time: the memory bandwidth of a shared machine swings within minutes, and only
neighbouring turns can be compared. It is measured between the turns. chatglm.cpp is a candidate where there is a
program that speaks the same few words (chatglm_cpp_bench.cpp).
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.bench_model import full_config, random_prompt, stream_chat_times
from chatglm import ChatGLMForConditionalGeneration, kernels
from chatglm.cache import CACHE_NAME
from pretraining.corpus import CORPUS_FOLDER, EVALUATION_FILE, heldout_examples, load_dialogues
from pretraining.evaluate import ask, evaluation_questions, likelihoods
from utils import DEFAULT_MODEL, free_memory, load_model, main_errors, peak_memory

CACHE_FOLDER = Path.home() / ".cache" / "chatglm-benchmark"
CONTEXTS = (32, 256, 1024)  # prompt lengths, tokens
DECODE_CONTEXTS = (32, 1024)
TURNS = 3  # of decoding behind one prompt: a prompt of 1024 tokens takes much longer to read than a turn
SLOW_TURN = 20.0  # seconds after which a turn ends early; for the candidates without kernels
WEIGHT_DEVIATION = 0.02  # standard deviation of the random weights: activations stay finite
BLOCK = 1 << 24  # random bytes drawn and repeated: drawing gigabytes takes minutes and changes no timing
PROBE_BYTES = 1 << 30  # far more than any cache
GB = 1e9

CANDIDATES = {  # name: (what differs from load_model's defaults, value of CHATGLM_KERNELS, GB beside the weights)
    "default": ({}, "auto", 1.2),
    "bf16": ({"activations": "bf16"}, "auto", 1.2),
    "embedding4": ({"embedding_bit": 4}, "auto", 1.2),
    "embedding16": ({"embedding_bit": 16}, "auto", 1.8),
    "torch": ({}, "torch", 3.5),  # dequantises a whole matrix at a time where torch has no packed product
    "none": ({}, "none", 3.5),
}
PEER = "chatglm.cpp"
PEER_WORKING_GB = 2.4  # what it needs beside its file
ROWS = [  # key of a result, label, unit, format
    ("load_s", "load", "s", ".2f"),
    ("first_token_s", "load and first token", "s", ".2f"),
    ("memory_peak_gb", "peak memory, context 1024", "GB", ".2f"),
    *((f"prefill_{n}_tok_s", f"prefill, {n} tokens", "tokens/s", ",.1f") for n in CONTEXTS),
    *((f"decode_{n}_tok_s", f"decode after {n} tokens", "tokens/s", ",.2f") for n in DECODE_CONTEXTS),
    *((f"decode_{n}_read_gb", f"one step after {n}: must read", "GB", ".2f") for n in DECODE_CONTEXTS),
    *((f"decode_{n}_bandwidth_gb_s", f"bandwidth around decode, {n}", "GB/s", ".1f") for n in DECODE_CONTEXTS),
    *((f"decode_{n}_share", f"decode of what it allows, {n}", "%", ".0f") for n in DECODE_CONTEXTS),
    ("stream_chat_tok_s", "decode through stream_chat", "tokens/s", ",.2f"),
]
# Embedding bits and activations that --quality compares; the first is the reference of the others. int16 is what
# load_model chooses for layers as narrow as those of the embedded model.
QUALITY_SETTINGS = ((8, "float32"), (8, "int16"), (8, "int8"), (8, "bf16"), (16, "int16"), (4, "int16"))
EVERY = 4  # of the held-out phrasings one in so many


# Checkpoint -----------------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, config) -> Path:
    """The folder of a quantised checkpoint with random weights for that config, written unless it is there already.

    It goes straight to disk: the network is laid out without memory, and its tensors are filled from one block.
    Raises OSError if the disk is too small.
    """
    if (folder / "config.json").exists():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        tensors = ChatGLMForConditionalGeneration(config).state_dict()
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = {torch.int8: "I8", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    free = shutil.disk_usage(folder).free
    if free < 1.05 * end:
        raise OSError(
            f"the checkpoint needs {end / GB:.1f} GB of disk, and {folder} has {free / GB:.1f} GB: give --folder"
        )

    generator = np.random.default_rng(0)
    fillings = {
        "bytes": generator.integers(-128, 128, BLOCK, dtype=np.int8),
        "normal": (WEIGHT_DEVIATION * generator.standard_normal(BLOCK // 2, dtype=np.float32)).astype(np.float16),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int8:
                filling = fillings["bytes"]
            elif name.endswith("weight_scale"):  # uniform integers of b bits deviate by 2^b / sqrt(12)
                bits = config.embedding_bits if "layers." not in name else config.quantization_bit
                filling = np.full(1 << 12, WEIGHT_DEVIATION * math.sqrt(12) / 2**bits, np.float16)
            elif "layernorm" in name or name.endswith("bias"):
                filling = np.full(1 << 12, float(name.endswith("weight")), np.float16)
            else:
                filling = fillings["normal"]
            filling = memoryview(filling).cast("B")
            for start in range(0, tensor.nbytes, len(filling)):
                file.write(filling[: tensor.nbytes - start])
    for path in Path(DEFAULT_MODEL).iterdir():
        if path.name in ("ice_text.model", "tokenizer_config.json"):
            shutil.copy(path, folder)
    config.to_json_file(folder / "config.json")
    return folder


def read_once(path: Path) -> None:
    """Bring a file into the cache of the operating system, so that every candidate loads from there."""
    with path.open("rb") as file:
        while file.read(1 << 26):
            pass


# One candidate, in its own process ------------------------------------------------------------------------------------


class Session:
    """A model with the keys and values of one prompt."""

    def __init__(self, model):
        self.model = model
        self.output, self.length, self.steps = None, 0, 0

    @torch.no_grad()
    def prefill(self, length):
        """Seconds of one forward over a random prompt of that length; its cache is kept."""
        self.output, self.length, self.steps = None, length, 0
        prompt = random_prompt(self.model.config, length)
        start = time.perf_counter()
        self.output = self.model(prompt, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.no_grad()
    def decode(self, steps):
        """Seconds of each of the next `steps` forwards of one token (fewer, but two, if they are slow)."""
        times = []
        while len(times) < steps and (len(times) < 2 or sum(times) < SLOW_TURN):
            token = self.output.logits[:, -1:].argmax(-1)
            position_ids = torch.tensor([[[self.length - 2], [self.steps + 2]]])  # place of [gMASK]; in the answer
            start = time.perf_counter()
            self.output = self.model(
                token,
                position_ids=position_ids,
                past_key_values=self.output[CACHE_NAME],
                use_cache=True,
                logits_to_keep=1,
            )
            times.append(time.perf_counter() - start)
            self.steps += 1
        return times

    def bytes_per_step(self):
        """What a step cannot but read: bytes of weights, and bytes of keys and values per token of context."""
        transformer = self.model.transformer
        modules = (transformer.layers, transformer.final_layernorm, self.model.lm_head)
        weights = sum(parameter.nbytes for module in modules for parameter in module.parameters())
        config, layer = self.model.config, self.output[CACHE_NAME].layers[0]
        return weights, 2 * config.num_layers * config.hidden_size * layer.keys.element_size()


def serve(folder, options, threads=None):
    """Load a checkpoint with those options of load_model, then answer the requests on stdin, one line of JSON each.

    prefill N -> seconds; decode N -> [seconds]; chat N -> tokens/s; memory -> peak bytes. The first line tells of the
    loading. Ends with stdin.
    """
    if threads:
        torch.set_num_threads(threads)
    backend = kernels.cpu_backend()  # compiled here if it never was: that is no part of loading
    start = time.perf_counter()
    model, tokenizer = load_model(folder, device="cpu", **options)
    loaded = time.perf_counter() - start
    session = Session(model)
    session.prefill(CONTEXTS[0])
    first_token = time.perf_counter() - start
    session.decode(2)
    weight_bytes, cache_bytes = session.bytes_per_step()
    facts = {
        "load_s": loaded,
        "first_token_s": first_token,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "kernels": backend.name if backend else "plain torch",
    }
    answers = {
        "prefill": session.prefill,
        "decode": session.decode,
        "chat": lambda steps: len(times := stream_chat_times(model, tokenizer, steps)) / times[-1],
        "memory": peak_memory,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        request, *numbers = line.split()
        print(json.dumps(answers[request](*map(int, numbers))), flush=True)


class Worker:
    """A process that holds one model: a line goes in, a line of JSON comes back."""

    def __init__(self, name, command, environment):
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.facts = self._reply()

    def ask(self, *words):
        """The answer to one request. Raises ChildProcessError if the process has ended."""
        with contextlib.suppress(OSError):  # it has ended: the missing reply says so
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()
        return self._reply()

    def _reply(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise ChildProcessError(f"{self.name} ended with exit code {code}: its own message is above")
        return json.loads(line)

    def close(self):
        """End the process."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# Taking turns ---------------------------------------------------------------------------------------------------------


def read_bandwidth(block, repeats=5):
    """Bytes per second at which all threads read a large tensor, the median of a few passes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / statistics.median(times)


def take_turns(workers, block, rounds, steps, contexts=CONTEXTS, decode_contexts=DECODE_CONTEXTS):
    """{candidate: {key of a result: number}}, medians over all turns.

    block is what the bandwidth probe reads, steps the tokens of a turn of decoding.
    """
    found = {worker.name: {} for worker in workers}

    def note(worker, key, value):
        found[worker.name].setdefault(key, []).append(value)

    for number in range(rounds):
        for context in contexts:
            print(f"round {number + 1}/{rounds}   context {context}", file=sys.stderr, flush=True)
            for worker in workers:
                note(worker, f"prefill_{context}_tok_s", context / worker.ask("prefill", context))
            for turn in range(TURNS if context in decode_contexts else 0):
                for worker in workers:
                    before = read_bandwidth(block)
                    times = worker.ask("decode", steps)
                    bandwidth = (before + read_bandwidth(block)) / 2
                    speed = 1 / statistics.median(times)
                    length = context + turn * steps + len(times) / 2
                    needed = worker.facts["weight_bytes"] + length * worker.facts["cache_bytes"]
                    note(worker, f"decode_{context}_tok_s", speed)
                    note(worker, f"decode_{context}_read_gb", needed / GB)
                    note(worker, f"decode_{context}_bandwidth_gb_s", bandwidth / GB)
                    note(worker, f"decode_{context}_share", 100 * speed * needed / bandwidth)
        for worker in workers:
            if worker.name != PEER:
                note(worker, "stream_chat_tok_s", worker.ask("chat", steps))
    results = {name: {key: statistics.median(values) for key, values in keys.items()} for name, keys in found.items()}
    for worker in workers:
        results[worker.name]["memory_peak_gb"] = worker.ask("memory") / GB
    return results


def measure(bits, names, folder, rounds, steps, threads=None, peer=None):
    """Results of the named candidates with weights of that many bits, a list of dictionaries.

    peer is (program, model file) of chatglm.cpp, or None.
    """
    checkpoint = make_checkpoint(folder / f"6b-int{bits}", quantized_config(bits))
    commands = []
    for name in names:
        options, backend, _ = CANDIDATES[name]
        request = json.dumps([str(checkpoint), options, threads])
        commands.append(
            (name, checkpoint / "model.safetensors", [sys.executable, __file__, "--serve", request], backend)
        )
    if peer:
        commands.append((PEER, Path(peer[1]), [str(peer[0]), str(peer[1])], ""))
    workers = []
    try:
        for name, file, command, backend in commands:
            read_once(file)
            print(f"loading {name}", file=sys.stderr, flush=True)
            workers.append(Worker(name, command, {"CHATGLM_KERNELS": backend}))
        results = take_turns(workers, torch.ones(PROBE_BYTES // 8, dtype=torch.int64), rounds, steps)
    finally:
        for worker in workers:
            worker.close()
    return [{"bits": bits, "candidate": worker.name, **worker.facts, **results[worker.name]} for worker in workers]


def quantized_config(bits):
    """Sizes of the published ChatGLM-6B in INT8 or INT4, with the special ids of the embedded tokenizer."""
    config = full_config(AutoTokenizer.from_pretrained(DEFAULT_MODEL))
    config.quantization_bit = bits
    return config


def needed_memory(bits, names, peer=None):
    """Bytes that the candidates need together, for they are in memory at the same time."""
    config = quantized_config(bits)
    with torch.device("meta"):
        weights = sum(p.nbytes for p in ChatGLMForConditionalGeneration(config).transformer.layers.parameters())
    head = config.vocab_size * config.hidden_size  # one byte each by default
    total = PROBE_BYTES + sum(weights + head + CANDIDATES[name][2] * GB for name in names)
    return total + (Path(peer[1]).stat().st_size + PEER_WORKING_GB * GB if peer else 0)


# Quality --------------------------------------------------------------------------------------------------------------


def measure_quality(limit=None, settings=QUALITY_SETTINGS):
    """Perplexity of the embedded model on held-out phrasings, and how many of its greedy answers stay the same.

    A list of dictionaries: the unquantised model in float32, then INT8 and INT4 with each pair of embedding bits and
    activations. The answers are compared with those of the first pair. limit shortens both lists of questions.
    """
    examples = heldout_examples(load_dialogues(CORPUS_FOLDER))[::EVERY][:limit]
    questions = evaluation_questions(CORPUS_FOLDER / EVALUATION_FILE)[:limit]
    model, tokenizer = load_model(device="cpu", dtype="float32")
    plain = perplexity(likelihoods(model, tokenizer, examples))
    results = [{"bits": 32, "embedding": 32, "activations": "float32", "perplexity": plain, "change": 0.0}]
    for bits in (8, 4):
        reference = None
        for embedding, kind in settings:
            model, _ = load_model(device="cpu", quantization_bit=bits, embedding_bit=embedding, activations=kind)
            scores = likelihoods(model, tokenizer, examples)
            answers = [item.answer for item in ask(model, tokenizer, questions)]
            reference = reference or answers
            results.append(
                {
                    "bits": bits,
                    "embedding": embedding,
                    "activations": kind,
                    "perplexity": perplexity(scores),
                    "change": 100 * (perplexity(scores) / plain - 1),
                    "same_answers": sum(map(str.__eq__, answers, reference)),
                    "answers": len(answers),
                }
            )
    return results


def perplexity(scores):
    """exp of the mean negative log-likelihood per token, over all languages."""
    return math.exp(sum(score.nats for score in scores.values()) / sum(score.tokens for score in scores.values()))


# Report ---------------------------------------------------------------------------------------------------------------


def speed_table(results):
    """Results of one number of bits side by side, one column per candidate; the peer's is the measure of the others."""
    lines = [[f"INT{results[0]['bits']}", "", *(result["candidate"] for result in results)]]
    for key, label, unit, style in ROWS:
        lines.append([label, unit, *(format(result[key], style) if key in result else "-" for result in results)])
    peer = next((result for result in results if result["candidate"] == PEER), None)
    for key, label, unit, _ in ROWS if peer else []:
        if unit == "tokens/s" and key in peer:
            lines.append([label, f"x {PEER}", *(format(result[key] / peer[key], ".2f") for result in results)])
    return aligned(lines, left=2)


def quality_table(results):
    """One line per way to quantise the embedded model."""
    lines = [["weights", "embedding", "activations", "perplexity", "change", "same answers"]]
    for result in results:
        same = f"{result['same_answers']}/{result['answers']}" if "answers" in result else "-"
        kinds = [{32: "float32", 16: "bfloat16", 8: "INT8", 4: "INT4"}[result[key]] for key in ("bits", "embedding")]
        change = f"{result['change']:+.2f} %"
        lines.append([*kinds, result["activations"], f"{result['perplexity']:.4f}", change, same])
    return aligned(lines, left=3)


def aligned(lines, left):
    """Rows of cells as text: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


# Command --------------------------------------------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser(description="Measure INT4 and INT8 weights on the CPU.")
    add = parser.add_argument
    add("--bits", choices=["4", "8", "all"], default="4", help="bits per weight (default: 4)")
    add(
        "--candidates",
        nargs="+",
        choices=list(CANDIDATES),
        default=["default"],
        help="what takes turns: default = as load_model chooses; bf16 = bfloat16 activations; embedding4, embedding16 "
        "= embedding and head in INT4 or bfloat16; torch, none = without our own kernels (default: default)",
    )
    add(
        "--folder",
        type=Path,
        default=CACHE_FOLDER,
        help="where checkpoints of random weights are made and kept: 4 GB for INT4, 7 for INT8 (default: %(default)s)",
    )
    add("--delete", action="store_true", help="delete the checkpoint afterwards")
    add("--rounds", type=int, default=3, help="rounds of turns behind each median (default: 3)")
    add("--steps", type=int, default=16, help="tokens of one turn of decoding (default: 16)")
    add("--threads", type=int, help="threads of torch (default: its own choice)")
    add("--chatglm_cpp", type=Path, metavar="PROGRAM", help="chatglm_cpp_bench, built as README.md says")
    add(
        "--chatglm_cpp_model",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="its model file, q4_0 for INT4 and q8_0 for INT8; both, in this order, with --bits all",
    )
    add("--quality", action="store_true", help="measure perplexity and answers of the embedded model instead of speed")
    add("--limit", type=int, help="most examples and questions of --quality, for a quick look (default: all)")
    add("--json", action="store_true", help="print the numbers as JSON instead of a table")
    add("--serve", help=argparse.SUPPRESS)  # how this program starts its candidates
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.serve:
        return serve(*json.loads(args.serve))
    for name, least in (("rounds", 1), ("steps", 2), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if args.quality:
        results = measure_quality(args.limit)
        print(json.dumps(results, indent=2) if args.json else quality_table(results))
        return

    all_bits = [4, 8] if args.bits == "all" else [int(args.bits)]
    peers = [None] * len(all_bits)
    if args.chatglm_cpp or args.chatglm_cpp_model:
        files = args.chatglm_cpp_model or []
        if not args.chatglm_cpp or len(files) != len(all_bits):
            parser.error(f"chatglm.cpp needs --chatglm_cpp and {len(all_bits)} --chatglm_cpp_model, got {len(files)}")
        for path in (args.chatglm_cpp, *files):
            if not path.is_file():
                parser.error(f"there is no file {path}")
        peers = [(args.chatglm_cpp.resolve(), path) for path in files]
    for bits, peer in zip(all_bits, peers, strict=True):
        needed, free = needed_memory(bits, args.candidates, peer), free_memory("cpu")
        if free < needed:
            parser.error(
                f"these candidates need {needed / GB:.1f} GB of free memory together with INT{bits}, and "
                f"{free / GB:.1f} GB are free: name fewer --candidates"
            )

    results = []
    with main_errors(parser):
        for bits, peer in zip(all_bits, peers, strict=True):
            results.append(measure(bits, args.candidates, args.folder, args.rounds, args.steps, args.threads, peer))
            if args.delete:
                shutil.rmtree(args.folder / f"6b-int{bits}")
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print("\n\n".join(map(speed_table, results)))


if __name__ == "__main__":
    main()
