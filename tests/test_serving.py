"""What the HTTP scripts share: flags, sentences for wrong requests, and the application around a router."""

import argparse
import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

pytest.importorskip("fastapi")
import uvicorn
from fastapi import APIRouter, Request
from fastapi.testclient import TestClient

import serving
from chatglm.engine import Engine
from chatglm.engine import Request as EngineRequest

ROOT = Path(__file__).resolve().parents[1]


class EchoModel:
    """Answers with the question, a character per step."""

    def stream_chat(self, tokenizer, query, history, **options):
        for end in range(1, len(query) + 1):
            yield query[:end], [*history, (query, query[:end])]


def be_even(value):
    if value is not None:
        raise ValueError(f"must be even, got {serving.describe_value(value)}")


class Question(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: serving.Text
    seed: int | None = None
    odd: Annotated[None, BeforeValidator(be_even)] = None


@pytest.fixture
def engine():
    with Engine(EchoModel(), None) as engine:
        yield engine


def client_of(engine, **options):
    router = APIRouter()

    @router.post("/echo", responses=serving.error_responses(options.get("error_model", serving.Error)))
    async def echo(request: Request, question: Question) -> str:
        state = await serving.answer(request, engine, EngineRequest(question.prompt, seed=question.seed))
        return state.text

    @router.get("/bug")
    async def bug():
        raise KeyError("secret")

    app = serving.create_app(engine, router, title="Echo", description="Repeats.", **options)
    return TestClient(app, raise_server_exceptions=False)


# Flags ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.delenv("CHATGLM_API_KEY", raising=False)

    def build():
        parser = argparse.ArgumentParser(prog="server")
        serving.add_server_arguments(parser, port=8000)
        serving.add_api_arguments(parser)
        return parser

    return build


def test_without_flags_only_this_machine_may_ask_and_logs_hold_no_text(parser):
    args = parser().parse_args([])
    assert (args.host, args.port, args.max_queue) == ("127.0.0.1", 8000, 64)
    assert serving.app_options(args) == {"api_key": None, "cors": [], "log_text": False}


def test_flags_of_a_server(parser):
    args = parser().parse_args(
        "--host ::1 --port 0 --max_queue 0 --api_key k-1 --cors http://a.org http://b.org --log_text".split()
    )
    assert (args.host, args.port, args.max_queue) == ("::1", 0, 0)
    options = {"api_key": "k-1", "cors": ["http://a.org", "http://b.org"], "log_text": True}
    assert serving.app_options(args) == options


def test_key_from_the_environment_is_not_shown_in_help(parser, monkeypatch, capsys):
    monkeypatch.setenv("CHATGLM_API_KEY", "from-env")
    assert parser().parse_args([]).api_key == "from-env"
    assert parser().parse_args(["--api_key", "k"]).api_key == "k"
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert "from-env" not in capsys.readouterr().out
    monkeypatch.setenv("CHATGLM_API_KEY", "")
    assert parser().parse_args([]).api_key is None
    monkeypatch.setenv("CHATGLM_API_KEY", "schlüssel")
    with pytest.raises(SystemExit):
        parser().parse_args([])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "65536"], "argument --port: must be a whole number from 0 to 65535, got 65536"),
        (["--port", "x"], "argument --port: must be a whole number from 0 to 65535, got x"),
        (["--max_queue", "-1"], "argument --max_queue: must be a whole number from 0 to 1000000, got -1"),
        (["--cors", "a.org"], "argument --cors: must be * or an origin such as https://example.org, got a.org"),
        (["--cors", "http://a/"], "argument --cors: must be * or an origin such as https://example.org, got http://a/"),
        (
            ["--cors", "http://*.org"],
            "argument --cors: must be * or an origin such as https://example.org, got http://*.org",
        ),
        (["--api_key", ""], "argument --api_key: must be ASCII letters, digits and signs, without spaces"),
        (["--api_key", "two words"], "argument --api_key: must be ASCII letters, digits and signs, without spaces"),
    ],
)
def test_wrong_flag_is_one_line(parser, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"server: error: {sentence}"


def test_taken_port_is_said_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: .*; choose another --host or"):
            serving.bind(argparse.Namespace(host="127.0.0.1", port=port))


def test_address_of_another_machine_is_one_sentence():
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1 port 0: .*; choose another --host or --port"):
        serving.bind(argparse.Namespace(host="192.0.2.1", port=0))


def test_import_needs_no_torch():
    code = "import serving, sys; print('torch' in sys.modules, 'chatglm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# Sentences ------------------------------------------------------------------------------------------------------------


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "system"]


