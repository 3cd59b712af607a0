"""Conversation <-> text: the prompt of a chat, the clean-up of an answer, and `chat` / `stream_chat` of the model.

A conversation is kept in a file as JSON; every front door saves and restores the same form.
"""

import json
import re
import reprlib
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from numbers import Integral, Real

import torch
from transformers import LogitsProcessorList

from .generation import SAFE_TOKEN_ID, InvalidScoreLogitsProcessor

History = Sequence[tuple[str, str]]

ACKNOWLEDGED = "明白了。"  # the answer to instructions (a system message) that go in front as a first round
FILE_FORMAT, FILE_VERSION = "chatglm-conversation", 1
REPLACEMENT_CHARACTER = "\ufffd"  # what decoding shows for a character whose bytes are not complete
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
FOLD = str.maketrans({wide: sign for sign, wide in FULL_WIDTH.items()})
MOST_TOKENS = 2**31 - 1  # a limit that no text reaches
GREEDY_BELOW = 1e-3  # so low a temperature leaves nothing to chance, and dividing by it can overflow
HANZI = "[\u4e00-\u9fff]"
BESIDE_HANZI = [
    (sign, wide, re.compile(f"(?<={HANZI}){re.escape(sign)}"), re.compile(f"{re.escape(sign)}(?={HANZI})"))
    for sign, wide in FULL_WIDTH.items()
]


def build_prompt(query: str, history: History | None = None) -> str:
    """The text that the model continues: the query itself, or all rounds numbered from 0 and an open `答：`."""
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(rounds)}]\n问：{query}\n答："


def process_response(text: str) -> str:
    """The answer as shown: trimmed, with full-width punctuation beside Hanzi (U+4E00..U+9FFF) restored."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for sign, wide, behind, before in BESIDE_HANZI:
        if sign in text:
            text = before.sub(wide, behind.sub(wide, text))
    return text


def decode_response(tokenizer, ids: torch.Tensor) -> str:
    """The answer as shown, of its ids [length]; a character whose bytes are not all there is left out."""
    return process_response(tokenizer.decode(ids.tolist()).replace(REPLACEMENT_CHARACTER, ""))


def fit_prompt(
    tokenizer, query: str, history: History, max_length: int, max_new_tokens: int | None = None, keep: int = 0
) -> tuple[list[int], int]:
    """Ids of the prompt, and how many rounds were left out of it so that it leaves room for an answer.

    Left out are the oldest rounds behind the first `keep`. Room is an eighth of max_length, or max_new_tokens if that
    is less. Raises ValueError if what must stay does not fit into max_length.
    """

    def encode(dropped: int) -> list[int]:
        rounds = [*history[:keep], *history[keep + dropped :]]
        *ids, last = tokenizer(build_prompt(query, rounds))["input_ids"]
        # A <sop> that someone typed would end the prompt there.
        return [i for i in ids if i != tokenizer.bos_token_id] + [last]

    dropped, ids, most = 0, encode(0), len(history) - keep
    longest = max_length - min(max_new_tokens or max_length, max(1, max_length // 8))
    if most > 0 and len(ids) > longest:
        dropped = bisect_left(range(most), True, lo=1, key=lambda dropped: len(encode(dropped)) <= longest)
        ids = encode(dropped)
    if len(ids) >= max_length:
        what = "query and history have" if dropped < len(history) else "the query has"
        raise ValueError(
            f"{what} {len(ids)} tokens and max_length is {max_length}: "
            f"shorten the text or raise max_length above {len(ids)}"
        )
    return ids, dropped


def dropped_note(dropped: int, rounds: int, max_length: int) -> str:
    """What the user is told of rounds that `fit_prompt` left out."""
    return (
        f"dropped the oldest {dropped} of {rounds} rounds of history to leave room for an answer within "
        f"max_length {max_length}"
    )


def check_text(name: str, text: str) -> None:
    """Raises TypeError if text is not a string, ValueError if it holds half of a surrogate pair."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode, got a lone surrogate {text[error.start]!r} at index {error.start}"
        ) from error


def check_history(history: History | None) -> list[tuple[str, str]]:
    """history as a new list; TypeError or ValueError unless it is a list of (query, response) pairs of strings."""
    if history is None:
        return []
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a list of (query, response) pairs, got {type(history).__name__}")
    for i, pair in enumerate(history):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"history[{i}] must be a (query, response) pair, got {reprlib.repr(pair)}")
        check_text(f"the query of history[{i}]", pair[0])
        check_text(f"the response of history[{i}]", pair[1])
    return [(query, response) for query, response in history]


