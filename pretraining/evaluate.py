"""Measure a chat model on text it was not trained on: `python pretraining/evaluate.py`.

Three judges, all repeatable: perplexity of the reference answers to held-out phrasings; a rubric of words for the
unseen questions of corpus/evaluation.jsonl; and free-running greedy answers to samples of trained phrasings, of
held-out phrasings and of generated dialogues with unseen names and numbers. An answer to a phrasing counts as sensible
if it shares enough pairs of neighbouring Hanzi or words with a reference answer (F1 of at least BIGRAM_F1). An answer
that runs in circles never counts; questions and held-out phrasings are also answered with the default temperature to
count those.
"""

import argparse
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, this folder is on the path and its parent is not

from pretraining.corpus import (  # noqa: E402
    CORPUS_FOLDER,
    EVALUATION_FILE,
    Dialogue,
    Example,
    heldout_examples,
    load_dialogues,
    load_evaluation,
)
from pretraining.grammars import SKILLS  # noqa: E402
from utils import add_model_arguments, load_model, main_errors, model_options, model_title  # noqa: E402

BIGRAM_F1 = 0.4  # reached by under 0.2 % of the pairs of different reference answers about the same group of topics
MAX_NEW_TOKENS = 160
SAMPLED = "sampled answers"  # the group that is answered with the default temperature
OUTSIDE = "unknown"  # the kind of question that is to be refused; all others are inside the model's domain
BATCH_TOKENS = 2048  # of the perplexity, padding included
LONGEST_EXAMPLE = 2048  # tokens; the positions the architecture was published with
UNIT = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")  # a Hanzi, a word or a number
LOOP = re.compile(r"(\S)\1{9,}|(.{2,60}?)\2{3,}", re.DOTALL)


@dataclass
class Question:
    """Something to ask, and how to judge the answer: by an expect rubric, or by its likeness to references."""

    group: str  # the table: questions, held-out phrasings or generated dialogues
    kind: str  # the row
    lang: str
    history: list[tuple[str, str]]
    query: str
    expect: dict[str, list[str]] = field(default_factory=dict)
    references: list[str] = field(default_factory=list)


@dataclass
class Answered:
    """A question with its answer and the verdict."""

    question: Question
    answer: str
    sensible: bool
    looping: bool


@dataclass
class Likelihood:
    """Negative log-likelihood of reference answers, summed. nats over tokens, characters without the end token."""

    nats: float = 0.0
    tokens: int = 0
    characters: int = 0
    examples: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean per token; nan without any."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_character(self) -> float:
        """Comparable between tokenizers; nan without any."""
        return self.nats / math.log(2) / self.characters if self.characters else math.nan


# Judging --------------------------------------------------------------------------------------------------------------


def contains(text: str, word: str) -> bool:
    """True if word occurs in text, whatever its capitals and widths; a number only as a whole number."""
    text, word = (unicodedata.normalize("NFKC", part).casefold() for part in (text, word))
    before = r"(?<!\d)" if word[0].isdigit() else ""
    after = r"(?!\d)" if word[-1].isdigit() else ""
    return re.search(before + re.escape(word) + after, text) is not None


def meets(answer: str, expect: dict[str, list[str]]) -> bool:
    """True if the answer contains one of expect["any"], each of expect["all"] and none of expect["none"]."""
    return (
        bool(answer.strip())
        and ("any" not in expect or any(contains(answer, word) for word in expect["any"]))
        and all(contains(answer, word) for word in expect.get("all", []))
        and not any(contains(answer, word) for word in expect.get("none", []))
    )


def bigram_f1(answer: str, reference: str) -> float:
    """Overlap of the pairs of neighbouring Hanzi and words, from 0 to 1; punctuation and capitals do not count.

    Pairs of letters would not do: in English most long answers share four in ten of them.
    """
    left, right = (_bigrams(text) for text in (answer, reference))
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0


def is_looping(answer: str) -> bool:
    """True if a character comes ten times, or a piece of 2 to 60 characters four times, in a row."""
    return LOOP.search(answer) is not None


def judge(question: Question, answer: str) -> Answered:
    """The answer with its verdict."""
    looping = is_looping(answer)
    fits = meets(answer, question.expect)
    if question.references:
        fits = fits and max(bigram_f1(answer, reference) for reference in question.references) >= BIGRAM_F1
    return Answered(question, answer, fits and not looping, looping)


def _bigrams(text: str) -> Counter:
    units = ["", *UNIT.findall(unicodedata.normalize("NFKC", text).casefold()), ""]
    return Counter(pairwise(units))