class Fields(Question):
    count: Annotated[int, Field(ge=1, le=2**31 - 1), serving.WHOLE] = 1
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    flag: bool = False
    words: Annotated[list[Annotated[serving.Text, Field(min_length=1)]], Field(min_length=1, max_length=2)] = ["x"]
    items: list[Inner] = []


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"prompt": 1}, "prompt", "prompt must be a string, got 1"),
        ({"prompt": None}, "prompt", "prompt must be a string, got null"),
        ({"prompt": ["x"]}, "prompt", "prompt must be a string, got a list"),
        ({}, "prompt", "prompt is missing"),
        ({"prompt": "\ud800"}, "prompt", "prompt must be valid Unicode, got a lone surrogate at index 0"),
        ({"count": 0}, "count", "count must be at least 1, got 0"),
        ({"count": 2**31}, "count", "count must be at most 2147483647, got 2147483648"),
        ({"count": 2.5}, "count", "count must be a whole number, got 2.5"),
        ({"count": True}, "count", "count must be a whole number, got true"),
        ({"count": "9" * 99}, "count", f'count must be a whole number, got "{"9" * 36}...'),
        ({"count": float("nan")}, "count", "count must be a whole number, got NaN"),
        ({"share": 1.5}, "share", "share must be at most 1, got 1.5"),
        ({"share": float("nan")}, "share", "share must be at most 1, got NaN"),
        ({"share": float("-inf")}, "share", "share must be at least 0, got -Infinity"),
        ({"share": False}, "share", "share must be a number, got false"),
        ({"share": 10**400}, "share", f"share must be a number, got 1{'0' * 36}..."),
        ({"flag": 1}, "flag", "flag must be true or false, got 1"),
        ({"words": "ab"}, "words", 'words must be a list, got "ab"'),
        ({"words": {}}, "words", "words must be a list, got an object"),
        ({"words": []}, "words", "words must not be empty"),
        ({"words": ["a"] * 3}, "words", "words must have at most 2 items, got 3"),
        ({"words": ["a", ""]}, "words[1]", "words[1] must not be empty"),
        ({"words": ["a", "b\udfff"]}, "words[1]", "words[1] must be valid Unicode, got a lone surrogate at index 1"),
        ({"items": [{}]}, "items[0].role", "items[0].role is missing"),
        ({"items": [{"role": "cat"}]}, "items[0].role", "items[0].role must be 'user' or 'system', got \"cat\""),
        ({"items": [{"role": "user", "a": 1}]}, "items[0].a", "items[0].a is no field of this request"),
        ({"items": [3]}, "items[0]", "items[0] must be an object, got 3"),
    ],
)
def test_wrong_field_is_named_with_what_came_and_what_is_allowed(fields, field, sentence):
    fields = fields if "prompt" in fields or not fields else {"prompt": "x", **fields}
    with pytest.raises(ValidationError) as caught:
        Fields.model_validate(json.loads(json.dumps(fields)))
    assert serving.describe(caught.value.errors()[0]) == (field, sentence)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is missing"),
        (b"{", "the body must be JSON: Expecting property name enclosed in double quotes at character 1"),
        (b"[]", "the body must be an object, got a list"),
        (b"null", "the body must be an object, got null"),
        (b'{"prompt": "\xff"}', "the body must be JSON in UTF-8, got something else at byte 12"),
        (b"[" * 100_000, "the body must be JSON that is nested less deeply"),
        (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "prompt must be a string, got a list"),
        (
            b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
            "the body must be JSON with numbers of at most 4300 digits",
        ),
        (b"x" * (2**20 + 1), "the body must have at most 1048576 bytes, got more"),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', "the body must have at most 1048576 bytes, got more"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[:12].decode("latin-1"),
)
def test_unreadable_body_is_422_with_one_sentence(engine, body, sentence):
    response = client_of(engine).post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (422, {"detail": sentence})


