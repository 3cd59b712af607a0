"""Generated dialogues are right, repeatable, and never show training what evaluation asks."""

import json
import random
import re

import pytest

from pretraining import grammars
from pretraining.grammars import SKILLS, WEIGHTS, generate, is_heldout

SAMPLES = 200


def dialogues_of(name, split="train", count=SAMPLES):
    rng = random.Random(f"{name}/{split}")
    return [SKILLS[name](rng, split) for _ in range(count)]


def last_round(dialogue):
    turn = dialogue.turns[-1]
    return turn.user[0], turn.assistant[0]


def test_every_skill_has_a_weight():
    assert set(WEIGHTS) == set(SKILLS)


def test_same_seed_gives_the_same_dialogues():
    first, second = (
        [generate(rng, split) for split in grammars.SPLITS for _ in range(50)]
        for rng in (random.Random(3), random.Random(3))
    )
    assert first == second


def test_split_is_the_same_everywhere_and_one_in_ten():
    assert [is_heldout(name) for name in ("Anna", "Tom", "王芳", 7)] == [
        is_heldout(n) for n in ("Anna", "Tom", "王芳", "7")
    ]
    assert 0.09 < sum(is_heldout(number, "+", 1) for number in range(5000)) / 5000 < 0.11
    assert [name for name in grammars.EN_NAMES[:40] if is_heldout(name)] == [
        "Andrea",
        "Andrew",
        "Anthony",
        "April",
        "Camille",
    ]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match='split must be "train" or "heldout", got \'test\''):
        generate(random.Random(0), "test")


@pytest.mark.parametrize("split", grammars.SPLITS)
@pytest.mark.parametrize("name", SKILLS)
def test_dialogues_are_well_formed_in_both_languages(name, split):
    dialogues = dialogues_of(name, split)
    assert {dialogue.lang for dialogue in dialogues} == {"zh", "en"}
    for dialogue in dialogues:
        texts = [text for turn in dialogue.turns for text in (*turn.user, *turn.assistant)]
        assert all(text.strip() == text and "{" not in text.replace('{"', "") for text in texts), texts
        assert dialogue.keys and all(key in last_round(dialogue)[1] for key in dialogue.keys)


@pytest.mark.parametrize("name", SKILLS)
def test_there_is_more_than_can_be_memorised(name):
    rounds = {tuple(turn.user[0] for turn in dialogue.turns) for dialogue in dialogues_of(name, count=1000)}
    least = {"day_and_month": 150, "remember_nothing": 300}.get(name, 500)
    assert len(rounds) > least


def test_names_of_evaluation_never_occur_in_training():
    asked = {dialogue.keys[0] for dialogue in dialogues_of("remember_name", "heldout")}
    told = {dialogue.keys[0] for dialogue in dialogues_of("remember_name", count=3000)}
    assert len(asked) > 100 and len(told) > 800
    assert not asked & told


def test_single_rounds_of_evaluation_are_not_those_of_training():
    for name in ("arithmetic", "compare_numbers", "extract_fields", "advert", "translate_word", "day_and_month"):
        heldout = {last_round(dialogue)[0] for dialogue in dialogues_of(name, "heldout")}
        trained = {last_round(dialogue)[0] for dialogue in dialogues_of(name, count=3000)}
        assert not heldout & trained, name


@pytest.mark.parametrize("name", ["remember_name", "remember_fact", "remember_two"])
def test_what_is_asked_was_told_before(name):
    for dialogue in dialogues_of(name):
        told = " ".join(turn.user[0] for turn in dialogue.turns[:-1]).replace(" my ", " your ")
        assert dialogue.keys[0] in told, (dialogue.keys, told)
        assert len(dialogue.turns) >= 2


def test_answers_fit_what_is_asked():
    for name in ("remember_name", "remember_fact"):
        for dialogue in dialogues_of(name):
            query, answer = last_round(dialogue)
            assert answer.startswith("记得") == ("记得" in query), (query, answer)
            assert answer.startswith("Yes") == query.startswith(("Do you", "Can you", "Remember")), (query, answer)
            if re.search("谁|[Ww]ho ", query) and name == "remember_name":
                assert re.search("你是|ou are ", answer), (query, answer)


def test_untold_things_are_not_made_up():
    for dialogue in dialogues_of("remember_nothing"):
        assert re.search("不知道|not know", last_round(dialogue)[1])


def test_arithmetic_is_right():
    signs = {"加": "+", "减": "-", "乘以": "*", "除以": "/", "plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    pattern = re.compile(r"(\d+) ?(加|减|乘以|除以|plus|minus|times|divided by) ?(\d+) ?(?:等于|is )(\d+)")
    for dialogue in dialogues_of("arithmetic", count=2000):
        query, answer = last_round(dialogue)
        left, sign, right, result = pattern.search(answer).groups()
        assert eval(f"{left} {signs[sign]} {right}") == int(result), answer
        assert {left, right} <= set(re.findall(r"\d+", query))
        for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)", answer):  # the steps on the way
            assert int(a) + int(b) == int(c)


def test_comparison_is_right():
    for dialogue in dialogues_of("compare_numbers", count=1000):
        query, answer = last_round(dialogue)
        numbers = [int(number) for number in re.findall(r"\d+", query)]
        wanted = max(numbers) if re.search("大|larg|bigg", query) else min(numbers)
        assert re.search(rf"(?<!\d){wanted}(?!\d)", answer.split("比")[0].split(" than")[0]), (query, answer)


