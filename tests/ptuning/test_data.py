"""Every form and layout of a file gives the same examples; what cannot be learnt is named; ids, labels, batches."""

import csv
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import openai_api
from chatglm.chat import build_prompt
from ptuning.data import (
    Collator,
    DataError,
    Example,
    cut_report,
    encode_example,
    encode_prompt,
    fingerprint,
    mix_replay,
    preview,
    read_examples,
    to_dataset,
)

PAIR = {"prompt": "你好", "response": "再见"}


def write(folder, content, name="train.json"):
    """A file of the given bytes or text, or of records, one JSON object a line."""
    if isinstance(content, list):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def write_csv(folder, rows, encoding="utf-8", name="train.csv", **options):
    path = folder / name
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **options).writerows(rows)
    return path


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# Forms ----------------------------------------------------------------------------------------------------------------


def test_history_comes_with_the_pair(tmp_path):
    record = {**PAIR, "history": [["一", "二"], ["三", "四"]]}
    examples, form = read_examples(write(tmp_path, [record, PAIR, {**PAIR, "history": None}, {**PAIR, "history": []}]))
    assert form == "prompt -> response with history, JSON lines"
    assert examples[0] == Example("你好", "再见", (("一", "二"), ("三", "四")), "train.json:1")
    assert examples[1:] == [Example("你好", "再见", (), f"train.json:{line}") for line in (2, 3, 4)]


@pytest.mark.parametrize(
    ("record", "form"),
    [
        (PAIR, "prompt -> response"),
        ({"content": "你好", "summary": "再见", "id": 7}, "ADGEN (content -> summary)"),
        ({"instruction": "你好", "input": "", "output": "再见"}, "Alpaca (instruction, input -> output)"),
        ({"instruction": "你好", "output": "再见"}, "Alpaca (instruction, input -> output)"),
        (
            {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "再见"}]},
            "ShareGPT (conversations)",
        ),
        (
            {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "再见"}]},
            "messages (role, content)",
        ),
    ],
)
def test_form_is_detected(tmp_path, record, form):
    assert read_examples(write(tmp_path, [record])) == (
        [Example("你好", "再见", (), "train.json:1")],
        f"{form}, JSON lines",
    )


def test_columns_are_named_by_flags(tmp_path):
    record = {"prompt": "not this", "response": "nor this", "q": "你好", "a": "再见", "turns": [["一", "二"]]}
    path = write(tmp_path, [{"q": "x", "a": "y"}, record])
    examples, form = read_examples(path, "q", "a", "turns")
    assert form == "q -> a with history, JSON lines"
    assert examples == [
        Example("x", "y", (), "train.json:1"),
        Example("你好", "再见", (("一", "二"),), "train.json:2"),
    ]
    # One flag alone goes with the usual name of the other column.
    examples, form = read_examples(write(tmp_path, [{"q": "你好", "summary": "再见"}]), "q")
    assert (examples[0].response, form) == ("再见", "q -> summary, JSON lines")


def test_alpaca_joins_instruction_and_input(tmp_path):
    record = {"instruction": "翻译", "input": "cat", "output": "猫", "history": [["一", "二"]], "system": "译者"}
    assert read_examples(write(tmp_path, [record]))[0] == [
        Example("翻译\ncat", "猫", (("译者", "明白了。"), ("一", "二")), "train.json:1", keep=1)
    ]
    del record["history"]  # instructions are no history
    assert read_examples(write(tmp_path, [record]))[1] == "Alpaca (instruction, input -> output), JSON lines"


def messages(*turns, role="role", content="content"):
    return [{role: speaker, content: text} for speaker, text in turns]


def test_system_messages_become_a_first_round(tmp_path):
    turns = messages(
        ("system", "甲"), ("user", "一"), ("assistant", "二"), ("developer", "乙"), ("user", "三"), ("assistant", "四")
    )
    (example,), _ = read_examples(write(tmp_path, [{"messages": turns}]))
    assert example == Example("三", "四", (("甲\n乙", "明白了。"), ("一", "二")), "train.json:1", keep=1)
    served = openai_api.conversation([openai_api.Message(**turn) for turn in turns[:-1]])
    assert served == {"query": example.prompt, "history": list(example.history), "keep": example.keep}