def history_to_json(history: History | None) -> str:
    """The text of a JSON file that keeps the conversation.

    `{"format": "chatglm-conversation", "version": 1, "history": [["问", "答"], ...]}`, one string to a line.
    Raises TypeError or ValueError unless history is a list of (query, response) pairs of strings.
    """
    content = {"format": FILE_FORMAT, "version": FILE_VERSION, "history": check_history(history)}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def history_from_json(text: str | bytes) -> list[tuple[str, str]]:
    """The conversation that history_to_json wrote; a bare list of [query, response] pairs is read as well.

    text  JSON, as bytes in UTF-8

    Raises ValueError, with one sentence for the user, if text is anything else.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a saved conversation is JSON in UTF-8, got the byte 0x{text[error.start]:02X} at {error.start}"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "lists within lists without end" if isinstance(error, RecursionError) else error
        raise ValueError(f"a saved conversation is JSON, got something else: {reason}") from None
    if isinstance(content, dict):
        if content.get("format") != FILE_FORMAT or "history" not in content:
            raise ValueError(f'a saved conversation has "format": "{FILE_FORMAT}" and a "history", this file has not')
        version = content.get("version")
        if version != FILE_VERSION:
            raise ValueError(
                f"a saved conversation has version {FILE_VERSION}, got {reprlib.repr(version)}: "
                "a newer program may have written it"
            )
        content = content["history"]
    if not isinstance(content, list):
        raise ValueError(f"a saved conversation is a list of [query, response] pairs, got {reprlib.repr(content)}")
    try:
        return check_history(content)
    except TypeError as error:
        raise ValueError(str(error)) from None


def check_number(name: str, value, low: float, high: float, allowed: str) -> None:
    """Raises TypeError or ValueError unless value is a number in [low, high]; allowed says what would do."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    if not low <= value <= high:
        try:
            got = str(value)
        except ValueError:  # Python writes no number of more than 4300 digits
            got = "one of thousands of digits"
        raise ValueError(f"{name} must be {allowed}, got {got if len(got) <= 40 else f'{got[:20]}...'}")


