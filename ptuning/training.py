"""What `main.py` adds to transformers' Seq2SeqTrainer: a guard on the loss, progress, a plot, resuming, a forecast.

Everything hangs on the Trainer's own hooks: `training_step`, which its documentation offers for overriding, and
callbacks. A checkpoint is what the Trainer writes, and beside it the picture of the loss.

An interrupted run continues from its newest complete checkpoint and ends bit-equal to one that was not interrupted.
For that the loss is logged before every checkpoint (the Trainer forgets what it has not logged), and the settings that
decide the result travel in the checkpoint's trainer_state.json.
"""

import json
import math
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.trainer_callback import ExportableState

GIGABYTE = 1e9
PICTURE = "loss.png"
STATE_FILE = "trainer_state.json"
FOREIGN = "another program wrote it"
WEIGHTS_ONLY = "it has no state of the optimiser, as --save_only_model leaves that out"
SHOWN_CHARACTERS = 60  # of an example, in an error


# The loss -------------------------------------------------------------------------------------------------------------


class LossError(ArithmeticError):
    """A loss or gradient that training cannot go on from: where, and what may help."""


class TuningTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer that ends where the loss is no number or exactly zero.

    tokenizer  says which batch it was

    Raises LossError before the weights change, and before they are saved after a gradient that is no number.
    """

    def __init__(self, model, *args, tokenizer, **kwargs):
        self._use_cache = model.config.use_cache  # the Trainer turns it off: what is saved is for use, not for training
        super().__init__(model, *args, **kwargs)
        self._tokenizer = tokenizer

    def save_model(self, output_dir=None, _internal_call=False):
        """As in transformers, with the base's use_cache in config.json."""
        config = self.model.config
        config.use_cache, training = self._use_cache, config.use_cache
        super().save_model(output_dir, _internal_call)
        config.use_cache = training

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in transformers; the loss is checked."""
        input_ids = inputs["input_ids"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value) or value == 0:
            raise LossError(self._stopped(f"the loss is {value}", input_ids))
        return loss

    def log(self, logs, start_time=None):
        """As in transformers; the norm of the gradient is checked. Every checkpoint is preceded by a log."""
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(norm) and not self.args.fp16:  # fp16 leaves steps out until its scale fits
            raise LossError(self._stopped(f"the gradient is {norm}"))
        super().log(logs, start_time)

    def _stopped(self, what: str, input_ids: torch.Tensor | None = None) -> str:
        args = self.args
        step = self.state.global_step + (input_ids is not None)
        if input_ids is not None:
            ids = input_ids[0][input_ids[0] != self._tokenizer.pad_token_id]
            text = " ".join(self._tokenizer.decode(ids.tolist()).split())
            shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
            what += f" in the batch that begins with {shown!r}"
        advice = [f"a lower --learning_rate than {args.learning_rate:g}"]
        half = {parameter.dtype for parameter in self.model.parameters()} & {torch.float16}
        if args.fp16 or half:
            advice.append("--dtype bfloat16 or float32 instead of float16")
        if not args.max_grad_norm:
            advice.append("--max_grad_norm 1")
        if not args.warmup_steps:
            advice.append("--warmup_steps 100")
        saved = find_checkpoint(args.output_dir)
        kept = f"; {saved} is from before that" if saved else ""
        return f"stopped at step {step}: {what}: try {', '.join(advice)}{kept}"


# Progress -------------------------------------------------------------------------------------------------------------


def shown_time(seconds: float) -> str:
    """A duration in one unit: "40 s", "5 min", "1.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


class Progress(TrainerCallback):
    """Loss, learning rate, samples per second and time left on stderr: a bar in a terminal, else a line for each log.

    start  the step that a continued run starts from
    """

    def __init__(self):
        self.bar = None
        self.started = self.start = 0
        self.facts = ""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        if state.is_world_process_zero:
            self.started, self.start = time.monotonic(), state.global_step
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                bar_format="step {n_fmt}/{total_fmt} |{bar:24}|   {desc}",
                dynamic_ncols=True,
                leave=False,
                disable=None,  # where stderr is no terminal
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_description_str(f"{self.facts}   {self._speed(args, state)}".strip(), refresh=False)
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest loss."""
        if self.bar is None:
            return
        if "loss" in logs:
            self.facts = f"loss {logs['loss']:.3f}   lr {logs['learning_rate']:.1e}"
            if self.bar.disable:
                self._print(state, f"{self.facts}   {self._speed(args, state)}")
        elif "eval_loss" in logs:
            self._print(state, f"loss {logs['eval_loss']:.3f} on the validation file")

    def on_save(self, args, state, control, **kwargs):
        """Name the checkpoint."""
        if self.bar is not None:
            facts = f"{self.facts}   " * (not self.bar.disable)
            self._print(state, f"{facts}saved {checkpoint_folder(args.output_dir, state.global_step)}")

    def on_train_end(self, args, state, control, **kwargs):
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _speed(self, args, state) -> str:
        seconds, steps = time.monotonic() - self.started, state.global_step - self.start
        samples = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        left = (state.max_steps - state.global_step) * seconds / max(steps, 1)
        return f"{samples / max(seconds, 1e-9):.1f} samples/s   {shown_time(left)} left"

    def _print(self, state, facts: str) -> None:
        width = len(str(state.max_steps))
        self.bar.write(f"step {state.global_step:>{width}}/{state.max_steps}   {facts}", file=sys.stderr)


class LossPlot(TrainerCallback):
    """Draws the loss of the whole run, also of the part before an interruption, beside each checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        """Draw it where the checkpoint is."""
        if state.is_world_process_zero:
            plot_loss(state.log_history, checkpoint_folder(args.output_dir, state.global_step) / PICTURE)


