"""The real command: it trains, continues where it was killed, and says in one sentence what is wrong."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from ptuning.main import main
from ptuning.training import TuningTrainer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = ROOT / "tests" / "golden" / "tokenizer" / "mini_ice_text.model"
PATIENCE = 300  # seconds; machines that run tests are busy
METHODS = {
    "prefix": ["--pre_seq_len", "4", "--learning_rate", "0.02"],
    "LoRA": ["--lora_rank", "2", "--lora_dropout", "0.1", "--learning_rate", "0.02"],
    "full": ["--learning_rate", "0.002"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small random model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = ChatGLMTokenizer(VOCABULARY)
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(
        ChatGLMConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            inner_hidden_size=64,
            use_cache=True,
            tie_word_embeddings=False,
            **tokenizer.config_ids,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 24 examples to train on and 6 general ones."""
    folder = tmp_path_factory.mktemp("data")
    texts = "你好 谢谢 再见 hello thanks goodbye".split()
    rows = [
        {"prompt": f"{a} {b}", "response": f"{b} {a} {i}"}
        for i, (a, b) in enumerate(zip(texts * 4, texts[::-1] * 4, strict=True))
    ]
    (folder / "train.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "general.json").write_text("\n".join(json.dumps({"prompt": text, "response": text}) for text in texts))
    return folder


def arguments(base, files, output, method, **flags):
    """The command line of a short run."""
    defaults = {
        "model_name_or_path": base,
        "train_file": files / "train.json",
        "output_dir": output,
        "per_device_train_batch_size": 2,
        "max_source_length": 16,
        "max_target_length": 16,
        "max_steps": 3,
        "logging_steps": 1,
    }
    pairs = [word for name, value in (defaults | flags).items() for word in (f"--{name}", str(value))]
    return ["--do_train", "--use_cpu", *METHODS[method], *pairs]


def losses(folder):
    """Step and loss of each log of a run."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def refused(argv, capsys):
    """The sentence with which the command refuses its flags."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_a_result_that_can_be_used_alone(base, files, tmp_path, method, capsys):
    assert main(arguments(base, files, tmp_path / "out", method)) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    result = {"prefix": "model.safetensors", "LoRA": "adapter_model.safetensors", "full": "model.safetensors"}[method]
    assert {result, "checkpoint-3", "loss.png", "train_results.json"} <= names
    assert ("ice_text.model" in names) == (method == "full")
    words = capsys.readouterr().err
    assert re.search(r"step 3/3   loss \d\.\d{3}   lr \d\.\de-\d\d   [\d.]+ samples/s   0 s left", words)
    tensors = load_file(tmp_path / "out" / result)
    base_tensors = load_file(base / "model.safetensors")
    if method == "full":
        assert all(
            not torch.equal(tensors[name], base_tensors[name])
            for name in ("lm_head.weight", "transformer.layers.1.mlp.dense_4h_to_h.weight")
        )
        assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    else:
        assert not tensors.keys() & base_tensors.keys()


def test_padding_and_checkpointing_change_no_loss(base, files, tmp_path):
    ways = {
        "plain": [],
        "left": ["--padding_side", "left"],
        "long": ["--pad_to_max_length"],
        "checkpointing": ["--gradient_checkpointing"],
    }
    found = {}
    for name, flags in ways.items():
        argv = arguments(base, files, tmp_path / name, "LoRA", lora_dropout=0, max_steps=2)
        main([*map(str, argv), *flags])
        found[name] = losses(tmp_path / name / "checkpoint-2")
    for name in ways:
        assert found[name] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in found["plain"]], name


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("LoRA", "--quantization_bit 4"),
        ("prefix", "--quantization_bit 8 --gradient_checkpointing"),
        ("prefix", "--dtype bfloat16 --prefix_projection"),
        ("LoRA", "--dtype bfloat16 --lora_target query_key_value dense"),
        ("full", "--bf16 --gradient_checkpointing"),
    ],
)
def test_what_is_trained_is_float32_whatever_the_base_is(base, files, tmp_path, method, flags):
    argv = [*map(str, arguments(base, files, tmp_path, method, max_steps=12)), *flags.split()]
    assert main(argv) == 0
    (result,) = tmp_path.glob("*model.safetensors")
    assert {tensor.dtype for tensor in load_file(result).values()} == {torch.float32}
    values = [loss for _, loss in losses(tmp_path / "checkpoint-12")]
    assert sum(values[-4:]) < sum(values[:4])


# Interrupted ----------------------------------------------------------------------------------------------------------


