"""Training data: files as people keep them -> examples -> the ids and labels that the model learns from.

read_examples finds out by itself how a file is written (a JSON list, one JSON object a line, CSV) and what its columns
mean:

    prompt, response [, history]             history: a list of [question, answer] pairs; other names through flags
    content, summary                         ADGEN
    instruction, input, output [, history]   Alpaca; the prompt is the instruction, a newline and the input
    conversations: [{from, value}, ...]      ShareGPT
    messages: [{role, content}, ...]         OpenAI

What is unusual:

- The file is read to its end before anything else happens, and every record must be usable: DataError names the lines
  that are not, and why.
- System messages become one first round, which the model "answered" with ACKNOWLEDGED; the answer to a question that
  nobody asked (a greeting at the start) gets an empty question. openai_api.py serves them the same way.
- The prompt of a round is read in both directions, so the answers within it cannot be learnt in the same pass: a
  conversation of N rounds is N examples if all its answers are to be learnt.
- What is too long loses its oldest rounds, then the end of its prompt and of its answer; never `[gMASK]`, `<sop>` or
  `<eop>`.
"""

import codecs
import csv
import hashlib
import io
import json
import random
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from chatglm.chat import ACKNOWLEDGED, build_prompt, check_text

IGNORED = -100
Rounds = tuple[list[tuple[str, str]], int]  # all rounds of a conversation, and how many at its start are instructions
SHOWN_PROBLEMS, SHOWN_PLACES, SHOWN_CUT = 5, 3, 200
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt"), "assistant"),
}
PAIRS = {("prompt", "response"): "{}", ("content", "summary"): "ADGEN ({})"}  # columns that need no flags
SAVE_AS_TEXT = "save it as JSON or CSV in UTF-8"
FOREIGN_FILES = {
    b"PK\x03\x04": f"is an Excel or ZIP file: {SAVE_AS_TEXT}",
    b"\xd0\xcf\x11\xe0": f"is an old Excel or Word file: {SAVE_AS_TEXT}",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"PAR1": f"is a Parquet file: {SAVE_AS_TEXT}",
    codecs.BOM_UTF16_LE: "is text in UTF-16: save it in UTF-8",
    codecs.BOM_UTF16_BE: "is text in UTF-16: save it in UTF-8",
    b"version https://git-lfs": "is a Git LFS pointer, not the data: fetch it with `git lfs pull`",
}
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
SPACE = re.compile(r"[ \t\r\n]*")  # between the values of JSON


class DataError(ValueError):
    """A file that cannot be learnt from: which one, where, and why."""


@dataclass(frozen=True)
class Example:
    """An answer to learn, and what it answers.

    history  earlier rounds, (query, response) each
    source   where it was read, "train.json:17"
    keep     rounds at the start of history that are the last to be dropped: 1 for system messages
    """

    prompt: str
    response: str
    history: tuple[tuple[str, str], ...] = ()
    source: str = ""
    keep: int = 0


@dataclass(frozen=True)
class Encoded:
    """An example as ids, without padding, and what was cut so that it fits.

    input_ids       prompt `[gMASK] <sop>` answer `<eop>`
    labels          as input_ids from `<sop>` on, -100 before it
    rounds_dropped  oldest rounds left out
    source_cut      tokens left out at the end of the prompt
    target_cut      tokens left out at the end of the answer
    """

    input_ids: list[int]
    labels: list[int]
    rounds_dropped: int = 0
    source_cut: int = 0
    target_cut: int = 0


# Files -> records -----------------------------------------------------------------------------------------------------


