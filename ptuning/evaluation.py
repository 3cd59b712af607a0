"""How good a model is: answers to a test set and their scores, and the perplexity of written answers.

Under torchrun every process takes a share of the work, and all of them get the whole result.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import distributed, nn
from tqdm import tqdm

from chatglm.chat import decode_response

from .data import IGNORED, encode_prompt
from .metrics import compute_scores
from .training import shown_time

PREDICTIONS_FILE = "generated_predictions.txt"


def evaluate(
    trainer,
    tokenizer,
    examples: Sequence,
    dataset,
    prefix: str,
    *,
    max_source_length: int,
    max_new_tokens: int,
    num_beams: int = 1,
) -> dict[str, float]:
    """Loss and scores of the trainer's model, printed and saved as `{prefix}_results.json` in its output_dir.

    examples  the Examples that are to be answered
    dataset   the same ones as features, for the loss
    prefix    "eval" answers them only with --predict_with_generate; "predict" always, and writes the answers to
              `generated_predictions.txt`

    The references are those of `examples` whole, not cut as the labels are.
    """
    metrics = trainer.evaluate(dataset, metric_key_prefix=prefix)
    metrics[f"{prefix}_samples"] = len(examples)
    if prefix == "predict" or trainer.args.predict_with_generate:
        prompts = [encode_prompt(tokenizer, example, max_source_length) for example in examples]
        batch_size = trainer.args.per_device_eval_batch_size
        predictions = generate_answers(trainer.model, tokenizer, prompts, batch_size, max_new_tokens, num_beams)
        references = [as_answer(tokenizer, example.response) for example in examples]
        scores = compute_scores(predictions, references)
        metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
        if prefix == "predict" and trainer.is_world_process_zero():
            write_predictions(Path(trainer.args.output_dir) / PREDICTIONS_FILE, references, predictions)
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def as_answer(tokenizer, text: str) -> str:
    """The text as the model would show it if it wrote just that: the tokenizer makes `（` of it `(`."""
    return decode_response(tokenizer, torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long))


def write_predictions(path: Path, references: Sequence[str], predictions: Sequence[str]) -> None:
    """Write a JSON object a line: `{"labels": reference, "predict": prediction}`."""
    with path.open("w", encoding="utf-8") as file:
        for reference, prediction in zip(references, predictions, strict=True):
            file.write(json.dumps({"labels": reference, "predict": prediction}, ensure_ascii=False) + "\n")


def generate_answers(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    do_sample: bool = False,
    **options,
) -> list[str]:
    """The model's answer to each prompt, as `chat` would show it, in the order of the prompts.

    prompts         ids of each, ending with `[gMASK] <sop>`
    batch_size      prompts answered at a time by each process; halved for good when memory runs out
    max_new_tokens  most tokens of an answer; how many answers reached it is told on stderr
    options         of `generate`, such as top_p and temperature
    """
    rank, processes = _process()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # the most memory first
    waiting, answers, unfinished = order[rank::processes], {}, 0
    options |= {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample, "use_cache": True}
    with _evaluating(model), _progress(len(waiting), "answers", shown=rank == 0) as advance:
        while waiting:
            batch = waiting[:batch_size]
            ids = _generate(model, tokenizer, [prompts[i] for i in batch], options)
            if ids is None:
                batch_size = len(batch) // 2
                print(f"out of memory: {batch_size} prompts at a time from here on", file=sys.stderr)
                clear_device_cache(garbage_collection=True)
                continue
            ends = torch.isin(ids, torch.tensor(_end_ids(model), device=ids.device))
            for i, row, end in zip(batch, ids, ends, strict=True):
                unfinished += not bool(end.any())
                answers[i] = decode_response(tokenizer, row[: end.int().argmax()] if end.any() else row)
            del waiting[: len(batch)]
            advance(len(batch))
    shares = _gather((answers, unfinished))
    unfinished = sum(share[1] for share in shares)
    if unfinished and rank == 0:
        print(
            f"{unfinished} of {len(prompts)} answers were cut at {max_new_tokens} tokens: longer ones may score higher",
            file=sys.stderr,
        )
    answers = {i: text for share in shares for i, text in share[0].items()}
    return [answers[i] for i in range(len(prompts))]


def _generate(model, tokenizer, prompts: list[list[int]], options: dict) -> torch.Tensor | None:
    """Ids of the answers [len(prompts), length], or None if memory ran out and fewer prompts at a time may do."""
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    input_ids = torch.tensor(
        [[tokenizer.pad_token_id] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
    )
    attention_mask = torch.arange(width) >= torch.tensor(pads)[:, None]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    try:
        ids = model.generate(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **options)
    except RuntimeError as error:
        if len(prompts) == 1 or not should_reduce_batch_size(error):
            raise
        return None
    return ids[:, width:]


def _end_ids(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def perplexity(model, examples: Sequence, collator: Callable, batch_size: int) -> float:
    """exp of the mean loss per learnt token: the number of tokens between which the model is as good as undecided.

    examples  features that collator makes a batch of

    Raises ValueError if no example has a token to be learnt.
    """
    rank, processes = _process()
    order = sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True)[rank::processes]
    total, count = 0.0, 0
    with _evaluating(model), _progress(len(order), "perplexity", shown=rank == 0) as advance:
        for start in range(0, len(order), batch_size):
            batch = collator(order[start : start + batch_size]).copy()
            targets = batch.pop("labels")[:, 1:].to(model.device)
            learnt = targets != IGNORED
            logits = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits
            # In float32, and a sum: the model's own loss is a mean, rounded to the dtype of the network.
            total += nn.functional.cross_entropy(
                logits[:, :-1][learnt].float(), targets[learnt], reduction="sum"
            ).item()
            count += int(learnt.sum())
            advance(len(batch["input_ids"]))
    totals, counts = zip(*_gather((total, count)), strict=True)
    if not sum(counts):
        raise ValueError("perplexity needs examples with an answer, got none")
    return torch.tensor(math.fsum(totals) / sum(counts), dtype=torch.float64).exp().item()  # inf where math.exp raises


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """No dropout, no gradients; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _progress(total: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows how far the work is, on stderr: a bar in a terminal, else a line for each tenth. Yields what to call."""
    started, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        bar.update(count)
        tenths, done = 10 * done // total, done + count
        if shown and bar.disable and 10 * done // total > tenths:
            rate = done / (time.monotonic() - started)
            left = shown_time((total - done) / rate)
            print(f"{what} {done:>{len(str(total))}}/{total}   {rate:.1f}/s   {left} left", file=sys.stderr)

    with tqdm(total=total, desc=what, disable=None if shown else True) as bar:
        yield advance


def _process() -> tuple[int, int]:
    """Number of this process, from 0, and of how many."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gather(value) -> list:
    """The value of every process, in order."""
    _, processes = _process()
    values = [value] * processes
    if processes > 1:
        distributed.all_gather_object(values, value)
    return values
