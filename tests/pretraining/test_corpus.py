"""The corpus reads without errors, trains on what it should, and keeps evaluation text out of training."""

import json
import random
from itertools import islice

import pytest

from pretraining.corpus import (
    CORE_SHOWINGS,
    CORPUS_FOLDER,
    Dialogue,
    Turn,
    heldout_examples,
    load_dialogues,
    load_evaluation,
    normalise,
    reserved_queries,
    swap_synonyms,
    training_examples,
    vary_ending,
    vary_wording,
)

GOOD = {"topic": "sleep/nap", "lang": "en", "turns": [{"user": ["May I nap?"], "assistant": ["Yes."], "heldout": []}]}


@pytest.fixture(scope="module")
def dialogues():
    return load_dialogues()


@pytest.fixture(scope="module")
def epoch(dialogues):
    return list(training_examples(dialogues, random.Random(7)))


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "part.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def small(topic="sleep/nap", lang="en", **turn):
    return Dialogue(topic, lang, [Turn(**({"user": ["May I nap?"], "assistant": ["Yes."]} | turn))])


# Files ----------------------------------------------------------------------------------------------------------------


def test_dialogue_file_is_read(tmp_path):
    write(tmp_path, GOOD, "")
    assert load_dialogues(tmp_path) == [Dialogue("sleep/nap", "en", [Turn(["May I nap?"], ["Yes."], [])])]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{not json", r"part.jsonl, line 2: not valid JSON"),
        ("[]", r"part.jsonl, line 2: expected a JSON object, got list"),
        ({"topic": "a/b", "lang": "en"}, r"line 2: turns is missing"),
        (GOOD | {"lang": "fr"}, r"line 2: lang must be \"zh\" or \"en\", got 'fr'"),
        (GOOD | {"topic": "/x"}, r"line 2: topic must be a text like health/sleep, got '/x'"),
        (GOOD | {"turns": []}, r"line 2: turns must be a list of at least one turn"),
        (GOOD | {"mood": 1}, r"line 2: unknown key mood, expected lang, topic, turns"),
        (GOOD | {"turns": [{"user": ["a"]}]}, r"line 2, turn 1: assistant is missing"),
        (GOOD | {"turns": [{"user": [], "assistant": ["b"]}]}, r"line 2, turn 1: user must hold at least 1 text"),
        (GOOD | {"turns": [{"user": ["a", " "], "assistant": ["b"]}]}, r"turn 1: user must be a list of non-empty"),
        (
            GOOD | {"turns": [{"user": ["May I nap?"], "assistant": ["b"], "heldout": ["may i nap"]}]},
            r"line 2, turn 1: held-out phrasing 'may i nap' is also a user phrasing",
        ),
    ],
)
def test_error_names_file_and_line(tmp_path, record, message):
    write(tmp_path, GOOD, record)
    with pytest.raises(ValueError, match=message):
        load_dialogues(tmp_path)


def test_folder_without_dialogues_is_refused(tmp_path):
    write(tmp_path, GOOD)
    (tmp_path / "part.jsonl").rename(tmp_path / "evaluation.jsonl")
    with pytest.raises(FileNotFoundError, match="no dialogues in"):
        load_dialogues(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "odd"}, "kind must be one of paraphrase, memory, unknown, skill, new, got 'odd'"),
        ({"expect": {}}, "expect must hold any, all or none"),
        ({"expect": {"any": []}}, "expect any must hold at least 1 text"),
        ({"history": [["only one"]]}, r"history must be a list of \[query, answer\] pairs"),
    ],
)
def test_evaluation_error_names_file_and_line(tmp_path, change, message):
    question = {"history": [], "query": "Hm?", "lang": "en", "kind": "new", "expect": {"any": ["x"]}}
    write(tmp_path, question, question | change)
    with pytest.raises(ValueError, match=f"part.jsonl, line 2: {message}"):
        load_evaluation(tmp_path / "part.jsonl")


def test_corpus_is_large_and_in_both_languages(dialogues):
    languages = [dialogue.lang for dialogue in dialogues]
    assert languages.count("zh") > 1500
    assert languages.count("en") > 1000


# Training -------------------------------------------------------------------------------------------------------------


def test_epoch_is_decided_by_the_seed(dialogues, epoch):
    same, other = (list(islice(training_examples(dialogues, random.Random(seed)), 2000)) for seed in (7, 8))
    assert same == epoch[:2000]
    assert other != epoch[:2000]


def test_epoch_shows_every_dialogue_and_a_third_generated(dialogues, epoch):
    topics = {dialogue.topic for dialogue in dialogues}
    assert topics <= {example.topic for example in epoch}
    plain = list(training_examples(dialogues, random.Random(7), grammar_share=0))
    assert {example.topic for example in plain} == topics
    assert 1.3 < len(epoch) / len(plain) < 1.8


def test_unrelated_rounds_come_before_the_share_asked_for(dialogues):
    single = [dialogue for dialogue in dialogues if len(dialogue.turns) == 1]
    for share in (0, 0.3, 1):
        examples = list(training_examples(single, random.Random(1), grammar_share=0, history_share=share))
        assert sum(bool(example.history) for example in examples) / len(examples) == pytest.approx(share, abs=0.02)
        assert all(len(example.history) <= 3 for example in examples)


def test_later_turns_come_with_their_own_history():
    talk = Dialogue("riddle/egg", "en", [Turn(["A riddle?"], ["What must be broken?"]), Turn(["An egg."], ["Right!"])])
    examples = list(training_examples([talk], random.Random(0), grammar_share=0, history_share=0, evaluation=[]))
    assert [(normalise(e.query), e.answer, len(e.history)) for e in examples] == [
        ("ariddle", "What must be broken?", 0),
        ("anegg", "Right!", 1),
    ]
    assert examples[1].history == [(examples[0].query, examples[0].answer)]