def _brief(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _names(columns) -> str:
    return ", ".join(map(_brief, columns)) or "none"


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f" in line {line}" if line > 1 else ""
        raise ValueError(
            f'not UTF-8, byte 0x{data[error.start]:02X}{where}: save the file in UTF-8 (Excel: "CSV UTF-8")'
        ) from None


def _json_reason(error: ValueError | RecursionError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    rest = error.doc[error.pos : error.pos + 20].strip()
    return f"not valid JSON: {error.msg}, {f'got {_brief(rest)}' if rest else 'the text ends'}"


def _json_lines(data: bytes) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.strip():
            continue
        try:
            text = _decode(line)
        except ValueError as error:
            yield str(number), error
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            record = ValueError(_json_reason(error))
        yield str(number), record


def _json_list(text: str) -> Iterator[tuple[str, object]]:
    decode, end = json.JSONDecoder().raw_decode, text.index("[")
    counted, line, number = 0, 1, 0
    while True:
        end = SPACE.match(text, end + 1).end()
        if number == 0 and text[end : end + 1] == "]":
            break
        line, counted, number = line + text.count("\n", counted, end), end, number + 1
        place = f"{line} (record {number})"
        try:
            record, end = decode(text, end)
        except (ValueError, RecursionError) as error:
            where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
            yield place, ValueError(_json_reason(error) + where)
            return  # where the next record begins cannot be known
        yield place, record
        end = SPACE.match(text, end).end()
        sign = text[end : end + 1]
        if sign == "]":
            break
        if sign != ",":
            found = f"got {_brief(text[end : end + 20])}" if sign else "the file ends"
            yield place, ValueError(f"not valid JSON: a comma or ] must follow, {found}")
            return
    rest = text[end + 1 :].strip()
    if rest:
        yield str(text.count("\n", 0, end) + 1), ValueError(f"the list ends here, but {_brief(rest)} follows")


def _delimiter(text: str) -> str:
    """The sign that separates the columns of the first row."""
    first_rows = text[:10_000].lstrip()

    def columns(sign: str) -> int:
        return len(next(csv.reader(io.StringIO(first_rows, newline=""), delimiter=sign), ()))

    return max(SEPARATORS, key=columns)


def _csv_rows(text: str, delimiter: str) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(2**31 - 1)  # 128 KiB otherwise
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = None
    while True:
        place = str(reader.line_num + 1)
        try:
            row = next(reader, None)
        except csv.Error as error:
            unclosed = "unexpected end of data" in str(error)
            reason = "a quoted text that begins here has no end" if unclosed else f"{error} (line {reader.line_num})"
            yield place, ValueError(f"not valid CSV: {reason}")
            return  # where the next record begins cannot be known
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                yield place, ValueError(f"two columns have the name {_brief(twice[0])}")
                return
        elif len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
            reason = f"cells: {len(row)}, columns: {len(header)}; a text with a comma needs quotes"
            yield place, ValueError(reason.replace("comma", SEPARATORS[delimiter]))
        else:
            yield place, dict(zip(header, row, strict=False))


def _records(path: Path) -> tuple[str, Iterator[tuple[str, object]]]:
    """How the file is written, and (place, record) for each record; a ValueError stands for one that is unreadable."""
    data = path.read_bytes()
    for start, what in FOREIGN_FILES.items():
        if data.startswith(start):
            raise DataError(f"{path} {what}")
    data = data.removeprefix(codecs.BOM_UTF8)
    beginning = data[:10_000].lstrip()
    if beginning.startswith(b"{"):
        if beginning.split(b"\n", 1)[0].strip() == b"{":
            raise DataError(f"{path} has objects of several lines: put them in a list [...], or each on one line")
        return "JSON lines", _json_lines(data)
    if not beginning.startswith(b"[") and path.suffix.lower() not in (".csv", ".tsv"):
        got = f"starts with {_brief(beginning[:40].decode('utf-8', 'replace'))}" if beginning else "is empty"
        raise DataError(f"{path} {got}: expected a JSON list, one JSON object a line, or CSV in a file named .csv")
    try:
        text = _decode(data)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if beginning.startswith(b"["):
        return "JSON list", _json_list(text)
    delimiter = _delimiter(text)
    return "CSV" if delimiter == "," else f"CSV with {SEPARATORS[delimiter]}s", _csv_rows(text, delimiter)


# Records -> examples --------------------------------------------------------------------------------------------------


def _text(value, name: str, blank: bool = False) -> str:
    """value with line ends of one character, if it is text, and not blank unless that is allowed."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {_brief(value)}")
    check_text(name, value)
    if not blank and not value.strip():
        raise ValueError(f"{name} is empty")
    return value.replace("\r\n", "\n")


def _column(record: dict, name: str):
    if name not in record:
        raise ValueError(f"no column {_brief(name)}, only {_names(record)}")
    return record[name]


def _optional(record: dict, name: str) -> str:
    return "" if record.get(name) is None else _text(record[name], name, blank=True)


def _list(value, name: str, what: str) -> list:
    """value, or the value that a cell of CSV holds as JSON, if it is a list; an empty list for nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"{name} must be {what} in JSON, got {_brief(value)}") from None
    if value is None:
        value = []
    if not isinstance(value, list):
        raise ValueError(f"{name} must be {what}, got {_brief(value)}")
    return value


def _instruct(instructions: list[str], rounds: list[tuple[str, str]]) -> Rounds:
    instructions = [text for text in instructions if text.strip()]
    return ([("\n".join(instructions), ACKNOWLEDGED), *rounds], 1) if instructions else (rounds, 0)


def _read_history(record: dict, column: str) -> list[tuple[str, str]]:
    what = "a list of [question, answer] pairs"
    pairs = _list(record.get(column), column, what)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{column} must be {what}, got {_brief(pair)} in it")
    return [
        (_text(query, f"question {i} of {column}", blank=True), _text(answer, f"answer {i} of {column}", blank=True))
        for i, (query, answer) in enumerate(pairs, 1)
    ]


def _read_pair(record: dict, prompt: str, response: str, history: str) -> Rounds:
    last = _text(_column(record, prompt), prompt), _text(_column(record, response), response)
    return [*_read_history(record, history), last], 0


def _read_alpaca(record: dict) -> Rounds:
    instruction = _text(_column(record, "instruction"), "instruction", blank=True)
    prompt = "\n".join(part for part in (instruction, _optional(record, "input")) if part.strip())
    last = _text(prompt, "instruction"), _text(_column(record, "output"), "output")
    return _instruct([_optional(record, "system")], [*_read_history(record, "history"), last])


def _read_messages(record: dict, column: str) -> Rounds:
    instructions = [_optional(record, "system")]
    texts = []  # question, answer, question, ...
    for number, message in enumerate(_list(_column(record, column), column, "a list of messages"), 1):
        name = f"message {number} of {column}"
        if not isinstance(message, dict):
            raise ValueError(f"{name} must be an object, got {_brief(message)}")
        role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
        spoken = message.get(role_key)
        role = ROLES.get(spoken) if isinstance(spoken, str) else None
        if role is None:
            raise ValueError(f"{role_key} of {name} must be one of {', '.join(ROLES)}, got {_brief(spoken)}")
        text = _text(message.get(text_key), f"{text_key} of {name}", blank=True)
        if role == "system":
            instructions.append(text)
            continue
        if role == "assistant" and not texts:
            texts.append("")
        if (role == "user") != (len(texts) % 2 == 0):
            raise ValueError(f"{name} is from {spoken} like the one before it: questions and answers must alternate")
        texts.append(text)
    if not texts or len(texts) % 2:
        raise ValueError(f"{column} must end with an answer: that is what is learnt")
    rounds = list(zip(texts[::2], texts[1::2], strict=True))
    for what, text in zip(("question", "answer"), rounds[-1], strict=True):
        _text(text, f"the last {what} of {column}")
    return _instruct(instructions, rounds)


def _find_form(
    record: dict, prompt: str | None, response: str | None, history: str | None
) -> tuple[str, Callable[[dict], Rounds]]:
    """The form whose columns the record has: its name, and what reads a record of it or says with ValueError why not.

    Raises ValueError if there is none.
    """
    if not (prompt or response or history):
        if "messages" in record:
            return "messages (role, content)", partial(_read_messages, column="messages")
        if "conversations" in record:
            return "ShareGPT (conversations)", partial(_read_messages, column="conversations")
        if {"instruction", "output"} <= record.keys():
            return "Alpaca (instruction, input -> output)", _read_alpaca
    for usual, name in PAIRS.items():
        columns = prompt or usual[0], response or usual[1]
        if set(columns) <= record.keys():
            read = partial(_read_pair, prompt=columns[0], response=columns[1], history=history or "history")
            return (name if columns == usual else "{}").format(" -> ".join(columns)), read
    missing = [column for column in (prompt, response) if column and column not in record]
    if missing:
        raise ValueError(
            f"no column {_brief(missing[0])}, only {_names(record)}: correct --prompt_column and --response_column, or "
            "leave them out if the form is a known one"
        )
    raise ValueError(
        f"what to learn cannot be told from the columns {_names(record)}: "
        "name two of them with --prompt_column and --response_column"
    )


def _examples(rounds: list[tuple[str, str]], keep: int, source: str, all_turns: bool) -> Iterator[Example]:
    for i, (query, response) in enumerate(rounds):
        is_last = i == len(rounds) - 1
        if is_last or (all_turns and i >= keep and query.strip() and response.strip()):
            place = source if is_last else f"{source}, round {i - keep + 1}"
            yield Example(query, response, tuple(rounds[:i]), place, keep)


def read_examples(
    path: str | Path,
    prompt_column: str | None = None,
    response_column: str | None = None,
    history_column: str | None = None,
    all_turns: bool = False,
    max_samples: int | None = None,
) -> tuple[list[Example], str]:
    """The examples of a file, and how it was understood: "ADGEN (content -> summary), JSON lines".

    prompt_column    its name if it is not one that is known (see the top of this file); the same goes for the others
    history_column   default: "history" where a record has it
    all_turns        learn every answer of a conversation, not only the last
    max_samples      stop after this many examples

    Raises DataError if a record cannot be used, and OSError if the file cannot be read.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    path = Path(path)
    layout, records = _records(path)
    examples, name, read, total, has_history = [], None, None, 0, False
    problems = {}  # reason -> places
    for place, record in records:
        total += 1
        if read is None and isinstance(record, dict):
            try:
                name, read = _find_form(record, prompt_column, response_column, history_column)
            except ValueError as error:
                raise DataError(f"{path}, line {place}: {error}") from None
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"a record must be an object {{...}}, got {_brief(record)}")
            rounds, keep = read(record)
        except ValueError as error:
            problems.setdefault(str(error), []).append(place)
            continue
        has_history = has_history or history_column in record
        examples.extend(_examples(rounds, keep, f"{path.name}:{place}", all_turns))
        if max_samples is not None and len(examples) >= max_samples:
            break
    if problems:
        raise DataError(_complaint(path, problems, total))
    if not examples:
        raise DataError(f"{path} has no records")
    if history_column and not has_history:
        raise DataError(f"{path}: no record has the column {_brief(history_column)}")
    if any(len(example.history) > example.keep for example in examples):
        name += " with history"
    return examples[:max_samples], f"{name}, {layout}"


def _complaint(path: Path, problems: dict[str, list[str]], total: int) -> str:
    """One sentence about the records that cannot be used; problems maps each reason to its lines."""
    parts = []
    for reason, places in list(problems.items())[:SHOWN_PROBLEMS]:
        more = f" and {len(places) - SHOWN_PLACES} more" if len(places) > SHOWN_PLACES else ""
        parts.append(f"{'lines' if len(places) > 1 else 'line'} {', '.join(places[:SHOWN_PLACES])}{more}: {reason}")
    count, shown = (sum(map(len, reasons)) for reasons in (problems.values(), list(problems.values())[:SHOWN_PROBLEMS]))
    if count > shown:
        parts.append(f"and {count - shown} more")
    return f"{path}, {f'{count} of {total} records cannot be used; ' if count > 1 else ''}{'; '.join(parts)}"


def fingerprint(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits of the examples in their order; it does not matter which file they were read from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.response, example.history, example.keep]).encode())
    return digest.hexdigest()[:16]


def mix_replay(examples: Sequence[Example], replay: Sequence[Example], ratio: float, seed: int) -> list[Example]:
    """examples and, so that they are `ratio` of the result, examples of replay, in random order.

    replay  general data against forgetting; used again from the start if it is too short
    ratio   from 0 to below 1

    The same arguments give the same result. Raises ValueError for another ratio or an empty replay.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the replay ratio must be from 0 to below 1, got {ratio}")
    if ratio == 0:
        return list(examples)
    if not replay:
        raise ValueError("there is nothing to replay: the replay data are empty")
    rng = random.Random(seed)
    times, rest = divmod(max(1, round(len(examples) * ratio / (1 - ratio))), len(replay))
    mixed = [*examples, *list(replay) * times, *rng.sample(list(replay), rest)]
    rng.shuffle(mixed)
    return mixed


# Examples -> ids ------------------------------------------------------------------------------------------------------


def _encode_text(tokenizer, text: str, *forbidden: int) -> list[int]:
    """Ids of the text. forbidden: control tokens which, typed by someone, would end the prompt or the answer there."""
    return [i for i in tokenizer.encode(text, add_special_tokens=False) if i not in forbidden]


def _fit_source(tokenizer, example: Example, max_source_length: int) -> tuple[list[int], list[int], int]:
    """Ids of the prompt that stay and that are cut, without `[gMASK] <sop>`, and how many rounds are left out."""
    if max_source_length < 2:
        raise ValueError(f"max_source_length must be at least 2, one token of text, got {max_source_length}")
    room = max_source_length - 1
    kept, rest = example.history[: example.keep], example.history[example.keep :]
    histories = [kept + rest[dropped:] for dropped in range(len(rest) + 1)] + ([()] if kept else [])

    def encode(history: tuple) -> list[int]:
        return _encode_text(tokenizer, build_prompt(example.prompt, history), tokenizer.bos_token_id)

    history, ids = histories[0], encode(histories[0])
    if len(ids) > room and history:
        index = bisect_left(histories, True, lo=1, hi=len(histories) - 1, key=lambda h: len(encode(h)) <= room)
        history, ids = histories[index], encode(histories[index])
    return ids[:room], ids[room:], len(example.history) - len(history)


def _fit_target(tokenizer, example: Example, max_target_length: int) -> tuple[list[int], list[int]]:
    """Ids of the answer that stay and that are cut, without `<eop>`."""
    if max_target_length < 3:
        raise ValueError(f"max_target_length must be at least 3, one token of text, got {max_target_length}")
    room = max_target_length - 2
    forbidden = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = _encode_text(tokenizer, example.response, *forbidden)
    return ids[:room], ids[room:]


def encode_example(tokenizer, example: Example, max_source_length: int, max_target_length: int) -> Encoded:
    """The example as ids and labels: at most max_source_length + max_target_length tokens.

    Prompt and `[gMASK] <sop>` take at most max_source_length + 1 of them, answer and `<eop>` max_target_length - 1, as
    in the original. A `<sop>` in the text of the prompt is left out; in the answer, `<eop>` and `<pad>` are as well.

    Raises ValueError for lengths that leave no room for text.
    """
    source, source_cut, rounds_dropped = _fit_source(tokenizer, example, max_source_length)
    target, target_cut = _fit_target(tokenizer, example, max_target_length)
    input_ids = tokenizer.build_inputs_with_special_tokens(source, target)
    start = len(source) + 1  # of <sop>
    labels = [IGNORED] * start + input_ids[start:]
    return Encoded(input_ids, labels, rounds_dropped, len(source_cut), len(target_cut))


def encode_prompt(tokenizer, example: Example, max_source_length: int) -> list[int]:
    """The ids that an answer is generated from: those of encode_example up to `<sop>`."""
    source, _, _ = _fit_source(tokenizer, example, max_source_length)
    return tokenizer.build_inputs_with_special_tokens(source)


def _encode_row(row: dict, tokenizer, max_source_length: int, max_target_length: int) -> dict:
    history = tuple(map(tuple, row["history"]))
    example = Example(row["prompt"], row["response"], history, keep=row["keep"])
    return vars(encode_example(tokenizer, example, max_source_length, max_target_length))


def to_dataset(
    tokenizer,
    examples: Sequence[Example],
    max_source_length: int,
    max_target_length: int,
    num_proc: int | None = None,
):
    """A datasets.Dataset with one row for each example, in their order; its columns are the fields of Encoded.

    num_proc  processes that work on it; the rows do not depend on it
    """
    import datasets

    text, ids, count = datasets.Value("string"), datasets.List(datasets.Value("int32")), datasets.Value("int32")
    pairs = datasets.List(datasets.List(text))
    rows = datasets.Dataset.from_dict(
        {name: [getattr(example, name) for example in examples] for name in ("prompt", "response", "history", "keep")},
        features=datasets.Features(prompt=text, response=text, history=pairs, keep=count),
    )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a bar in a log file is noise
    return rows.map(
        _encode_row,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_source_length": max_source_length,
            "max_target_length": max_target_length,
        },
        num_proc=num_proc and min(num_proc, len(rows)),
        remove_columns=rows.column_names,
        features=datasets.Features(input_ids=ids, labels=ids, rounds_dropped=count, source_cut=count, target_cut=count),
        desc="encoding",
    )


