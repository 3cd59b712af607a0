"""Tune ChatGLM and evaluate it: `python ptuning/main.py --do_train --train_file FILE --output_dir FOLDER ...`.

--pre_seq_len N trains a prefix (P-Tuning v2), --lora_rank N LoRA matrices, and without either all parameters are
trained. `train.sh` and the other scripts beside this file show the flags in use; README.md explains them.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.utils.memory import should_reduce_batch_size  # noqa: E402
from pyarrow import compute  # noqa: E402
from transformers import PrinterCallback, ProgressCallback, TrainerState, set_seed  # noqa: E402

from chatglm.adapters import apply_adapter, open_adapter  # noqa: E402
from chatglm.checkpoint import load_tokenizer, open_checkpoint  # noqa: E402
from ptuning.arguments import (  # noqa: E402
    LEARNING_RATES,
    DataArguments,
    ModelArguments,
    TuningArguments,
    parse_arguments,
)
from ptuning.data import (  # noqa: E402
    Collator,
    Example,
    cut_report,
    fingerprint,
    mix_replay,
    preview,
    read_examples,
    to_dataset,
)
from ptuning.evaluation import evaluate, perplexity  # noqa: E402
from ptuning.training import (  # noqa: E402
    GIGABYTE,
    PICTURE,
    STATE_FILE,
    LossError,
    LossPlot,
    Progress,
    RunSettings,
    SavedRun,
    TuningTrainer,
    compare_settings,
    find_checkpoint,
    forecast_lines,
    list_checkpoints,
    mean_loss,
    plot_loss,
    remove_checkpoints,
    saved_run,
    shown_time,
)
from utils import SMALL_MODEL, free_memory, load_model, main_errors, peak_memory  # noqa: E402

PREFIX, LORA, FULL = "prefix", "LoRA", "full"  # the methods; the first two as chatglm.adapters calls them


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate and predict as the flags say; returns the exit code."""
    parser, model_args, data_args, training_args, ignored = parse_arguments(argv)
    transformers.logging.set_verbosity_error()  # what matters is said here
    transformers.logging.disable_progress_bar()
    say = _say if training_args.process_index == 0 else lambda *facts: None
    if ignored:
        say(f"without effect here: {' '.join(ignored)}")

    with ended_politely(parser, training_args), main_errors(parser):
        checkpoint = open_checkpoint(model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(checkpoint)
        method = choose_method(model_args, checkpoint.config, training_args)
        examples = read_data(data_args, training_args, say)
        if data_args.preview_data:
            shown = examples["train"]
            print(preview(tokenizer, shown, data_args.max_source_length, data_args.max_target_length))
            return 0
        make_output_dir(training_args.output_dir)
        settings = run_settings(method, model_args, data_args, training_args, examples)
        saved = find_run(training_args, settings, say)
        finished = saved is not None and saved.is_finished(training_args.max_steps, training_args.num_train_epochs)
        datasets = encode_data(tokenizer, examples, data_args, say)

        model = load_base(model_args, training_args, method)
        collator = make_collator(tokenizer, data_args)
        general = {}
        if "general" in datasets and training_args.do_train:
            general["general_perplexity_before"] = general_perplexity(model, datasets, collator, training_args, say)
        if finished:
            result = str(saved.best if training_args.load_best_model_at_end else saved.folder)
            if method == FULL:
                del model  # two of them may not fit
                model_args.model_name_or_path, model_args.model_revision = result, None
                model = load_base(model_args, training_args, method)
            else:
                model_args.ptuning_checkpoint = result
        model = attach(model, method, model_args, training_args, say)
        trainer = make_trainer(model, method, tokenizer, training_args, collator, datasets, settings)
        if training_args.do_train:
            show_forecast(model, datasets["train"], training_args, say)

    with ended_politely(parser, training_args):
        if training_args.do_train:
            train(trainer, saved, finished, say)
        if "general" in datasets:
            name = "general_perplexity" + "_after" * training_args.do_train
            general[name] = general_perplexity(trainer.model, datasets, collator, training_args, say)
            trainer.save_metrics("general", general)
        for task, asked in (("eval", training_args.do_eval), ("predict", training_args.do_predict)):
            if asked:
                evaluate(
                    trainer,
                    tokenizer,
                    examples[task],
                    datasets[task],
                    task,
                    max_source_length=data_args.max_source_length,
                    max_new_tokens=data_args.val_max_target_length,
                    num_beams=data_args.num_beams,
                )
    trainer.accelerator.end_training()
    return 0


def _say(*facts: str) -> None:
    print("   ".join(fact for fact in facts if fact), file=sys.stderr)


@contextlib.contextmanager
def ended_politely(parser, training_args: TuningArguments) -> Iterator[None]:
    """Turn what may end the work early into one line on stderr: exit code 1, and 130 for Ctrl-C."""
    args = training_args
    try:
        yield
    except (LossError, OSError, ImportError) as error:
        code, words = 1, f"{parser.prog}: {error}"
    except KeyboardInterrupt:
        folder = find_checkpoint(args.output_dir) if args.do_train else None
        changed = " without --overwrite_output_dir" * args.overwrite_output_dir
        code, words = 130, f"interrupted: the same command{changed} continues from {folder}" if folder else ""
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        code, words = 1, f"{parser.prog}: out of memory on {args.device}: try smaller batches and lengths"
    else:
        return
    parser.exit(code, "\n" * sys.stderr.isatty() + f"{words}\n")  # below the bar


# Before the model -----------------------------------------------------------------------------------------------------


def choose_method(model_args: ModelArguments, config, training_args: TuningArguments) -> str:
    """The method that flags and adapter stand for; the learning rate is set to the method's, if none is given.

    Raises ValueError if they contradict each other, or the model.
    """
    method = model_args.method
    if model_args.ptuning_checkpoint:
        adapter = open_adapter(model_args.ptuning_checkpoint)
        asked = {PREFIX: model_args.pre_seq_len, LORA: model_args.lora_rank}
        size = adapter.pre_seq_len if adapter.kind == PREFIX else adapter.settings["r"]
        if method not in (FULL, adapter.kind) or asked[adapter.kind] not in (None, size):
            flag = f"--pre_seq_len {asked[PREFIX]}" if method == PREFIX else f"--lora_rank {asked[LORA]}"
            raise ValueError(f"{flag} does not fit {model_args.ptuning_checkpoint}, which is {adapter.title}")
        method = adapter.kind
        if method == PREFIX:
            model_args.pre_seq_len, model_args.prefix_projection = size, adapter.prefix_projection
        else:
            model_args.lora_rank = size
    elif method != FULL and not training_args.do_train:
        raise ValueError("without --do_train the adapter to evaluate is missing: give its folder with --adapter")
    bits = model_args.quantization_bit or config.quantization_bit
    if training_args.do_train and method == FULL and bits:
        raise ValueError(
            f"INT{bits} weights cannot be trained: add --pre_seq_len or --lora_rank, or take an unquantised model"
        )
    if training_args.do_train and method == FULL and model_args.dtype not in (None, "float32"):
        raise ValueError(
            f"all parameters are trained in float32: leave --dtype {model_args.dtype} out; --bf16 computes in bfloat16"
        )
    if training_args.learning_rate is None:
        training_args.learning_rate = LEARNING_RATES[
            "projected prefix" if method == PREFIX and model_args.prefix_projection else method
        ]
    return method


def read_data(data_args: DataArguments, training_args: TuningArguments, say: Callable) -> dict[str, list[Example]]:
    """The examples of each file that is needed: "train" (with replay mixed in), "eval", "predict" and "general"."""
    columns = data_args.prompt_column, data_args.response_column, data_args.history_column
    wanted = {
        "train": (data_args.train_file, training_args.do_train or data_args.preview_data, data_args.max_train_samples),
        "eval": (data_args.validation_file, training_args.do_eval, data_args.max_eval_samples),
        "predict": (data_args.test_file, training_args.do_predict, data_args.max_predict_samples),
    }
    examples = {}
    for name, (path, needed, most) in wanted.items():
        if path and needed:
            all_turns = data_args.train_on_all_turns and name == "train"
            examples[name], form = read_examples(path, *columns, all_turns=all_turns, max_samples=most)
            if data_args.source_prefix:
                examples[name] = [prefixed(example, data_args.source_prefix) for example in examples[name]]
            say(f"{name} data", f"{len(examples[name])} examples", form)
    if "train" in examples and data_args.replay_file:
        replay, form = read_examples(data_args.replay_file)
        examples["train"] = mix_replay(examples["train"], replay, data_args.replay_ratio, training_args.seed)
        say("replay data", f"{data_args.replay_ratio:.0%} of {len(examples['train'])} examples", form)
    if data_args.general_file:
        examples["general"], form = read_examples(data_args.general_file)
        say("general data", f"{len(examples['general'])} examples", form)
    return examples


def prefixed(example: Example, prefix: str) -> Example:
    """The example with a text in front of its first question."""
    if not example.history:
        return replace(example, prompt=prefix + example.prompt)
    (query, response), *others = example.history
    return replace(example, history=((prefix + query, response), *others))


def make_output_dir(output_dir: str) -> None:
    """Make the folder, so that hours of work do not end for the lack of it. Raises ValueError if that cannot be."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be made: {error.strerror}") from None
    if not os.access(output_dir, os.W_OK):
        raise ValueError(f"--output_dir {output_dir} is not writable")


def run_settings(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TuningArguments,
    examples: dict[str, list[Example]],
) -> RunSettings:
    """What a run is: a checkpoint keeps it, and whoever continues it must ask for the same."""
    args = training_args
    own = {PREFIX: "pre_seq_len prefix_projection", LORA: "lora_rank lora_alpha lora_dropout lora_target", FULL: ""}
    length = "max_source_length max_target_length padding_side pad_to_max_length"
    of_trainer = (
        "learning_rate lr_scheduler_type warmup_steps weight_decay optim adam_beta1 adam_beta2 adam_epsilon "
        "max_grad_norm label_smoothing_factor seed data_seed bf16 fp16"
    )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    fixed = {
        "method": method,
        **{name: getattr(model_args, name) for name in f"{own[method]} quantization_bit".split()},
        "dtype": base_dtype(model_args, args, method),
        **{name: getattr(data_args, name) for name in length.split()},
        **{name: args.to_dict()[name] for name in of_trainer.split()},  # which has no Enums
        "examples per step": per_step,
        "training data with fingerprint": fingerprint(examples.get("train", ())),
    }
    free = {
        **{name: getattr(model_args, name) for name in ("model_name_or_path", "ptuning_checkpoint")},
        **{name: getattr(args, name) for name in ("max_steps", "num_train_epochs", "per_device_train_batch_size")},
        "processes": args.world_size,
    }
    return RunSettings(fixed, free)


def find_run(training_args: TuningArguments, settings: RunSettings, say: Callable) -> SavedRun | None:
    """The interrupted run to continue, None to start from the beginning. Raises ValueError if it does not fit."""
    args = training_args
    if not args.do_train:
        return None
    asked_for = args.resume_from_checkpoint
    with args.main_process_first(local=False):  # it alone deletes; what it leaves is complete
        folders = list_checkpoints(args.output_dir)
        if args.overwrite_output_dir:
            if folders and args.process_index == 0:
                remove_checkpoints(folders)
                say(f"deleted {len(folders)} checkpoints in {args.output_dir}: training starts anew")
            return None
        saved = saved_run(args.output_dir, None if asked_for in (None, "True", "true") else asked_for, say)
    if saved is None:
        results = [Path(args.output_dir) / name for name in ("config.json", "adapter_config.json")]
        if any(path.exists() for path in results):
            raise ValueError(
                f"{args.output_dir} holds a model or an adapter, and no checkpoint to continue from: give another "
                "--output_dir, or --overwrite_output_dir to write over it"
            )
        return None
    changed = compare_settings(saved.settings, settings, saved.folder)
    say(f"continuing from {saved.folder}" + f", which had {changed}" * bool(changed))
    return saved


def encode_data(tokenizer, examples: dict[str, list[Example]], data_args: DataArguments, say: Callable) -> dict:
    """The examples as datasets of ids and labels."""
    encoded = {}
    for name, rows in examples.items():
        longest = data_args.max_target_length if name == "train" else data_args.val_max_target_length
        sizes = data_args.max_source_length, longest
        encoded[name] = to_dataset(tokenizer, rows, *sizes, data_args.preprocessing_num_workers)
        report = cut_report(encoded[name])
        if report:
            say(f"{name} data", report)
    return encoded


def make_collator(tokenizer, data_args: DataArguments) -> Collator:
    """What makes a batch of rows."""
    length = data_args.max_source_length + max(data_args.max_target_length, data_args.val_max_target_length)
    return Collator(tokenizer, data_args.padding_side, length if data_args.pad_to_max_length else None)


# The model ------------------------------------------------------------------------------------------------------------


def base_dtype(model_args: ModelArguments, training_args: TuningArguments, method: str) -> str:
    """The number format of the weights that are not quantised."""
    if model_args.dtype:
        return model_args.dtype
    if training_args.device.type != "cuda" or method == FULL:
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def load_base(model_args: ModelArguments, training_args: TuningArguments, method: str) -> torch.nn.Module:
    """The model without adapter, where the Trainer wants it."""
    args = training_args
    shards = args.deepspeed or args.fsdp  # they bring the weights to the devices themselves
    quiet = contextlib.redirect_stderr(io.StringIO()) if args.process_index else contextlib.nullcontext()
    with quiet:
        model, _ = load_model(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            device="cpu" if shards or args.device.type == "cpu" else str(args.device),
            dtype=base_dtype(model_args, args, method),
            quantization_bit=model_args.quantization_bit,
        )
    return model


def attach(
    model, method: str, model_args: ModelArguments, training_args: TuningArguments, say: Callable
) -> torch.nn.Module:
    """The model with what is trained of it, or with the adapter that is evaluated; LoRA in training is a PeftModel."""
    training = training_args.do_train
    set_seed(training_args.seed)  # of fresh weights
    if model_args.ptuning_checkpoint:
        model = apply_adapter(model, model_args.ptuning_checkpoint, trainable=training)
    elif method == PREFIX:
        model.add_prefix_encoder(model_args.pre_seq_len, model_args.prefix_projection)
    elif method == LORA:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=model_args.lora_rank,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=model_args.lora_target,
        )
        with warnings.catch_warnings():  # peft asks transformers by a name that 5.23 deprecates
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model = get_peft_model(model, config)
    if training:
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
        titles = {
            PREFIX: f"P-Tuning v2, {model_args.pre_seq_len} tokens",
            LORA: f"LoRA, rank {model_args.lora_rank}",
            FULL: "all parameters",
        }
        say(titles[method], f"{trained:,} of {total:,} parameters learn", f"lr {training_args.learning_rate:g}")
    return model


def make_trainer(
    model, method: str, tokenizer, training_args: TuningArguments, collator, datasets: dict, settings: RunSettings
) -> TuningTrainer:
    """The Trainer with our progress instead of its own."""
    asked = training_args.asked_for_checkpointing
    training_args.set_checkpointing(model.num_parameters() > SMALL_MODEL if asked is None else asked)
    trainer = TuningTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("eval"),
        processing_class=tokenizer if method == FULL else None,  # a model needs its tokenizer beside it, an adapter not
        callbacks=[settings, Progress(), LossPlot()],
        tokenizer=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def show_forecast(model, dataset, training_args: TuningArguments, say: Callable) -> None:
    """Say what a training step needs, before the first one."""
    device = training_args.device
    place = str(device) if device.type != "cpu" else "cpu"
    longest = compute.max(compute.list_value_length(dataset.data["input_ids"])).as_py()
    sizes = training_args.per_device_train_batch_size, longest
    for line in forecast_lines(model, *sizes, training_args.gradient_checkpointing, free_memory(place), place):
        say(line)


# Work -----------------------------------------------------------------------------------------------------------------


def general_perplexity(model, datasets: dict, collator, training_args: TuningArguments, say: Callable) -> float:
    """Perplexity on the general data, which is said, too."""
    value = perplexity(model, datasets["general"], collator, training_args.per_device_eval_batch_size)
    say(f"general data: perplexity {value:.3f}")
    return value


def train(trainer: TuningTrainer, saved: SavedRun | None, finished: bool, say: Callable) -> None:
    """Train, or continue; leaves the result, its loss.png and train_results.json in output_dir."""
    args = trainer.args
    metrics = {}
    if finished:
        trainer.state = TrainerState.load_from_json(str(saved.folder / STATE_FILE))
        say(f"{saved.folder} has all steps already: raise --max_steps or --num_train_epochs to train on")
    else:
        metrics = trainer.train(resume_from_checkpoint=str(saved.folder) if saved else None).metrics
    trainer.save_model()
    history = trainer.state.log_history
    metrics |= {
        "train_loss": mean_loss(history),
        "train_samples": len(trainer.train_dataset),
        "trainable_parameters": trainer.model.num_parameters(only_trainable=True),
        "train_peak_memory": peak_memory(str(args.device)),
    }
    trainer.save_metrics("train", metrics)
    if trainer.is_world_process_zero():
        plot_loss(history, Path(args.output_dir) / PICTURE)
    best = args.load_best_model_at_end and trainer.state.best_model_checkpoint
    say(
        f"saved {args.output_dir}" + (f", the best: {Path(best).name}" if best else ""),
        f"mean loss {metrics['train_loss']:.3f}",
        f"peak memory {metrics['train_peak_memory'] / GIGABYTE:.2f} GB",
        "" if finished else f"trained for {shown_time(metrics['train_runtime'])}",
    )


if __name__ == "__main__":
    sys.exit(main())
