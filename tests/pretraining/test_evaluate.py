"""Verdicts of the evaluation on answers whose worth is known, and its tables."""

import math
import random

import pytest
import torch

from pretraining.corpus import Example, load_dialogues
from pretraining.evaluate import (
    Likelihood,
    Question,
    answer_table,
    ask,
    bigram_f1,
    build_parser,
    contains,
    generated_questions,
    is_looping,
    judge,
    likelihood_table,
    likelihoods,
    main,
    meets,
    sampled_questions,
    trained_questions,
    transcript,
)
from pretraining.grammars import SKILLS


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("The capital is TOKYO.", "tokyo", True),
        ("姓名：李雷", "姓名:李雷", True),  # full and half width are the same
        ("一共17个", "7", False),  # a number counts as a whole
        ("一共7个", "7", True),
        ("It is 82.", "82", True),
    ],
)
def test_word_is_found_as_a_reader_would(text, word, found):
    assert contains(text, word) is found


def test_rubric_asks_for_any_all_and_none():
    expect = {"any": ["mild", "warm"], "all": ["Oslo"], "none": ["snow"]}
    assert meets("It is warm in Oslo.", expect)
    assert not meets("It is warm.", expect)
    assert not meets("It is cold in Oslo.", expect)
    assert not meets("It is warm in Oslo, with snow.", expect)
    assert not meets("  ", {"none": ["x"]})


def test_overlap_counts_pairs_of_hanzi_and_words():
    assert bigram_f1("你叫李雷。", "你叫李雷") == 1
    assert bigram_f1("red, green!", "Red green") == 1
    assert bigram_f1("天地", "山水") == 0
    # With the ends, "a b c" and "a b d" have four pairs each and share two: (start, a) and (a, b).
    assert bigram_f1("a b c", "a b d") == pytest.approx(0.5)


def test_running_in_circles_is_noticed():
    assert is_looping("我很好，我很好，我很好，我很好，")
    assert is_looping("no no no no no ")
    assert is_looping("哈" * 10)
    assert not is_looping("哈哈哈，真好笑！")
    assert not is_looping("1. Rest.\n2. Drink water.\n3. Sleep.\n4. Walk.")


def test_looping_answer_is_never_sensible():
    question = Question("questions", "skill", "en", [], "2+2?", {"any": ["4"]})
    assert judge(question, "It is 4.").sensible
    verdict = judge(question, "It is 4. It is 4. It is 4. It is 4. It is 4. ")
    assert verdict.looping and not verdict.sensible


def test_answer_near_any_reference_is_sensible():
    question = Question("held-out phrasings", "opening", "zh", [], "问", references=["完全不同", "多喝水，早点睡"])
    assert judge(question, "多喝水，早点睡觉。").sensible
    assert not judge(question, "今天天气很好。").sensible


def test_tables_count_by_kind_and_language():
    answered = [
        judge(Question("questions", kind, lang, [], "q", {"any": ["yes"]}), answer)
        for kind, lang, answer in [
            ("skill", "zh", "yes"),
            ("skill", "en", "no"),
            ("new", "en", "yes"),
            ("new", "en", "no no no no no "),
        ]
    ]
    assert [line.split() for line in answer_table("questions", answered)] == [
        ["questions", "zh", "en", "all", "loops"],
        ["skill", "1/1", "100", "%", "0/1", "0", "%", "1/2", "50", "%", "0"],
        ["new", "-", "1/2", "50", "%", "1/2", "50", "%", "1"],
        ["all", "1/1", "100", "%", "1/3", "33", "%", "2/4", "50", "%", "1"],
    ]
    text = transcript("Evaluation of X", ["table"], answered)
    assert text.count("### ") == 4
    assert text.count("**not sensible**") == 1 and text.count("looping") == 1


def test_likelihoods_of_languages_are_weighted_by_tokens():
    zh, en = Likelihood(math.log(2) * 30, 30, 15, 1), Likelihood(math.log(8) * 10, 10, 30, 1)
    assert (zh.perplexity, zh.bits_per_character) == (pytest.approx(2), pytest.approx(2))
    assert en.perplexity == pytest.approx(8)
    total = likelihood_table({"zh": zh, "en": en})[-1].split()
    assert total == [
        "all",
        "2",
        "40",
        "2.83",
        "1.333",
    ]  # (30 * 1 + 10 * 3) / 40 = 1.5 bits a token, 60 / 45 a character


def test_likelihood_is_that_of_the_labelled_forward_pass(model, tokenizer):
    examples = [
        Example([("你好", "你好！")], "1加1等于几？", "1加1等于2。", "t", "zh"),
        Example([], "Hi", "Hello!", "t", "zh"),
    ]
    score = likelihoods(model, tokenizer, examples)["zh"]

    nats = tokens = 0
    for prompt, answer in [
        ("[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：1加1等于几？\n答：", "1加1等于2。"),
        ("Hi", "Hello!"),
    ]:
        start = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].float()
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()
        tokens += len(ids)
    assert score.tokens == tokens
    assert score.nats == pytest.approx(nats, rel=1e-4)
    assert (score.characters, score.examples) == (len("1加1等于2。Hello!"), 2)


def test_generated_questions_cover_every_skill():
    questions = generated_questions(2, random.Random(0))
    assert [question.kind for question in questions] == [name for name in SKILLS for _ in range(2)]
    assert all(question.expect["all"] for question in questions)


def test_trained_questions_are_opening_phrasings_with_their_answers():
    openings = {(query, tuple(turn.assistant)) for d in load_dialogues() for turn in d.turns[:1] for query in turn.user}
    questions = trained_questions(load_dialogues(), 50, random.Random(0))
    assert len(questions) == 50
    assert all((question.query, tuple(question.references)) in openings for question in questions)


def test_negative_limit_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--limit", "-1"])
    assert "--limit must be 0 or more, got -1" in capsys.readouterr().err
    assert build_parser().parse_args([]).samples == 200


def test_missing_corpus_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--corpus", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no dialogues in" in capsys.readouterr().err


def test_questions_inside_the_domain_have_a_row_of_their_own():
    answered = [
        judge(Question("questions", kind, "en", [], "?", {"any": ["yes"]}), answer)
        for kind, answer in [("new", "yes"), ("skill", "no"), ("unknown", "yes"), ("unknown", "yes")]
    ]
    lines = answer_table("questions", answered)
    assert [line.split()[0] for line in lines] == ["questions", "new", "skill", "unknown", "in-domain", "all"]
    assert lines[-2].split() == ["in-domain", "-", "1/2", "50", "%", "1/2", "50", "%", "0"]


def test_sampled_answers_differ_and_greedy_ones_do_not(model, tokenizer):
    greedy = Question("questions", "new", "zh", [], "给我讲个故事", {"none": ["~"]})
    sampled = sampled_questions([greedy], 5, random.Random(0))
    assert [(question.group, question.query) for question in sampled] == [("sampled answers", greedy.query)]
    torch.manual_seed(0)
    assert len({item.answer for item in ask(model, tokenizer, sampled * 6)}) > 1
    assert len({item.answer for item in ask(model, tokenizer, [greedy] * 2)}) == 1
