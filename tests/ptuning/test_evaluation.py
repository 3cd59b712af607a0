"""Answers to many prompts at once, perplexity, and the files that an evaluation leaves."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from ptuning import evaluation
from ptuning.data import Collator, Example, encode_prompt, to_dataset
from ptuning.evaluation import as_answer, evaluate, generate_answers, perplexity, write_predictions

ROOT = Path(__file__).parents[2]
QUERIES = [
    "你好",
    "类型#裙*颜色#白色*风格#清新",
    "What is the capital of France?",
    "请用一句话介绍一下你自己，并且告诉我你能帮我做些什么事情。",
    "怎么泡茶？",
    "春天",
]
HISTORY = (("你好", "你好！我能为你做什么？"),)
EXAMPLES = [
    Example("类型#裙*颜色#白色", "白色的裙子很清新（棉）。"),
    Example("你好", "你好！"),
    Example("怎么泡茶？", "先烧水，再放茶叶，最后等三分钟。", HISTORY),
]


class PatientModel(nn.Module):
    """Answers with what its prompt begins with, as many times as that says; runs out of memory above `most` prompts."""

    def __init__(self, tokenizer, most=100, error="CUDA out of memory. Tried to allocate 2.00 GiB", ends=None):
        super().__init__()
        self.tokenizer, self.most, self.error, self.batches = tokenizer, most, error, []
        self.end, self.device = tokenizer.eos_token_id, torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=ends or self.end)

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        self.batches.append(len(input_ids))
        if len(input_ids) > self.most:
            raise RuntimeError(self.error)
        answers = torch.full((len(input_ids), max_new_tokens), self.tokenizer.pad_token_id)
        for answer, row, mask in zip(answers, input_ids, attention_mask, strict=True):
            first, times = row[mask == 1][0], int(mask.sum()) - 2
            written = torch.tensor([int(first)] * times + [self.end])[:max_new_tokens]
            answer[: len(written)] = written
        return torch.cat((input_ids, answers), dim=1)


@pytest.fixture
def prompts(tokenizer):
    return [encode_prompt(tokenizer, Example(query, ""), 64) for query in QUERIES]


@pytest.fixture
def repeated(tokenizer):
    """Prompts of one word said 3, 1, 4, 2 and 5 times, and what PatientModel answers."""
    words = ["茶", "好", "春", "你", "我"]
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    control = tokenizer.build_inputs_with_special_tokens([])
    counts = [3, 1, 4, 2, 5]
    prompts = [[i] * count + control for i, count in zip(ids, counts, strict=True)]
    return prompts, [word * count for word, count in zip(words, counts, strict=True)]


def random_model(tokenizer, **sizes):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        inner_hidden_size=64,
        **tokenizer.config_ids,
    )
    return ChatGLMForConditionalGeneration(config).eval()


# Answers --------------------------------------------------------------------------------------------------------------


def test_batch_answers_as_chat_does_one_by_one(model, tokenizer, prompts):
    single = [model.chat(tokenizer, query, do_sample=False, max_new_tokens=12)[0] for query in QUERIES]
    assert generate_answers(model, tokenizer, prompts, batch_size=1, max_new_tokens=12) == single
    assert generate_answers(model, tokenizer, prompts, batch_size=4, max_new_tokens=12) == single


def test_batch_answers_as_single_prompts_do_behind_a_prefix(tokenizer, prompts):
    from utils import DEFAULT_MODEL, load_model

    model, _ = load_model(DEFAULT_MODEL, device="cpu", dtype="float32")
    plain = generate_answers(model, tokenizer, prompts, batch_size=6, max_new_tokens=12)
    torch.manual_seed(0)
    model.add_prefix_encoder(8)
    # A weaker prefix leaves these answers as they are.
    nn.init.normal_(model.transformer.prefix_encoder.embedding.weight, std=10.0)
    model.train()  # dropout must not reach the answers
    single = generate_answers(model, tokenizer, prompts, batch_size=1, max_new_tokens=12)
    assert single != plain
    assert generate_answers(model, tokenizer, prompts, batch_size=6, max_new_tokens=12) == single
    assert model.training


def test_beams_answer_as_chat_does(model, tokenizer, prompts):
    single = [model.chat(tokenizer, query, num_beams=2, do_sample=False, max_new_tokens=8)[0] for query in QUERIES[:3]]
    assert generate_answers(model, tokenizer, prompts[:3], batch_size=3, max_new_tokens=8, num_beams=2) == single


def test_sampling_follows_the_seed(model, tokenizer, prompts):
    def answers():
        torch.manual_seed(3)
        return generate_answers(model, tokenizer, prompts, 6, 8, do_sample=True, top_p=0.9, temperature=1.5)

    first = answers()
    assert answers() == first
    assert first != generate_answers(model, tokenizer, prompts, 6, 8)


def test_answers_come_in_the_order_of_the_prompts(tokenizer, repeated):
    prompts, expected = repeated
    for batch_size in (1, 2, 3, 5, 8):
        model = PatientModel(tokenizer)
        assert generate_answers(model, tokenizer, prompts, batch_size, max_new_tokens=9) == expected
        assert len(model.batches) == math.ceil(5 / batch_size)


def test_longest_prompts_come_first(tokenizer, repeated):
    seen = []
    model = PatientModel(tokenizer)
    model.register_module("watched", nn.Identity())
    generate = model.generate
    model.generate = lambda input_ids, **options: (seen.append(input_ids.shape[1]), generate(input_ids, **options))[1]
    generate_answers(model, tokenizer, repeated[0], batch_size=2, max_new_tokens=9)
    assert seen == [7, 5, 3]


def test_answers_cut_by_the_limit_are_counted_and_told(tokenizer, repeated, capsys):
    prompts, expected = repeated
    # Four tokens: "茶茶茶<eop>" ends in time, "春春春春" and "我我我我" do not.
    answers = generate_answers(PatientModel(tokenizer), tokenizer, prompts, 3, max_new_tokens=4)
    assert answers == [*expected[:4], "我我我我"]
    assert "2 of 5 answers were cut at 4 tokens" in capsys.readouterr().err
    generate_answers(PatientModel(tokenizer), tokenizer, prompts, 3, max_new_tokens=6)
    assert "cut" not in capsys.readouterr().err


def test_answer_ends_at_any_of_several_end_tokens(tokenizer, repeated):
    prompts, _ = repeated
    spring = tokenizer.convert_tokens_to_ids("春")
    model = PatientModel(tokenizer, ends=[tokenizer.eos_token_id, spring])
    answers = generate_answers(model, tokenizer, prompts, 5, max_new_tokens=9)
    assert answers == ["茶茶茶", "好", "", "你你", "我我我我我"]


def test_batch_is_halved_when_memory_runs_out(tokenizer, repeated, capsys):
    prompts, expected = repeated
    model = PatientModel(tokenizer, most=1)
    assert generate_answers(model, tokenizer, prompts, batch_size=4, max_new_tokens=9) == expected
    assert model.batches == [4, 2, 1, 1, 1, 1, 1]
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert told == [f"out of memory: {count} prompts at a time from here on" for count in (2, 1)]


def test_memory_too_small_for_one_prompt_is_an_error(tokenizer, repeated):
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_answers(PatientModel(tokenizer, most=0), tokenizer, repeated[0], 4, max_new_tokens=9)


def test_other_errors_of_the_model_are_not_taken_for_missing_memory(tokenizer, repeated):
    model = PatientModel(tokenizer, most=1, error="shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate_answers(model, tokenizer, repeated[0], 4, max_new_tokens=9)
    assert model.batches == [4]


def test_no_prompts_have_no_answers(tokenizer):
    assert generate_answers(PatientModel(tokenizer), tokenizer, [], 4, max_new_tokens=9) == []


def test_progress_is_ten_lines_without_a_terminal(tokenizer, repeated, capsys):
    prompts, _ = repeated
    generate_answers(PatientModel(tokenizer), tokenizer, prompts * 8, batch_size=1, max_new_tokens=9)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert [line.split("   ")[0] for line in lines] == [f"answers {count:>2}/40" for count in range(4, 41, 4)]
    assert output.out == ""


def test_progress_is_a_bar_in_a_terminal(tokenizer, repeated, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    generate_answers(PatientModel(tokenizer), tokenizer, repeated[0], batch_size=1, max_new_tokens=9)
    errors = capsys.readouterr().err
    assert "5/5" in errors and "answers 5/5 " not in errors.replace("\r", "\n").splitlines()


# Perplexity -----------------------------------------------------------------------------------------------------------


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(tokenizer):
    model = random_model(tokenizer)
    nn.init.zeros_(model.transformer.final_layernorm.weight)
    nn.init.zeros_(model.transformer.final_layernorm.bias)
    dataset = to_dataset(tokenizer, EXAMPLES, 64, 64)
    assert perplexity(model, dataset, Collator(tokenizer), 2) == pytest.approx(tokenizer.vocab_size, rel=1e-6)


def test_perplexity_is_a_mean_over_tokens_whatever_the_batches(tokenizer):
    model = random_model(tokenizer).train()
    dataset = to_dataset(tokenizer, EXAMPLES, 64, 64)
    losses, counts = [], []
    for row in dataset:
        labels = torch.tensor([row["labels"]])
        losses.append(model(torch.tensor([row["input_ids"]]), labels=labels).loss.item())
        counts.append(int((labels != -100).sum()))
    expected = math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
    assert len(set(counts)) == 3
    for batch_size in (1, 2, 8):
        for side in ("right", "left"):
            got = perplexity(model, dataset, Collator(tokenizer, side), batch_size)
            assert got == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    assert model.training


def test_perplexity_without_answers_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="got none"):
        perplexity(random_model(tokenizer), [], Collator(tokenizer), 2)


def test_perplexity_beyond_all_numbers_is_infinite(tokenizer):
    model = random_model(tokenizer)
    nn.init.constant_(model.transformer.final_layernorm.bias, 1.0)
    nn.init.zeros_(model.transformer.final_layernorm.weight)
    nn.init.zeros_(model.lm_head.weight)
    nn.init.constant_(model.lm_head.weight[0], 100.0)  # 3200 nats for a token that is no answer
    assert perplexity(model, to_dataset(tokenizer, EXAMPLES, 64, 64), Collator(tokenizer), 2) == math.inf


# Files and scores -----------------------------------------------------------------------------------------------------


def test_reference_is_compared_as_the_model_would_show_it(tokenizer):
    assert as_answer(tokenizer, " 白色的裙子，很清新（棉）。\n") == "白色的裙子，很清新(棉)。"
    assert as_answer(tokenizer, "") == ""


def test_predictions_are_written_an_object_a_line(tmp_path):
    write_predictions(tmp_path / "answers.txt", ["白色\n裙子", "b"], ["红色", ""])
    assert (tmp_path / "answers.txt").read_text(encoding="utf-8") == (
        '{"labels": "白色\\n裙子", "predict": "红色"}\n{"labels": "b", "predict": ""}\n'
    )


def make_trainer(model, tokenizer, folder, **options):
    arguments = Seq2SeqTrainingArguments(
        output_dir=folder, per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    return Seq2SeqTrainer(model, arguments, data_collator=Collator(tokenizer))


def run_evaluation(tokenizer, folder, prefix, **options):
    trainer = make_trainer(random_model(tokenizer), tokenizer, folder, **options)
    dataset = to_dataset(tokenizer, EXAMPLES, 64, 64)
    metrics = evaluate(
        trainer, tokenizer, EXAMPLES, dataset, prefix, max_source_length=64, max_new_tokens=8, num_beams=1
    )
    return metrics, {file.name: file for file in folder.iterdir()}


def test_predict_leaves_loss_scores_and_answers(tokenizer, tmp_path, monkeypatch):
    answers = ["白色的裙子很清新(棉)。", "", "先烧水。"]
    calls = []

    def fake(model, tokenizer, prompts, *rest):
        calls.append((prompts, rest))
        return answers

    monkeypatch.setattr(evaluation, "generate_answers", fake)
    metrics, files = run_evaluation(tokenizer, tmp_path, "predict")
    assert calls == [([encode_prompt(tokenizer, example, 64) for example in EXAMPLES], (2, 8, 1))]
    assert files.keys() == {"predict_results.json", "all_results.json", "generated_predictions.txt"}
    assert json.loads(files["predict_results.json"].read_text()) == metrics
    lines = [json.loads(line) for line in files["generated_predictions.txt"].read_text("utf-8").splitlines()]
    assert [line["predict"] for line in lines] == answers
    assert [line["labels"] for line in lines] == [as_answer(tokenizer, example.response) for example in EXAMPLES]
    scores = evaluation.compute_scores(answers, [line["labels"] for line in lines])
    assert 33.3 < scores["rouge-l"] < 70
    assert {name: metrics[f"predict_{name}"] for name in scores} == scores
    assert metrics["predict_samples"] == 3 and metrics["predict_loss"] > 0


def test_eval_answers_only_when_asked_to(tokenizer, tmp_path):
    metrics, files = run_evaluation(tokenizer, tmp_path / "loss", "eval")
    assert "eval_bleu-4" not in metrics and metrics["eval_loss"] > 0
    assert files.keys() == {"eval_results.json", "all_results.json"}
    metrics, files = run_evaluation(tokenizer, tmp_path / "scores", "eval", predict_with_generate=True)
    assert metrics["eval_bleu-4"] >= 0
    assert "generated_predictions.txt" not in files


PROCESSES = """
import json
import sys
import torch
from torch import distributed
from ptuning.data import Collator, Example, encode_prompt, to_dataset
from ptuning.evaluation import generate_answers, perplexity
from tests.ptuning.test_evaluation import EXAMPLES, QUERIES
from utils import DEFAULT_MODEL, load_model

torch.set_num_threads(1)
distributed.init_process_group("gloo")
model, tokenizer = load_model(DEFAULT_MODEL, device="cpu", dtype="float32")
prompts = [encode_prompt(tokenizer, Example(query, ""), 64) for query in QUERIES[:5]]
answers = generate_answers(model, tokenizer, prompts, 2, 8)
value = perplexity(model, to_dataset(tokenizer, EXAMPLES, 64, 64), Collator(tokenizer), 2)
with open(f"{sys.argv[1]}/{distributed.get_rank()}", "w") as file:
    json.dump([answers, value], file)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_work_and_all_get_the_result(model, tokenizer, prompts, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script, tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    answers = generate_answers(model, tokenizer, prompts[:5], 2, 8)
    value = perplexity(model, to_dataset(tokenizer, EXAMPLES, 64, 64), Collator(tokenizer), 2)
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    # Rows are padded by their batch, which moves float32 sums; the loss is their mean, its exponential magnifies.
    assert results == [[answers, pytest.approx(value, rel=1e-5)]] * 2
    assert "5 of 5 answers were cut" in run.stderr
    assert run.stderr.count("answers were cut") == 1
