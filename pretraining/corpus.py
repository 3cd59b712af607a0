"""The dialogues of pretraining/corpus as training examples: plain strings in, plain strings out.

Unusual here: each line of the corpus pairs several phrasings of a request with its answers, and keeps `heldout`
phrasings that training never sees. An epoch mixes them with generated dialogues (grammars.py), and puts unrelated
rounds in front of some, so that the model learns to answer the last question whatever was said before. Prompt text is
made elsewhere, by `chatglm.chat.build_prompt(query, history)`.
"""

import functools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CORPUS_FOLDER = Path(__file__).resolve().parent / "corpus"
EVALUATION_FILE = "evaluation.jsonl"
SYNONYMS_FILE = "synonyms.txt"
KINDS = ("paraphrase", "memory", "unknown", "skill", "new")

MOST_PHRASINGS = 4  # an epoch shows one dialogue at most this often, with different phrasings
CORE_TOPICS = {"identity", "greeting", "courtesy", "unknown"}  # these get CORE_SHOWINGS more
CORE_SHOWINGS = 2
# Rounds of these topics tell facts about the user or refer to earlier rounds: no unrelated history can be made of them.
UNFIT_AS_HISTORY = {"memory", "multi", "dialogue", "extract", "mail"}
LONGEST_HISTORY_ANSWER = {"zh": 80, "en": 200}  # characters; long unrelated rounds cost time and teach nothing

_QUESTION_WORDS = ("吗", "什么", "怎么", "怎样", "哪", "谁", "几", "多少", "为什么", "呢", "如何", "是不是", "能不能")
_ENGLISH_QUESTION_STARTS = ("what ", "how ", "who ", "where ", "when ", "why ", "which ", "can ", "do ", "is ", "are ")
_OPENERS = {
    "zh": (
        "请问",
        "我想问一下，",
        "你好，",
        "问一下，",
        "那个，",
        "嗯，",
        "麻烦问下，",
        "你好，请问",
        "想请教一下，",
        "在吗？",
    ),
    "en": ("Hi, ", "Hello, ", "Hey, ", "Please tell me, ", "Quick question: ", "Sorry, ", "Okay, ", "Well, "),
}
_CLOSERS = {
    "zh": ("，谢谢", "，谢谢你", "呢", "呀", "啊", "，急", "，麻烦了", "~"),
    "en": (" Thanks!", " please", " Thank you.", " Thanks in advance."),
}
_WORKING_MARKS = '：:"”』」#*'  # a query with one of these carries text to work on: its punctuation is left alone


@dataclass
class Turn:
    """One round: phrasings of a request, the answers that fit any of them, and phrasings kept for evaluation."""

    user: list[str]
    assistant: list[str]
    heldout: list[str] = field(default_factory=list)


@dataclass
class Dialogue:
    """A conversation of one or more turns. topic is "group/detail"; lang is "zh" or "en".

    keys: what a right last answer contains, where that can be said (generated dialogues).
    """

    topic: str
    lang: str
    turns: list[Turn]
    keys: list[str] = field(default_factory=list)

    @property
    def group(self) -> str:
        """The part of the topic before the slash."""
        return self.topic.split("/")[0]


@dataclass
class Example:
    """A query with its earlier rounds and the wanted answer.

    references  every answer that fits (held-out examples)
    generated   made by grammars.py: the answer repeats parts of the query
    """

    history: list[tuple[str, str]]
    query: str
    answer: str
    topic: str
    lang: str
    references: list[str] = field(default_factory=list)
    generated: bool = False


def normalise(text: str) -> str:
    """The text without spaces, punctuation, width variants and capitals: equal results ask the same thing.

    A text of nothing but punctuation is only stripped.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(char for char in folded if char.isalnum() or char in "+-*/=<>") or text.strip()


def load_dialogues(folder: str | Path = CORPUS_FOLDER) -> list[Dialogue]:
    """All dialogues of the *.jsonl files of a folder, in order of file name and line; evaluation*.jsonl is left out.

    Raises FileNotFoundError if there is no such file, and ValueError naming file and line for anything malformed.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*.jsonl") if not path.name.startswith("evaluation"))
    if not paths:
        raise FileNotFoundError(f"no dialogues in {folder}: expected at least one .jsonl file beside {EVALUATION_FILE}")
    return [_parse_dialogue(record, place) for path in paths for record, place in _read_lines(path)]


