"""Text <-> ids on the embedded vocabulary and on broken ones; recorded ids of the original are in test_golden.py."""

from pathlib import Path

import numpy as np
import pytest

from chatglm import ChatGLMTokenizer
from chatglm.tokenization_chatglm import decode_whitespace, encode_whitespace

TINY = Path(__file__).parents[1] / "chatglm" / "tiny" / "ice_text.model"


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer(TINY)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("a\tb\nc", "a<|tab|>b<n>c"),
        ("a b", "a b"),
        ("a  b", "a<|blank_2|>b"),
        (" " * 80, "<|blank_80|>"),
        (" " * 81, "<|blank_80|> "),
        (" " * 83, "<|blank_80|><|blank_3|>"),
    ],
)
def test_whitespace_becomes_pieces_and_comes_back(text, encoded):
    assert encode_whitespace(text) == encoded
    assert decode_whitespace(encoded) == text


@pytest.mark.parametrize(
    "text",
    ["晚上睡不着应该怎么办", "The capital of France is Paris.", "def f(x):\n    return\tx", "龘😀 ǎǐ", "3.14159"],
)
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_pieces_stand_where_the_published_vocabulary_has_them(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(list(range(6)))
    assert pieces == ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
    first = tokenizer.mask_token_id
    assert tokenizer.convert_ids_to_tokens(list(range(first, first + 8))) == [
        "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(tokenizer.vocab_size - 1) == "<0xFF>"
    assert tokenizer.bos_token_id == first + 4


def test_control_tokens_in_text_are_recognised_and_their_spaces_dropped(tokenizer):
    ids = tokenizer.encode("你好 [MASK] 你好", add_special_tokens=False)
    hello = tokenizer.encode("你好", add_special_tokens=False)
    assert ids == [*hello, tokenizer.mask_token_id, *hello]
    assert tokenizer.gmask_token_id not in tokenizer.encode("[gMASK]", add_special_tokens=False)


def test_chinese_and_english_cost_few_tokens(tokenizer):
    chinese = "晚上睡不着的时候，可以先放下手机，做几次深呼吸，让身体慢慢放松下来。"
    english = "When you cannot sleep, put the phone away and breathe slowly until your body relaxes."
    assert len(chinese) / len(tokenizer.encode(chinese, add_special_tokens=False)) > 1.4
    assert len(english) / len(tokenizer.encode(english, add_special_tokens=False)) > 3.5


def test_padding_brings_mask_and_positions(tokenizer):
    batch = tokenizer(["你好", "今天天气怎么样"], padding=True, return_tensors="np")
    width = batch["input_ids"].shape[1]
    pads = int((batch["input_ids"][0] == 3).sum())
    assert pads > 0 and (batch["input_ids"][0, :pads] == 3).all()
    assert batch["attention_mask"].shape == (2, 1, width, width)
    assert batch["attention_mask"].dtype == np.bool_
    assert batch["attention_mask"][0, 0, -1].tolist() == [True] * pads + [False] * (width - pads)
    assert batch["position_ids"][0, 0].tolist() == [0] * pads + [*range(width - pads - 1), width - pads - 2]
    assert batch["position_ids"][0, 1].tolist() == [0] * (width - 1) + [1]


def test_padding_on_the_right_is_refused(tokenizer):
    with pytest.raises(ValueError, match="pads on the left, got padding_side 'right'"):
        tokenizer(["a", "你好你好"], padding=True, padding_side="right")


def test_truncation_leaves_room_for_control_tokens(tokenizer):
    ids = tokenizer("你好" * 50, truncation=True, max_length=10)["input_ids"]
    assert len(ids) == 10
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 100]) == ""


def test_vocabulary_is_saved_byte_for_byte(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "ice_text.model").read_bytes() == TINY.read_bytes()
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.gmask_token_id == tokenizer.gmask_token_id
    assert again("你好 [gMASK]") == tokenizer("你好 [gMASK]")


def test_folder_without_vocabulary_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    with pytest.raises(ValueError, match=f"no ice_text.model in {tmp_path}"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_file_that_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "ice_text.model").write_text("not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        ChatGLMTokenizer(tmp_path / "ice_text.model")
