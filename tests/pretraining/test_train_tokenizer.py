"""The vocabulary comes out in the published order, and the same text gives the same file."""

import pytest

from chatglm import ChatGLMTokenizer
from chatglm.tokenization_chatglm import encode_whitespace
from pretraining.train_tokenizer import train_pieces

# 397 pieces are exactly the characters of this text and the special pieces.
TEXT = ["今天天气很好，我们去公园散步吧。", "The quick brown fox jumps over the lazy dog.", "第1行\n第2行\tx  y"] * 40


@pytest.fixture(scope="module")
def vocabulary():
    return train_pieces(map(encode_whitespace, TEXT), vocab_size=397)


def test_special_pieces_stand_behind_the_text_pieces(vocabulary, tmp_path):
    (tmp_path / "ice_text.model").write_bytes(vocabulary)
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    pieces = tokenizer.convert_ids_to_tokens(list(range(397)))
    assert pieces[:6] == ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
    assert pieces[53:61] == ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    assert pieces[61:64] == ["<|tab|>", "<|blank_2|>", "<|blank_3|>"]
    assert pieces[141:] == [f"<0x{value:02X}>" for value in range(256)]
    for text in (*TEXT[:3], "emoji 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("，", ",")


def test_same_text_gives_the_same_file(vocabulary):
    assert train_pieces(map(encode_whitespace, TEXT), vocab_size=397) == vocabulary