def load_evaluation(path: str | Path = CORPUS_FOLDER / EVALUATION_FILE) -> list[dict]:
    """The unseen questions, each {"history", "query", "lang", "kind", "expect"}; history becomes a list of tuples.

    expect says what a sensible answer contains: "any" (at least one of these), "all" (each of these), "none" (none).
    Raises ValueError naming file and line for anything malformed.
    """
    questions = []
    for record, place in _read_lines(Path(path)):
        _check_keys(record, {"history", "query", "lang", "kind", "expect"}, set(), place)
        if record["lang"] not in ("zh", "en"):
            raise ValueError(f'{place}: lang must be "zh" or "en", got {record["lang"]!r}')
        if record["kind"] not in KINDS:
            raise ValueError(f"{place}: kind must be one of {', '.join(KINDS)}, got {record['kind']!r}")
        expect = record["expect"]
        if not isinstance(expect, dict) or not expect or set(expect) - {"any", "all", "none"}:
            raise ValueError(f"{place}: expect must hold any, all or none, got {expect!r}")
        for key, words in expect.items():
            _check_texts(words, f"{place}: expect {key}", at_least=1)
        history = record["history"]
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise ValueError(f"{place}: history must be a list of [query, answer] pairs, got {history!r}")
        questions.append(record | {"history": [tuple(pair) for pair in history]})
    return questions


def reserved_queries(dialogues: list[Dialogue], evaluation: list[dict]) -> set[str]:
    """Normalised opening queries that training must never contain: held-out phrasings and evaluation questions.

    Questions that depend on a history (memory checks) are not reserved alone, as their wording is ordinary:
    what is unseen there is the conversation.
    """
    heldout = {normalise(text) for dialogue in dialogues for text in dialogue.turns[0].heldout}
    return heldout | {normalise(question["query"]) for question in evaluation if question["kind"] != "memory"}


def training_examples(
    dialogues: list[Dialogue],
    rng: random.Random,
    *,
    grammar_share: float = 0.4,
    history_share: float = 0.15,
    evaluation: list[dict] | None = None,
) -> Iterator[Example]:
    """One epoch in random order: every dialogue with up to MOST_PHRASINGS phrasings, mixed with generated dialogues.

    grammar_share  share of all dialogues shown that come from grammars.py, in [0, 1)
    history_share  share of opening turns that get one to three unrelated earlier rounds, in [0, 1]
    evaluation     unseen questions to keep out; None reads those of pretraining/corpus

    The same rng state gives the same examples. Raises ValueError for a share out of range.
    """
    from pretraining.grammars import generate  # here, because grammars.py builds the Dialogues defined above

    if not 0 <= grammar_share < 1:
        raise ValueError(f"grammar_share must be in [0, 1), got {grammar_share}")
    if not 0 <= history_share <= 1:
        raise ValueError(f"history_share must be in [0, 1], got {history_share}")
    reserved = reserved_queries(dialogues, load_evaluation() if evaluation is None else evaluation)
    rounds = _HistoryRounds(dialogues, reserved)

    shown = []
    for dialogue in dialogues:
        openings = [text for text in dialogue.turns[0].user if normalise(text) not in reserved]
        if not openings:
            continue
        times = min(max(len(openings), *(len(turn.user) for turn in dialogue.turns)), MOST_PHRASINGS)
        times += CORE_SHOWINGS * (dialogue.group in CORE_TOPICS)
        rng.shuffle(openings)
        shown += [(dialogue, openings[index % len(openings)]) for index in range(times)]
    generated = round(len(shown) * grammar_share / (1 - grammar_share))
    shown += [(None, None)] * generated
    rng.shuffle(shown)

    for dialogue, opening in shown:
        if dialogue is None:
            yield from _generated_examples(generate, rng, rounds, history_share, reserved)
        else:
            yield from _corpus_examples(dialogue, opening, rng, rounds, history_share, reserved)


def heldout_examples(dialogues: list[Dialogue]) -> list[Example]:
    """One example per held-out phrasing; later turns come with their own history, in its most natural phrasing."""
    examples = []
    for dialogue in dialogues:
        history = []
        for turn in dialogue.turns:
            for query in turn.heldout:
                answers = list(turn.assistant)
                examples.append(Example(list(history), query, answers[0], dialogue.topic, dialogue.lang, answers))
            history.append((turn.user[0], turn.assistant[0]))
    return examples


