"""Training of the embedded model: batches, objective, schedule, and a run that is interrupted and continued."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatglm import ChatGLMTokenizer
from chatglm.chat import build_prompt
from pretraining import train
from pretraining.corpus import Example

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "chatglm" / "tiny")
SETTINGS = (
    "--hidden_size 16 --num_layers 1 --num_attention_heads 2 --batch_tokens 256 --max_length 64 --warmup 2".split()
)


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    dialogues = [
        {"topic": f"t/{i}", "lang": "zh", "turns": [{"user": [f"第{i}个问题"], "assistant": [f"这是第{i}个回答。"]}]}
        for i in range(40)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dialogues), "utf-8")
    return folder


def test_row_is_the_prompt_of_chat_then_the_answer(tokenizer):
    example = Example([("你好", "你好！")], "再见", "再见！", "t/1", "zh")
    row = train.encode_example(example, tokenizer, max_length=100)
    prompt = tokenizer(build_prompt("再见", [("你好", "你好！")]))["input_ids"]
    answer = tokenizer.encode("再见！", add_special_tokens=False)
    assert row.ids == [*prompt, *answer, tokenizer.eos_token_id]
    assert row.answer_start == len(prompt)
    assert train.encode_example(example, tokenizer, max_length=len(row.ids) - 1) is None


def test_prompts_of_training_are_cut_in_many_ways_and_answers_in_one(tokenizer):
    example = Example([], "晚上睡不着应该怎么办？", "睡前不要看手机。", "t/1", "zh")
    rows = [train.encode_example(example, tokenizer, 100, random.Random(seed)) for seed in range(40)]
    assert len({tuple(row.ids[: row.answer_start]) for row in rows}) > 3
    assert len({tuple(row.ids[row.answer_start :]) for row in rows}) == 1
    whole = tokenizer.decode(tokenizer(example.query)["input_ids"])
    texts = {tokenizer.decode(row.ids[: row.answer_start]) for row in rows}
    assert whole in texts and len(texts) > 1  # some pieces are left out
    for text in texts:
        left = iter(whole)
        assert all(character in left for character in text), text  # the others stay in order
    again = train.encode_example(example, tokenizer, 100, random.Random(3))
    assert again == rows[3]


def test_cuts_are_the_same_in_another_process(tokenizer):
    code = """if True:
        import random
        from chatglm import ChatGLMTokenizer
        from pretraining.train import sample_pieces
        tokenizer = ChatGLMTokenizer.from_pretrained("chatglm/tiny")
        print([sample_pieces("晚上睡不着应该怎么办？", tokenizer, random.Random(seed)) for seed in range(10)])
    """
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cuts = [train.sample_pieces("晚上睡不着应该怎么办？", tokenizer, random.Random(seed)) for seed in range(10)]
    assert str(cuts) == other.strip()
    assert len({tuple(cut) for cut in cuts}) > 3


def test_head_starts_as_a_rotation_of_the_embedding(tokenizer):
    model = train.initial_model(train.model_config(train.build_parser().parse_args(SETTINGS), tokenizer), seed=0)
    embedding, head = model.transformer.word_embeddings.weight[:64], model.lm_head.weight[:64]
    torch.testing.assert_close(head @ head.T, embedding @ embedding.T)
    assert not torch.allclose(head, embedding, atol=1e-3)


def rows_of(batches, tokenizer):
    """(prompt, answer) of every row, as texts."""
    for batch in batches:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            answer = labels != train.IGNORED
            prompt = ids[: answer.int().argmax()]
            yield tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(ids[answer][:-1])


def test_answers_to_look_ups_stand_in_the_prompt(tokenizer):
    rows = train.lookup_rows(tokenizer, random.Random(0), width=80, count=300)
    assert max(len(row.ids) for row in rows) <= 80
    copies = finds = 0
    for row in rows:
        prompt, answer = row.ids[: row.answer_start], row.ids[row.answer_start : -1]
        places = [i for i in range(len(prompt)) if prompt[i : i + len(answer)] == answer]
        assert places and row.ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        copies += "请重复" in text
        if "请查找" in text:
            finds += 1
            asked = prompt[-3]  # then [gMASK], <sop>
            assert any(prompt[place - 2] == asked for place in places)  # key, colon, value
    assert copies > 100 and finds > 100 and copies + finds == 300


def test_first_epoch_teaches_to_look_things_up(tokenizer):
    batches = train.epoch_batches([], tokenizer, seed=0, epoch=0, batch_tokens=64, max_length=64)
    halves = batches[: train.FIRST_BATCHES], batches[train.FIRST_BATCHES :]
    pieces = [{i for batch in half for i in batch.labels.unique().tolist()} for half in halves]
    assert len(halves[0]) == len(halves[1]) == train.FIRST_BATCHES
    assert len(pieces[0]) == train.FIRST_PIECES + 2  # those, the end and the ignored
    assert len(pieces[1]) > 7000
    assert all("请重复" in prompt for prompt, _ in rows_of(halves[0][:20], tokenizer))


@pytest.mark.parametrize("epoch, share", [(1, 0.35), (9, 0.1)])
def test_later_epochs_show_the_corpus_and_keep_a_share_of_look_ups(corpus, tokenizer, epoch, share):
    dialogues = train.load_dialogues(corpus)
    batches = train.epoch_batches(dialogues, tokenizer, 0, epoch, 1024, 256)
    rows = list(rows_of(batches, tokenizer))
    assert {dialogue.turns[0].assistant[0] for dialogue in dialogues} <= {answer for _, answer in rows}
    lookups = sum(len(prompt + answer) for prompt, answer in rows if "请查找" in prompt or "请重复" in prompt)
    assert lookups / sum(len(prompt + answer) for prompt, answer in rows) == pytest.approx(share, abs=0.6 * share)
    assert all(batch.input_ids.numel() <= 1024 for batch in batches)


def test_texts_that_are_copied_keep_their_pieces(tokenizer):
    for example in (
        Example([], "请重复：晚上睡不着应该怎么办", "晚上睡不着应该怎么办", "copy/text", "zh", generated=True),
        Example([("我叫林小雨", "你好，林小雨！")], "我叫什么名字？", "你叫林小雨。", "memory/name", "zh"),
    ):
        rows = [train.encode_example(example, tokenizer, 100, random.Random(seed)) for seed in range(20)]
        assert all(row == train.encode_example(example, tokenizer, 100) for row in rows)


def test_batch_is_padded_on_the_right_and_learns_answers_only():
    batch = train.collate([train.Row([5, 6, 7, 8], 2), train.Row([5, 6, 9], 2)], pad_token_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 3]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, -100, 9, -100]]


def test_loss_is_that_of_the_model(tokenizer):
    args = train.build_parser().parse_args(SETTINGS)
    model = train.initial_model(train.model_config(args, tokenizer), seed=0)
    rows = [
        train.encode_example(Example([], query, answer, "t/1", "zh"), tokenizer, 64)
        for query, answer in [("你好", "你好！"), ("今天天气怎么样", "我不知道。")]
    ]
    batch = train.collate(rows, tokenizer.pad_token_id)
    expected = model(batch.input_ids, labels=batch.labels).loss
    torch.testing.assert_close(train.answer_loss(model, batch), expected)


def test_learning_rate_rises_stays_and_falls():
    factors = [train.lr_factor(step, steps=100, warmup=10, decay=0.4) for step in (0, 4, 9, 30, 59, 80, 99)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.025])


def run(corpus, folder, steps, save_every=3):
    settings = [*SETTINGS, "--corpus", str(corpus), "--tokenizer", TINY, "--save_every", str(save_every)]
    code = train.main([*settings, "--steps", str(steps), "--run", str(folder), "--output", str(folder / "model")])
    assert code == 0
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_interrupted_run_ends_with_the_same_weights(corpus, tmp_path, monkeypatch):
    unbroken = run(corpus, tmp_path / "unbroken", steps=9)

    class PowerCut(Exception):
        pass

    def cut(*arguments, calls=[], real=train.answer_loss):  # noqa: B006 - counts over calls
        calls.append(1)
        if len(calls) == 6:  # after the checkpoint of step 3, before that of step 6
            raise PowerCut
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(train, "answer_loss", cut)
        run(corpus, tmp_path / "broken", steps=9)
    continued = run(corpus, tmp_path / "broken", steps=9)

    assert continued["step"] == unbroken["step"] == 9
    for name, weight in unbroken["model"].items():
        assert torch.equal(weight, continued["model"][name]), name
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("unbroken", "broken")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert (tmp_path / "broken" / "loss.png").stat().st_size > 0


def test_other_settings_do_not_continue_a_run(corpus, tmp_path, capsys):
    run(corpus, tmp_path, steps=3)
    with pytest.raises(SystemExit):
        train.main([*SETTINGS, "--corpus", str(corpus), "--tokenizer", TINY, "--run", str(tmp_path), "--seed", "1"])
    assert "was made with --seed 0: use that, or another --run" in capsys.readouterr().err


def test_loss_falls(corpus, tmp_path):
    run(corpus, tmp_path, steps=60, save_every=60)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[0] > 8.5  # ln 8000 = 8.99: all pieces equally likely
    assert losses[-1] < losses[0] - 1


def test_finished_model_loads_in_float16_size(corpus, tmp_path):
    from utils import load_model

    run(corpus, tmp_path, steps=3)
    model, tokenizer = load_model(tmp_path / "model", device="cpu")
    saved = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert saved < 2.1 * sum(p.numel() for p in model.parameters())
    assert isinstance(model.chat(tokenizer, "第1个问题", temperature=0, max_new_tokens=4)[0], str)
