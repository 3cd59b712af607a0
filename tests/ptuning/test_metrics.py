"""Scores of pairs that are worked out by hand."""

import subprocess
import sys
from math import exp
from pathlib import Path

import pytest

from ptuning.metrics import NAMES, compute_scores, words

ROOT = Path(__file__).parents[2]
ZERO = dict.fromkeys(NAMES, 0.0)


def rounded(**scores):
    return {name.replace("_", "-"): round(100 * value, 4) for name, value in scores.items()}


def test_scores_of_a_pair_are_those_worked_out_by_hand():
    prediction, reference = "我喜欢红色裙子", "我喜欢白色裙子"
    assert words(prediction) == ["我", "喜欢", "红色", "裙子"]
    assert words(reference) == ["我", "喜欢", "白色", "裙子"]
    # Words: 3 of 4 are the same on both sides, 1 of 3 pairs, and 3 of 4 in the same order.
    # Characters: 6 of 7, 4 of 6 pairs, 2 of 5 triples, none of 4 quadruples, which then counts as half of one.
    bleu = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 8) ** (1 / 4)
    assert compute_scores([prediction], [reference]) == rounded(
        rouge_1=3 / 4, rouge_2=1 / 3, rouge_l=3 / 4, bleu_4=bleu
    )


def test_rouge_is_the_f_measure_of_precision_and_recall():
    # Both words of the prediction are among the four of the reference: precision 1, recall 1/2. One pair of three.
    scores = compute_scores(["喜欢红色"], ["我喜欢红色裙子"])
    assert (scores["rouge-1"], scores["rouge-2"], scores["rouge-l"]) == (66.6667, 50.0, 66.6667)


def test_words_count_once_for_rouge_1_and_2_and_as_often_as_they_stand_for_rouge_l():
    scores = compute_scores(["裙子，裙子，裙子"], ["裙子"])
    # {裙子 ，} against {裙子}: 1/2 and 1; no pairs in the reference; 1 of 5 and 1 of 1 words in order.
    assert (scores["rouge-1"], scores["rouge-2"], scores["rouge-l"]) == (66.6667, 0.0, 33.3333)


def test_order_of_words_matters_for_rouge_l_and_not_for_rouge_1():
    scores = compute_scores(["红色喜欢"], ["喜欢红色"])
    assert (scores["rouge-1"], scores["rouge-2"], scores["rouge-l"]) == (100.0, 0.0, 50.0)


def test_short_prediction_pays_the_brevity_penalty():
    # All characters, pairs and triples are there; no quadruple is: half of one. 3 characters for 7.
    assert compute_scores(["我喜欢"], ["我喜欢白色裙子"])["bleu-4"] == round(
        100 * exp(1 - 7 / 3) * (1 / 2) ** (1 / 4), 4
    )


def test_equal_texts_score_100():
    text = "这条裙子很好看。颜色也好！（白色）"
    assert compute_scores([text], [text]) == dict.fromkeys(NAMES, 100.0)


def test_texts_without_anything_in_common_score_0():
    assert compute_scores(["裙子"], ["上衣很短"]) == ZERO


@pytest.mark.parametrize("empty", ["", " ", "\n", "\u3000\n"])
def test_empty_text_scores_0_on_either_side(empty):
    assert compute_scores([empty], ["裙子"]) == ZERO
    assert compute_scores(["裙子"], [empty]) == ZERO
    assert compute_scores([empty], [empty]) == ZERO


def test_scores_are_means_over_the_pairs_and_an_empty_answer_counts():
    text = "这条裙子很好看"
    assert compute_scores([text, "", text, ""], [text] * 4) == dict.fromkeys(NAMES, 50.0)


def test_white_space_between_words_is_no_word():
    assert words("red \n 裙子\u3000好") == ["red", "裙子", "好"]


def test_texts_of_punctuation_or_other_scripts_score_as_well():
    for text in ("。。。", "……！？”", "？ ”", "a\nb c", "ok", "١٢٣", "👍👍"):
        assert compute_scores([text], [text])["rouge-1"] == 100.0


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_nothing_to_compare_is_an_error(predictions, references):
    with pytest.raises(ValueError):
        compute_scores(predictions, references)


def test_scoring_writes_nothing_to_the_terminal():
    code = "from ptuning.metrics import compute_scores; compute_scores(['裙子'], ['裙子'])"
    run = subprocess.run([sys.executable, "-B", "-W", "default", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
