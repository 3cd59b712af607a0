"""The shipped tuning data keep what ptuning/data/README.md says of them."""

import json
import re
from pathlib import Path

import pytest

from chatglm.tokenization_chatglm import ChatGLMTokenizer
from pretraining.corpus import load_dialogues, load_evaluation, normalise, reserved_queries
from ptuning.data import read_examples

ROOT = Path(__file__).parents[2]
DATA = ROOT / "ptuning" / "data"
PAIRS = "advert/train.json advert/dev.json chat/train.json chat/dev.json general/replay.jsonl general/dev.jsonl".split()
CLOSING = "青禾衣橱，等你来试。"


def records(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def attributes(content):
    return [tuple(part.split("#")) for part in content.split("*")]


def rounds(name):
    return [[*map(tuple, record["history"]), (record["prompt"], record["response"])] for record in records(name)]


def customers():
    columns = {"prompt_column": "question", "response_column": "answer"}
    return read_examples(DATA / "customers.csv", **columns)[0]


@pytest.fixture(scope="module")
def reserved():
    return reserved_queries(load_dialogues(), load_evaluation())


def test_readme_gives_the_number_of_records_in_both_languages():
    counts = {name: len(read_examples(DATA / name)[0]) for name in PAIRS} | {"customers.csv": len(customers())}
    assert counts == dict(zip(PAIRS, (878, 120, 249, 32, 300, 100), strict=True)) | {"customers.csv": 75}
    rows = re.findall(r"^\| (`.*?) \| ([\d、, ]+) \|", (DATA / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = [
        dict(zip(re.findall("`(.*?)`", names), map(int, re.findall(r"\d+", numbers)), strict=True))
        for names, numbers in rows
    ]
    half = len(told) // 2
    assert [{k: v for row in part for k, v in row.items()} for part in (told[:half], told[half:])] == [counts] * 2


@pytest.mark.parametrize("name", PAIRS)
def test_no_record_occurs_twice(name):
    texts = [json.dumps(record, sort_keys=True) for record in records(name)]
    assert len(set(texts)) == len(texts)


def test_adverts_of_dev_are_unseen_but_made_of_seen_attributes():
    train, dev = (
        [frozenset(attributes(record["content"])) for record in records(f"advert/{part}.json")]
        for part in ("train", "dev")
    )
    assert len({*train, *dev}) == len(train) + len(dev)
    assert frozenset().union(*dev) <= frozenset().union(*train)


@pytest.mark.parametrize("part", ["train", "dev"])
def test_adverts_have_title_text_and_closing_sentence(part):
    for record in records(f"advert/{part}.json"):
        assert list(record) == ["content", "summary"]
        assert re.fullmatch(r"类型#(裙|上衣|裤|鞋|包)(\*[^*#]+#[^*#]+)+", record["content"])
        kind, *values = (value for _, value in attributes(record["content"]))
        title, text = record["summary"].removesuffix(CLOSING).split("：", maxsplit=1)
        assert title.split("·") == [*values, kind]
        assert record["summary"].endswith(CLOSING)
        assert 30 <= len(text) <= 70
        assert [v for v in values if v not in text and (len(v) == 1 or v[:-1] not in text)] == []


def test_chats_have_two_to_four_rounds_and_a_quarter_is_english():
    train, dev = rounds("chat/train.json"), rounds("chat/dev.json")
    assert {len(chat) for chat in train + dev} == {2, 3, 4}
    assert sum(len(chat) for chat in train) == 697
    assert 0.2 < sum(chat[0][0].isascii() for chat in train) / len(train) < 0.3
    assert not {chat[0][0] for chat in dev} & {chat[0][0] for chat in train}


def test_replay_holds_no_question_that_is_kept_from_training(reserved):
    assert not [chat[0][0] for chat in rounds("general/replay.jsonl") if normalise(chat[0][0]) in reserved]


def test_questions_that_measure_forgetting_are_held_out():
    turns = [turn for dialogue in load_dialogues() for turn in dialogue.turns]
    answers = {text: turn.assistant for turn in turns for text in turn.heldout}
    dev, replay = rounds("general/dev.jsonl"), rounds("general/replay.jsonl")
    assert all(chat[-1][1] in answers[chat[-1][0]] for chat in dev)
    assert not {answer for chat in dev for _, answer in chat} & {answer for chat in replay for _, answer in chat}


def test_vocabulary_of_the_embedded_model_covers_the_new_texts():
    tokenizer = ChatGLMTokenizer.from_pretrained(ROOT / "chatglm" / "tiny")
    texts = [text for name in PAIRS[:2] for record in records(name) for text in record.values()]
    texts += [text for name in PAIRS[2:4] for chat in rounds(name) for turn in chat for text in turn]
    texts += [text for example in customers() for text in (example.prompt, example.response)]
    pieces = {piece for text in texts for piece in tokenizer.tokenize(text)}
    assert [piece for piece in pieces if re.fullmatch("<0x[0-9A-F]{2}>", piece)] == []