def test_extracted_values_stand_in_the_sentence():
    for dialogue in dialogues_of("extract_fields"):
        query, answer = last_round(dialogue)
        if answer.startswith("{"):
            fields = json.loads(answer)
        else:
            fields = dict(re.split("：|: ", line, maxsplit=1) for line in answer.split("\n"))
        assert fields
        for key, value in fields.items():
            assert value in query, (query, answer)
            assert key.lower() in query, (query, answer)


def test_extracted_words_come_in_the_order_of_the_sentence():
    for dialogue in dialogues_of("extract_words"):
        query, answer = last_round(dialogue)
        words = ".*".join(map(re.escape, dialogue.keys))  # one after the other, though 蓝色 also stands in 天蓝色
        assert re.search(words, query) and re.search(words, answer), (query, answer)


def test_repeated_text_is_the_given_text():
    for dialogue in dialogues_of("copy_text"):
        query, answer = last_round(dialogue)
        assert query.endswith(answer) or query[:-1].endswith(answer)


def test_lists_are_counted_and_turned_round_rightly():
    for dialogue in dialogues_of("short_list", count=1500):
        query, answer = last_round(dialogue)
        if dialogue.topic == "list/sort":
            numbers = [int(number) for number in re.findall(r"\d+", answer)]
            assert numbers == sorted(int(number) for number in re.findall(r"\d+", query))
        if dialogue.topic == "list/reverse":
            words = answer.split("、" if dialogue.lang == "zh" else ", ")
            assert [query.index(word) for word in words] == sorted((query.index(word) for word in words), reverse=True)
        if dialogue.topic == "list/contains":
            word = re.search("里面(?:没)?有(.*)。" if dialogue.lang == "zh" else '"(.*)"', answer).group(1)
            listed = re.split("清单：|list: |list is ", query)[-1]
            listed = re.split("，里面有|。有没有|[?]|[.] Does", listed)[0]
            assert (word in re.split("[、，]|, |(?<=[\u4e00-\u9fff]) ", listed)) == answer.startswith(("有", "Yes"))


def test_every_review_shows_its_words_and_has_openings():
    assert set(grammars.ZH_OPENINGS) == set(grammars.ZH_REVIEWS)
    for sides in (*grammars.ZH_REVIEWS.values(), *grammars.EN_REVIEWS.values()):
        assert all(words in clause for side in sides for clause, words in side)


def test_sentiment_follows_the_clauses():
    for dialogue in dialogues_of("sentiment"):
        query, _ = last_round(dialogue)
        good, bad = (
            [clause for pair in reviews.values() for clause, _ in pair[side] if clause.lower() in query.lower()]
            for reviews in [grammars.ZH_REVIEWS if dialogue.lang == "zh" else grammars.EN_REVIEWS]
            for side in (0, 1)
        )
        verdict = dialogue.keys[0]
        expected = ("有好有坏", "Mixed") if good and bad else ("正面", "Positive") if good else ("负面", "Negative")
        assert verdict in expected, query


def test_advert_uses_every_attribute():
    for dialogue in dialogues_of("advert"):
        query, answer = last_round(dialogue)
        if dialogue.lang == "zh":
            for value in re.findall(r"(?<!类型)#([^*。\s]+)", query):
                assert value in answer or any(
                    value in phrases and phrases[value] in answer for phrases in grammars.ZH_COPY.values()
                ), (query, answer)


def test_made_up_words_are_told_and_asked_alike_and_stand_in_no_list():
    rng = random.Random(0)
    for name in ("remember_fact", "extract_words"):
        changed = 0
        for dialogue in dialogues_of(name):
            other = grammars.with_made_up_words(dialogue, rng)
            query, answer = last_round(other)
            told = " ".join(turn.user[0] for turn in other.turns).replace(" my ", " your ")
            assert all(key in told and key in answer for key in other.keys), (query, answer)
            for key, old in zip(other.keys, dialogue.keys, strict=True):
                changed += key != old
                assert key == old or key not in grammars.REPLACEABLE[other.lang]
        assert changed > 50, name


def test_honest_answer_names_what_was_asked_or_refuses():
    named = 0
    for dialogue in dialogues_of("honest_ignorance"):
        query, answer = last_round(dialogue)
        named += dialogue.keys[0] in query
        assert dialogue.keys[0] in query or any(
            word in answer for word in ("算不准", "beyond me", "do not know", "learned")
        )
    assert named > 0.7 * len(dialogues_of("honest_ignorance"))


def test_days_and_months_move_on():
    assert grammars.ZH_DAYS[0] == "星期一" and grammars.EN_DAYS[-1] == "Sunday"
    for dialogue in dialogues_of("day_and_month"):
        query, answer = last_round(dialogue)
        match = re.search(r"(星期.)的?，?(\d)天(前|后)", query)
        if match:
            start, shift, way = match.groups()
            end = grammars.ZH_DAYS.index(start) + int(shift) * (1 if way == "后" else -1)
            assert answer == f"是{grammars.ZH_DAYS[end % 7]}。"


def test_spelling_gives_the_letters():
    for dialogue in dialogues_of("spell_word"):
        query, answer = last_round(dialogue)
        if dialogue.topic == "spelling/letters":
            word = answer.rstrip("。.").replace("-", "").lower()
            assert word in query.lower()
