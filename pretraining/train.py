"""Train the embedded model from scratch: `python pretraining/train.py`.

GLM's own objective in the chat format: the prompt as `chat` builds it, `[gMASK] <sop>`, the answer, `<eop>`; the prompt
is read in both directions, and only the answer is learnt. Weights stay in float32, matrix products run in bfloat16.
Matrices are trained with Muon, the rest with AdamW. The learning rate warms up, stays, and falls to zero at the end.

One seed decides everything: initial weights, phrasings, generated dialogues and the order of batches. A run that was
interrupted continues from its newest checkpoint with the same batches; on the same machine it ends bit-equal.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer  # noqa: E402
from chatglm.chat import build_prompt  # noqa: E402
from chatglm.tokenization_chatglm import encode_whitespace  # noqa: E402
from pretraining.corpus import CORPUS_FOLDER, load_dialogues, training_examples  # noqa: E402
from utils import main_errors  # noqa: E402

IGNORED = -100
GRADIENT_NORM = 1.0
# A run cannot be continued with others; --steps and --decay may change on the way.
FIXED_SETTINGS = (
    *("hidden_size", "num_layers", "num_attention_heads", "batch_tokens", "max_length"),
    *("muon_lr", "adam_lr", "warmup", "seed"),
)
COPY, FIND = KINDS = ("请重复", "请查找")
SAMPLED_PROMPTS = 0.5  # share of prompts that are cut into sampled pieces
SAMPLED_CUTS = 64  # the ways of cutting that are drawn from
SAMPLING_ALPHA = 0.15  # 0: all of them are as likely; 1: by their likelihood
DROPPED_PIECES = 0.08  # share of the pieces of such a prompt that are left out
FIRST_BATCHES = 300  # of FIRST_TOKENS, twice: copies of FIRST_PIECES different pieces, then look-ups among all pieces
FIRST_TOKENS = 2048
FIRST_PIECES = 300
LOOKUP_SHARE = (0.35, 0.2, 0.1)  # of the tokens of epochs 1, 2 and all later ones
LONGEST_COPY = 40  # pieces
SMOOTHING = 0.98  # of the loss that is shown


@dataclass
class Row:
    """One example as ids; answer_start is the index of its first answer token."""

    ids: list[int]
    answer_start: int


@dataclass
class Batch:
    """input_ids and labels [batch, seq_len], padded on the right; labels are -100 but for the answers."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def sample_pieces(text: str, tokenizer: ChatGLMTokenizer, rng: random.Random) -> list[str]:
    """One of the likeliest ways to cut the text into pieces, drawn by likelihood to the power of SAMPLING_ALPHA, with
    gaps. Not by sentencepiece's own sampling: that differs from process to process with the same seed.
    """
    sp_model = tokenizer.sp_model
    cuts = sp_model.nbest_encode(encode_whitespace(text), out_type=int, nbest_size=SAMPLED_CUTS)
    scores = [sum(map(sp_model.get_score, ids)) for ids in cuts]
    (ids,) = rng.choices(cuts, [math.exp(SAMPLING_ALPHA * (score - scores[0])) for score in scores])
    pieces = sp_model.id_to_piece(ids)
    return [piece for piece in pieces if rng.random() >= DROPPED_PIECES] or pieces


def encode_example(
    example, tokenizer: ChatGLMTokenizer, max_length: int, rng: random.Random | None = None
) -> Row | None:
    """The example as ids, or None if it is longer than max_length tokens.

    rng: cut half of the prompts into less likely pieces, as unseen wordings will be (subword regularisation,
    arXiv 1804.10959), and leave some out, but none of a prompt whose pieces the answer may repeat; None cuts as in use.
    """
    text = build_prompt(example.query, example.history)
    if rng is not None and not example.history and not example.generated and rng.random() < SAMPLED_PROMPTS:
        pieces = sample_pieces(text, tokenizer, rng)
        prompt = tokenizer.build_inputs_with_special_tokens(tokenizer.convert_tokens_to_ids(pieces))
    else:
        prompt = tokenizer(text)["input_ids"]
    answer = tokenizer.encode(example.answer, add_special_tokens=False)
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return Row(ids, len(prompt)) if len(ids) <= max_length else None