class Collator:
    """Rows with input_ids and labels -> a batch of tensors [batch, seq_len]; labels are padded with -100.

    padding_side  "right" needs no mask: the answer is causal, nothing looks at what comes behind it. "left" brings
                  attention_mask, 1 = real token
    length        seq_len of every batch (default: the longest row of each)

    Raises ValueError for another side, and for a row longer than length.
    """

    def __init__(self, tokenizer, padding_side: str = "right", length: int | None = None):
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be left or right, got {padding_side!r}")
        self.pad_token_id = tokenizer.pad_token_id
        self.padding_side = padding_side
        self.length = length

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        if self.length is not None and longest > self.length:
            raise ValueError(f"a row of {longest} tokens does not fit into a batch of length {self.length}")

        def pad(rows, value: int) -> torch.Tensor:
            rows = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
            batch = torch.full((len(rows), self.length or longest), value)
            for target, row in zip(batch, rows, strict=True):
                target[slice(len(row)) if self.padding_side == "right" else slice(len(target) - len(row), None)] = row
            return batch

        batch = {
            "input_ids": pad([feature["input_ids"] for feature in features], self.pad_token_id),
            "labels": pad([feature["labels"] for feature in features], IGNORED),
        }
        if self.padding_side == "left":
            batch["attention_mask"] = pad([[1] * len(feature["input_ids"]) for feature in features], 0)
        return batch


