"""`api.py` through its front doors: the application with a model under control, and the real program."""

import contextlib
import json
import logging
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
import httpx
import uvicorn
from fastapi.testclient import TestClient
from pydantic import ValidationError

import api
import serving
from chatglm.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds; machines that run tests are busy

not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


class FakeModel:
    """Answers with the question; to "hold ..." it goes on until `release` is set, to "crash" it fails."""

    def __init__(self):
        self.release = threading.Event()
        self.asked = queue.Queue()  # (query, history, options) of each question as its answer begins

    def stream_chat(self, tokenizer, query, history, **options):
        self.asked.put((query, history, options))
        if query == "crash":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        yield query[:1], history
        while query.startswith("hold") and not self.release.wait(0.005):
            yield query[:1], history
        yield f"收到【{query}】", history


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def engine(model):
    with Engine(model, None, max_queue=1) as engine:
        yield engine


@pytest.fixture
def client(engine):
    return TestClient(api.create_app(engine), raise_server_exceptions=False)


# The contract ---------------------------------------------------------------------------------------------------------


def test_answer_has_response_history_status_and_time(client):
    before = datetime.now().replace(microsecond=0)
    response = client.post("/", json={"prompt": "你好", "history": [["一", "二"]]})
    answer = response.json()
    moment = datetime.strptime(answer.pop("time"), "%Y-%m-%d %H:%M:%S")
    assert before <= moment <= datetime.now()
    history = [["一", "二"], ["你好", "收到【你好】"]]
    assert (response.status_code, answer) == (200, {"response": "收到【你好】", "history": history, "status": 200})


@pytest.mark.parametrize(
    "fields", [{}, dict.fromkeys("history max_length top_p temperature max_new_tokens seed stop".split())]
)
def test_fields_absent_or_null_get_the_defaults(client, model, fields):
    assert client.post("/", json={"prompt": "x", **fields}).json()["history"] == [["x", "收到【x】"]]
    query, history, options = model.asked.get(timeout=PATIENCE)
    names = "max_length top_p temperature max_new_tokens seed stop".split()
    assert (query, history) == ("x", [])
    assert [options[name] for name in names] == [2048, 0.7, 0.95, None, None, ()]


def test_zeros_are_values_and_reach_the_model(client, model):
    fields = {"max_length": 100, "top_p": 0, "temperature": 0, "max_new_tokens": 5, "seed": 0, "stop": "。"}
    assert client.post("/", json={"prompt": "x", "history": [["a", "b"]], **fields}).status_code == 200
    _, history, options = model.asked.get(timeout=PATIENCE)
    assert history == [("a", "b")]
    assert {name: options[name] for name in fields} == {**fields, "stop": ("。",)}


def test_whole_numbers_may_have_a_point_as_in_json(client, model):
    client.post("/", json={"prompt": "x", "max_length": 100.0, "seed": 7.0})
    options = model.asked.get(timeout=PATIENCE)[2]
    assert (repr(options["max_length"]), repr(options["seed"])) == ("100", "7")


def test_several_stop_strings(client, model):
    client.post("/", json={"prompt": "x", "stop": ["。", "\n"]})
    assert model.asked.get(timeout=PATIENCE)[2]["stop"] == ("。", "\n")