def test_greeting_gets_an_empty_question(tmp_path):
    turns = messages(("gpt", "您好"), ("human", "一"), ("gpt", "二"), role="from", content="value")
    path = write(tmp_path, [{"conversations": turns, "system": " "}])
    assert read_examples(path)[0] == [Example("一", "二", (("", "您好"),), "train.json:1")]
    # Nobody asked for it, so there is no prompt that it could be learnt from.
    assert read_examples(path, all_turns=True)[0] == read_examples(path)[0]


def test_all_turns_makes_an_example_of_each_answer(tmp_path):
    turns = messages(
        ("system", "甲"), ("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", ""), ("user", "五"),
        ("assistant", "六"),
    )  # fmt: skip
    path = write(tmp_path, [{"messages": turns}])
    system = "甲", "明白了。"
    assert read_examples(path, all_turns=True)[0] == [
        Example("一", "二", (system,), "train.json:1, round 1", keep=1),
        Example("五", "六", (system, ("一", "二"), ("三", "")), "train.json:1", keep=1),
    ]
    path = write(tmp_path, [PAIR, {**PAIR, "history": [["一", "二"]]}])
    assert read_examples(path, all_turns=True)[0] == [
        Example("你好", "再见", (), "train.json:1"),
        Example("一", "二", (), "train.json:2, round 1"),
        Example("你好", "再见", (("一", "二"),), "train.json:2"),
    ]


def test_max_samples_stops_reading(tmp_path):
    path = write(tmp_path, "\n".join([json.dumps(PAIR)] * 3 + ["broken"]))
    assert [example.source for example in read_examples(path, max_samples=2)[0]] == ["train.json:1", "train.json:2"]
    path = write(tmp_path, [{**PAIR, "history": [["一", "二"]]}, PAIR])
    assert len(read_examples(path, all_turns=True, max_samples=1)[0]) == 1
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        read_examples(path, max_samples=0)


# Ways to write a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.csv"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \t\n"])
@pytest.mark.parametrize("layout", ["lines", "list", "indented", "one line"])
def test_json_is_found_by_its_content(tmp_path, name, start, layout):
    records = [PAIR, {"prompt": "line\nbreak\u2028\x85]", "response": "b"}]
    text = {
        "lines": "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "list": "[" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "]",
        "indented": json.dumps(records, indent=2) + "\n",
        "one line": json.dumps(records),
    }[layout]
    examples, form = read_examples(write(tmp_path, start + text, name))
    assert form == f"prompt -> response, JSON {'lines' if layout == 'lines' else 'list'}"
    assert [(example.prompt, example.response) for example in examples] == [
        tuple(record.values()) for record in records
    ]
    first = 3 if start == "\n \t\n" else 1
    lines = {"lines": (1, 2), "list": (1, 2), "indented": (2, 6), "one line": (1, 1)}[layout]
    assert [example.source for example in examples] == [
        f"{name}:{line + first - 1}" + ("" if layout == "lines" else f" (record {number})")
        for number, line in enumerate(lines, 1)
    ]


