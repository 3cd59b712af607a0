"""`chat` and `stream_chat`: prompts, history, limits, stop strings, seeds, whole characters and refusals.

And conversations kept as JSON.
"""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.chat import build_prompt, check_history, history_from_json, history_to_json, process_response

VOCABULARY = Path(__file__).parent / "golden" / "tokenizer" / "mini_ice_text.model"


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer(VOCABULARY)


def small_config(tokenizer, width, num_layers):
    sizes = {"hidden_size": width, "inner_hidden_size": width, "num_layers": num_layers, "num_attention_heads": 2}
    return ChatGLMConfig(vocab_size=tokenizer.vocab_size, use_cache=True, **sizes, **tokenizer.config_ids)


class Scripted(ChatGLMForConditionalGeneration):
    """A network whose answer is given in advance: the next token of `script` always has the highest score."""

    script = ()

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        step = 0 if input_ids.shape[1] > 1 else self.told + 1
        self.told = step
        output.logits[:, -1] = 0.0
        output.logits[:, -1, self.script[step]] = 1e3
        return output


@pytest.fixture
def scripted(tokenizer):
    torch.manual_seed(0)
    model = Scripted(small_config(tokenizer, width=16, num_layers=1)).eval()

    def say(*parts):
        """Parts are texts or lists of ids; <eop> follows."""
        model.script = []
        for part in parts:
            model.script += tokenizer.encode(part, add_special_tokens=False) if isinstance(part, str) else part
        model.script.append(tokenizer.eos_token_id)
        return model

    return say


def byte_ids(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


def test_prompt_of_zero_one_and_two_rounds():
    assert build_prompt("你好") == "你好"
    assert build_prompt("你好", []) == "你好"
    one = [("a", "b")]
    assert build_prompt("c", one) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："
    two = [("a", "b"), ("c ", "\nd")]
    assert build_prompt("e", two) == ("[Round 0]\n问：a\n答：b\n[Round 1]\n问：c \n答：\nd\n[Round 2]\n问：e\n答：")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (" 你好,世界! ", "你好，世界！"),
        ("Hello, world!", "Hello, world!"),
        ("你好!!!", "你好！!!"),
        ("时间:[[训练时间]]?", "时间：2023年？"),
        ("a;中", "a；中"),
    ],
)
def test_punctuation_beside_hanzi_is_restored(raw, shown):
    assert process_response(raw) == shown


def test_chat_returns_response_and_a_new_history(scripted, tokenizer):
    history = [("早", "早!")]
    response, new_history = scripted("你好").chat(tokenizer, "在吗", history, temperature=0)
    assert response == "你好"
    assert new_history == [("早", "早!"), ("在吗", "你好")]
    assert history == [("早", "早!")]


def test_stream_grows_to_the_same_response(scripted, tokenizer):
    model = scripted("Hello world")
    steps = list(model.stream_chat(tokenizer, "hi", temperature=0))
    texts = [response for response, _ in steps]
    assert texts[0] == "He"
    assert texts[-1] == "Hello world" == model.chat(tokenizer, "hi", temperature=0)[0]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert steps[-1][1] == [("hi", "Hello world")]


def test_character_spread_over_bytes_appears_whole_or_not_at_all(scripted, tokenizer):
    emoji = byte_ids(tokenizer, "😀")
    model = scripted("好", emoji, "好")
    texts = [text for text, _ in model.stream_chat(tokenizer, "hi", temperature=0)]
    assert texts == ["", "好", "好", "好", "好", "好😀", "好😀", "好😀 好"]
    for text in texts:
        assert "\ufffd" not in text
        text.encode("utf-8")


def test_broken_bytes_are_not_shown(scripted, tokenizer):
    model = scripted("好", byte_ids(tokenizer, "😀")[:3], "好")
    response, _ = model.chat(tokenizer, "hi", temperature=0)
    assert response == "好 好"


def test_answer_ends_before_a_stop_string(scripted, tokenizer):
    model = scripted("Hello world Hello")
    for stop in ("world", ["nothing", "wor"]):
        assert model.chat(tokenizer, "hi", temperature=0, stop=stop)[0] == "Hello"
        texts = [text for text, _ in model.stream_chat(tokenizer, "hi", temperature=0, stop=stop)]
        assert texts[-1] == "Hello"
        assert not any("w" in text for text in texts)  # a beginning of the stop string is held back