# Questions ------------------------------------------------------------------------------------------------------------


def heldout_questions(examples: list[Example], count: int, rng: random.Random) -> list[Question]:
    """A sample of held-out phrasings; opening turns and later ones are rows of their own."""
    return [
        Question(
            "held-out phrasings",
            "later turn" if example.history else "opening",
            example.lang,
            example.history,
            example.query,
            references=example.references,
        )
        for example in rng.sample(examples, min(count, len(examples)))
    ]


def trained_questions(dialogues: list[Dialogue], count: int, rng: random.Random) -> list[Question]:
    """A sample of opening turns in a phrasing that training did see: how much was learnt at all."""
    return [
        Question(
            "trained phrasings",
            "opening",
            dialogue.lang,
            [],
            rng.choice(dialogue.turns[0].user),
            references=dialogue.turns[0].assistant,
        )
        for dialogue in rng.sample(dialogues, min(count, len(dialogues)))
    ]


def generated_questions(each: int, rng: random.Random) -> list[Question]:
    """Dialogues of every skill with slot values that training never shows; an answer must contain the right ones."""
    questions = []
    for name, skill in SKILLS.items():
        for _ in range(each):
            dialogue = skill(rng, "heldout")
            *rounds, last = [(turn.user[0], turn.assistant[0]) for turn in dialogue.turns]
            questions.append(
                Question("generated", name, dialogue.lang, rounds, last[0], {"all": dialogue.keys}, references=[])
            )
    return questions


def sampled_questions(questions: list[Question], count: int, rng: random.Random) -> list[Question]:
    """count of the questions, to be answered with the default temperature."""
    return [replace(question, group=SAMPLED) for question in rng.sample(questions, min(count, len(questions)))]


def evaluation_questions(path: Path) -> list[Question]:
    """The unseen questions of a file, one row per kind."""
    return [
        Question("questions", entry["kind"], entry["lang"], entry["history"], entry["query"], entry["expect"])
        for entry in load_evaluation(path)
    ]


# Running the model ----------------------------------------------------------------------------------------------------


def likelihoods(model, tokenizer, examples: list[Example]) -> dict[str, Likelihood]:
    """{lang: Likelihood} of the first reference answers, end token included, as far as the model can read."""
    import torch

    from pretraining.train import answer_loss, collate, encode_example

    rows = [(encode_example(example, tokenizer, LONGEST_EXAMPLE), example) for example in examples]
    result = {}
    for lang in sorted({example.lang for example in examples}, reverse=True):
        chosen = sorted(
            ((row, example) for row, example in rows if row and example.lang == lang), key=lambda pair: len(pair[0].ids)
        )
        total = result[lang] = Likelihood(
            tokens=sum(len(row.ids) - row.answer_start for row, _ in chosen),
            characters=sum(len(example.answer) for _, example in chosen),
            examples=len(chosen),
        )
        for batch in progress(list(_batches([row for row, _ in chosen])), f"perplexity, {lang}"):
            inputs = collate(batch, tokenizer.pad_token_id)
            inputs.input_ids, inputs.labels = inputs.input_ids.to(model.device), inputs.labels.to(model.device)
            with torch.inference_mode():
                loss = answer_loss(model, inputs).item()
            total.nats += loss * sum(len(row.ids) - row.answer_start for row in batch)
    return result


def ask(model, tokenizer, questions: list[Question]) -> list[Answered]:
    """Answers of the model, judged; greedy ones but for the group SAMPLED."""
    answered = []
    for question in progress(questions, questions[0].group if questions else ""):
        options = {} if question.group == SAMPLED else {"temperature": 0}
        answer, _ = model.chat(
            tokenizer, question.query, history=question.history, max_new_tokens=MAX_NEW_TOKENS, **options
        )
        answered.append(judge(question, answer))
    return answered


def progress(items: list, name: str) -> Iterator:
    """The items one by one; how far it got goes to stderr, on one line of a terminal, else at every tenth."""
    for index, item in enumerate(items, 1):
        yield item
        line = f"{name:<24} {index:>5}/{len(items)}"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if index == len(items) else "", file=sys.stderr, flush=True)
        elif index * 10 // len(items) > (index - 1) * 10 // len(items):
            print(line, file=sys.stderr, flush=True)