def collate(rows: list[Row], pad_token_id: int) -> Batch:
    """Rows of similar length as one batch. Padding behind the answer needs no mask: the answer is causal."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        input_ids[i, : len(ids)] = ids
        labels[i, row.answer_start : len(ids)] = ids[row.answer_start :]
    return Batch(input_ids, labels)


def lookup_rows(tokenizer: ChatGLMTokenizer, rng: random.Random, width: int, count: int, kinds=KINDS, few=False):
    """count rows of about width ids of random pieces: texts to repeat, and pairs `key: value`, one of which is asked.

    Names, numbers and extraction need what these teach. Among other text a model of this size does not find it in
    millions of tokens; alone, and with few different pieces, copying takes half a million (induction heads,
    arXiv 2209.11895). Once found it must be kept up, or the rest of the corpus washes it out.
    """
    pieces = range(tokenizer.convert_tokens_to_ids("▁") + 1, tokenizer.convert_tokens_to_ids("[MASK]"))
    pieces = pieces[:FIRST_PIECES] if few else pieces

    def ids(text, **options):
        return tokenizer.convert_tokens_to_ids(tokenizer.encode_pieces(text, **options))

    colon, comma = (ids(mark, add_dummy_prefix=False)[0] for mark in "：，")
    rows = []
    for _ in range(count):
        kind = rng.choice(kinds) if width > 32 else COPY
        request = ids(build_prompt(f"{kind}：", []))
        room = width - len(request) - 3
        if kind == COPY:
            text = answer = rng.choices(pieces, k=rng.randint(3, max(3, min(LONGEST_COPY, room // 2))))
        else:
            keys = rng.sample(pieces, max(2, min(10, room // 7)))
            values = [rng.choices(pieces, k=rng.randint(1, 4)) for _ in keys]
            text = [piece for key, value in zip(keys, values, strict=True) for piece in (key, colon, *value, comma)]
            asked = rng.randrange(len(keys))
            text, answer = [*text, keys[asked]], values[asked]
        prompt = tokenizer.build_inputs_with_special_tokens([*request, *text])
        rows.append(Row([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return rows


def first_batches(tokenizer: ChatGLMTokenizer, rng: random.Random) -> list[Batch]:
    """The batches of epoch 0: copies of few different pieces, then look-ups among all."""
    batches = []
    for options in ({"kinds": [COPY], "few": True}, {}):
        for _ in range(FIRST_BATCHES):
            width = rng.randint(24, 2 * LONGEST_COPY + 16)
            rows = lookup_rows(tokenizer, rng, width, FIRST_TOKENS // width, **options)
            batches.append(collate(rows, tokenizer.pad_token_id))
    return batches


def epoch_batches(dialogues, tokenizer, seed: int, epoch: int, batch_tokens: int, max_length: int) -> list[Batch]:
    """The batches of one epoch: rows of similar length together, at most batch_tokens with padding, in random order.

    Epoch 0 teaches to look things up and nothing else; each later batch keeps a share of that.
    """
    rng = random.Random(f"{seed}/{epoch}")
    if epoch == 0:
        return first_batches(tokenizer, rng)
    lookup_tokens = round(batch_tokens * LOOKUP_SHARE[min(epoch, len(LOOKUP_SHARE)) - 1])
    batch_tokens -= lookup_tokens
    rows = [encode_example(example, tokenizer, max_length, rng) for example in training_examples(dialogues, rng)]
    rows = sorted((row for row in rows if row is not None), key=lambda row: len(row.ids) + rng.random() * 4)
    batches, current = [], []
    for row in rows:
        if current and max(len(row.ids), *(len(r.ids) for r in current)) * (len(current) + 1) > batch_tokens:
            batches.append(current)
            current = []
        current.append(row)
    batches.append(current)
    for batch in batches:
        width = max(len(row.ids) for row in batch)
        batch += lookup_rows(tokenizer, rng, width, lookup_tokens // width)
    rng.shuffle(batches)
    return [collate(batch, tokenizer.pad_token_id) for batch in batches]


def stream_batches(make_epoch, start_epoch: int, start_batch: int) -> Iterator[tuple[int, int, Batch]]:
    """(epoch, index, batch) for ever, from the given place on."""
    epoch = start_epoch
    while True:
        for index, batch in enumerate(make_epoch(epoch)):
            if epoch > start_epoch or index >= start_batch:
                yield epoch, index, batch
        epoch += 1


def answer_loss(model: ChatGLMForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the answer tokens; the head runs on the positions that predict one, and on no other."""
    hidden_states = model.transformer(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    predicts = targets != IGNORED
    logits = model.lm_head(hidden_states[:, :-1][predicts])
    return nn.functional.cross_entropy(logits.float(), targets[predicts])


def model_config(args: argparse.Namespace, tokenizer: ChatGLMTokenizer) -> ChatGLMConfig:
    """The sizes asked for, with the ids of the tokenizer."""
    return ChatGLMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        inner_hidden_size=4 * args.hidden_size,
        use_cache=True,
        tie_word_embeddings=False,  # an own head learns faster here: the residual favours repeating the input
        **tokenizer.config_ids,
    )