@pytest.mark.parametrize(("stop", "expected"), [(",", "你好"), ("，", "你好"), ("好,", "你"), ("好，", "你")])
def test_stop_string_is_found_in_either_width(scripted, tokenizer, stop, expected):
    model = scripted("你好", tokenizer.encode(",", add_special_tokens=False)[-1:], "再见")
    assert model.chat(tokenizer, "hi", temperature=0)[0] == "你好， 再见"
    assert model.chat(tokenizer, "hi", temperature=0, stop=stop)[0] == expected
    *_, (streamed, _) = model.stream_chat(tokenizer, "hi", temperature=0, stop=stop)
    assert streamed == expected


def test_held_back_end_is_shown_when_the_answer_ends_with_it(scripted, tokenizer):
    model = scripted("Hello wor")
    texts = [text for text, _ in model.stream_chat(tokenizer, "hi", temperature=0, stop="world")]
    assert texts[-1] == "Hello wor"


def test_oldest_rounds_are_dropped_with_a_warning(scripted, tokenizer):
    history = [("第一" * 10, "a"), ("第二" * 10, "b"), ("第三", "c")]
    model = scripted("好")
    lengths = [len(tokenizer(build_prompt("q", history[i:]))["input_ids"]) for i in range(4)]
    max_length = lengths[1] + 20  # room for an answer beside the last two rounds, not beside all three
    with pytest.warns(UserWarning, match="dropped the oldest 1 of 3 rounds of history"):
        _, new_history = model.chat(tokenizer, "q", history, max_length=max_length, temperature=0)
    assert new_history == [*history, ("q", "好")]
    with pytest.raises(ValueError, match=f"query and history have {lengths[0]} tokens and max_length is {lengths[0]}"):
        model.chat(tokenizer, "q", history, max_length=lengths[0], truncate_history=False)


@pytest.fixture
def seen(monkeypatch):
    """Inputs and options that reach `stream_generate` of a Scripted network."""
    seen = {}
    original = Scripted.stream_generate

    def stream_generate(self, input_ids, **options):
        seen.update(options, input_ids=input_ids)
        return original(self, input_ids, **options)

    monkeypatch.setattr(Scripted, "stream_generate", stream_generate)
    return seen