def check_count(name: str, value, low: int, high: float, allowed: str) -> None:
    """As check_number, for whole numbers."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    check_number(name, value, low, high, allowed)


def check_options(
    max_length: int, max_new_tokens: int | None, top_p: float, temperature: float, seed: int | None
) -> None:
    """Raises TypeError or ValueError unless these are options that `chat` can use."""
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if name == "max_length" or value is not None:
            check_count(name, value, 1, float("inf"), "a whole number of tokens, at least 1")
            check_count(name, value, 1, MOST_TOKENS, f"at most {MOST_TOKENS} tokens")
    check_number("top_p", top_p, 0, 1, "a number from 0 to 1")
    check_number("temperature", temperature, 0, 100, "a number from 0 to 100")
    if seed is not None:
        check_count("seed", seed, -(2**63), 2**64 - 1, "a whole number of at most 64 bits")


def check_stop(stop: Sequence[str] | str | None) -> list[str]:
    """The stop strings as a new list; TypeError or ValueError for anything but non-empty strings."""
    if isinstance(stop, str):
        stop = [stop]
    elif not isinstance(stop, Sequence | None):
        raise TypeError(f"stop must be a string or a list of strings, got {type(stop).__name__}")
    for string in stop or ():
        check_text("a stop string", string)
        if not string:
            raise ValueError("a stop string must not be empty")
    return list(stop or ())


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """text up to the first stop string, and whether one was found; `,` finds the `，` made of it as well."""
    folded = text.translate(FOLD)
    places = [place for place in (folded.find(string.translate(FOLD)) for string in stop) if place >= 0]
    return (text[: min(places)].rstrip(), True) if places else (text, False)


def hold_back(text: str, stop: Sequence[str]) -> str:
    """text without an end that may yet grow into a stop string."""
    folded, stop = text.translate(FOLD), [string.translate(FOLD) for string in stop]
    longest = max(map(len, stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(folded[-length:]) for string in stop):
            return text[:-length]
    return text


class ChatMixin:
    """`chat` and `stream_chat` for a model with `generate` and `stream_generate`."""

    def chat(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor=None,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str | None = None,
        seed: int | None = None,
        truncate_history: bool = True,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """The answer to query, and history with this round added (a new list).

        history           earlier rounds, (query, response) each
        max_length        most tokens of prompt + answer; the prompt alone must be shorter
        num_beams         beams of beam search; 1 = none
        top_p             sample among the likeliest tokens that reach this probability, in [0, 1]
        temperature       0 = always the likeliest token; higher = more varied
        max_new_tokens    most tokens of the answer; replaces max_length as its limit
        stop              the answer ends before any of these strings
        seed              makes sampling repeatable
        truncate_history  drop the oldest rounds, with a warning, when the prompt leaves no room for an answer

        Other keywords go to `generate`. Raises TypeError or ValueError for arguments that make no sense, and ValueError
        if the query alone (with truncate_history=False: with its history) does not fit into max_length.
        """
        check_count("num_beams", num_beams, 1, float("inf"), "a whole number of at least 1")
        history, inputs, options, stop = self._prepare_chat(
            tokenizer, query, history, max_length, do_sample, top_p, temperature, logits_processor,
            max_new_tokens, stop, seed, truncate_history, kwargs,
        )  # fmt: skip
        if num_beams > 1:
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                ids = self.generate(**inputs, num_beams=num_beams, **options)
        else:
            ids = inputs["input_ids"]
            steps = self.stream_generate(**inputs, **options, generator=self._generator(seed), yield_last=True)
            for ids in steps:
                if stop and cut_at_stop(self._response(tokenizer, ids, inputs), stop)[1]:
                    break
        response, _ = cut_at_stop(self._response(tokenizer, ids, inputs), stop)
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor=None,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str | None = None,
        seed: int | None = None,
        truncate_history: bool = True,
        **kwargs,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields (answer so far, new history) after each token; the arguments are those of `chat`.

        Every answer is whole text: a character whose bytes are not all there yet, or an end that may become a stop
        string, is held back. Closing the iterator stops the work. As in the original, the token that reaches the length
        limit is not shown (with max_new_tokens=1 nothing is).
        """
        earlier, inputs, options, stop = self._prepare_chat(
            tokenizer, query, history, max_length, do_sample, top_p, temperature, logits_processor,
            max_new_tokens, stop, seed, truncate_history, kwargs,
        )  # fmt: skip
        response = shown = ""
        for ids in self.stream_generate(**inputs, **options, generator=self._generator(seed)):
            response, stopped = cut_at_stop(self._response(tokenizer, ids, inputs), stop)
            shown = response if stopped else hold_back(response, stop)
            yield shown, [*earlier, (query, shown)]
            if stopped:
                return
        if shown != response:
            yield response, [*earlier, (query, response)]

    def _prepare_chat(
        self, tokenizer, query, history, max_length, do_sample, top_p, temperature, logits_processor,
        max_new_tokens, stop, seed, truncate_history, kwargs,
    ):  # fmt: skip
        """Everything checked: history, inputs of the model, options of `generate`, stop strings."""
        check_text("query", query)
        history = check_history(history)
        check_options(max_length, max_new_tokens, top_p, temperature, seed)
        stop = check_stop(stop)

        keep = 0 if truncate_history else len(history)
        ids, dropped = fit_prompt(tokenizer, query, history, max_length, max_new_tokens, keep)
        if dropped:
            warnings.warn(
                f"{dropped_note(dropped, len(history), max_length)}; truncate_history=False turns this off",
                UserWarning,
                stacklevel=3,
            )
        input_ids = torch.tensor([ids], device=self.device)
        # All ones: a literal <pad> in the query is text, not padding.
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        options = dict(kwargs)
        guard = InvalidScoreLogitsProcessor(SAFE_TOKEN_ID + tokenizer.num_image_tokens)
        options["logits_processor"] = LogitsProcessorList([*(logits_processor or []), guard])
        options["do_sample"] = do_sample and temperature >= GREEDY_BELOW
        if options["do_sample"]:
            options.update(top_p=float(top_p), temperature=float(temperature))
        if max_new_tokens is None:
            options["max_length"] = max_length
        else:
            options["max_new_tokens"] = max_new_tokens
        return history, inputs, options, stop

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self.device).manual_seed(seed)

    @staticmethod
    def _response(tokenizer, ids: torch.Tensor, inputs: dict) -> str:
        return decode_response(tokenizer, ids[0, inputs["input_ids"].shape[1] :])