def initial_model(config: ChatGLMConfig, seed: int) -> ChatGLMForConditionalGeneration:
    """A model with Xavier weights: with the strong residual (alpha), layers that start small learn slowly.

    The head starts as a rotation of the embedding: what copies one token of the prompt then copies every other, even
    those that training hardly shows. An equal head would start by repeating the last token: the residual favours it.
    """
    torch.manual_seed(seed)
    model = ChatGLMForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # faster than sdpa for rows this short
    rotation = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q
    model.lm_head.weight.data = model.transformer.word_embeddings.weight.data @ rotation
    for layer in model.transformer.layers:
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                # The projection interleaves three matrices: each gets the range of its own shape.
                fan_out = weight.shape[0] // 3 if "query_key_value" in name else weight.shape[0]
                bound = (6 / (weight.shape[1] + fan_out)) ** 0.5
                nn.init.uniform_(weight, -bound, bound)
    return model


def make_optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982) for the matrices of the layers, AdamW for embedding, head, norms and biases."""
    matrices = [p for p in model.transformer.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor of the learning rate: rises over warmup steps, falls linearly to 0 over the last part (decay)."""
    falling = max(1, round(steps * decay))
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (steps - step) / falling))


def write_atomically(write, path: Path) -> None:
    """Call write(temporary path), then rename: a file of that name is always whole."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    temporary.replace(path)


def plot_loss(log: Path, picture: Path) -> None:
    """Draw the loss of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot([p["tokens"] / 1e6 for p in points], [p["loss"] for p in points], linewidth=1)
    axes.set(xlabel="million tokens seen", ylabel="loss per answer token (nats)", yscale="log", title="ChatGLM-Tiny")
    axes.grid(which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def save_model(model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    """Write the finished model in float16, as load_model reads it.

    Not with save_pretrained: that would put copies of the package's source files beside the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(lambda path: save_file(weights, path, metadata={"format": "pt"}), folder / "model.safetensors")
    config = copy.deepcopy(model.config)
    config.dtype = "float16"
    config.architectures = [type(model).__name__]
    config.to_json_file(folder / "config.json")
    tokenizer.save_vocabulary(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}\n')


def build_parser() -> argparse.ArgumentParser:
    """All settings; the defaults are those of the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, default=CORPUS_FOLDER, help="folder of dialogues (default: %(default)s)")
    add(
        "--tokenizer",
        type=Path,
        default=ROOT / "chatglm" / "tiny",
        help="folder of the vocabulary (default: %(default)s)",
    )
    add(
        "--run",
        type=Path,
        default=ROOT / "pretraining" / "run",
        help="checkpoints, log and plot (default: %(default)s)",
    )
    add("--output", type=Path, default=ROOT / "chatglm" / "tiny", help="the finished model (default: %(default)s)")
    add("--steps", type=int, default=2600, help="batches to train on (default: 2600)")
    add("--batch_tokens", type=int, default=6144, help="most tokens of a batch, padding included (default: 6144)")
    add("--max_length", type=int, default=512, help="longer examples are left out, tokens (default: 512)")
    add("--hidden_size", type=int, default=384, help="width of the network (default: 384)")
    add("--num_layers", type=int, default=6, help="layers of the network (default: 6)")
    add("--num_attention_heads", type=int, default=6, help="heads of each layer (default: 6)")
    add("--muon_lr", type=float, default=3e-3, help="learning rate of the matrices (default: 3e-3)")
    add("--adam_lr", type=float, default=3e-3, help="learning rate of everything else (default: 3e-3)")
    add("--warmup", type=int, default=50, help="steps of rising learning rate (default: 50)")
    add("--decay", type=float, default=0.45, help="last part of the run with falling learning rate (default: 0.45)")
    add("--save_every", type=int, default=200, help="steps between checkpoints (default: 200)")
    add("--seed", type=int, default=0, help="decides everything random (default: 0)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, or continue training; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    settings = {name: getattr(args, name) for name in FIXED_SETTINGS}
    with main_errors(parser):
        tokenizer = ChatGLMTokenizer.from_pretrained(args.tokenizer)
        dialogues = load_dialogues(args.corpus)
    model = initial_model(model_config(args, tokenizer), args.seed)
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    args.run.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.run / "checkpoint.pt", args.run / "log.jsonl"
    step = tokens = epoch = batch_index = 0
    seconds, smoothed = 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        changed = [f"--{name} {value}" for name, value in state["settings"].items() if value != settings[name]]
        if changed:
            parser.error(f"{checkpoint} was made with {' '.join(changed)}: use that, or another --run")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, epoch, batch_index = state["step"], state["tokens"], state["epoch"], state["batch_index"]
        seconds, smoothed = state["seconds"], state["loss"]
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept))
        print(f"continuing at step {step} of {args.steps} from {checkpoint}", file=sys.stderr)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(dialogues)} dialogues, {args.steps} steps", file=sys.stderr)

    def make_epoch(number):
        return epoch_batches(dialogues, tokenizer, args.seed, number, args.batch_tokens, args.max_length)

    def save(step, epoch, batch_index):
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step, "tokens": tokens, "epoch": epoch, "batch_index": batch_index,
            "seconds": seconds, "loss": smoothed, "settings": settings,
        }  # fmt: skip
        write_atomically(lambda path: torch.save(state, path), checkpoint)
        plot_loss(log, args.run / "loss.png")

    model.train()
    batches = stream_batches(make_epoch, epoch, batch_index)
    clock = time.perf_counter()
    while step < args.steps:
        epoch, batch_index, batch = next(batches)
        factor = lr_factor(step, args.steps, args.warmup, args.decay)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = answer_loss(model, batch)
        value = loss.item()
        if not value < float("inf"):
            print(f"the loss is {value} at step {step}: lower the learning rates", file=sys.stderr)
            return 1
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        smoothed = value if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * value
        step += 1
        tokens += batch.input_ids.numel()
        now = time.perf_counter()
        seconds, clock = seconds + now - clock, now
        saves = step % args.save_every == 0 or step == args.steps
        if saves or step % 10 == 0:
            point = {"step": step, "tokens": tokens, "loss": round(smoothed, 4), "seconds": round(seconds)}
            with log.open("a") as lines:
                lines.write(json.dumps(point) + "\n")
            left = seconds / step * (args.steps - step)
            done = int(24 * step / args.steps)
            print(
                f"[{'#' * done:<24}] step {step}/{args.steps}   epoch {epoch}   loss {smoothed:.3f}   "
                f"lr {factor:.2f}   {tokens / seconds:.0f} tokens/s   {left / 60:.0f} min left",
                file=sys.stderr,
                end="\n" if saves or not sys.stderr.isatty() else "\r",
                flush=True,
            )
        if saves:
            save(step, epoch, batch_index + 1)

    save_model(model, tokenizer, args.output)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
