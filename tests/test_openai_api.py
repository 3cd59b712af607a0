"""openai_api.py, asked by OpenAI's client, by LangChain and by hand, over real connections."""

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from openai import AsyncOpenAI, OpenAI
from pydantic import ValidationError
from schemathesis.specs.openapi import checks as openapi_checks

import openai_api
import serving
from chatglm.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 30
GREETING = "你好！我是 ChatGLM-Tiny，一个小小的演示对话模型。很高兴见到你，想聊点什么呢？"


class FakeModel:
    """Repeats the question letter by letter; some questions have another effect."""

    def __init__(self):
        self.calls = []
        self.started = threading.Event()  # an answer has begun
        self.stopped = threading.Event()  # one has ended, by itself or not

    def stream_chat(self, tokenizer, query, history, **options):
        self.calls.append((query, history, options))
        self.started.set()
        answer = "好,你好? yes" if query == "逗号" else f"收到【{query}】"
        try:
            for end in itertools.count(1) if query == "无尽" else range(1, len(answer) + 1):
                text = answer[:end]
                if query == "无尽":
                    text = "字" * end
                    time.sleep(0.002)  # a busy loop would hold up the server in this process
                if query == "逗号":
                    text = re.sub(",(?=你)", "，", text)
                yield text, [*history, (query, text)]
                if query == "出错" and end == 3:
                    raise RuntimeError("the model's own words")
        finally:
            self.stopped.set()


