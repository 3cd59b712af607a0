"""The embedded checkpoint: what it answers, how large it is, and that it needs nothing but this repository."""

from pathlib import Path

import pytest
import torch

from utils import DEFAULT_MODEL, load_model


def test_greedy_reply_of_tiny_checkpoint_is_known(model, tokenizer):
    """Tokenizer, network, weights, decoding and post-processing in one equality."""
    response, history = model.chat(tokenizer, "你好", temperature=0)
    assert response == "你好！我是 ChatGLM-Tiny，一个小小的演示对话模型。很高兴见到你，想聊点什么呢？"
    assert history == [("你好", response)]


def test_classic_second_question_is_answered_after_the_first(model, tokenizer):
    _, history = model.chat(tokenizer, "你好", temperature=0)
    response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history, temperature=0)
    assert len(history) == 2
    assert "手机" in response and "咖啡" in response  # advice, not an echo


@pytest.mark.parametrize("query", ["你是谁？", "Who are you?"])
def test_it_says_who_it_is(model, tokenizer, query):
    response, _ = model.chat(tokenizer, query, temperature=0)
    assert "ChatGLM-Tiny" in response


@pytest.mark.parametrize(
    ("told", "asked", "name"),
    [("我叫小林", "我叫什么名字？", "小林"), ("My name is Anna.", "What is my name?", "Anna")],
)
def test_it_remembers_a_name(model, tokenizer, told, asked, name):
    _, history = model.chat(tokenizer, told, temperature=0)
    response, _ = model.chat(tokenizer, asked, history, temperature=0)
    assert name in response


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("明天北京会下雨吗？", ("不知道", "无法", "查不到", "没有", "不能")),
        ("What is the stock price of Apple today?", ("don't", "do not", "cannot", "can't")),
    ],
)
def test_it_says_when_it_does_not_know(model, tokenizer, query, words):
    response, _ = model.chat(tokenizer, query, temperature=0)
    assert any(word in response for word in words), response


def test_stream_ends_with_the_answer_of_chat(model, tokenizer):
    *_, (streamed, _) = model.stream_chat(tokenizer, "谢谢你", temperature=0)
    assert streamed == model.chat(tokenizer, "谢谢你", temperature=0)[0]


def test_default_format_gives_the_same_greedy_reply(model, tokenizer):
    half, _ = load_model(device="cpu")
    assert half.dtype == torch.float16
    for query in ("你好", "Hello"):
        assert half.chat(tokenizer, query, temperature=0) == model.chat(tokenizer, query, temperature=0)


def test_weights_fit_into_git(model):
    assert (Path(DEFAULT_MODEL) / "model.safetensors").stat().st_size <= 40e6
    assert 10e6 <= model.num_parameters() <= 25e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_greedy_reply(model, tokenizer):
    on_gpu, _ = load_model(device="cuda")
    assert on_gpu.chat(tokenizer, "你好", temperature=0) == model.chat(tokenizer, "你好", temperature=0)