@pytest.mark.parametrize(
    ("options", "form"),
    [({}, "CSV"), ({"delimiter": ";"}, "CSV with semicolons"), ({"delimiter": "\t"}, "CSV with tabs")],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_as_excel_writes_it(tmp_path, options, form, encoding, end):
    history = json.dumps([["一", "二"]], ensure_ascii=False)
    rows = [
        [" prompt ", "response", "history", "", ""],
        ["multi\r\nline", 'a, "b"; c\td', history, "", ""],
        [],
        ["", " ", "", "", ""],
        ["last", "two\nlines", "", "note", ""],
    ]
    path = write_csv(tmp_path, rows, encoding, lineterminator=end, **options)
    examples, found = read_examples(path)
    assert found == f"prompt -> response with history, {form}"
    assert examples == [
        Example("multi\nline", 'a, "b"; c\td', (("一", "二"),), "train.csv:2"),
        Example("last", "two\nlines", (), "train.csv:6"),
    ]


def test_the_first_row_says_what_separates_columns(tmp_path):
    path = write(tmp_path, "\n \nprompt,response\na; b; c; d,e; f; g\n", "train.csv")
    assert read_examples(path)[0] == [Example("a; b; c; d", "e; f; g", (), "train.csv:4")]
    path = write(tmp_path, "\n\nprompt;response\na, b, c,d;e\n", "train.csv")
    assert read_examples(path)[0] == [Example("a, b, c,d", "e", (), "train.csv:4")]


def test_lines_of_an_old_mac(tmp_path):
    path = write(tmp_path, "prompt,response\ra,b\rc,d\r", "train.csv")
    assert [example.source for example in read_examples(path)[0]] == ["train.csv:2", "train.csv:3"]


def test_cells_of_any_length(tmp_path):
    assert (
        read_examples(write_csv(tmp_path, [["prompt", "response"], ["长" * 200_000, "b"]]))[0][0].prompt
        == "长" * 200_000
    )


# What cannot be learnt ------------------------------------------------------------------------------------------------


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


ALTERNATE = "questions and answers must alternate"
WRONG_FILES = {
    # name: (content, what the message says behind the path)
    "empty.json": ("", " is empty: expected a JSON list, one JSON object a line, or CSV in a file named .csv"),
    "list.json": ("[ ]", " has no records"),
    "header.csv": ("prompt,response\n", " has no records"),
    "empty.csv": ("", " has no records"),
    "prose.txt": ("你好", ' starts with "你好": expected a JSON list'),
    "excel.csv": (b"PK\x03\x04", " is an Excel or ZIP file: save it as JSON or CSV in UTF-8"),
    "utf16.csv": ("prompt,response\n".encode("utf-16"), " is text in UTF-16: save it in UTF-8"),
    "pointer.json": ("version https://git-lfs.github.com/spec/v1", " is a Git LFS pointer, not the data: fetch it"),
    "gbk.csv": ("prompt,response\n你,好\n".encode("gbk"), ": not UTF-8, byte 0xC4 in line 2: save the file in UTF-8"),
    "gbk_list.json": ('[{"prompt":\n"你"}]'.encode("gbk"), ": not UTF-8, byte 0xC4 in line 2: save the file in UTF-8"),
    "gbk.json": (
        lines(PAIR).encode() + b"\n" + lines(PAIR).encode("gbk"),
        ", line 3: not UTF-8, byte 0xC4: save the file in UTF-8",
    ),
    "indented.json": (json.dumps(PAIR, indent=1), " has objects of several lines: put them in a list"),
    "half.json": (
        lines(PAIR) + '{"prompt": "a", "resp',
        ', line 2: not valid JSON: Unterminated string starting at, got "',
    ),
    "commas.json": (
        lines(PAIR).replace("\n", ",\n") * 2,
        ', 2 of 2 records cannot be used; lines 1, 2: not valid JSON: Extra data, got ","',
    ),
    "deep.json": ('{"a":' + "[" * 100_000, ", line 1: not valid JSON: maximum recursion depth exceeded"),
    "no_comma.json": (
        "[" + lines(PAIR, PAIR) + "]",
        ', line 1 (record 1): not valid JSON: a comma or ] must follow, got "{',
    ),
    "open_list.json": (
        "[" + json.dumps(PAIR),
        ", line 1 (record 1): not valid JSON: a comma or ] must follow, the file ends",
    ),
    "last_comma.json": (
        "[" + json.dumps(PAIR) + ",\n\n]",
        ', line 3 (record 2): not valid JSON: Expecting value, got "]" (line 3, column 1)',
    ),
    "two_lists.json": (json.dumps([PAIR]) + "\n[]", ', line 1: the list ends here, but "[]" follows'),
    "numbers.json": (
        "[1, 2]",
        ", 2 of 2 records cannot be used; line 1 (record 1): a record must be an object {...}, got 1",
    ),
    "unknown.csv": (
        "question,answer\na,b\n",
        ', line 2: what to learn cannot be told from the columns "question", "answer": '
        "name two of them with --prompt_column and --response_column",
    ),
    "no_columns.json": ("{}", ", line 1: what to learn cannot be told from the columns none: name two of them"),
    "missing.json": (
        lines(PAIR, {"prompt": "a", "answer": "b"}),
        ', line 2: no column "response", only "prompt", "answer"',
    ),
    "number.json": (lines({**PAIR, "response": 3}), ", line 1: response must be text, got 3"),
    "null.json": (lines({**PAIR, "response": None}), ", line 1: response must be text, got null"),
    "nan.json": (lines({**PAIR, "prompt": float("nan")}), ", line 1: prompt must be text, got NaN"),
    "blank.json": (lines({**PAIR, "response": " \n"}), ", line 1: response is empty"),
    "blank.csv": ("prompt,response\na,\n", ", line 2: response is empty"),
    "surrogate.json": (
        r'{"prompt": "a\ud83d", "response": "b"}',
        ", line 1: prompt must be valid Unicode, got a lone surrogate",
    ),
    "input.json": (lines({"instruction": "a", "input": 0, "output": "b"}), ", line 1: input must be text, got 0"),
    "no_instruction.json": (lines({"instruction": "", "input": " ", "output": "b"}), ", line 1: instruction is empty"),
    "flat_history.json": (
        lines({**PAIR, "history": ["一", "二"]}),
        ', line 1: history must be a list of [question, answer] pairs, got "一" in it',
    ),
    "empty_pair.json": (
        lines({**PAIR, "history": [[]]}),
        ", line 1: history must be a list of [question, answer] pairs, got []",
    ),
    "null_in_history.json": (
        lines({**PAIR, "history": [["一", None]]}),
        ", line 1: answer 1 of history must be text, got null",
    ),
    "python_history.json": (
        lines({**PAIR, "history": "[['一', '二']]"}),
        ", line 1: history must be a list of [question, answer] pairs in JSON, got \"[['一', '二']]\"",
    ),
    "history.json": (
        lines({**PAIR, "history": {"a": 1}}),
        ', line 1: history must be a list of [question, answer] pairs, got {"a": 1}',
    ),
    "twice.csv": ("a,b,a\n1,2,3\n", ', line 1: two columns have the name "a"'),
    "cells.csv": ("prompt,response\na,b,c\n", ", line 2: cells: 3, columns: 2; a text with a comma needs quotes"),
    "few_cells.csv": ("prompt;response\na\n", ", line 2: cells: 1, columns: 2; a text with a semicolon needs quotes"),
    "open_quote.csv": (
        'prompt,response\na,b\nc,"d\ne,f\n',
        ", line 3: not valid CSV: a quoted text that begins here has no end",
    ),
    "bad_quote.csv": ('prompt,response\n"a\n"b",c\n', ", line 2: not valid CSV: ',' expected after '\"' (line 3)"),
    "two_questions.json": (
        lines({"messages": messages(("user", "a"), ("user", "b"), ("assistant", "c"))}),
        f", line 1: message 2 of messages is from user like the one before it: {ALTERNATE}",
    ),
    "two_answers.json": (
        lines({"messages": messages(("user", "a"), ("assistant", "b"), ("assistant", "c"))}),
        f", line 1: message 3 of messages is from assistant like the one before it: {ALTERNATE}",
    ),
    "no_answer.json": (lines({"messages": messages(("user", "a"))}), ", line 1: messages must end with an answer"),
    "no_messages.json": (lines({"messages": []}), ", line 1: messages must end with an answer"),
    "null_messages.json": (lines({"messages": None}), ", line 1: messages must end with an answer"),
    "tool.json": (
        lines({"messages": messages(("tool", "a"))}),
        ", line 1: role of message 1 of messages must be one of system, developer, user, human, assistant, gpt, ",
    ),
    "role.json": (lines({"messages": [{"role": ["user"]}]}), ", line 1: role of message 1 of messages must be one of"),
    "strings.json": (lines({"messages": ["a"]}), ', line 1: message 1 of messages must be an object, got "a"'),
    "parts.json": (
        lines({"conversations": messages(("human", [1]), role="from", content="value")}),
        ", line 1: value of message 1 of conversations must be text, got [1]",
    ),
    "greeting.json": (
        lines({"messages": messages(("assistant", "a"))}),
        ", line 1: the last question of messages is empty",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_file_is_named_with_line_and_reason(tmp_path, name):
    content, message = WRONG_FILES[name]
    path = write(tmp_path, content, name)
    with pytest.raises(DataError) as raised:
        read_examples(path)
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


def test_wrong_columns_are_named(tmp_path):
    path = write(tmp_path, [PAIR])
    with pytest.raises(DataError, match=r'no column "q", only "prompt", "response": correct --prompt_column'):
        read_examples(path, "q", "response")
    with pytest.raises(DataError, match=r'no record has the column "histroy"'):
        read_examples(path, history_column="histroy")
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none.json")


def test_bad_records_are_grouped_and_counted(tmp_path):
    empty = [{**PAIR, "response": ""}] * 10_000
    numbers = [{**PAIR, "prompt": number} for number in range(6)]
    path = write(tmp_path, [PAIR, *empty, PAIR, *numbers])
    with pytest.raises(DataError) as raised:
        read_examples(path)
    assert str(raised.value) == (
        f"{path}, 10006 of 10008 records cannot be used; lines 2, 3, 4 and 9997 more: response is empty; "
        "line 10003: prompt must be text, got 0; line 10004: prompt must be text, got 1; "
        "line 10005: prompt must be text, got 2; line 10006: prompt must be text, got 3; and 2 more"
    )


# Ids and labels -------------------------------------------------------------------------------------------------------


def test_layout_of_a_row(tokenizer):
    encoded = encode_example(tokenizer, Example("你好", "再见", (("一", "二"),)), 64, 64)
    prompt = encode(tokenizer, "[Round 0]\n问：一\n答：二\n[Round 1]\n问：你好\n答：")
    answer = [tokenizer.bos_token_id, *encode(tokenizer, "再见"), tokenizer.eos_token_id]
    assert encoded.input_ids == [*prompt, tokenizer.gmask_token_id, *answer]
    assert encoded.labels == [-100] * (len(prompt) + 1) + answer
    assert (encoded.rounds_dropped, encoded.source_cut, encoded.target_cut) == (0, 0, 0)


def test_prompt_is_that_of_a_chat(tokenizer):
    example = Example("你好", "再见", (("一", "二"),))
    assert encode_prompt(tokenizer, example, 64) == tokenizer(build_prompt("你好", example.history))["input_ids"]


def test_text_is_cut_at_its_end_and_control_tokens_stay(tokenizer):
    example = Example("甲乙丙丁戊己庚辛", "子丑寅卯辰巳午未")
    source, target = encode(tokenizer, example.prompt), encode(tokenizer, example.response)
    encoded = encode_example(tokenizer, example, 5, 4)
    answer = [tokenizer.bos_token_id, *target[:2], tokenizer.eos_token_id]
    assert encoded.input_ids == [*source[:4], tokenizer.gmask_token_id, *answer]
    assert encoded.labels == [-100] * 5 + answer
    assert (encoded.source_cut, encoded.target_cut) == (len(source) - 4, len(target) - 2)
    assert len(encode_example(tokenizer, example, 2, 3).input_ids) == 5
    for lengths in ((1, 3), (2, 2)):
        with pytest.raises(ValueError, match="one token of text, got"):
            encode_example(tokenizer, example, *lengths)


def test_oldest_rounds_are_dropped_first_and_instructions_last(tokenizer):
    rounds = tuple((f"问题{i}", f"回答{i}") for i in range(6))
    system = ("你是店员", "明白了。")

    def length(history):
        return len(encode(tokenizer, build_prompt("最后", history)))

    for kept in range(7):  # room for exactly so many rounds behind the instructions
        history = (system, *rounds[6 - kept :])
        encoded = encode_example(tokenizer, Example("最后", "好", (system, *rounds), keep=1), length(history) + 1, 8)
        assert encoded.input_ids == encode_example(tokenizer, Example("最后", "好", history), 999, 8).input_ids
        assert (encoded.rounds_dropped, encoded.source_cut) == (6 - kept, 0)
    encoded = encode_example(tokenizer, Example("最后", "好", (system, *rounds), keep=1), length((system,)), 8)
    assert encoded.input_ids == encode_example(tokenizer, Example("最后", "好"), 999, 8).input_ids
    assert (encoded.rounds_dropped, encoded.source_cut) == (7, 0)
    encoded = encode_example(tokenizer, Example("最后" * 50, "好", rounds), 9, 8)
    assert encoded.input_ids[:8] == encode(tokenizer, "最后" * 50)[:8]
    assert encoded.rounds_dropped == 6 and encoded.source_cut > 0


PIECES = [*"你好，。a1 \n\t[]<>🙂", "<sop>", "<eop>", "<pad>", "[MASK]", "[gMASK]"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@settings(max_examples=60, deadline=None)
@given(
    prompt=TEXT, response=TEXT, history=st.lists(st.tuples(TEXT, TEXT), max_size=4), source=st.integers(2, 40),
    target=st.integers(3, 20),
)  # fmt: skip
def test_every_row_has_its_control_tokens_once(tokenizer, prompt, response, history, source, target):
    example = Example(prompt, response, tuple(history), keep=min(1, len(history)))
    ids = (encoded := encode_example(tokenizer, example, source, target)).input_ids
    start = ids.index(tokenizer.bos_token_id)
    assert ids[: start + 1] == encode_prompt(tokenizer, example, source)
    assert ids[start - 1] == tokenizer.gmask_token_id and start <= source
    assert ids.count(tokenizer.bos_token_id) == 1 and len(ids) - start <= target
    assert ids.index(tokenizer.eos_token_id, start) == len(ids) - 1 and tokenizer.pad_token_id not in ids[start:]
    assert encoded.labels == [-100] * start + ids[start:]
    assert encoded.rounds_dropped <= len(history)


def test_dataset_has_the_rows_in_order(tokenizer, capfd):
    examples = [
        Example(f"你好{i}", "再见" * i, (("甲", "乙"), ("一" * 3 * i, "二")), keep=1) for i in range(20)
    ] + [Example("a", "b")]  # fmt: skip
    dataset = to_dataset(tokenizer, examples, 40, 16)
    assert list(dataset) == [vars(encode_example(tokenizer, example, 40, 16)) for example in examples]
    assert list(dataset) != list(to_dataset(tokenizer, [replace(example, keep=0) for example in examples], 40, 16))
    assert capfd.readouterr() == ("", "")


def test_dataset_does_not_depend_on_the_number_of_processes(tokenizer, capfd):
    examples = [Example(f"你好{i}", "再见" * i) for i in range(30)]
    alone, shared = (to_dataset(tokenizer, examples, 24, 16, num_proc) for num_proc in (None, 2))
    assert list(shared) == list(alone)
    assert list(to_dataset(tokenizer, examples[:1], 24, 16, num_proc=2)) == list(alone)[:1]
    assert capfd.readouterr() == ("", "")


def test_report_of_what_was_cut(tokenizer):
    examples = [Example("甲", "乙"), Example("甲" * 40, "乙" * 20), Example("甲", "乙" * 30, (("丙" * 40, "丁"),) * 2)]
    dataset = to_dataset(tokenizer, examples, 20, 12)
    source, target = (len(encode(tokenizer, text)) for text in ("甲" * 40, "乙" * 30))
    assert cut_report(dataset) == (
        f"1 of 3 prompts cut by up to {source - 19} tokens (--max_source_length); "
        f"2 of 3 answers cut by up to {target - 10} tokens (--max_target_length); "
        "1 of 3 histories cut by up to 2 rounds (--max_source_length)"
    )
    assert cut_report(to_dataset(tokenizer, examples[:1], 20, 12)) == ""


# Batches --------------------------------------------------------------------------------------------------------------

ROWS = [
    {"input_ids": [11, 12, 13], "labels": [-100, 12, 13], "source_cut": 0},
    {"input_ids": [21], "labels": [21], "source_cut": 4},
]


def test_collator_pads_on_the_right_without_a_mask(tokenizer):
    pad = tokenizer.pad_token_id
    batch = Collator(tokenizer)(ROWS)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[11, 12, 13], [21, pad, pad]] and batch["input_ids"].dtype == torch.int64
    assert batch["labels"].tolist() == [[-100, 12, 13], [21, -100, -100]]
    batch = Collator(tokenizer, length=4)(ROWS[1:])
    assert batch["input_ids"].tolist() == [[21, pad, pad, pad]] and batch["labels"].tolist() == [[21, -100, -100, -100]]


def test_collator_pads_on_the_left_with_a_mask(tokenizer):
    pad = tokenizer.pad_token_id
    batch = Collator(tokenizer, "left", 4)(ROWS)
    assert batch["input_ids"].tolist() == [[pad, 11, 12, 13], [pad, pad, pad, 21]]
    assert batch["labels"].tolist() == [[-100, -100, 12, 13], [-100, -100, -100, 21]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


def test_collator_refuses_what_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit into a batch of length 2"):
        Collator(tokenizer, length=2)(ROWS)
    with pytest.raises(ValueError, match="padding_side must be left or right, got 'middle'"):
        Collator(tokenizer, "middle")


@torch.no_grad()
def test_padding_does_not_change_the_loss(model, tokenizer):
    examples = [Example("你好", "你好！我能帮你什么？"), Example("中国的首都是哪里？", "北京。", (("在吗", "在的。"),))]
    rows = [vars(encode_example(tokenizer, example, 64, 64)) for example in examples]
    counts = torch.tensor([len(row["labels"]) - row["labels"].count(-100) for row in rows]).float()
    alone = torch.stack([model(**Collator(tokenizer)([row])).loss for row in rows])
    want = (alone * counts).sum() / counts.sum()
    for collator in (Collator(tokenizer), Collator(tokenizer, length=128), Collator(tokenizer, "left", 90)):
        torch.testing.assert_close(model(**collator(rows)).loss, want, atol=2e-5, rtol=0)  # float32 rounding


# Replay, preview ------------------------------------------------------------------------------------------------------


def test_replay_has_its_share_and_is_repeatable():
    examples = [Example(f"new {i}", "x") for i in range(90)]
    replay = [Example(f"old {i}", "x") for i in range(7)]
    mixed = mix_replay(examples, replay, 0.25, seed=1)
    assert len(mixed) == 120  # 30 are a quarter of it
    counts = Counter(example.prompt for example in mixed)
    assert {counts[example.prompt] for example in examples} == {1}
    assert sorted(counts[example.prompt] for example in replay) == [4, 4, 4, 4, 4, 5, 5]
    assert mixed[:90] != examples  # in random order
    assert mixed == mix_replay(examples, replay, 0.25, seed=1) != mix_replay(examples, replay, 0.25, seed=2)
    assert mix_replay(examples, [], 0, seed=1) == examples
    assert len(mix_replay(examples[:3], replay, 0.01, seed=1)) == 4  # asked for, so at least one


@pytest.mark.parametrize("ratio", [-0.1, 1, float("nan")])
def test_replay_ratio_is_a_share(ratio):
    with pytest.raises(ValueError, match="the replay ratio must be from 0 to below 1, got"):
        mix_replay([], [Example("a", "b")], ratio, seed=0)


def test_nothing_to_replay():
    with pytest.raises(ValueError, match="there is nothing to replay"):
        mix_replay([Example("a", "b")], [], 0.5, seed=0)


def test_fingerprint_does_not_depend_on_the_file():
    examples = [Example("你好", "b", (("c", "d"),), "train.json:1"), Example("e", "f")]
    moved = [Example("你好", "b", (("c", "d"),), "other.csv:7"), Example("e", "f")]
    assert fingerprint(examples) == fingerprint(moved)
    assert len(fingerprint(examples)) == 16
    others = [examples[::-1], examples[:1], [examples[0], Example("ef", "")], [Example("你好", "b"), examples[1]]]
    others.append([replace(examples[0], keep=1), examples[1]])
    assert len({fingerprint(other) for other in [examples, *others]}) == 6


def test_preview_shows_what_is_read_learnt_and_cut(tokenizer):
    examples = [
        Example("你好", "再见", (("在吗", "在的"), ("一", "二")), "train.json:1"),
        Example("你好", "好" * 500, (), "train.json:2"),
    ]
    prompt = encode_prompt(tokenizer, Example("你好", "", (("一", "二"),)), 99)
    assert preview(tokenizer, examples, len(prompt) - 1, 8, count=1) == "\n".join(
        [
            f"train.json:1   {len(prompt) - 1} tokens read, {2 + len(encode(tokenizer, '再见'))} learnt",
            "  reads  | [Round 0]",
            "         | 问:一",
            "         | 答:二",
            "         | [Round 1]",
            "         | 问:你好",
            "         | 答:[gMASK]",
            "  learns | <sop>再见<eop>",
            "  cut    | the oldest 1 of 2 earlier rounds",
        ]
    )
    second = preview(tokenizer, examples, 64, 8).split("\n\n")[1].splitlines()
    tokens = encode(tokenizer, "好" * 500)
    shown = tokenizer.decode(tokens[6:])
    assert second[2] == f"  learns | <sop>{tokenizer.decode(tokens[:6])}<eop>"
    assert second[3] == (
        f"  cut    | {len(tokens) - 6} tokens of the answer: {shown[:200]}... {len(shown) - 200} characters more"
    )