def test_number_of_showings_is_bounded_and_core_topics_get_more():
    user = [f"Question number {word}?" for word in ("one", "two", "three", "four", "five", "six")]
    for topic, times in (("sleep/nap", 4), ("identity/name", 4 + CORE_SHOWINGS)):
        examples = list(training_examples([small(topic, user=user)], random.Random(0), grammar_share=0, evaluation=[]))
        assert len(examples) == times
        assert len({normalise(example.query) for example in examples}) == times


@pytest.mark.parametrize("share", [{"grammar_share": 1}, {"grammar_share": -0.1}, {"history_share": 1.5}])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=f"{next(iter(share))} must be in"):
        next(training_examples([small()], random.Random(0), evaluation=[], **share))


def test_ending_changes_but_not_where_the_query_carries_text():
    rng = random.Random(0)
    assert {vary_ending("What is tea?", "en", rng) for _ in range(200)} == {
        "What is tea?",
        "What is tea",
        "what is tea?",
        "what is tea",
    }
    assert {vary_ending("茶是什么", "zh", rng) for _ in range(100)} == {"茶是什么", "茶是什么？"}
    assert {vary_ending("翻译：我很好。", "zh", rng) for _ in range(50)} == {"翻译：我很好。"}


# What training must not see -------------------------------------------------------------------------------------------


def test_wording_varies_by_greetings_thanks_and_slips_only():
    rng = random.Random(0)
    query = "晚饭吃多了睡得香吗？"  # no word of it stands in synonyms.txt
    variants = {vary_wording(query, "zh", rng) for _ in range(500)}
    assert query in variants and len(variants) > 20
    assert all(len(set(query) - set(variant)) <= 2 and abs(len(variant) - len(query)) <= 6 for variant in variants)
    assert {vary_wording("翻译：我很好。", "zh", rng) for _ in range(100)} == {"翻译：我很好。"}
    assert {vary_wording("Yes", "en", rng) for _ in range(200)} >= {"Yes", "Hi, yes", "Yes Thanks!"}


def test_synonyms_take_each_others_place():
    rng = random.Random(0)
    assert {swap_synonyms("DNA是什么？", "zh", rng) for _ in range(99)} > {"DNA是什么？", "DNA是啥？", "DNA指什么？"}
    assert {swap_synonyms("Tell me a joke", "en", rng) for _ in range(99)} == {
        f"Tell me a {word}" for word in ("joke", "gag", "funny story")
    }
    starts = {swap_synonyms("What is an atom?", "en", rng) for _ in range(99)}
    assert starts == {f"{start} an atom?" for start in ("What is", "What's", "What exactly is")}
    assert {swap_synonyms("没有人", "zh", rng) for _ in range(99)} == {"没有人"}  # 有 alone is not replaced


def test_every_line_of_synonyms_is_a_group():
    groups = [line.split("|") for line in (CORPUS_FOLDER / "synonyms.txt").read_text("utf-8").splitlines()]
    assert len(groups) > 200
    for group in groups:
        assert len(group) >= 2 and len(set(group)) == len(group), group
        assert all(word.strip() == word and word for word in group), group


def test_heldout_openings_and_evaluation_questions_are_never_trained_on(dialogues, epoch):
    reserved = reserved_queries(dialogues, load_evaluation())
    for example in epoch:
        assert example.history or normalise(example.query) not in reserved, example.query
        for query, _ in example.history[:1]:
            assert normalise(query) not in reserved, query


def test_evaluation_conversations_are_never_trained_on(epoch):
    unseen = {
        tuple(normalise(text) for text in (*(query for query, _ in question["history"]), question["query"]))
        for question in load_evaluation()
    }
    trained = {tuple(normalise(text) for text in (*(q for q, _ in e.history), e.query)) for e in epoch}
    assert not unseen & trained


def test_evaluation_questions_stand_nowhere_in_the_corpus(dialogues):
    written = {normalise(t) for dialogue in dialogues for turn in dialogue.turns for t in turn.user + turn.heldout}
    questions = [question for question in load_evaluation() if question["kind"] != "memory"]
    assert [q["query"] for q in questions if normalise(q["query"]) in written] == []


def test_evaluation_covers_both_languages_and_all_kinds():
    counts = {}
    for question in load_evaluation():
        key = (question["lang"], question["kind"])
        counts[key] = counts.get(key, 0) + 1
    assert sum(counts.values()) >= 120
    assert len(counts) == 10
    assert min(counts.values()) >= 10


def test_reserved_phrasing_of_another_dialogue_is_left_out():
    dialogues = [
        small(user=["May I nap?", "Is a nap fine?"]),
        small("sleep/other", user=["x y"], heldout=["may i nap"]),
    ]
    examples = list(training_examples(dialogues, random.Random(0), grammar_share=0, evaluation=[]))
    queries = {normalise(example.query) for example in examples}
    assert not any("mayinap" in query for query in queries)
    assert [any(text in query for query in queries) for text in ("isanapfine", "xy")] == [True, True]


def test_heldout_examples_carry_references_and_their_own_history():
    talk = Dialogue(
        "a/b", "en", [Turn(["Hi", "Hey"], ["Hello!", "Hi!"], ["Yo"]), Turn(["How are you?"], ["Fine."], ["All good?"])]
    )
    first, second = heldout_examples([talk])
    assert (first.history, first.query, first.answer, first.references) == ([], "Yo", "Hello!", ["Hello!", "Hi!"])
    assert (second.history, second.query, second.references) == ([("Hi", "Hello!")], "All good?", ["Fine."])
