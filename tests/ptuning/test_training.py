"""The guard on the loss, progress, the plot, which checkpoint is complete, and the memory forecast."""

import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from ptuning.training import (
    FOREIGN,
    WEIGHTS_ONLY,
    Progress,
    RunSettings,
    compare_settings,
    find_checkpoint,
    forecast,
    forecast_lines,
    mean_loss,
    missing_in,
    plot_loss,
    read_run,
    saved_run,
    shown_time,
)

SETTINGS = {"fixed": {"learning_rate": 0.02, "pre_seq_len": 4}, "free": {"max_steps": 10, "processes": 1}}


def save_checkpoint(output_dir, step, processes=1, settings=SETTINGS):
    """A folder that looks like the Trainer's."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    settings = {**settings, "free": {**settings["free"], "processes": processes}}
    state = {
        "global_step": step,
        "epoch": step / 10,
        "stateful_callbacks": {"RunSettings": {"args": settings, "attributes": {}}},
    }
    names = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    for name in ("optimizer.pt", "scheduler.pt", *names):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


# Resuming -------------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (900, 1000, 200):
        save_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"
    assert find_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_with_anything_broken_off_is_not_complete(tmp_path, processes):
    folder = save_checkpoint(tmp_path, 7, processes)
    assert missing_in(folder) is None
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert missing_in(folder) == f"its {path.name} is broken off"
        path.unlink()
        expected = {
            "trainer_state.json": "it has no trainer_state.json, which is written last",
            "optimizer.pt": WEIGHTS_ONLY,
        }
        assert missing_in(folder) == expected.get(path.name, f"its {path.name} is not there")
        path.write_bytes(whole)
    assert missing_in(folder) is None


def test_what_was_not_saved_to_the_end_is_deleted_and_told(tmp_path):
    save_checkpoint(tmp_path, 10)
    (save_checkpoint(tmp_path, 20) / "trainer_state.json").unlink()
    told = []
    run = saved_run(tmp_path, None, told.append)
    assert (run.folder, run.step, run.settings.fixed) == (tmp_path / "checkpoint-10", 10, SETTINGS["fixed"])
    assert "checkpoint-20 was not saved to the end" in told[0]
    assert not (tmp_path / "checkpoint-20").exists()


def test_nothing_saved_means_a_start_from_the_beginning(tmp_path):
    assert saved_run(tmp_path, None, print) is None


@pytest.mark.parametrize("reason", [FOREIGN, WEIGHTS_ONLY])
def test_a_checkpoint_that_cannot_be_continued_is_not_written_over(tmp_path, reason):
    folder = save_checkpoint(tmp_path, 10)
    if reason == FOREIGN:
        (folder / "trainer_state.json").write_text('{"global_step": 10, "stateful_callbacks": {}}')
    else:
        (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="--overwrite_output_dir to start anew"):
        saved_run(tmp_path, None, print)
    assert folder.exists()


def test_the_checkpoint_that_is_asked_for_is_taken_or_refused(tmp_path):
    save_checkpoint(tmp_path, 10)
    assert saved_run(tmp_path, str(tmp_path / "checkpoint-10"), print).step == 10
    assert saved_run(tmp_path / "new", str(tmp_path / "checkpoint-10"), print).step == 10
    save_checkpoint(tmp_path, 20)
    with pytest.raises(ValueError, match=r"checkpoint-20 is newer than .*checkpoint-10: delete it, give another"):
        saved_run(tmp_path, str(tmp_path / "checkpoint-10"), print)
    with pytest.raises(ValueError, match=r"cannot continue from .*checkpoint-30: there is no such folder"):
        saved_run(tmp_path, str(tmp_path / "checkpoint-30"), print)


def test_settings_that_decide_the_result_must_be_the_same_and_others_are_named(tmp_path):
    saved = read_run(save_checkpoint(tmp_path, 10)).settings
    longer = RunSettings(SETTINGS["fixed"], {**SETTINGS["free"], "max_steps": 20})
    assert compare_settings(saved, RunSettings(**SETTINGS), tmp_path) == ""
    assert compare_settings(saved, longer, tmp_path) == "max_steps 10 (now 20)"
    other = RunSettings({**SETTINGS["fixed"], "learning_rate": 0.01}, SETTINGS["free"])
    with pytest.raises(ValueError, match=r"was trained with learning_rate 0.02 \(now 0.01\): give the same"):
        compare_settings(saved, other, tmp_path)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "finished"), [(10, 3, True), (11, 3, False), (-1, 1.0, True), (-1, 1.1, False)]
)
def test_a_run_has_finished_when_its_steps_or_epochs_are_done(tmp_path, max_steps, epochs, finished):
    assert read_run(save_checkpoint(tmp_path, 10)).is_finished(max_steps, epochs) is finished


# Progress and plot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "1.7 h")]
)
def test_times_have_one_unit(seconds, text):
    assert shown_time(seconds) == text


def follow(monkeypatch, stream, steps=3):
    """What Progress writes to a stream in a run of some steps, each of 2 s and 8 samples."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("ptuning.training.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr", stream)
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=1, output_dir="out")
    state = SimpleNamespace(is_world_process_zero=True, global_step=10, max_steps=20)
    progress = Progress()
    progress.on_train_begin(args, state, None)
    for _ in range(steps):
        state.global_step += 1
        progress.on_step_end(args, state, None)
        progress.on_log(args, state, None, {"loss": 1.25, "learning_rate": 0.02})
    progress.on_log(args, state, None, {"eval_loss": 1.5})
    progress.on_save(args, state, None)
    progress.on_train_end(args, state, None)
    return stream.getvalue()