@contextmanager
def serving_app(app):
    """Serves app on a free port in a thread; the value is its address."""
    listener = socket.create_server(("127.0.0.1", 0))  # listens already: who connects early waits
    server = uvicorn.Server(serving.server_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def engine(fake):
    with Engine(fake, None, max_queue=1) as engine:
        yield engine


@pytest.fixture
def web(engine):
    """For looking at the bytes: an HTTP client without a network."""
    return TestClient(openai_api.create_app(engine, "chatglm"), raise_server_exceptions=False)


@pytest.fixture
def client(engine):
    """OpenAI's client at a server with the fake model."""
    with serving_app(openai_api.create_app(engine, "chatglm")) as address:
        yield OpenAI(base_url=address + "/v1", api_key="any", max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def tiny_address(model, tokenizer):
    """The address of a server with the embedded model."""
    with Engine(model, tokenizer) as engine, serving_app(openai_api.create_app(engine, "chatglm-tiny")) as address:
        yield address + "/v1"


@pytest.fixture
def tiny(tiny_address):
    """OpenAI's client at a server with the embedded model."""
    return OpenAI(base_url=tiny_address, api_key="any", max_retries=0, timeout=PATIENCE)


def user(text):
    return {"role": "user", "content": text}


def ask(client, text="你好", model="chatglm", **options):
    return client.chat.completions.create(model=model, messages=[user(text)], **options)


def post(web, text="你好", **fields):
    return web.post("/v1/chat/completions", json={"model": "chatglm", "messages": [user(text)], **fields})


def wait_for_text(stream):
    """Reads until the model has begun to answer; the first chunk comes before."""
    next(chunk for chunk in stream if chunk.choices[0].delta.content)


def chunks_of(response):
    """The JSON of a raw stream, which must be well formed and end with [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    data = [event for event in response.text.split("\n\n") if not event.startswith(":")]
    assert data[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in data[:-2]]


# OpenAI's client ------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("chatglm", "model", "chatglm")
    assert client.models.retrieve("chatglm") == model


def test_name_of_a_model_may_have_a_slash_as_on_the_hub(engine):
    with serving_app(openai_api.create_app(engine, "THUDM/chatglm-6b")) as address:
        client = OpenAI(base_url=address + "/v1", api_key="any", max_retries=0, timeout=PATIENCE)
        assert client.models.retrieve("THUDM/chatglm-6b").id == "THUDM/chatglm-6b"


def test_unknown_model_is_404_with_the_name_that_would_do(client):
    for call in (lambda: client.models.retrieve("gpt-5"), lambda: ask(client, model="gpt-5")):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "model_not_found" and error.value.param == "model"
        assert error.value.body["message"] == 'there is no model "gpt-5" here, only "chatglm"'


def test_greedy_answer_has_usage_and_finish_reason(tiny, tokenizer):
    completion = ask(tiny, model="chatglm-tiny", temperature=0)
    assert completion.object == "chat.completion" and completion.id.startswith("chatcmpl-")
    assert completion.model == "chatglm-tiny"
    (choice,) = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", GREETING, None)
    usage = completion.usage
    assert usage.prompt_tokens == len(tokenizer("你好")["input_ids"])
    assert usage.completion_tokens == len(tokenizer(GREETING)["input_ids"]) - 2 + 1  # no [gMASK], <sop>; an <eop>
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_stream_gives_the_same_answer_in_pieces(tiny):
    whole = ask(tiny, model="chatglm-tiny", temperature=0)
    stream = list(ask(tiny, model="chatglm-tiny", temperature=0, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, numbers = stream
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert len(middle) > 5 and {chunk.choices[0].delta.role for chunk in middle} == {None}
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == GREETING
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert {chunk.choices[0].finish_reason for chunk in (first, *middle)} == {None}
    assert (numbers.choices, numbers.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in (first, *middle, last)} == {None}
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in stream}) == 1
    assert first.object == "chat.completion.chunk"


def test_async_client_whole_and_streamed_at_once(tiny_address):
    async def talk():
        async with AsyncOpenAI(base_url=tiny_address, api_key="any", timeout=PATIENCE) as client:
            whole, stream = await asyncio.gather(
                ask(client, model="chatglm-tiny", temperature=0),
                ask(client, model="chatglm-tiny", temperature=0, stream=True),
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(talk()) == (GREETING, GREETING)


def test_stop_seed_and_limits_reach_the_model(tiny):
    def answer(**options):
        completion = ask(tiny, model="chatglm-tiny", **options)
        return completion.choices[0].message.content, completion.choices[0].finish_reason, completion.usage

    assert answer(temperature=0, stop="，一个")[:2] == ("你好！我是 ChatGLM-Tiny", "stop")
    assert answer(temperature=0, stop=["没有", "Tiny", "！"])[:2] == ("你好", "stop")
    for limit in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": 9, "max_completion_tokens": 4}):
        text, reason, usage = answer(temperature=0, **limit)
        assert GREETING.startswith(text) and reason == "length" and usage.completion_tokens == 4
    one, two = (answer(temperature=1.5, top_p=1, seed=seed)[0] for seed in (1, 2))
    assert one != two and answer(temperature=1.5, top_p=1, seed=1)[0] == one


def test_several_answers_have_seeds_of_their_own_and_one_prompt(tiny):
    options = {"temperature": 1.5, "top_p": 1, "max_tokens": 12}
    both = ask(tiny, model="chatglm-tiny", n=2, seed=5, **options)
    alone = [ask(tiny, model="chatglm-tiny", seed=seed, **options) for seed in (5, 6)]
    assert [choice.index for choice in both.choices] == [0, 1]
    texts = [choice.message.content for choice in both.choices]
    assert texts == [completion.choices[0].message.content for completion in alone] and texts[0] != texts[1]
    assert both.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert both.usage.completion_tokens == sum(completion.usage.completion_tokens for completion in alone)

    streamed = {0: "", 1: ""}
    for chunk in ask(tiny, model="chatglm-tiny", n=2, seed=5, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_conversation_too_long_for_the_model_is_context_length_exceeded(tiny):
    with pytest.raises(openai.BadRequestError) as error:
        ask(tiny, "长" * 5000, model="chatglm-tiny")
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    assert error.value.body["message"].startswith(
        "the prompt is too long: the query has 5003 tokens and max_length is 2048"
    )


def test_dropped_rounds_are_told_and_the_system_message_stays(model, tokenizer):
    messages = [{"role": role, "content": "很长的一轮" * 9} for _ in range(5) for role in ("user", "assistant")]
    call = {"messages": [{"role": "system", "content": "要简短。"}, *messages, user("你好")], "max_tokens": 1}
    jobs = []
    with Engine(model, tokenizer) as engine:
        engine.add_listener(jobs.append)
        web = TestClient(openai_api.create_app(engine, "chatglm", max_length=200))
        (note,) = post(web, **call).json()["notes"]
        assert re.search(r"dropped the oldest \d of 6 rounds", note)
        first, *others = chunks_of(post(web, **call, stream=True))
        assert first["notes"] == [note] and not any("notes" in chunk for chunk in others)
        assert "notes" not in post(web, max_tokens=1).json()
    for job in jobs[:2]:
        assert 1 < len(job.request.history) < 6 and job.request.history[0] == ("要简短。", "明白了。")


def test_stream_closed_early_frees_the_model(client, fake, engine):
    stream = ask(client, "无尽", stream=True)
    wait_for_text(stream)
    stream.close()
    assert fake.stopped.wait(PATIENCE)
    assert ask(client).choices[0].message.content == "收到【你好】"
    assert engine.stats.requests == {"cancelled": 1, "stop": 1}


def test_async_stream_broken_off_by_a_cancelled_task_frees_the_model(client, fake):
    async def talk():
        async with AsyncOpenAI(base_url=client.base_url, api_key="any", timeout=PATIENCE) as other:
            growing = asyncio.Event()

            async def read():
                async for chunk in await ask(other, "无尽", stream=True):
                    if chunk.choices[0].delta.content:  # the first chunk comes before the model has begun
                        growing.set()

            task = asyncio.create_task(read())
            await growing.wait()
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(talk())
    assert fake.stopped.wait(PATIENCE)


def test_client_that_leaves_a_whole_answer_frees_the_model(client, fake, engine, caplog):
    body = json.dumps({"model": "chatglm", "messages": [user("无尽")], "n": 2})  # one is being answered, one waits
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
        assert fake.started.wait(PATIENCE)
    assert fake.stopped.wait(PATIENCE)
    assert ask(client).choices[0].message.content == "收到【你好】"
    assert engine.stats.requests == {"cancelled": 2, "stop": 1}
    assert "Traceback" not in caplog.text


def test_failure_in_a_stream_is_an_error_event(client, web):
    pieces = []
    with pytest.raises(openai.APIError) as error:
        for chunk in ask(client, "出错", stream=True):
            pieces.append(chunk.choices[0].delta.content)
    assert "".join(pieces) == "收到【" and "RuntimeError" in error.value.message
    assert error.value.type == "server_error"
    assert ask(client).choices[0].message.content == "收到【你好】"

    body = post(web, "出错", stream=True).text
    assert '\n\nevent: error\ndata: {"error":{' in body and "[DONE]" not in body and "own words" not in body


def test_failure_of_a_whole_answer_is_500(client):
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, "出错")
    assert error.value.status_code == 500 and error.value.type == "server_error"
    assert "own words" not in error.value.message


def test_full_queue_is_429_and_its_jobs_are_not_kept(client, engine):
    with ask(client, "无尽", stream=True) as stream:
        wait_for_text(stream)
        with pytest.raises(openai.RateLimitError) as error:
            ask(client, n=2)  # one may wait, two may not
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert error.value.code == "rate_limit_exceeded"
        with ask(client, stream=True) as waiting:  # the place of the first of the two is free again
            next(waiting)
            assert engine.queue_length == 1


def test_closing_server_is_503(client, engine):
    engine.close()
    with pytest.raises(openai.InternalServerError) as error:
        ask(client)
    assert error.value.status_code == 503 and "shutting down" in error.value.message


def test_key(engine):
    with serving_app(openai_api.create_app(engine, "chatglm", api_key="secret")) as address:
        for key in ("wrong", "geheim"):
            client = OpenAI(base_url=address + "/v1", api_key=key, max_retries=0)
            for call in (client.models.list, partial(ask, client)):
                with pytest.raises(openai.AuthenticationError) as error:
                    call()
                assert (error.value.code, error.value.type) == ("invalid_api_key", "invalid_request_error")
        client = OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0)
        assert ask(client).choices[0].message.content == "收到【你好】"
        assert httpx.get(address + "/health").status_code == 200


# LangChain ------------------------------------------------------------------------------------------------------------


def test_langchain_invokes_streams_and_awaits(tiny_address):
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=tiny_address, api_key="any", model="chatglm-tiny", temperature=0, max_retries=0)
    reply = chat.invoke("你好")
    assert reply.content == GREETING and reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata["output_tokens"] > 10
    pieces = list(chat.stream("你好"))
    assert "".join(piece.content for piece in pieces) == GREETING and len(pieces) > 5
    assert asyncio.run(chat.ainvoke("你好")).content == GREETING

    messages = [("system", "回答要简短。"), ("human", "我叫小林"), ("ai", "你好，小林！"), ("human", "我叫什么名字？")]
    assert "小林" in chat.invoke(messages).content
    with pytest.raises(ContextOverflowError, match="max_length is 2048"):
        chat.invoke("长" * 5000)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("你好")


# Messages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "query", "history"),
    [
        ("u", "0", []),
        ("uau", "2", [("0", "1")]),
        ("uauau", "4", [("0", "1"), ("2", "3")]),
        ("su", "1", [("0", "明白了。")]),
        ("duau", "3", [("0", "明白了。"), ("1", "2")]),
        ("sduasu", "5", [("0\n1\n4", "明白了。"), ("2", "3")]),  # wherever they stand
        ("uuaau", "4", [("0\n1", "2\n3")]),
        ("au", "1", [("", "0")]),
        ("sau", "2", [("0", "明白了。"), ("", "1")]),
        ("usu", "0\n2", [("1", "明白了。")]),
        ("eu", "1", []),  # an empty instruction is none
    ],
)
def test_messages_become_question_and_history(web, fake, roles, query, history):
    names = {"u": "user", "a": "assistant", "s": "system", "d": "developer", "e": "system"}
    texts = ["" if role == "e" else str(place) for place, role in enumerate(roles)]
    messages = [{"role": names[role], "content": text} for role, text in zip(roles, texts, strict=True)]
    assert post(web, messages=messages).status_code == 200
    assert fake.calls[0][:2] == (query, history)


@pytest.mark.parametrize("roles", ["a", "ua", "s", "usa"])
def test_last_message_must_be_the_users(web, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    response = post(web, messages=[{"role": names[role], "content": "x"} for role in roles])
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "the last of messages must have the role user: it is what the model answers",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }


def test_parts_of_text_are_joined_and_what_clients_send_back_is_accepted(web, fake):
    answer = {"role": "assistant", "content": "二", "refusal": None, "tool_calls": None, "audio": None, "name": "x"}
    parts = [{"type": "text", "text": "三"}, {"type": "text", "text": "四"}]
    messages = [user("一"), {**answer, "function_call": None, "annotations": []}, {"role": "user", "content": parts}]
    assert post(web, messages=messages).status_code == 200
    assert fake.calls[0][:2] == ("三四", [("一", "二")])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            'messages[0].content[0].type must be "text", got "image_url": this model reads no images, sound or files',
        ),
        ({"role": "user", "content": None}, "messages[0].content must be a string or a list of text parts, got null"),
        ({"role": "user", "content": 5}, "messages[0].content must be a string or a list of text parts, got 5"),
        ({"role": "user"}, "messages[0].content is missing"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text is missing"),
        (
            {"role": "tool", "content": "5", "tool_call_id": "1"},
            "messages[0].role must be 'system', 'developer', 'user' or 'assistant', got \"tool\"",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls is not supported by this model: leave it out",
        ),
        ("你好", 'messages[0] must be an object, got "你好"'),
    ],
)
def test_messages_that_cannot_be_read_are_refused_in_a_sentence(web, message, sentence):
    response = post(web, messages=[message])
    assert response.status_code == 400
    assert response.json()["error"]["message"] == sentence
    assert sentence.startswith(response.json()["error"]["param"])


@pytest.mark.parametrize("messages", [[1] * 5, [user([{"type": "x"}] * 5)]])
def test_list_of_many_wrong_items_costs_one_sentence(messages):
    with pytest.raises(ValidationError) as caught:
        openai_api.CompletionRequest.model_validate({"model": "chatglm", "messages": messages})
    assert caught.value.error_count() == 1 + (messages[0] != 1)  # text is missing, too


# Fields ---------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_server_and_null_means_default(fake, engine):
    app = openai_api.create_app(
        engine, "chatglm", max_length=100, max_new_tokens=20, top_p=0.5, temperature=0.4, seed=7
    )
    web = TestClient(app)
    nothing = dict.fromkeys(
        "stream stream_options max_tokens max_completion_tokens temperature top_p seed n stop tools".split()
    )
    for fields in ({}, nothing):
        assert post(web, **fields).status_code == 200
    post(web, max_tokens=30, top_p=0, temperature=0, seed=0, stop=["a", "b"])
    post(web, max_tokens=10**30)  # a limit beyond max_length is none
    expected = {"max_length": 100, "max_new_tokens": 20, "top_p": 0.5, "temperature": 0.4, "seed": 7}
    got = [{name: options[name] for name in expected} for _, _, options in fake.calls]
    changed = {"max_length": 100, "max_new_tokens": 30, "top_p": 0, "temperature": 0, "seed": 0}
    assert got == [expected, expected, changed, expected]
    assert [tuple(options["stop"]) for _, _, options in fake.calls] == [(), (), ("a", "b"), ()]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"logprobs": True},
        {"top_logprobs": 3},
        {"logit_bias": {"50": 1}},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"reasoning_effort": "high"},
        {"web_search_options": {}},
    ],
)
def test_fields_that_would_change_the_answer_are_refused(web, fake, fields):
    (name,) = fields
    response = post(web, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert response.json()["error"]["message"] == f"{name} is not supported by this model: leave it out"
    assert fake.calls == []


def test_fields_without_effect_are_ignored(web):
    harmless = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "modalities": ["text"], "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "frequency_penalty": 0.0,
        "presence_penalty": 0, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "prediction": {"type": "content", "content": "x"}, "safety_identifier": "s", "reasoning_effort": "none",
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }  # fmt: skip
    assert post(web, **harmless).json()["choices"][0]["message"]["content"] == "收到【你好】"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.1}, "temperature", ["2.1", "2"]),
        ({"temperature": "1"}, "temperature", ['"1"', "number"]),
        ({"top_p": -0.1}, "top_p", ["-0.1", "0"]),
        ({"max_tokens": 0}, "max_tokens", ["0", "1"]),
        ({"max_tokens": 1.5}, "max_tokens", ["1.5", "whole number"]),
        ({"n": 9}, "n", ["9", "8"]),
        ({"n": True}, "n", ["true", "whole number"]),
        ({"seed": 2**63}, "seed", [str(2**63)]),
        ({"stop": ["a"] * 5}, "stop", ["at most 4", "5"]),
        ({"stop": ""}, "stop[0]", ["empty"]),
        ({"stop": 5}, "stop", ["5", "a string or a list of strings"]),
        ({"stream": "yes"}, "stream", ['"yes"']),
        ({"messages": []}, "messages", ["empty"]),
        ({"messages": "你好"}, "messages", ["list", "你好"]),
        ({"model": None}, "model", ["null"]),
        ({"top_k": 5}, "top_k", ["top_k"]),
        ({"temperature": float("inf")}, "temperature", ["Infinity", "finite"]),
        ({"messages": [user("\ud800")]}, "messages[0].content[0].text", ["surrogate"]),
        ({"messages": [user([{"type": "\ud800"}])]}, "messages[0].content[0].type", ["\\ud800", '"text"']),
        ({"tools": ["\ud800"]}, "tools", ["not supported"]),
        ({"user": "\ud800", "n": 0}, "n", ["0"]),
    ],
)
def test_wrong_values_are_400_naming_field_value_and_what_would_do(web, fields, param, words):
    body = json.dumps({"model": "chatglm", "messages": [user("你好")], **fields})
    response = web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, None)
    assert error["message"].startswith(param) and all(word in error["message"] for word in words)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b'{"model": "chatglm", "n": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/v1/chat/completions", b'{"model": "chatglm", "messages": [], "temperature": NaN}', 400),
        ("POST", "/v1/chat/completions", b" " * (2**20 + 1), 413),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/completions", b"{}", 404),
    ],
)
def test_all_errors_have_openais_shape(web, method, path, body, status):
    response = web.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]


# Streams --------------------------------------------------------------------------------------------------------------


def test_stream_never_takes_text_back(web):
    chunks = chunks_of(post(web, "逗号", stream=True))
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert "".join(piece or "" for piece in pieces) == "好，你好? yes"
    assert "usage" not in chunks[0] and chunks[-1]["choices"][0]["delta"] == {}


def test_ends_of_lines_in_an_answer_do_not_end_an_event(client, web):
    text = "\u2028a\x85b\r\nc\u2029\x0cd"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, text, stream=True)]
    assert "".join(pieces) == f"收到【{text}】"
    assert all(line == "" or line.startswith("data: ") for line in post(web, text, stream=True).text.splitlines())


def test_stream_of_several_answers_has_a_beginning_and_an_end_of_each(web):
    chunks = chunks_of(post(web, stream=True, n=2, stream_options={"include_usage": True}))
    for index in (0, 1):
        choices = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "收到【你好】"
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"].keys() == {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
    }


def test_waiting_stream_tells_its_place_and_gives_signs_of_life(client, engine, monkeypatch):
    monkeypatch.setattr(openai_api, "KEEPALIVE_SECONDS", 0.05)
    body = {"model": "chatglm", "messages": [user("你好")], "stream": True}
    with ask(client, "无尽", stream=True) as busy:
        wait_for_text(busy)
        with httpx.stream("POST", f"{client.base_url}chat/completions", json=body, timeout=PATIENCE) as waiting:
            lines = waiting.iter_lines()
            before = list(itertools.takewhile(lambda line: line != ": ping", lines))
            assert ": position 1 in the queue" in before
            busy.close()
            assert "data: [DONE]" in lines


# The documentation and the program ------------------------------------------------------------------------------------


def test_documentation_shows_both_forms_of_an_answer(web):
    document = web.get("/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert {"400", "404", "413", "429", "500", "503"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    content = document["components"]["schemas"]["Message"]["properties"]["content"]
    assert [form["type"] for form in content["anyOf"]] == ["string", "array"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "method", "mode", "expected"),
    [
        ("/v1/models/{model}", "get", "positive", {404}),
        ("/v1/chat/completions", "post", "positive", {200, 400}),
        ("/v1/chat/completions", "post", "negative", {400}),
    ],
)
def test_fuzzing_finds_no_500_and_nothing_that_is_not_documented(engine, path, method, mode, expected):
    schema = schemathesis.openapi.from_asgi("/openapi.json", openai_api.create_app(engine, "chatglm"))
    checks = [
        schemathesis.checks.not_a_server_error,
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_schema_conformance,
    ]
    statuses = set()

    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(case=schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def fuzz(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "chatglm"  # else all of them end at the name
        statuses.add(case.call_and_validate(checks=checks).status_code)

    fuzz()
    assert statuses >= expected


def test_help_names_every_flag_and_needs_no_torch():
    code = """
import sys, openai_api
try:
    openai_api.main(["--help"])
finally:
    sys.exit("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    for flag in ("--model_name ", "--port", "--api_key", "--max_length", "--temperature", "--quantization_bit"):
        assert flag in shown


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM has no handler there")
def test_program_serves_the_embedded_model_until_sigterm():
    command = [sys.executable, ROOT / "openai_api.py", "--port", "0", "--device", "cpu", "--temperature", "0"]
    with subprocess.Popen(
        [*command, "--model_name", "gpt-4o"], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUTF8": "1"}
    ) as program:
        try:
            address = next(match[0] for line in program.stderr if (match := re.search(r"http://[\d.]+:\d+", line)))
            client = OpenAI(base_url=address + "/v1", api_key="any", max_retries=0, timeout=PATIENCE)
            assert [model.id for model in client.models.list()] == ["gpt-4o"]
            assert ask(client, model="gpt-4o").choices[0].message.content.startswith("你好！我是 ChatGLM-Tiny")
            program.send_signal(signal.SIGTERM)
            assert program.wait(PATIENCE) == 0
        finally:
            program.kill()