def test_body_of_another_type_is_told_which_to_send(engine):
    response = client_of(engine).post("/echo", data={"prompt": "x"})
    sentence = "the body must be JSON, sent with the header Content-Type: application/json"
    assert (response.status_code, response.json()) == (422, {"detail": sentence})


def test_body_of_just_the_limit_is_read(engine):
    body = json.dumps({"prompt": "x"}).ljust(serving.MAX_BODY)
    response = client_of(engine).post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (200, "x")


def send_in_pieces(engine, *messages):
    """What the application sends to a client of which messages come, and then nothing."""
    coming, sent = list(messages), []

    async def receive():
        return coming.pop(0) if coming else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/echo",
        "raw_path": b"/echo", "query_string": b"", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    asyncio.run(client_of(engine).app(scope, receive, send))
    return sent


def test_body_that_does_not_arrive_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.01)
    start, body = send_in_pieces(engine, {"type": "http.request", "body": b"{", "more_body": True})
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"]) == {"detail": "the body must be here within 0.01 s"}


def test_client_that_leaves_within_its_body_is_no_wrong_request(engine, caplog):
    caplog.set_level(logging.INFO, "serving")
    send_in_pieces(engine, {"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"})
    (line,) = request_lines(caplog)
    assert " POST /echo 499 " in line


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: "], ids=["nothing", "half a head"])
def test_connection_that_brings_no_request_is_closed(engine, monkeypatch, sent):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.05)
    server = uvicorn.Server(serving.server_config(client_of(engine).app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(1) == b""
        finally:
            server.should_exit = True
            thread.join()


def test_unknown_path_points_to_the_documentation(engine):
    client = client_of(engine)
    redirected = client.get("/health/", headers={"Host": "other.example"})  # to a host that anybody may name
    assert (redirected.status_code, "location" in redirected.headers) == (404, False)
    assert client.get("/nope").json() == {"detail": "there is no GET /nope; /docs shows what there is"}
    assert client.get("/nope").status_code == 404
    assert client.get("/echo").status_code == 405
    assert client.get("/echo").headers["allow"] == "POST"


def test_whole_numbers_may_have_a_point_as_in_json():
    assert repr(Fields.model_validate({"prompt": "x", "count": 5.0}).count) == "5"


def test_bug_is_a_sentence_without_its_details(engine):
    response = client_of(engine).get("/bug")
    assert (response.status_code, response.json()) == (500, {"detail": "the server failed; its log says more"})


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"prompt": "x", "seed": "\\ud800"}', 'seed must be a whole number, got "\\ud800"'),
        (b'{"prompt": "x", "odd": "\\ud800"}', 'odd must be even, got "\\ud800"'),
        (b'{"prompt": "x", "\\ud800": 1}', 'the body must be valid Unicode, got "\\ud800"'),
        (b'{"prompt": "x", "' + b"y" * 999 + b'": 1}', "y" * 100 + " is no field of this request"),
    ],
    ids="value validator field long-field".split(),
)
def test_sentence_that_quotes_half_a_surrogate_pair_or_a_long_name_can_be_sent(engine, body, sentence):
    response = client_of(engine).post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (422, {"detail": sentence})


def test_script_may_shape_its_errors(engine):
    class Shaped(BaseModel):
        STATUS: ClassVar = {422: 400, 413: 400}
        error: dict

        @classmethod
        def make(cls, status, message, field, code):
            return cls(error={"code": status, "message": message, "param": field})

    client = client_of(engine, error_model=Shaped, api_key="k")
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    response = client.post("/echo", json={"prompt": 1}, headers=headers)
    error = {"code": 400, "message": "prompt must be a string, got 1", "param": "prompt"}
    assert (response.status_code, response.json()) == (400, {"error": error})
    assert client.post("/echo", json={"prompt": "x"}).json()["error"]["code"] == 401
    assert client.get("/nope").json()["error"]["code"] == 404
    assert client.post("/echo", content="x" * 2**21, headers=headers).json()["error"]["code"] == 400
    documented = client.get("/openapi.json").json()["paths"]["/echo"]["post"]["responses"]
    assert {"400", "401", "429", "500", "503"} <= set(documented)
    assert "Retry-After" in documented["429"]["headers"]


# Keys, origins, logs, metrics -----------------------------------------------------------------------------------------