def _batches(rows: list) -> Iterator[list]:
    """Rows of rising length in groups of at most BATCH_TOKENS with padding."""
    batch = []
    for row in rows:
        if batch and len(row.ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


# Report ---------------------------------------------------------------------------------------------------------------


def likelihood_table(scores: dict[str, Likelihood]) -> list[str]:
    """Lines with perplexity and bits per character by language."""
    lines = [f"{'reference answers':<20}{'examples':>10}{'tokens':>10}{'perplexity':>12}{'bits/char':>11}"]
    total = Likelihood()
    for lang, score in scores.items():
        lines.append(_likelihood_line(lang, score))
        for name in ("nats", "tokens", "characters", "examples"):
            setattr(total, name, getattr(total, name) + getattr(score, name))
    return [*lines, _likelihood_line("all", total)]


def answer_table(group: str, answered: list[Answered]) -> list[str]:
    """Lines with the share of sensible answers by kind and language, and the number of answers that run in circles."""
    lines = [f"{group:<20}{'zh':>16}{'en':>16}{'all':>16}{'loops':>8}"]
    kinds = list(dict.fromkeys(item.question.kind for item in answered))
    groups = {kind: [kind] for kind in kinds}
    if OUTSIDE in kinds:
        groups["in-domain"] = [kind for kind in kinds if kind != OUTSIDE]
    groups["all"] = kinds
    for name, members in groups.items():
        rows = [item for item in answered if item.question.kind in members]
        cells = [_share([item for item in rows if lang in ("all", item.question.lang)]) for lang in ("zh", "en", "all")]
        lines.append(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells) + f"{sum(i.looping for i in rows):>8}")
    return lines


def transcript(title: str, tables: list[str], answered: list[Answered]) -> str:
    """Markdown: the tables, then every question with its history, answer and verdict."""
    lines = [f"# {title}", "", "```", *tables, "```"]
    group = None
    for item in answered:
        question = item.question
        if question.group != group:
            group = question.group
            lines += ["", f"## {group}"]
        verdict = "looping" if item.looping else "sensible" if item.sensible else "**not sensible**"
        lines += ["", f"### {question.kind}, {question.lang}: {verdict}", ""]
        for query, answer in [*question.history, (question.query, item.answer)]:
            lines += [f"> {query}".replace("\n", "\n> "), "", answer, ""]
        if not item.sensible:
            wanted = question.references[0] if question.references else question.expect
            lines.append(f"Expected: {wanted}")
    return "\n".join(lines) + "\n"


def _likelihood_line(name: str, score: Likelihood) -> str:
    return f"{name:<20}{score.examples:>10}{score.tokens:>10}{score.perplexity:>12.2f}{score.bits_per_character:>11.3f}"


def _share(answered: list[Answered]) -> str:
    if not answered:
        return "-"
    good = sum(item.sensible for item in answered)
    return f"{good}/{len(answered)} {100 * good / len(answered):4.0f} %"


# Command --------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--corpus", type=Path, default=CORPUS_FOLDER, help="folder of dialogues (default: %(default)s)")
    add("--samples", type=int, default=200, help="held-out and trained phrasings to answer, each (default: 200)")
    add("--generated", type=int, default=10, help="generated dialogues to answer for each skill (default: 10)")
    add("--limit", type=int, help="most examples and questions of each part, for a quick look (default: all)")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--output", type=Path, help="Markdown file for all questions and answers (default: none is written)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Evaluate a model; tables go to stdout, progress to stderr."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("samples", "generated", "limit"):
        value = getattr(args, name)
        if value is not None and value < 0:
            parser.error(f"--{name} must be 0 or more, got {value}")
    with main_errors(parser):
        dialogues = load_dialogues(args.corpus)
        examples = heldout_examples(dialogues)
        questions = evaluation_questions(args.corpus / EVALUATION_FILE)
        model, tokenizer = load_model(**model_options(args))
    import torch

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    heldout = heldout_questions(examples, args.samples, rng)
    groups = [
        questions,
        heldout,
        generated_questions(args.generated, rng),
        trained_questions(dialogues, args.samples, rng),
        sampled_questions([*questions, *heldout], args.samples, rng),
    ]
    if args.limit is not None:
        examples, *groups = [rng.sample(part, min(args.limit, len(part))) for part in (examples, *groups)]

    tables = likelihood_table(likelihoods(model, tokenizer, examples))
    print("\n".join(tables))
    answered = []
    for group in filter(None, groups):
        found = ask(model, tokenizer, group)
        table = answer_table(group[0].group, found)
        print("\n" + "\n".join(table))
        tables += ["", *table]
        answered += found
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(transcript(f"Evaluation of {model_title(model)}", tables, answered), encoding="utf-8")
        print(f"questions and answers: {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