class Command:
    """The real command in a process of its own, and what it says line by line."""

    def __init__(self, argv, launcher=()):
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "ptuning" / "main.py"), *map(str, argv)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
            start_new_session=True,
        )
        self.words = ""

    def read_until(self, text):
        """Wait for a line with that text."""
        for line in self.process.stderr:
            self.words += line
            if text in line:
                return
        pytest.fail(f"{text!r} never came:\n{self.words}")

    def end(self):
        """Wait for the end; returns everything that was said."""
        self.words += self.process.communicate(timeout=PATIENCE)[1]
        assert self.process.returncode == 0, self.words
        return self.words

    def kill(self):
        """SIGKILL, as the machine does when memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def kill_while_writing(self, path):
        """SIGKILL while that file is being saved: it is a pipe without a reader, so that the writer waits."""
        path.parent.mkdir()
        os.mkfifo(path)
        deadline = time.monotonic() + PATIENCE
        before = {"optimizer.pt": ".safetensors", "trainer_state.json": "rng_state.pth"}[path.name]
        while not any(other.name.endswith(before) for other in path.parent.iterdir()):
            assert self.process.poll() is None and time.monotonic() < deadline, "it was never saved"
            time.sleep(0.01)
        self.kill()
        path.unlink()
        path.write_bytes(b"PK\x03\x04" if path.suffix == ".pt" else b'{"epoch": 1.0,')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes with names")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_again_and_again_ends_bit_equal(base, files, tmp_path, method):
    # Dropout, shuffling over several epochs, accumulated gradients, replay, and logs between the checkpoints.
    flags = {
        "max_steps": 24,
        "save_steps": 4,
        "logging_steps": 3,
        "gradient_accumulation_steps": 3,
        "warmup_steps": 5,
        "replay_file": files / "general.json",
        "general_file": files / "general.json",
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Command(arguments(base, files, whole, method, **flags)).end()

    argv = arguments(base, files, broken, method, **flags)
    run = Command(argv)
    run.read_until("saved")
    run.kill_while_writing(broken / "checkpoint-12" / "optimizer.pt")
    run = Command(argv)
    run.read_until("checkpoint-8")
    assert "checkpoint-12 was not saved to the end" in run.words
    run.read_until(f"step {random.choice((9, 12)):>2}/24")
    run.kill()
    run = Command(argv)
    run.read_until("saved")
    run.kill_while_writing(broken / "checkpoint-20" / "trainer_state.json")
    assert "continuing from" in Command(argv).end()

    result = "adapter_model.safetensors" if method == "LoRA" else "model.safetensors"
    assert (broken / result).read_bytes() == (whole / result).read_bytes()
    assert losses(broken / "checkpoint-24") == losses(whole / "checkpoint-24")
    states = [torch.load(folder / "checkpoint-24" / "optimizer.pt")["state"] for folder in (broken, whole)]
    assert states[0].keys() == states[1].keys()
    for old, new in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (broken, whole)]
    names = "train_loss", "general_perplexity_before", "general_perplexity_after"
    assert [results[0][name] for name in names] == [results[1][name] for name in names]


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix", "LoRA"])
def test_two_processes_learn_as_one_with_twice_the_batch(base, files, tmp_path, method):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2, "lora_dropout": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    Command(arguments(base, files, one, method, per_device_train_batch_size=4, **flags)).end()
    argv = arguments(base, files, two, method, **flags, general_file=files / "general.json")
    argv += ["--do_predict", "--test_file", str(files / "general.json")]
    if not torch.accelerator.is_available():
        argv.remove("--use_cpu")  # goes without saying
    words = Command(argv, torchrun).end()
    assert words.count("loaded") == 1  # one process speaks
    if method != "prefix":  # its dropout differs
        assert losses(two / "checkpoint-6") == [
            (step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(one / "checkpoint-6")
        ]
    answers = (two / "generated_predictions.txt").read_text().splitlines()
    assert [json.loads(line)["labels"] for line in answers] == "你好 谢谢 再见 hello thanks goodbye".split()

    # Both processes find the checkpoint that is complete.
    (two / "checkpoint-6" / "rng_state_1.pth").write_bytes(b"PK")
    words = Command(argv, torchrun).end()
    assert f"continuing from {two / 'checkpoint-3'}" in words and "its rng_state_1.pth is broken off" in words


# Continued and refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prefix", "full"])
def test_a_finished_run_is_not_trained_again_but_its_best_is_saved_again(base, files, tmp_path, capsys, method):
    out, general = tmp_path / "out", files / "general.json"
    # The full model gets worse from step to step, the prefix better: here that counts as worse.
    flags = {"full": {"learning_rate": 0.3}, "prefix": {"learning_rate": 30, "greater_is_better": True}}[method]
    flags |= {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps"}
    flags |= {"validation_file": general, "general_file": general, "load_best_model_at_end": True}
    argv = [str(word) for word in arguments(base, files, out, method, **flags)]
    main(argv)
    best = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best == str(out / "checkpoint-1")
    assert f"saved {out}, the best: checkpoint-1" in capsys.readouterr().err
    result, found = (out / "model.safetensors").read_bytes(), json.loads((out / "all_results.json").read_text())
    (out / "model.safetensors").unlink()  # as if killed before the end of the last save
    assert main(argv) == 0
    assert "checkpoint-3 has all steps already: raise --max_steps" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == result
    again = json.loads((out / "all_results.json").read_text())
    assert again["general_perplexity_before"] != again["general_perplexity_after"]
    for name in ("train_loss", "eval_loss", "general_perplexity_before", "general_perplexity_after"):
        assert again[name] == found[name], name


def test_more_steps_go_on_where_the_run_ended(base, files, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(word) for word in arguments(base, files, out, "prefix")])
    main([str(word) for word in arguments(base, files, out, "prefix", max_steps=5)])
    words = capsys.readouterr().err
    assert f"continuing from {out / 'checkpoint-3'}, which had max_steps 3 (now 5)" in words
    assert [step for step, _ in losses(out / "checkpoint-5")] == [1, 2, 3, 4, 5]


def test_changed_settings_are_refused_and_overwriting_starts_anew(base, files, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(word) for word in arguments(base, files, out, "prefix")])
    changed = arguments(base, files, out, "prefix", max_source_length=8)
    assert "was trained with max_source_length 16 (now 8): give the same to continue" in refused(changed, capsys)
    other = arguments(base, files, out, "prefix", train_file=files / "general.json")
    assert "was trained with training data with fingerprint" in refused(other, capsys)
    assert main([str(word) for word in changed] + ["--overwrite_output_dir"]) == 0
    assert "deleted 1 checkpoints" in capsys.readouterr().err
    assert [step for step, _ in losses(out / "checkpoint-3")] == [1, 2, 3]


def test_a_result_without_checkpoints_is_not_written_over(base, files, tmp_path, capsys):
    argv = arguments(base, files, tmp_path / "out", "LoRA", save_strategy="no")
    main([str(word) for word in argv])
    assert "holds a model or an adapter, and no checkpoint to continue from" in refused(argv, capsys)


def test_a_folder_that_cannot_be_made_is_told_before_any_model_is_loaded(base, files, capsys):
    argv = arguments(base, files, files / "train.json" / "out", "LoRA")
    assert "train.json/out cannot be made: Not a directory" in refused(argv, capsys)


def test_an_interrupted_run_says_how_it_goes_on(base, files, tmp_path, capsys, monkeypatch):
    step = TuningTrainer.training_step

    def interrupted(trainer, *args):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args)

    monkeypatch.setattr(TuningTrainer, "training_step", interrupted)
    argv = arguments(base, files, tmp_path / "out", "LoRA", save_steps=1, overwrite_output_dir=True)
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 130
    saved = tmp_path / "out" / "checkpoint-2"
    words = f"interrupted: the same command without --overwrite_output_dir continues from {saved}"
    assert capsys.readouterr().err.splitlines()[-1] == words


def test_tuning_goes_on_from_an_adapter(base, files, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    main([str(word) for word in arguments(base, files, first, "LoRA")])
    argv = ["--do_train", "--use_cpu", *arguments(base, files, second, "full", max_steps=1, ptuning_checkpoint=first)]
    assert main([str(word) for word in argv]) == 0
    assert "LoRA, rank 2" in capsys.readouterr().err
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert old.keys() == new.keys()
    moved = max((old[name] - new[name]).abs().max() for name in old)
    assert 0 < moved <= 0.0021  # one step of AdamW at this learning rate
    wrong = arguments(base, files, tmp_path / "third", "prefix", ptuning_checkpoint=first)
    assert f"--pre_seq_len 4 does not fit {first}, which is LoRA, rank 2" in refused(wrong, capsys)


def test_an_adapter_and_the_untuned_model_are_evaluated_by_the_same_command(base, files, tmp_path, capsys):
    main([str(word) for word in arguments(base, files, tmp_path / "tuned", "prefix")])
    shared = (
        f"--do_predict --use_cpu --model_name_or_path {base} --test_file {files / 'general.json'} --max_target_length 8"
    )
    for name, flags in (("untuned", ""), ("tuned", f" --adapter {tmp_path / 'tuned'}")):
        assert main(f"{shared} --output_dir {tmp_path / name}{flags}".split()) == 0
        results = json.loads((tmp_path / name / "predict_results.json").read_text())
        assert {"predict_loss", "predict_bleu-4", "predict_rouge-l"} <= results.keys()
        assert len((tmp_path / name / "generated_predictions.txt").read_text().splitlines()) == 6
    words = refused([*shared.split(), "--output_dir", "x", "--pre_seq_len", "4"], capsys)
    assert "without --do_train the adapter to evaluate is missing: give its folder with --adapter" in words


def test_the_preview_shows_examples_and_loads_no_model(base, files, capsys):
    argv = ["--preview_data", "--model_name_or_path", str(base), "--train_file", str(files / "train.json")]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert shown.out.count("[gMASK]") == 3 and "<sop>" in shown.out
    assert "loaded" not in shown.err


def test_all_parameters_of_a_quantised_model_are_not_trained(base, files, tmp_path, capsys):
    argv = arguments(base, files, tmp_path / "out", "full", quantization_bit=8)
    assert "INT8 weights cannot be trained: add --pre_seq_len or --lora_rank" in refused(argv, capsys)
    assert main([str(word) for word in arguments(base, files, tmp_path / "out", "prefix", quantization_bit=8)]) == 0


def test_a_bad_record_is_named_before_any_model_is_loaded(base, files, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    words = refused(arguments(base, files, tmp_path / "out", "prefix", train_file=bad), capsys)
    assert "bad.json" in words and "2" in words
    assert "loaded" not in capsys.readouterr().err


# The guard ------------------------------------------------------------------------------------------------------------


def stopped(argv, capsys):
    """The sentence with which training ends by itself, and its exit code 1."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_no_number_stops_with_the_step_the_batch_and_advice(base, files, tmp_path, capsys):
    # A step of this size makes the next loss infinite or NaN.
    argv = arguments(
        base, files, tmp_path / "out", "full", learning_rate=1e30, save_steps=1, lr_scheduler_type="constant"
    )
    words = stopped(argv, capsys)
    assert re.search(r"stopped at step [23]: the (loss|gradient) is (nan|inf)", words)
    assert "try a lower --learning_rate than 1e+30, --warmup_steps 100" in words


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_the_step_with_a_broken_loss_is_named_and_its_weights_are_not_saved(
    base, files, tmp_path, capsys, monkeypatch, value
):
    whole, calls = ChatGLMForConditionalGeneration.loss_function.fget, []

    def loss_function(model):
        def loss(logits, *args, **kwargs):
            calls.append(1)
            return whole(model)(logits, *args, **kwargs) * (value if len(calls) == 5 else 1)

        return loss

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "loss_function", property(loss_function))
    out = tmp_path / "out"
    argv = arguments(base, files, out, "prefix", gradient_accumulation_steps=2, save_steps=1)
    words = stopped(argv, capsys)
    assert re.search(rf"stopped at step 3: the loss is {value} in the batch that begins with '\S", words)
    assert words.endswith(f"{out / 'checkpoint-2'} is from before that")
    assert not (out / "checkpoint-3").exists() and not (out / "model.safetensors").exists()