def plot_loss(log_history: Sequence[Mapping], picture: Path) -> None:
    """Draw the losses of a TrainerState's log_history; the file appears whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window system is asked for

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss per answer token (nats)")
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="." if len(points) < 30 else None)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    temporary = picture.with_name(f".{picture.name}.part")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(picture)


def mean_loss(log_history: Iterable[Mapping]) -> float:
    """Mean training loss of all steps of a run: each logged value stands for the steps since the one before."""
    total, last = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else math.nan


# Resuming -------------------------------------------------------------------------------------------------------------


class RunSettings(TrainerCallback, ExportableState):
    """Keeps the settings of a run in its checkpoints, and logs the loss before each of them.

    fixed  name -> value of what must not change while a run goes on
    free   name -> value of what may, and is told
    """

    def __init__(self, fixed: Mapping, free: Mapping):
        self.fixed, self.free = dict(fixed), dict(free)

    def state(self) -> dict:
        """What trainer_state.json keeps."""
        return {"args": {"fixed": self.fixed, "free": self.free}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        """The intervals of logging and saving are those of this command, not of the checkpoint."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """Log where a checkpoint follows."""
        control.should_log |= control.should_save
        return control

    on_epoch_end = on_step_end


@dataclass(frozen=True)
class SavedRun:
    """A complete checkpoint: its folder, the steps and epochs done, settings and best checkpoint of its run."""

    folder: Path
    step: int
    epoch: float
    settings: RunSettings
    best: Path

    def is_finished(self, max_steps: int, num_train_epochs: float) -> bool:
        """Whether a run of that length has nothing left to do."""
        return self.step >= max_steps if max_steps > 0 else self.epoch >= num_train_epochs


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Where the Trainer saves after a step."""
    return Path(output_dir) / f"checkpoint-{step}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of checkpoints, complete or not, newest first."""
    names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")]
    steps = sorted((int(match[1]) for match in names if match), reverse=True)
    return [checkpoint_folder(output_dir, step) for step in steps]


def missing_in(folder: Path) -> str | None:
    """What a checkpoint lacks, as a phrase; None if training can continue from it.

    The main process writes trainer_state.json last; the others write their random states at the same time.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        processes = state["stateful_callbacks"][RunSettings.__name__]["args"]["free"]["processes"]
    except FileNotFoundError:
        return f"it has no {STATE_FILE}, which is written last"
    except ValueError:
        return f"its {STATE_FILE} is broken off"
    except (KeyError, TypeError):
        return FOREIGN
    if any(folder.glob("global_step*")) or any(folder.glob("pytorch_model_fsdp*")):
        return None  # DeepSpeed and FSDP have forms of their own
    random_states = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    if not (folder / "optimizer.pt").exists():
        return WEIGHTS_ONLY
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        if not zipfile.is_zipfile(folder / name):
            return f"its {name} is {'broken off' if (folder / name).is_file() else 'not there'}"
    return None


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that training can continue from; None if there is none."""
    return next((folder for folder in list_checkpoints(output_dir) if missing_in(folder) is None), None)


def read_run(folder: Path) -> SavedRun:
    """What a checkpoint says of its run. Raises ValueError if training cannot continue from it."""
    missing = missing_in(folder)
    if missing:
        raise ValueError(f"cannot continue from {folder}: {missing}")
    state = json.loads((folder / STATE_FILE).read_text())
    settings = RunSettings(**state["stateful_callbacks"][RunSettings.__name__]["args"])
    best = Path(state.get("best_model_checkpoint") or folder)
    return SavedRun(folder, state["global_step"], state["epoch"], settings, best if best.is_dir() else folder)