def test_prompt_without_dropped_rounds_counts_from_zero(scripted, tokenizer, seen):
    history = [("第一" * 20, "a"), ("第二", "b")]
    rest = build_prompt("q", history[1:])
    max_length = len(tokenizer(rest)["input_ids"]) + 20
    with pytest.warns(UserWarning, match="dropped the oldest 1 of 2"):
        scripted("好").chat(tokenizer, "q", history, max_length=max_length, temperature=0)
    assert rest.startswith("[Round 0]")
    assert seen["input_ids"].tolist() == [tokenizer(rest)["input_ids"]]


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 5000}, {"truncate_history": False, "max_length": 60}])
def test_history_that_fits_is_kept_in_silence(scripted, tokenizer, seen, options):
    history = [["a", "b"], ("c", "")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, new_history = scripted("好").chat(tokenizer, "q", history, temperature=0, **options)
    assert seen["input_ids"].tolist() == [tokenizer(build_prompt("q", history))["input_ids"]]
    assert new_history == [("a", "b"), ("c", ""), ("q", "好")]


def test_sop_written_by_a_user_does_not_end_the_prompt(scripted, tokenizer, seen):
    scripted("好").chat(tokenizer, "a<sop>b", temperature=0)
    ids = seen["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.bos_token_id


@pytest.mark.parametrize("query", ["", "   ", "\n", "<eop>", "[MASK]", "[gMASK]", "<unk>"])
def test_unusual_queries_are_answered(scripted, tokenizer, query):
    assert scripted("好").chat(tokenizer, query, temperature=0) == ("好", [(query, "好")])


def test_other_options_reach_generate(scripted, tokenizer):
    model = scripted("Hello Hello Hello")
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert model.chat(tokenizer, "hi", temperature=0, suppress_tokens=hello[:1])[0] != "Hello Hello Hello"
    assert model.chat(tokenizer, "hi", temperature=0, eos_token_id=hello[-1])[0] == "Hello"

    class Forbid:
        def __call__(self, input_ids, scores):
            return scores.index_fill(-1, torch.tensor(hello[:1]), -torch.inf)

    forbidden = model.chat(tokenizer, "hi", temperature=0, logits_processor=[Forbid()])[0]
    assert forbidden and "Hello" not in forbidden.split()[0]


def test_query_that_does_not_fit_alone_names_both_numbers(scripted, tokenizer):
    count = len(tokenizer("长" * 40)["input_ids"])
    with pytest.raises(ValueError, match=f"the query has {count} tokens and max_length is 20"):
        scripted("好").chat(tokenizer, "长" * 40, [("a", "b")], max_length=20)


def test_max_new_tokens_limits_the_answer(scripted, tokenizer):
    model = scripted("Hello world")
    assert model.chat(tokenizer, "hi", temperature=0, max_new_tokens=2)[0] == "Hell"


@pytest.fixture(scope="module")
def random_model(tokenizer):
    torch.manual_seed(1)
    return ChatGLMForConditionalGeneration(small_config(tokenizer, width=32, num_layers=2)).eval()


def test_seed_repeats_an_answer_and_another_seed_gives_another(random_model, tokenizer):
    def answer(seed):
        return random_model.chat(tokenizer, "hi", seed=seed, max_new_tokens=12, top_p=1.0)[0]

    assert answer(0) == answer(0) != answer(1) == answer(1)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    answer(3)
    beams = [random_model.chat(tokenizer, "hi", seed=5, num_beams=2, max_new_tokens=12)[0] for _ in range(2)]
    assert beams[0] == beams[1]
    assert torch.equal(torch.rand(1), expected)  # the global seed is left alone


def test_temperature_zero_is_greedy(random_model, tokenizer):
    greedy = random_model.chat(tokenizer, "hi", do_sample=False, max_new_tokens=12)
    for temperature in (0, 1e-40):
        assert random_model.chat(tokenizer, "hi", temperature=temperature, max_new_tokens=12) == greedy
    beams = [random_model.chat(tokenizer, "hi", temperature=0, num_beams=3, max_new_tokens=12) for _ in range(2)]
    assert beams[0] == beams[1]


def test_pad_written_by_a_user_is_text(scripted, tokenizer, seen):
    scripted("好").chat(tokenizer, "<pad>hi", temperature=0)
    assert seen["input_ids"][0, 0] == tokenizer.pad_token_id
    assert seen["attention_mask"].tolist() == [[1] * seen["input_ids"].shape[1]]


def test_closing_the_stream_stops_the_work(scripted, tokenizer):
    model = scripted("Hello world Hello world")
    answers = model.stream_chat(tokenizer, "hi", temperature=0)
    next(answers)
    next(answers)
    answers.close()
    assert model.told == 1  # two steps, counted from 0


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"query": 5}, TypeError, "query must be a string, got int"),
        ({"query": "a\ud800"}, ValueError, "lone surrogate .* at index 1"),
        ({"history": "hello"}, TypeError, r"history must be a list of \(query, response\) pairs, got str"),
        ({"history": [("a",)]}, ValueError, r"history\[0\] must be a \(query, response\) pair, got \('a',\)"),
        ({"history": [("a", "b"), ("c", None)]}, TypeError, r"the response of history\[1\] must be a string"),
        ({"max_length": 0}, ValueError, "max_length must be a whole number of tokens, at least 1, got 0"),
        ({"max_length": 2.5}, TypeError, "max_length must be a whole number of tokens, at least 1, got float"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be a whole number of tokens, at least 1, got -1"),
        ({"top_p": 1.5}, ValueError, "top_p must be a number from 0 to 1, got 1.5"),
        ({"top_p": float("nan")}, ValueError, "top_p must be a number from 0 to 1, got nan"),
        ({"temperature": -0.1}, ValueError, "temperature must be a number from 0 to 100, got -0.1"),
        ({"temperature": "warm"}, TypeError, "temperature must be a number from 0 to 100, got str"),
        ({"stop": [""]}, ValueError, "a stop string must not be empty"),
        ({"stop": 5}, TypeError, "stop must be a string or a list of strings, got int"),
        ({"stop": {"a": 1}}, TypeError, "stop must be a string or a list of strings, got dict"),
        ({"stop": [5]}, TypeError, "a stop string must be a string, got int"),
        ({"seed": 1.5}, TypeError, "seed must be a whole number of at most 64 bits, got float"),
        ({"seed": 2**70}, ValueError, "seed must be a whole number of at most 64 bits"),
        ({"seed": 10**300}, ValueError, r"64 bits, got 10{19}\.\.\.$"),
        ({"seed": 10**5000}, ValueError, "64 bits, got one of thousands of digits"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(scripted, tokenizer, arguments, kind, sentence):
    model = scripted("好")
    arguments = {"query": "hi", **arguments}
    with pytest.raises(kind, match=sentence):
        model.chat(tokenizer, **arguments)
    with pytest.raises(kind, match=sentence):
        next(model.stream_chat(tokenizer, **arguments))


def test_history_of_json_lists_is_accepted():
    assert check_history([["a", "b"]]) == [("a", "b")]


# Saved conversations --------------------------------------------------------------------------------------------------


def test_saved_conversation_is_json_that_people_can_read():
    assert history_to_json([("问", "答")]) == (
        '{\n "format": "chatglm-conversation",\n "version": 1,\n "history": [\n  [\n   "问",\n   "答"\n  ]\n ]\n}\n'
    )


@pytest.mark.parametrize(
    "history", [[], [("", "")], [('a\n"b"', "\r\n\u2028\0<script>"), ("😀", "\ufeff"), ("[[x]]", "\\ud800")]]
)
def test_saved_conversation_comes_back_as_it_was(history):
    text = history_to_json(history)
    assert history_from_json(text) == history_from_json(text.encode()) == history


def test_other_ways_to_write_a_conversation_are_read():
    assert history_from_json('[["a", "b"]]') == [("a", "b")]
    assert history_from_json("[]") == []
    assert history_from_json('\ufeff[["问", "\\ud83d\\ude00"]]'.encode()) == [("问", "😀")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is JSON, got something else: Expecting value"),
        ("[" * 100_000, "is JSON, got something else: lists within lists"),
        ("9" * 5000, "is JSON, got something else: Exceeds the limit"),
        (b"[\xff]", "is JSON in UTF-8, got the byte 0xFF at 1"),
        ("NaN", "is a list of .* pairs, got nan"),
        ('"text"', "is a list of .* pairs, got 'text'"),
        ("{}", '"format": "chatglm-conversation" and a "history", this file has not'),
        ('{"history": [["a", "b"]]}', "this file has not"),
        ('{"format": "chatglm-conversation", "version": 1}', "this file has not"),
        ('{"format": "chatglm-conversation", "version": 2, "history": []}', "has version 1, got 2"),
        ('{"format": "chatglm-conversation", "version": 1, "history": null}', "is a list of .* pairs, got None"),
        ('["ab"]', r"history\[0\] must be a \(query, response\) pair, got 'ab'"),
        ('[["a", "b"], ["c"]]', r"history\[1\] must be a \(query, response\) pair, got \['c'\]"),
        ('[{"a": 1, "b": 2}]', r"history\[0\] must be a \(query, response\) pair, got {'a': 1, 'b': 2}"),
        ('[["a", null]]', r"the response of history\[0\] must be a string, got NoneType"),
        ('[["a\\ud800", "b"]]', "lone surrogate .* at index 1"),
        ("[" * 500 + "]" * 500, r"history\[0\] must be a \(query, response\) pair, got \[\[\["),
        (json.dumps([["a" * 10_000]]), r"history\[0\] must be a \(query, response\) pair, got \['aa"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_short_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        history_from_json(text)
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)


def test_what_is_no_history_is_not_saved():
    with pytest.raises(ValueError, match="lone surrogate"):
        history_to_json([("a", "\ud800")])
    with pytest.raises(TypeError, match="history must be a list"):
        history_to_json("ab")