def test_key_is_asked_for_except_for_health_and_documentation(engine):
    client = client_of(engine, api_key="k-1")
    for headers, sentence in [
        ({}, "the key is missing: send the header `Authorization: Bearer KEY`"),
        ({"Authorization": "Bearer"}, "the key is missing: send the header `Authorization: Bearer KEY`"),
        ({"Authorization": "Bearer k-2"}, "the key is wrong: send the header `Authorization: Bearer KEY`"),
        ({"Authorization": "Basic k-1"}, "the key is missing: send the header `Authorization: Bearer KEY`"),
        ({"Authorization": "Bearer schl\xfcssel".encode("latin-1")}, None),
    ]:
        for response in (client.post("/echo", json={"prompt": "x"}, headers=headers),
                         client.get("/metrics", headers=headers)):  # fmt: skip
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert sentence is None or response.json() == {"detail": sentence}
    right = {"Authorization": "bearer k-1"}  # the scheme's name may be written small
    assert client.post("/echo", json={"prompt": "x"}, headers=right).json() == "x"
    assert client.get("/metrics", headers=right).status_code == 200
    for path in ("/health", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_only_pages_of_given_origins_may_ask(engine):
    client = client_of(engine, cors=["https://page.example"], api_key="k")
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = client.options("/echo", headers={"Origin": "https://page.example", **asking})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    other = client.options("/echo", headers={"Origin": "https://other.example", **asking})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    # An error must be readable for the page as well.
    refused = client.post("/echo", json={}, headers={"Origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_without_cors_no_page_may_read_an_answer(engine):
    response = client_of(engine).post("/echo", json={"prompt": "x"}, headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers


def request_lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "serving"]


def test_log_has_one_line_per_request_without_text(engine, caplog):
    caplog.set_level(logging.INFO, "serving")
    client = client_of(engine)
    client.post("/echo", json={"prompt": "geheim"})
    client.post("/echo?word=geheim", json={"prompt": "x", "seed": "geheim"})
    client.get("/health")
    client.get("/a%0d%0aforged%20" + "c" * 200)
    client.request("M" * 2000, "/health")
    lines = request_lines(caplog)
    assert len(lines) == 4  # that /health and /metrics answered is no news
    assert lines[0].startswith("testclient POST /echo 200 0.") and lines[0].endswith(" s   0 + 0 tokens stop")
    assert lines[1].startswith("testclient POST /echo 422 0.") and lines[1].endswith(" s")
    assert "geheim" not in "".join(lines)
    assert all(line.isprintable() and len(line) < 140 for line in lines)


def test_log_text_adds_question_and_answer_on_the_same_line(engine, caplog):
    caplog.set_level(logging.INFO, "serving")
    client_of(engine, log_text=True).post("/echo", json={"prompt": "你\n好\x1b[2J"})
    (line,) = request_lines(caplog)
    assert line.endswith(r" stop   '你\n好\x1b[2J' -> '你\n好\x1b[2J'") and line.isprintable()


def test_metrics_count_requests_tokens_and_seconds(engine):
    client = client_of(engine)
    client.post("/echo", json={"prompt": "x"})
    client.post("/echo", json={"prompt": 1})
    client.get("/made/up/1")
    client.get("/made/up/2")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = set(response.text.splitlines())
    assert {
        "chatglm_running 0.0",
        "chatglm_queue_length 0.0",
        'chatglm_answers_total{finish_reason="stop"} 1.0',
        "chatglm_prompt_tokens_total 0.0",
        "chatglm_completion_tokens_total 0.0",
        'chatglm_http_requests_total{path="/echo",status="200"} 1.0',
        'chatglm_http_requests_total{path="/echo",status="422"} 1.0',
        'chatglm_http_requests_total{path="other",status="404"} 2.0',
        'chatglm_http_request_seconds_count{path="/echo"} 2.0',
        'chatglm_http_request_seconds_bucket{le="+Inf",path="/echo"} 2.0',
    } <= lines
    assert any(line.startswith("chatglm_model_seconds_total ") for line in lines)


def test_two_applications_count_apart(engine):
    client_of(engine).get("/nope")
    assert 'status="404"' not in client_of(engine).get("/metrics").text


def test_documentation_page_needs_no_other_server(engine):
    client = client_of(engine)
    page = client.get("/docs").text
    assert "https://" not in page
    assert client.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    assert client.get("/redoc").status_code == 404