def vary_wording(query: str, lang: str, rng: random.Random) -> str:
    """The query as another, a hasty or a polite person might type it: often with synonyms, vary_ending, sometimes with
    a greeting in front, thanks behind, or a slip: a character left out or two swapped (a word left out in English).

    Queries that carry a text to work on come back unchanged.
    """
    if _is_left_alone(query):
        return query
    if rng.random() < 0.6:
        query = swap_synonyms(query, lang, rng)
    query = vary_ending(query, lang, rng)
    dice = rng.random()
    if dice < 0.12:
        if lang == "en" and query[1].islower():
            query = query[0].lower() + query[1:]
        query = rng.choice(_OPENERS[lang]) + query
    elif dice < 0.18:
        query = query.rstrip("。.") + rng.choice(_CLOSERS[lang])
    elif dice < 0.34 and len(units := list(query) if lang == "zh" else query.split(" ")) >= 5:
        index = rng.randrange(len(units) - 1)
        if lang == "zh" and rng.random() < 0.4:
            units[index], units[index + 1] = units[index + 1], units[index]
        else:
            del units[index]
        query = ("" if lang == "zh" else " ").join(units)
    return query


def any_word(words: Iterable[str], lang: str) -> re.Pattern:
    """A pattern that finds each of the words, the longest where several fit, in small or large letters."""
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    edge = r"\b" if lang == "en" else ""
    return re.compile(f"{edge}(?:{'|'.join(longest_first)}){edge}", re.IGNORECASE)


@functools.cache
def load_synonyms() -> dict[str, dict[str, list[str]]]:
    """Language -> word in small letters -> what may stand in its place in a question.

    One group a line, its words separated by "|". Single Hanzi replace others and are not replaced: they are parts of
    too many words.
    """
    synonyms = {"zh": {}, "en": {}}
    for line in (CORPUS_FOLDER / SYNONYMS_FILE).read_text(encoding="utf-8").splitlines():
        group = line.split("|")
        lang = "en" if group[0].isascii() else "zh"
        for word in group:
            if lang == "en" or len(word) > 1:
                synonyms[lang].setdefault(word.lower(), []).extend(other for other in group if other != word)
    return synonyms


@functools.cache
def _synonym_pattern(lang: str) -> re.Pattern:
    return any_word(load_synonyms()[lang], lang)


def swap_synonyms(query: str, lang: str, rng: random.Random) -> str:
    """The query with about half of the words of synonyms.txt replaced by others of their group.

    A model that has read nothing else learns here that 为啥 asks what 为什么 asks, whatever the topic.
    """

    def swap(match):
        word = match[0]
        if rng.random() < 0.5:
            return word
        other = rng.choice(load_synonyms()[lang][word.lower()])
        return other[0].upper() + other[1:] if word[0].isupper() else other

    return _synonym_pattern(lang).sub(swap, query)


def vary_ending(query: str, lang: str, rng: random.Random) -> str:
    """The query as someone else might type it: end mark dropped or added, English without its first capital.

    Queries that carry a text to work on come back unchanged, for there the punctuation belongs to the text.
    """
    if _is_left_alone(query):
        return query
    dice = rng.random()
    if query[-1] in "？。?.！!":
        if dice < 0.25 and query[-2] not in "？。?.！!":
            query = query[:-1]
    elif dice < 0.2 and query[-1].isalnum():
        if lang == "zh":
            query += "？" if any(word in query for word in _QUESTION_WORDS) else "。"
        else:
            query += "?" if query.lower().startswith(_ENGLISH_QUESTION_STARTS) else "."
    if lang == "en" and query[1].islower() and rng.random() < 0.12:
        query = query[0].lower() + query[1:]
    return query


def _is_left_alone(query: str) -> bool:
    return any(char in query for char in _WORKING_MARKS) or len(query) < 2


class _HistoryRounds:
    """Short stand-alone rounds of the corpus, drawn as an unrelated history; greetings come up more often."""

    def __init__(self, dialogues: list[Dialogue], reserved: set[str]):
        self._rounds = {"zh": [], "en": []}
        self._greetings = {"zh": [], "en": []}
        for dialogue in dialogues:
            turn = dialogue.turns[0]
            queries = [text for text in turn.user if normalise(text) not in reserved]
            short = [text for text in turn.assistant if len(text) <= LONGEST_HISTORY_ANSWER[dialogue.lang]]
            if dialogue.group in UNFIT_AS_HISTORY or not queries or not short:
                continue
            group = self._greetings if dialogue.group in ("greeting", "courtesy") else self._rounds
            group[dialogue.lang].append((queries, short))

    def draw(self, lang: str, rng: random.Random) -> list[tuple[str, str]]:
        """One to three rounds, mostly of the language asked for; none if the corpus has nothing that fits."""
        return [pair for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]) for pair in self._draw_one(lang, rng)]

    def _draw_one(self, lang, rng):
        if rng.random() < 0.15:
            lang = "en" if lang == "zh" else "zh"
        group = self._greetings if rng.random() < 0.25 else self._rounds
        if not group[lang]:
            return []
        queries, answers = rng.choice(group[lang])
        return [(vary_ending(rng.choice(queries), lang, rng), rng.choice(answers))]


