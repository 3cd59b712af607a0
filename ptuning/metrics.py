"""Scores of generated answers against written ones: ROUGE on words and BLEU-4 on characters, as the original counts."""

import logging
import warnings
from collections.abc import Sequence
from statistics import fmean

with warnings.catch_warnings(action="ignore"):  # old escape sequences, which Python mentions when it compiles them
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

jieba.setLogLevel(logging.WARNING)  # it tells stderr that it loads its dictionary
ROUGE = Rouge(metrics=["rouge-1", "rouge-2", "rouge-l"], stats=["f"])
SMOOTHING = SmoothingFunction().method3  # n-grams that never match count 1/2, 1/4, ... of one match, not 0
NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def compute_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of `score` over all pairs, in percent with four decimals. Raises ValueError if there are none."""
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        raise ValueError("scores need at least one prediction and its reference, got none")
    scores = [score(prediction, reference) for prediction, reference in pairs]
    return {name: round(100 * fmean(pair[name] for pair in scores), 4) for name in NAMES}


def score(prediction: str, reference: str) -> dict[str, float]:
    """rouge-1, rouge-2, rouge-l and bleu-4 of one answer, 0 to 1; an empty text on either side scores 0.

    ROUGE-1 and -2 are the F measure of the sets of words and of pairs of words in a row, ROUGE-L that of the longest
    common subsequence of words; jieba finds the words. BLEU-4 counts runs of 1 to 4 characters. Sources: Lin, ROUGE
    (2004), sections 2 and 3; Papineni et al., BLEU (2002), section 2; Chen and Cherry (2014), smoothing technique 3.
    """
    predicted, written = words(prediction), words(reference)
    if not predicted or not written:
        return dict.fromkeys(NAMES, 0.0)
    rouge = ROUGE.get_scores(" ".join(predicted), " ".join(written))[0]
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SMOOTHING)
    return {name: measure["f"] for name, measure in rouge.items()} | {"bleu-4": float(bleu)}


def words(text: str) -> list[str]:
    """The words and signs of a text, without white space."""
    return [word for word in jieba.cut(text) if word.strip()]