# For the user's eyes --------------------------------------------------------------------------------------------------


def cut_report(dataset) -> str:
    """What was cut from the rows of to_dataset, and the flags that would keep it, in one line; empty if nothing."""
    parts = []
    for what, column, unit, flag in (
        ("prompts", "source_cut", "tokens", "--max_source_length"),
        ("answers", "target_cut", "tokens", "--max_target_length"),
        ("histories", "rounds_dropped", "rounds", "--max_source_length"),
    ):
        cuts = dataset.data[column].to_numpy()
        if cuts.any():
            parts.append(f"{(cuts > 0).sum()} of {len(cuts)} {what} cut by up to {cuts.max()} {unit} ({flag})")
    return "; ".join(parts)


def _visible(tokenizer, ids: list[int]) -> str:
    """Text of the ids, control tokens included."""
    control = {*tokenizer.all_special_ids, tokenizer.gmask_token_id}
    return "".join(
        "".join(tokenizer.convert_ids_to_tokens(list(group)))
        if is_control
        else tokenizer.decode(list(group), clean_up_tokenization_spaces=False)
        for is_control, group in groupby(ids, key=control.__contains__)
    )


def preview(
    tokenizer, examples: Sequence[Example], max_source_length: int, max_target_length: int, count: int = 3
) -> str:
    """The first `count` examples as the model will see them: what it reads, what it learns, and what is cut."""
    paragraphs = []
    for example in examples[:count]:
        source, source_cut, rounds_dropped = _fit_source(tokenizer, example, max_source_length)
        target, target_cut = _fit_target(tokenizer, example, max_target_length)
        read, learnt = [*source, tokenizer.gmask_token_id], [tokenizer.bos_token_id, *target, tokenizer.eos_token_id]
        parts = [("reads", _visible(tokenizer, read)), ("learns", _visible(tokenizer, learnt))]
        if rounds_dropped:
            parts.append(("cut", f"the oldest {rounds_dropped} of {len(example.history)} earlier rounds"))
        for what, cut in (("prompt", source_cut), ("answer", target_cut)):
            if cut:
                text = _visible(tokenizer, cut)
                rest = f"... {len(text) - SHOWN_CUT} characters more" if len(text) > SHOWN_CUT else ""
                parts.append(("cut", f"{len(cut)} tokens of the {what}: {text[:SHOWN_CUT]}{rest}"))
        title = f"{example.source}   {len(read)} tokens read, {len(learnt)} learnt"
        lines = [f"  {'' if i else name:<7}| {line}" for name, text in parts for i, line in enumerate(text.split("\n"))]
        paragraphs.append("\n".join([title, *lines]))
    return "\n\n".join(paragraphs)