# Shell scripts --------------------------------------------------------------------------------------------------------


def run_script(name, *flags, **environment):
    """A shell script as a user runs it, from another folder; returns what it said on stderr."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(ROOT / "ptuning" / name), *map(str, flags)],
        cwd=ROOT / "tests",
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_shell_scripts_run_as_they_stand(tmp_path):
    """But for their length, and for where they leave what they make."""
    short = ["--use_cpu", "--max_steps", "2", "--max_train_samples", "16"]
    words = run_script("train.sh", *short, "--output_dir", tmp_path / "pt", PRE_SEQ_LEN="4", LR="0.1")
    assert "P-Tuning v2, 4 tokens" in words and "lr 0.1" in words and words.count("general data: perplexity") == 2
    assert "training anew" not in run_script("train_chat.sh", *short, "--output_dir", tmp_path / "chat")
    few = ["--use_cpu", "--max_predict_samples", "4", "--val_max_target_length", "8"]
    run_script("evaluate.sh", *few, "--output_dir", tmp_path / "pt", "--ptuning_checkpoint", tmp_path / "pt")
    run_script("evaluate.sh", *few, "--output_dir", tmp_path / "untuned", CHECKPOINT="")
    base = ["--model_name_or_path", ROOT / "chatglm" / "tiny"]
    run_script("evaluate_finetune.sh", *few, "--output_dir", tmp_path / "full", *base)
    for name in ("pt", "untuned", "full"):
        assert len((tmp_path / name / "generated_predictions.txt").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_deepspeed_trains_and_continues_or_says_what_to_install(tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(AssertionError, match=r"ds_train_finetune.sh: the package deepspeed is missing"):
            run_script("ds_train_finetune.sh")
        return
    flags = ["--max_train_samples", "16", "--save_steps", "2", "--output_dir", tmp_path / "out"]
    run_script("ds_train_finetune.sh", *flags, "--max_steps", "2")
    words = run_script("ds_train_finetune.sh", *flags, "--max_steps", "4")
    assert f"continuing from {tmp_path / 'out' / 'checkpoint-2'}" in words and "step 4/4" in words
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == load_file(ROOT / "chatglm" / "tiny" / "model.safetensors").keys()
