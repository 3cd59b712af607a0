"""The flags of `ptuning/main.py`: those of the original script, those of this one, and the Trainer's.

What is unusual: flags that users of the original have in their scripts and that mean nothing here are accepted
(`OriginalArguments`), and `parse_arguments` tells which of them were given.
"""

import importlib.util
import math
import sys
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser, IntervalStrategy, Seq2SeqTrainingArguments

from utils import DEFAULT_MODEL, DTYPES

# What is taken without --learning_rate.
LEARNING_RATES = {"prefix": 2e-2, "projected prefix": 1e-3, "LoRA": 1e-3, "full": 1e-4}


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Names the default of a flag where there is one and the text does not."""

    def _get_help_string(self, action):
        if action.default in (None, "", False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _flag(default, help_text: str, *aliases: str, **options):
    """A field whose flag has this help text, further names, and options of `add_argument`."""
    return field(default=default, metadata={"help": help_text, "aliases": list(aliases), **options})


def _switch(help_text: str, *aliases: str):
    """A field that is None unless its flag is given, alone or with true or false."""
    return _flag(None, help_text, *aliases, nargs="?", const=True)


@dataclass
class ModelArguments:
    """The model and what of it is trained."""

    _argument_group_name = "model and method"

    model_name_or_path: str = _flag(
        DEFAULT_MODEL, "folder of a checkpoint, or its name on the Hugging Face hub such as THUDM/chatglm-6b"
    )
    model_revision: str | None = _flag(None, "branch, tag or commit of a hub checkpoint", "--revision")
    dtype: Literal["float32", "bfloat16", "float16"] | None = _flag(
        None,
        "number format of the frozen weights; what is trained is float32 (default: float32 on cpu and for full tuning, "
        "else bfloat16, or float16 where the GPU has no bfloat16)",
        choices=tuple(DTYPES),
    )
    quantization_bit: int | None = _flag(
        None, "bits per weight of the frozen linear layers, 4 or 8 (default: as the checkpoint is)", choices=(4, 8)
    )
    ptuning_checkpoint: str | None = _flag(
        None, "folder of an adapter to evaluate, or to go on training from", "--adapter"
    )
    pre_seq_len: int | None = _flag(None, "P-Tuning v2: length of the trained prefix, tokens")
    prefix_projection: bool = _flag(False, "P-Tuning v2: the prefix goes through a trained two-layer MLP")
    lora_rank: int | None = _flag(None, "LoRA: rank of the trained matrices")
    lora_alpha: float | None = _flag(None, "LoRA: the update is scaled by alpha / rank (default: twice the rank)")
    lora_dropout: float = _flag(0.0, "LoRA: share of the inputs that is dropped in training")
    lora_target: list[str] = field(
        default_factory=lambda: ["query_key_value"],
        metadata={"help": "LoRA: names of the linear layers: query_key_value dense dense_h_to_4h dense_4h_to_h"},
    )

    def __post_init__(self):
        _check_whole(self, "pre_seq_len", "lora_rank")
        _check(self.lora_alpha is None or 0 < self.lora_alpha < math.inf, "lora_alpha", "above 0", self.lora_alpha)
        _check(0 <= self.lora_dropout < 1, "lora_dropout", "from 0 to below 1", self.lora_dropout)
        if self.pre_seq_len and self.lora_rank:
            raise ValueError("--pre_seq_len is P-Tuning v2 and --lora_rank is LoRA: give one of them")
        if self.prefix_projection and not (self.pre_seq_len or self.ptuning_checkpoint):
            raise ValueError("--prefix_projection belongs to P-Tuning v2: add --pre_seq_len")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * (self.lora_rank or 0)

    @property
    def method(self) -> str:
        """What the flags ask for: "prefix", "LoRA" or "full"."""
        return "prefix" if self.pre_seq_len else "LoRA" if self.lora_rank else "full"


@dataclass
class DataArguments:
    """The examples, and how they become tokens."""

    _argument_group_name = "data"

    train_file: str | None = _flag(None, "examples to train on: .json, .jsonl or .csv")
    validation_file: str | None = _flag(None, "examples for --do_eval")
    test_file: str | None = _flag(None, "examples for --do_predict")
    prompt_column: str | None = _flag(None, "column of the question (default: found by its usual names)")
    response_column: str | None = _flag(None, "column of the answer (default: found by its usual names)")
    history_column: str | None = _flag(None, "column of the earlier rounds (default: found by its usual names)")
    source_prefix: str = _flag("", "text in front of every prompt")
    preview_data: bool = _flag(False, "show three examples as the model will see them, and end")
    train_on_all_turns: bool = _flag(False, "learn every answer of a conversation, not only the last one")
    max_source_length: int = _flag(1024, "most tokens of a prompt; the oldest rounds go first")
    max_target_length: int = _flag(128, "most tokens of an answer")
    val_max_target_length: int | None = _flag(
        None, "most tokens of an answer in evaluation (default: max_target_length)"
    )
    padding_side: Literal["right", "left"] = _flag("right", "where short rows of a training batch are filled up")
    pad_to_max_length: bool = _flag(
        False, "fill every row up to max_source_length + max_target_length, not only to the longest of its batch"
    )
    max_train_samples: int | None = _flag(None, "take the first so many examples only")
    max_eval_samples: int | None = _flag(None, "the same for --do_eval")
    max_predict_samples: int | None = _flag(None, "the same for --do_predict")
    num_beams: int = _flag(1, "beams of the search for an answer in evaluation; 1 = none")
    preprocessing_num_workers: int | None = _flag(None, "processes that turn text into tokens")
    replay_file: str | None = _flag(None, "general dialogues to mix in, against forgetting")
    replay_ratio: float = _flag(0.2, "share of them among what is trained on")
    general_file: str | None = _flag(None, "general dialogues whose perplexity before and after shows the forgetting")

    def __post_init__(self):
        _check_whole(self, "max_train_samples", "max_eval_samples", "max_predict_samples", "num_beams")
        _check_whole(self, "val_max_target_length", "preprocessing_num_workers")
        # Room for one token of text beside the control tokens.
        _check(self.max_source_length >= 2, "max_source_length", "at least 2 tokens", self.max_source_length)
        _check(self.max_target_length >= 3, "max_target_length", "at least 3 tokens", self.max_target_length)
        _check(0 < self.replay_ratio < 1, "replay_ratio", "between 0 and 1", self.replay_ratio)
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


@dataclass
class TuningArguments(Seq2SeqTrainingArguments):
    """The Trainer's own flags, with other defaults."""

    _argument_group_name = "training (flags of transformers' Seq2SeqTrainer)"

    output_dir: str | None = _flag(None, "folder for checkpoints and the result")
    overwrite_output_dir: bool = _flag(
        False, "start anew: checkpoints in output_dir are deleted (default: training continues from the newest one)"
    )
    resume_from_checkpoint: str | None = _flag(
        None, "checkpoint to continue from (default: the newest complete one in output_dir)"
    )
    learning_rate: float | None = _flag(
        None, "(default: " + ", ".join(f"{rate:g} {method}" for method, rate in LEARNING_RATES.items()) + ")"
    )
    gradient_checkpointing: bool | None = _switch(
        "keep the input of each layer only and compute the rest twice: less memory, a third slower "
        "(default: for models above 0.1 B parameters)"
    )
    logging_steps: float = _flag(10, "steps between two values of the loss; a share of all steps if below 1")
    logging_first_step: bool = _flag(True, "log the loss of the first step too")
    logging_nan_inf_filter: bool = _flag(False, "hide losses that are no number instead of ending there")
    ddp_find_unused_parameters: bool | None = _flag(False, "look for parameters without gradient in each step")
    # Names of older transformers, which users have in their scripts.
    eval_strategy: IntervalStrategy | str = field(
        default="no", metadata={"help": "when to evaluate while training", "aliases": ["--evaluation_strategy"]}
    )
    use_cpu: bool = _flag(False, "train on the CPU even if there is a GPU", "--no_cuda")
    warmup_steps: float = _flag(
        0, "steps in which the learning rate rises; a share of all steps if below 1", "--warmup_ratio"
    )

    def __post_init__(self):
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ValueError("--deepspeed needs the package deepspeed, which is not there: pip install deepspeed")
        if self.output_dir is None and (self.do_train or self.do_eval or self.do_predict):
            raise ValueError("--output_dir is missing: give the folder for the result")
        _check_whole(self, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        _check(self.max_steps == -1 or self.max_steps > 0, "max_steps", "at least 1", self.max_steps)
        _check(self.num_train_epochs > 0, "num_train_epochs", "above 0", self.num_train_epochs)
        _check(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295", self.seed)
        metric = self.metric_for_best_model
        _check(metric in (None, "loss", "eval_loss"), "metric_for_best_model", "loss", metric)
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("--overwrite_output_dir starts anew and --resume_from_checkpoint continues: give one")
        rate = self.learning_rate
        _check(rate is None or 0 < rate < math.inf, "learning_rate", "above 0", rate)
        if self.logging_nan_inf_filter:
            raise ValueError("a loss that is no number ends the training: leave --logging_nan_inf_filter out")
        if str(self.fsdp).lower() == "true":  # as transformers wants it, which the command line cannot say
            self.fsdp = True
        # Under torchrun, accelerate would not join the processes of a machine without GPU that did not ask for its CPU.
        self.use_cpu |= not torch.accelerator.is_available()
        # transformers 5.23 calls it activation checkpointing and warns of the older name.
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        self.asked_for_checkpointing = getattr(self, "activation_checkpointing", self.gradient_checkpointing)
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible and this is one process: start one for each with `torchrun "
                f"--nproc_per_node={self.n_gpu} ptuning/main.py ...`, or choose one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.set_checkpointing(bool(self.asked_for_checkpointing))
        self.dataloader_pin_memory &= self.device.type == "cuda"

    def set_checkpointing(self, on: bool) -> None:
        """Say whether the Trainer switches gradient checkpointing on."""
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if hasattr(self, name):
                setattr(self, name, on)
                setattr(self, f"{name}_kwargs", {"use_reentrant": False} if on else None)


@dataclass
class OriginalArguments:
    """Flags of the original that are accepted and change nothing."""

    _argument_group_name = "accepted for the sake of old scripts, without effect"

    config_name: str | None = _flag(None, "the model folder has its configuration")
    tokenizer_name: str | None = _flag(None, "the model folder has its tokenizer")
    use_fast_tokenizer: bool = _flag(True, "there is one tokenizer")
    cache_dir: str | None = _flag(None, "the environment variable HF_HOME says where downloads go")
    use_auth_token: bool = _flag(False, "the environment variable HF_TOKEN does")
    resize_position_embeddings: bool | None = _switch("positions are computed")
    lang: str | None = _flag(None, "there is one vocabulary")
    forced_bos_token: str | None = _flag(None, "an answer starts with <sop>")
    dataset_name: str | None = _flag(None, "give files")
    dataset_config_name: str | None = _flag(None, "give files")
    overwrite_cache: bool = _flag(False, "nothing is cached")
    ignore_pad_token_for_loss: bool = _flag(True, "padding is never learnt")

    def given(self) -> list[str]:
        """The flags that were given, by name."""
        return [f"--{item.name}" for item in fields(self) if getattr(self, item.name) != item.default]


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[HfArgumentParser, ModelArguments, DataArguments, TuningArguments, list[str]]:
    """The parser, for its `exit`, the three groups of settings, checked, and the names of flags without effect.

    argv  the command line; None = that of the program

    Ends the program with one sentence and exit code 2 if the flags are wrong.
    """
    # The Trainer alone has 120 flags: the usual line that lists them all would hide the error below it.
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TuningArguments, OriginalArguments),
        usage="%(prog)s --do_train --train_file FILE --output_dir FOLDER [--pre_seq_len N | --lora_rank N] ...",
        description="Tune ChatGLM with P-Tuning v2, LoRA or in full, and evaluate it.",
        epilog="Without --pre_seq_len and --lora_rank all parameters are trained. Training that was interrupted "
        "continues when the same command is given again.",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    argv = sys.argv[1:] if argv is None else argv
    # torchrun and deepspeed start scripts with it.
    argv = [flag.replace("--local-rank", "--local_rank") for flag in argv]
    try:
        model_args, data_args, training_args, original, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(_unknown(parser, unknown))
        _check_task(data_args, training_args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    return parser, model_args, data_args, training_args, original.given()


def _check_task(data_args: DataArguments, training_args: TuningArguments) -> None:
    """Raises ValueError unless there is something to do, and files to do it with."""
    tasks = {
        "--do_train": (training_args.do_train, "train_file"),
        "--do_eval": (training_args.do_eval, "validation_file"),
        "--do_predict": (training_args.do_predict, "test_file"),
    }
    files = [name for asked, name in tasks.values() if asked]
    if not files and not data_args.preview_data:
        raise ValueError(f"nothing to do: give {', '.join(tasks)} or --preview_data")
    for name in files:
        if getattr(data_args, name) is None:
            raise ValueError(f"--{name} is missing: give the file with the examples")
    for name in (*files, "replay_file", "general_file"):
        path = getattr(data_args, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"--{name}: there is no file {path}")
    if data_args.preview_data and data_args.train_file is None:
        raise ValueError("--train_file is missing: give the file to preview")


def _unknown(parser: HfArgumentParser, unknown: list[str]) -> str:
    """What the user is told of words that are no flag."""
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        return f"{' '.join(unknown)} belongs to no flag"
    name = flag.partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings if "_" in option[2:]]
    close = get_close_matches(name.replace("-", "_").replace("__", "--", 1), options, n=1)
    return f"there is no flag {name}" + (f": did you mean {close[0]}?" if close else "")


def _check(holds: bool, name: str, allowed: str, value) -> None:
    if not holds:
        raise ValueError(f"--{name} must be {allowed}, got {value}")


def _check_whole(arguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        _check(value is None or value >= 1, name, "at least 1", value)