def test_fields_it_does_not_know_are_ignored_as_before(client):
    assert client.post("/", json={"prompt": "x", "user": "somebody"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('{"prompt": "x", "temperature": NaN}', "temperature must be at most 100, got NaN"),
        ('{"prompt": "\\ud800"}', "prompt must be valid Unicode, got a lone surrogate at index 0"),
        ('{"prompt": "x", "max_length": -5}', "max_length must be at least 1, got -5"),
        (
            '{"prompt": "x", "history": [["a", "b", "c"]]}',
            "history[0] must be a pair [prompt, response] of strings, got a list of 3",
        ),
        ('{"prompt": "x", "history": ["ab"]}', 'history[0] must be a pair [prompt, response] of strings, got "ab"'),
        (
            '{"prompt": "x", "history": ["\\udfff"]}',
            r'history[0] must be a pair [prompt, response] of strings, got "\udfff"',
        ),
        ('{"prompt": "x", "history": [["a", null]]}', "history[0][1] must be a string, got null"),
        ('{"prompt": "x", "history": "ab"}', 'history must be a list, got "ab"'),
        ('{"prompt": "x", "max_length": "10"}', 'max_length must be a whole number, got "10"'),
        ('{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens must be at least 1, got 0"),
        ('{"prompt": "x", "top_p": 1.01}', "top_p must be at most 1, got 1.01"),
        ('{"prompt": "x", "seed": 9007199254740992}', "seed must be at most 9007199254740991, got 9007199254740992"),
        ('{"prompt": "x", "stop": 3}', "stop must be a string or a list of strings, got 3"),
        ('{"prompt": "x", "stop": ["a", 3]}', "stop[1] must be a string, got 3"),
        ('{"prompt": "x", "stop": ""}', "stop[0] must not be empty"),
        ('{"prompt": "x", "stop": ' + json.dumps(["a"] * 17) + "}", "stop must have at most 16 items, got 17"),
        ("[" * 10_000, "the body must be JSON that is nested less deeply"),
        ('{"prompt": "' + "x" * 10_000_000 + '"}', "the body must have at most 1048576 bytes, got more"),
    ],
    ids=lambda value: value[:45] if value[0] in "{[" else "",
)
def test_wrong_request_is_422_with_one_sentence(client, model, body, sentence):
    response = client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (422, {"detail": sentence})
    assert model.asked.empty()


def test_list_of_many_wrong_items_costs_one_sentence():
    with pytest.raises(ValidationError) as caught:
        api.Question.model_validate({"prompt": "x", "history": [1] * 5})
    assert caught.value.error_count() == 1


def test_model_that_fails_is_500_with_a_sentence_and_the_next_is_answered(client):
    response = client.post("/", json={"prompt": "crash"})
    assert response.status_code == 500
    assert "memory" in response.json()["detail"] and "Traceback" not in response.text
    assert client.post("/", json={"prompt": "x"}).json()["response"] == "收到【x】"


def test_closed_engine_is_503(client, engine):
    engine.close()
    response = client.post("/", json={"prompt": "x"})
    assert (response.status_code, "shutting down" in response.json()["detail"]) == (503, True)


def test_documentation_shows_every_field_example_and_error(engine):
    with_key = TestClient(api.create_app(engine, api_key="k"))
    document = with_key.get("/openapi.json").json()
    ask = document["paths"]["/"]["post"]
    assert set(ask["responses"]) == {"200", "401", "408", "422", "500", "503"}
    for status in ("401", "408", "422", "500", "503"):
        schema = ask["responses"][status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Error"}
    assert "Retry-After" in ask["responses"]["503"]["headers"]
    assert ask["security"] == [{"HTTPBearer": []}] and "security" not in document["paths"]["/health"]["get"]

    question = document["components"]["schemas"]["Question"]
    names = "prompt history max_length top_p temperature seed stop max_new_tokens".split()
    assert question["required"] == ["prompt"] and set(question["properties"]) == set(names)
    assert all(field["description"] for field in question["properties"].values())
    for example in question["examples"]:
        api.Question.model_validate(example)
    for example in document["components"]["schemas"]["Answer"]["examples"]:
        api.Answer.model_validate(example)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert "HTTPValidationError" not in document["components"]["schemas"]  # not the shape of our errors


def test_temperature_zero_is_repeatable_over_http(embedded):
    with Engine(*embedded) as engine:
        client = TestClient(api.create_app(engine))
        question = {"prompt": "介绍一下你自己", "temperature": 0, "max_new_tokens": 16}
        first, second = (client.post("/", json=question).json() for _ in range(2))
        greedy, _ = embedded[0].chat(embedded[1], "介绍一下你自己", do_sample=False, max_new_tokens=16)
    assert first["response"] == second["response"] == greedy != ""


def test_seed_is_repeatable_and_stop_ends_an_answer_over_http(embedded):
    with Engine(*embedded) as engine:
        client = TestClient(api.create_app(engine))
        question = {"prompt": "你好", "temperature": 2, "top_p": 1, "max_new_tokens": 12}
        first, second = (client.post("/", json={**question, "seed": 7}).json()["response"] for _ in range(2))
        assert first == second
        middle = first[len(first) // 2]
        stopped = client.post("/", json={**question, "seed": 7, "stop": middle}).json()["response"]
        assert stopped == first[: first.index(middle)].rstrip()
        too_long = client.post("/", json={"prompt": "你好" * 100, "max_length": 10})
        assert (too_long.status_code, "max_length is 10" in too_long.json()["detail"]) == (422, True)


# Several clients at once ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(app):
    """The address of a server for app in a thread of this process."""
    server = uvicorn.Server(serving.server_config(app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def url(model, engine):
    with serve(api.create_app(engine)) as url:
        yield url
        model.release.set()


class Asker(threading.Thread):
    """A client that asks in a thread of its own; `answer()` waits for the response."""

    def __init__(self, url, prompt):
        super().__init__()
        self.url, self.prompt, self.outcome = url, prompt, None
        self.start()

    def run(self):
        try:
            self.outcome = httpx.post(self.url, json={"prompt": self.prompt}, timeout=PATIENCE)
        except httpx.HTTPError as error:
            self.outcome = error

    def answer(self):
        self.join(PATIENCE)
        return self.outcome


def wait_until(is_reached):
    """Wait until is_reached() is true: for what no event tells of."""
    deadline = time.monotonic() + PATIENCE
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_health_and_metrics_answer_while_the_model_works(url, model):
    first = Asker(url, "hold")
    model.asked.get(timeout=PATIENCE)
    second = Asker(url, "next")
    wait_until(lambda: httpx.get(f"{url}/health").json()["queue_length"] == 1)
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "running": 1, "queue_length": 1}
    metrics = httpx.get(f"{url}/metrics").text
    assert "\nchatglm_running 1.0\n" in metrics and "\nchatglm_queue_length 1.0\n" in metrics
    model.release.set()
    assert first.answer().json()["response"] == "收到【hold】"
    assert second.answer().json()["response"] == "收到【next】"


def test_full_queue_is_503_with_retry_after(url, model, engine):
    first = Asker(url, "hold")
    model.asked.get(timeout=PATIENCE)
    second = Asker(url, "next")
    wait_until(lambda: engine.queue_length == 1)
    refused = httpx.post(url, json={"prompt": "x"})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert re.fullmatch(r"1 requests are waiting and no more may: try again in \d+ s", refused.json()["detail"])
    model.release.set()
    assert [asker.answer().status_code for asker in (first, second)] == [200, 200]


def open_request(url, prompt):
    """A connection on which a question has been sent."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": prompt})
    connection = socket.create_connection((host, int(port)))
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def test_client_that_leaves_frees_its_slot_and_its_place_in_the_queue(url, model, engine, caplog):
    running = open_request(url, "hold 1")
    assert model.asked.get(timeout=PATIENCE)[0] == "hold 1"
    waiting = open_request(url, "hold 2")
    wait_until(lambda: engine.queue_length == 1)
    waiting.close()
    wait_until(lambda: engine.queue_length == 0)
    running.close()
    answered = httpx.post(url, json={"prompt": "next"}, timeout=PATIENCE)  # while nobody has released "hold 1"
    assert answered.json()["response"] == "收到【next】"
    assert engine.stats.requests == {"cancelled": 2, "stop": 1}
    wait_until(lambda: 'chatglm_http_requests_total{path="/",status="499"} 2.0' in httpx.get(f"{url}/metrics").text)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# The program ----------------------------------------------------------------------------------------------------------

PROGRAM_WITH_FAKE_MODEL = """
import sys, threading
import api, utils

release = threading.Event()

class Model:
    def stream_chat(self, tokenizer, query, history, **options):
        print(query, flush=True)
        while not release.wait(0.005):
            yield query, history
        yield query + "!" * (10**7 if query == "much" else 1), history

threading.Thread(target=lambda: sys.stdin.readline() and release.set(), daemon=True).start()
utils.load_model = lambda **options: (Model(), None)
sys.exit(api.main())
"""


class Program:
    """A server process: what it writes to stderr line by line, its address, its end."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0"],
            cwd=ROOT, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.lines, self.log = queue.Queue(), []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.url = self.wait_for(r"listening on (http://127\.0\.0\.1:\d+)")[1]

    def _read(self):
        for line in self.process.stderr:
            self.lines.put(line)

    def wait_for(self, pattern):
        while True:
            try:
                self.log.append(self.lines.get(timeout=PATIENCE))
            except queue.Empty:
                raise AssertionError(f"{pattern} did not come, but {self.log}") from None
            if match := re.search(pattern, self.log[-1]):
                return match

    def end(self):
        """The exit code; after it, `log` is complete."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        while not self.lines.empty():
            self.log.append(self.lines.get())
        return code


@pytest.fixture
def start():
    programs = []

    def start(*command):
        programs.append(Program(*command))
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.communicate()


@pytest.mark.slow
@not_on_windows
def test_sigterm_loses_no_answer_running_or_waiting(start):
    program = start("-c", PROGRAM_WITH_FAKE_MODEL)
    first = Asker(program.url, "first")
    assert program.process.stdout.readline() == "first\n"
    second = Asker(program.url, "second")
    wait_until(lambda: httpx.get(f"{program.url}/health").json()["queue_length"] == 1)
    idle = socket.create_connection(program.url.removeprefix("http://").split(":"))  # it must not hold up the end
    program.process.send_signal(signal.SIGTERM)
    program.wait_for("shutting down: 1 running, 1 waiting")
    with pytest.raises(httpx.ConnectError):
        while True:  # until the listener has been closed
            httpx.get(f"{program.url}/health")
    print(file=program.process.stdin, flush=True)
    assert first.answer().json()["response"] == "first!"
    assert second.answer().json()["response"] == "second!"
    assert program.end() == 0
    idle.close()


@not_on_windows
@pytest.mark.slow
def test_second_ctrl_c_ends_what_is_running_with_503(start):
    program = start("-c", PROGRAM_WITH_FAKE_MODEL)
    asker = Asker(program.url, "first")
    assert program.process.stdout.readline() == "first\n"
    program.process.send_signal(signal.SIGINT)
    program.wait_for("shutting down: 1 running, 0 waiting")
    program.process.send_signal(signal.SIGINT)
    assert program.end() == 0
    assert asker.answer().status_code == 503
    assert len(program.log) == 3 and "127.0.0.1 POST / 503 " in program.log[2]  # and no traceback


@not_on_windows
@pytest.mark.slow
def test_client_that_does_not_take_its_answer_holds_up_the_end_no_longer_than_stated(start):
    program = start("-c", "import serving; serving.FETCH_SECONDS = 0.1\n" + PROGRAM_WITH_FAKE_MODEL)
    connection = open_request(program.url, "much")
    assert program.process.stdout.readline() == "much\n"
    program.process.send_signal(signal.SIGTERM)
    program.wait_for("shutting down: 1 running, 0 waiting")
    print(file=program.process.stdin, flush=True)
    assert program.end() == 0
    assert "127.0.0.1 POST / 200 " in program.log[2] and len(program.log) == 3
    connection.close()


@not_on_windows
@pytest.mark.slow
def test_program_answers_with_the_embedded_model_and_ends_with_0(start):
    program = start("api.py", "--device", "cpu")
    response = httpx.post(program.url, json={"prompt": "你好", "history": []}, timeout=PATIENCE)
    answer = response.json()
    assert response.status_code == 200 and answer["response"] and answer["history"] == [["你好", answer["response"]]]
    assert "server" not in response.headers
    line = program.wait_for(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d 127\.0\.0\.1 POST / 200 \d+\.\d{3} s   (\d+) \+ (\d+) tok"
    )
    assert int(line[1]) > 0 and int(line[2]) > 0
    program.process.send_signal(signal.SIGTERM)
    assert program.end() == 0
    assert program.process.stdout.read() == ""


def test_taken_port_ends_the_program_in_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit) as end:
        api.main(["--port", str(other.getsockname()[1])])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: cannot listen on 127.0.0.1 port" in line


def test_wrong_model_folder_ends_the_program_in_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        api.main(["--port", "0", "--model_name_or_path", str(tmp_path)])
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# Fuzzing --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_made_from_the_documentation_breaks_the_server(engine, mode):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    ask = schemathesis.openapi.from_asgi("/openapi.json", api.create_app(engine))["/"]["POST"]
    statuses = set()

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=ask.as_strategy(schemathesis.GenerationMode[mode]))
    def check(case):
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code < 500
        case.validate_response(response)  # status, headers and body are as documented

    check()
    assert statuses == ({200} if mode == "POSITIVE" else {422})