def test_without_a_terminal_each_log_is_a_line(monkeypatch):
    lines = follow(monkeypatch, io.StringIO()).splitlines()
    assert lines == [
        "step 11/20   loss 1.250   lr 2.0e-02   4.0 samples/s   18 s left",  # 8 samples in 2 s, 9 steps to go
        "step 12/20   loss 1.250   lr 2.0e-02   4.0 samples/s   16 s left",
        "step 13/20   loss 1.250   lr 2.0e-02   4.0 samples/s   14 s left",
        "step 13/20   loss 1.500 on the validation file",
        "step 13/20   saved out/checkpoint-13",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_a_bar_carries_the_same_facts(monkeypatch):
    text = follow(monkeypatch, Terminal())
    assert re.search(r"step 13/20 \|#+\d? +\|   loss 1\.250   lr 2\.0e-02   4\.0 samples/s   14 s left", text)
    assert "saved out/checkpoint-13" in text


def test_the_mean_loss_weighs_each_value_with_its_steps():
    history = [{"step": 1, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 5, "loss": 2.0}, {"step": 5}]
    assert mean_loss(history) == (4.0 * 1 + 2.0 * 4) / 5
    assert math.isnan(mean_loss([]))


def test_the_picture_of_the_loss_appears_whole(tmp_path):
    history = [{"step": step, "loss": 1 / step} for step in range(1, 40)] + [{"step": 20, "eval_loss": 0.5}]
    plot_loss(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    plot_loss([], tmp_path / "empty.png")  # a run killed before its first log


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["prefix", "LoRA", "full"])
def model(request):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=1000,
        hidden_size=128,
        num_layers=4,
        num_attention_heads=4,
        inner_hidden_size=512,
        bos_token_id=4,
        eos_token_id=5,
        mask_token_id=6,
        gmask_token_id=7,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    model = ChatGLMForConditionalGeneration(config)
    if request.param == "prefix":
        model.add_prefix_encoder(32)
    if request.param == "LoRA":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"])
        )
    return model.train()


def kept_for_backward(model, batch_size, seq_len):
    """Bytes that autograd keeps of one forward, the parameters left out."""
    input_ids = torch.randint(10, 1000, (batch_size, seq_len))
    input_ids[:, seq_len // 2], input_ids[:, seq_len // 2 + 1] = 7, 4
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=input_ids, labels=input_ids, use_cache=False)
    return sum(kept.values())


def test_the_forecast_of_activations_is_what_autograd_keeps(model):
    needs = forecast(model, 2, 128, checkpointing=False)
    logits_kept = needs.logits / 3  # of their three copies one is kept
    assert kept_for_backward(model, 2, 128) == pytest.approx(needs.activations + logits_kept, rel=0.12)
    less = forecast(model, 2, 128, checkpointing=True)
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.23
    enable = getattr(model, f"{word}_checkpointing_enable")
    enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    assert kept_for_backward(model, 2, 128) < less.activations + logits_kept < 0.6 * (needs.activations + logits_kept)


def test_the_forecast_counts_gradients_and_two_states_of_what_is_trained(model):
    needs = forecast(model, 1, 16, checkpointing=False)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert needs.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert needs.learning == 3 * trained
    assert needs.total == needs.weights + needs.learning + needs.activations + needs.logits


def test_too_little_memory_comes_with_what_helps(model):
    enough = forecast_lines(model, 2, 128, False, 1e12, "cpu")
    assert len(enough) == 1 and "with gradient checkpointing)" in enough[0] and "free on cpu 1000.00" in enough[0]
    lines = forecast_lines(model, 2, 128, False, 1e6, "cpu")
    assert "this may be too little memory; what helps: --gradient_checkpointing, a smaller" in lines[1]
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    assert ("--pre_seq_len or --lora_rank" in lines[1]) is trains_all