def saved_run(output_dir: str | Path, asked_for: str | None, say: Callable) -> SavedRun | None:
    """The run to continue: from the checkpoint asked for, or the newest one; None to start from the beginning.

    Folders whose saving was interrupted, behind that checkpoint, are deleted; say tells it.
    Raises ValueError if the checkpoint asked for is not complete, and if output_dir holds something else, or newer,
    that training would write over.
    """
    asked = read_run(Path(asked_for)) if asked_for else None
    for folder in list_checkpoints(output_dir):
        missing = missing_in(folder)
        if missing is None:
            newest = read_run(folder)
            if asked and newest.step > asked.step:
                raise ValueError(
                    f"{folder} is newer than {asked_for}: delete it, give another --output_dir, or leave "
                    "--resume_from_checkpoint out to continue from the newest"
                )
            return asked or newest
        if missing in (FOREIGN, WEIGHTS_ONLY):
            raise ValueError(
                f"cannot continue from {folder}: {missing}: give another --output_dir, or --overwrite_output_dir to "
                "start anew"
            )
        say(f"{folder} was not saved to the end ({missing}) and is deleted")
        remove_checkpoints([folder])
    return asked


def remove_checkpoints(folders: Iterable[Path]) -> None:
    """Delete checkpoints; one that is half deleted never looks complete."""
    for folder in folders:
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def compare_settings(saved: RunSettings, now: RunSettings, folder: Path) -> str:
    """What differs among the settings that may, as a phrase, or "".

    Raises ValueError if others differ: the run would be neither the old one nor the one that is asked for.
    """

    def differences(old: dict, new: dict) -> str:
        return ", ".join(
            f"{name} {_shown(old.get(name))} (now {_shown(new[name])})" for name in new if old.get(name) != new[name]
        )

    changed = differences(saved.fixed, now.fixed)
    if changed:
        raise ValueError(
            f"{folder} was trained with {changed}: give the same to continue, another --output_dir, or "
            "--overwrite_output_dir to start anew"
        )
    return differences(saved.free, now.free)


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# Memory ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a training step needs on its device, in bytes.

    weights      of the whole model
    learning     gradients and optimiser states of what is trained
    activations  what the layers keep for the way back, and what one of them computes with
    logits       of a batch, with their gradient
    """

    weights: int
    learning: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.learning + self.activations + self.logits


def forecast(model, batch_size: int, seq_len: int, checkpointing: bool) -> Forecast:
    """The memory of a training step with AdamW, computed from the sizes of the network.

    model                a ChatGLMForConditionalGeneration, or a PeftModel of one
    batch_size, seq_len  of one batch on one device
    """
    config, width = model.config, model.dtype.itemsize
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tokens, hidden, inner = batch_size * seq_len, config.hidden_size, config.inner_hidden_size
    # Numbers that a layer keeps of each token, counted by autograd's saved_tensors_hooks: more where the
    # inputs of linear layers are needed for the gradients of their weights.
    if any(name.endswith("mlp.dense_4h_to_h.weight") for name in trained):
        kept = 11 * hidden + 2 * inner
    else:
        kept = (8 if config.pre_seq_len else 10) * hidden + inner
    states = config.num_layers * tokens * hidden + tokens * kept if checkpointing else config.num_layers * tokens * kept
    prefix = 2 * config.num_layers * batch_size * (config.pre_seq_len or 0) * hidden
    matrix = hidden * inner if config.quantization_bit else 0  # made ready for its product
    return Forecast(
        weights=sum(sizes.values()),
        learning=3 * sum(sizes[name] for name in trained),
        activations=(states + 3 * prefix + matrix) * width,
        logits=tokens * config.vocab_size * (3 * 4 + (width if width < 4 else 0)),
    )


def forecast_lines(model, batch_size: int, seq_len: int, checkpointing: bool, free: float, place: str) -> list[str]:
    """What a step will need, in a line, and in a second one what would help if that is more than is free.

    free   bytes that are free beside the weights, which are there already
    place  the device
    """
    needs = forecast(model, batch_size, seq_len, checkpointing)
    other = forecast(model, batch_size, seq_len, not checkpointing)
    facts = [
        f"memory of a step, computed: {needs.total / GIGABYTE:.2f} GB",
        f"weights {needs.weights / GIGABYTE:.2f}",
        f"gradients and optimiser {needs.learning / GIGABYTE:.2f}",
        f"activations {needs.activations / GIGABYTE:.2f} ({other.activations / GIGABYTE:.2f} "
        f"{'without' if checkpointing else 'with'} gradient checkpointing)",
        f"logits {needs.logits / GIGABYTE:.2f}",
        f"free on {place} {free / GIGABYTE:.2f}",
    ]
    lines = ["   ".join(facts)]
    if needs.total > needs.weights + free:
        helps = []
        if not checkpointing:
            helps.append("--gradient_checkpointing")
        if batch_size > 1:
            helps.append("a smaller --per_device_train_batch_size with more --gradient_accumulation_steps")
        if needs.learning > needs.weights:
            helps.append("--pre_seq_len or --lora_rank instead of all parameters")
        elif not model.config.quantization_bit:
            helps.append("--quantization_bit 4")
        helps.append("a smaller --max_source_length")
        lines.append(f"this may be too little memory; what helps: {', '.join(helps)}")
    return lines