def _corpus_examples(dialogue, opening, rng, rounds, history_share, reserved) -> Iterator[Example]:
    history = rounds.draw(dialogue.lang, rng) if rng.random() < history_share else []
    for index, turn in enumerate(dialogue.turns):
        query = vary_wording(opening if index == 0 else rng.choice(turn.user), dialogue.lang, rng)
        answer = rng.choice(turn.assistant)
        if history or normalise(query) not in reserved:
            yield Example(list(history), query, answer, dialogue.topic, dialogue.lang)
        history.append((query, answer))


def _generated_examples(generate: Callable, rng, rounds, history_share, reserved) -> Iterator[Example]:
    dialogue = generate(rng, "train")
    while normalise(dialogue.turns[0].user[0]) in reserved:
        dialogue = generate(rng, "train")
    history = rounds.draw(dialogue.lang, rng) if rng.random() < history_share else []
    last = len(dialogue.turns) - 1
    for index, turn in enumerate(dialogue.turns):
        query, answer = rng.choice(turn.user), rng.choice(turn.assistant)
        # Remembering is what the later turns are for; "hello, Anna" is taught often enough at a third of the price.
        if index == last or rng.random() < 0.35:
            yield Example(list(history), query, answer, dialogue.topic, dialogue.lang, generated=True)
        history.append((query, answer))
        if dialogue.group == "memory" and index < last and rng.random() < 0.3:
            history += rounds.draw(dialogue.lang, rng)


def _read_lines(path: Path) -> Iterator[tuple[dict, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path.name}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{place}: expected a JSON object, got {type(record).__name__}")
            yield record, place


def _parse_dialogue(record: dict, place: str) -> Dialogue:
    _check_keys(record, {"topic", "lang", "turns"}, set(), place)
    topic, lang, turns = record["topic"], record["lang"], record["turns"]
    if not isinstance(topic, str) or not topic.strip("/ ") or not topic.split("/")[0].strip():
        raise ValueError(f"{place}: topic must be a text like health/sleep, got {topic!r}")
    if lang not in ("zh", "en"):
        raise ValueError(f'{place}: lang must be "zh" or "en", got {lang!r}')
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place}: turns must be a list of at least one turn, got {turns!r}")
    parsed = []
    for number, turn in enumerate(turns, 1):
        where = f"{place}, turn {number}"
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: expected an object with user and assistant, got {type(turn).__name__}")
        _check_keys(turn, {"user", "assistant"}, {"heldout"}, where)
        heldout = turn.get("heldout", [])
        _check_texts(turn["user"], f"{where}: user", at_least=1)
        _check_texts(turn["assistant"], f"{where}: assistant", at_least=1)
        _check_texts(heldout, f"{where}: heldout", at_least=0)
        seen = {normalise(text) for text in turn["user"]}
        for text in heldout:
            if normalise(text) in seen:
                raise ValueError(f"{where}: held-out phrasing {text!r} is also a user phrasing; reword one of them")
        parsed.append(Turn(turn["user"], turn["assistant"], heldout))
    return Dialogue(topic, lang, parsed)


def _check_keys(record: dict, required: set[str], optional: set[str], place: str):
    missing = required - set(record)
    unknown = set(record) - required - optional
    if missing:
        raise ValueError(f"{place}: {', '.join(sorted(missing))} is missing")
    if unknown:
        expected = ", ".join(sorted(required | optional))
        raise ValueError(f"{place}: unknown key {', '.join(sorted(unknown))}, expected {expected}")


def _check_texts(texts: object, what: str, at_least: int):
    if not isinstance(texts, list) or any(not isinstance(text, str) or not text.strip() for text in texts):
        raise ValueError(f"{what} must be a list of non-empty texts, got {texts!r}")
    if len(texts) < at_least:
        raise ValueError(f"{what} must hold at least {at_least} text, got none")
