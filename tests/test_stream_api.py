"""stream_api.py through its front door: Flask's test client for the contract, real server processes for the rest."""

import gc
import http.client
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import stream_api
from chatglm.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
STARTED = {"code": 0, "msg": "start process"}
SECONDS = 60  # nothing here takes so long: whoever waits longer has failed
STARTING_SECONDS = 180  # on a busy machine, importing torch takes its time


class FakeModel:
    """Answers "收到【...】", one character after another; on "等..." it says 收到 and waits for `go`."""

    def __init__(self):
        self.go = threading.Semaphore(0)
        self.calls = []

    def stream_chat(self, tokenizer, query, history, **options):
        self.calls.append((query, history, options))
        answer = f"收到【{query}】"
        for end in range(1, len(answer) + 1):
            if query.startswith("等") and end == 3:
                assert self.go.acquire(timeout=SECONDS)
            if query.startswith("坏") and end == 3:
                raise MemoryError("CUDA out of memory")
            yield answer[:end], [*history, (query, answer[:end])]


class Caller:
    """What the callers of a test do, over Flask's test client."""

    def __init__(self, engine, **options):
        self.app = stream_api.create_app(engine, **options)
        self.engine = engine

    def post(self, path, body, **options):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.app.test_client().post(path, data=data, content_type="application/json", **options)

    def chat(self, request_id, query, **fields):
        return self.post("/chat", {"request_id": request_id, "query": query, "history": [], **fields})

    def get(self, request_id):
        """The `response` of an answer that has not failed."""
        answer = self.post("/get_response", {"request_id": request_id})
        assert answer.status_code == 200 and answer.json["code"] == 0 and answer.json["msg"] == "success"
        return answer.json["response"]

    def wait(self, request_id, until):
        """Poll until the `response` is as wanted."""
        return poll(lambda: self.get(request_id), until)

    def finish(self, request_id):
        return self.wait(request_id, lambda response: response["is_finished"])


def poll(look, until):
    """What look() returns as soon as until(that) is true."""
    end = time.monotonic() + SECONDS
    while not until(value := look()):
        assert time.monotonic() < end, value
        time.sleep(0.002)
    return value


def without_time(response):
    return {name: value for name, value in response.items() if name != "timestamp"}


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def caller(fake):
    with Engine(fake, None, max_queue=3) as engine:
        yield Caller(engine)
        fake.go.release(100)


def handled(response):
    return response["response"] == "收到"


# The contract ---------------------------------------------------------------------------------------------------------


def test_an_answer_waits_then_grows_then_is_finished(caller, fake):
    before = time.time()
    assert caller.chat("a", "等一").json == STARTED
    caller.wait("a", handled)
    assert caller.chat("b", "等二").json == STARTED
    assert caller.chat("c", "三").json == STARTED
    assert without_time(caller.get("a")) == {
        "is_finished": False, "is_handled": True, "response": "收到", "position": 0, "finish_reason": None, "notes": [],
    }  # fmt: skip
    for request_id, position in (("b", 1), ("c", 2)):
        assert without_time(caller.get(request_id)) == {
            "is_finished": False, "is_handled": False, "response": "", "position": position, "finish_reason": None,
            "notes": [],
        }  # fmt: skip
    fake.go.release()
    assert without_time(caller.finish("a")) == {
        "is_finished": True, "is_handled": True, "response": "收到【等一】", "position": None, "finish_reason": "stop",
        "notes": [],
    }  # fmt: skip
    assert caller.get("c")["position"] == 1
    fake.go.release()
    assert caller.finish("c")["response"] == "收到【三】"
    assert before <= caller.get("c")["timestamp"] <= time.time()


def test_parameters_reach_the_model_and_null_is_the_default(caller, fake):
    caller.post("/chat", {"request_id": "a", "query": "一", "history": None, "seed": None, "top_p": None})
    caller.finish("a")
    given = {"max_length": 99, "max_new_tokens": 5, "top_p": 0.5, "temperature": 0, "seed": 7, "stop": ["。", "！"]}
    caller.chat("b", "二", **given, history=[["问", "答"]], colour="red")
    caller.finish("b")
    (query, history, options), (query_2, history_2, options_2) = fake.calls
    shown = [options[name] for name in given], [options_2[name] for name in given]
    assert (query, history, query_2, history_2) == ("一", [], "二", [("问", "答")])
    assert shown == ([2048, None, 0.7, 0.95, None, ()], [99, 5, 0.5, 0, 7, ("。", "！")])


def test_a_whole_number_is_the_same_request_id_as_its_digits(caller):
    assert caller.chat(12, "一").json == STARTED
    assert caller.finish("12") and caller.finish(12)["response"] == "收到【一】"


def test_json_is_utf8_and_in_the_order_of_the_contract(caller):
    caller.chat("a", "一")
    caller.finish("a")
    text = caller.post("/get_response", {"request_id": "a"}).get_data(as_text=True)
    assert "收到【一】" in text and text.index('"code"') < text.index('"msg"') < text.index('"response"')


# Whose id is it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/get_response", "/cancel"])
def test_an_unknown_id_is_404(caller, path):
    answer = caller.post(path, {"request_id": "nobody"})
    message = "there is no request_id 'nobody': it was never started, or its answer is forgotten"
    assert (answer.status_code, answer.json) == (404, {"code": 404, "msg": message})


def test_an_id_in_use_is_409_and_its_answer_goes_on(caller, fake):
    caller.chat("a", "等一")
    caller.chat("b", "等二")
    for request_id in "ab":
        answer = caller.chat(request_id, "别的")
        assert (answer.status_code, answer.json["code"]) == (409, 409)
        assert answer.json["msg"].startswith(f"request_id '{request_id}' is in use")
    fake.go.release(2)
    assert [caller.finish(request_id)["response"] for request_id in "ab"] == ["收到【等一】", "收到【等二】"]


def test_of_two_questions_with_one_id_at_once_one_is_asked(fake):
    entered, leave = threading.Event(), threading.Event()

    class SlowEngine(Engine):
        def submit(self, request):
            entered.set()
            assert leave.wait(SECONDS)
            return super().submit(request)

    with SlowEngine(fake, None) as engine:
        caller = Caller(engine)
        answers = []
        first = threading.Thread(target=lambda: answers.append(caller.chat("a", "一").json))
        first.start()
        assert entered.wait(SECONDS)
        second = caller.chat("a", "二")
        leave.set()
        first.join(SECONDS)
        assert (second.status_code, answers) == (409, [STARTED])
        assert caller.finish("a")["response"] == "收到【一】"
        assert len(fake.calls) == 1


def test_the_id_of_a_finished_answer_can_be_used_again_and_replaces_it(caller):
    for round_ in range(3):
        assert caller.chat("a", f"第{round_}").json == STARTED
        assert caller.finish("a")["response"] == f"收到【第{round_}】"


def test_an_id_is_free_as_soon_as_its_end_can_be_seen(fake):
    told = threading.Event()
    with Engine(fake, None) as engine:
        engine.add_listener(lambda job: told.wait(SECONDS))  # holds up the listener of the application
        caller = Caller(engine)
        caller.chat("a", "一")
        caller.finish("a")
        assert caller.chat("a", "二").json == STARTED
        told.set()
        assert caller.finish("a")["response"] == "收到【二】"


def test_a_refused_question_leaves_the_finished_answer_of_its_id(caller, fake):
    caller.chat("a", "一")
    caller.finish("a")
    assert caller.chat("a", "二", top_p=2).status_code == 422
    assert caller.finish("a")["response"] == "收到【一】"


# What is kept ---------------------------------------------------------------------------------------------------------


def test_a_finished_answer_is_kept_for_ten_minutes_and_polling_is_repeatable(caller, monkeypatch):
    caller.chat("a", "一")
    first = without_time(caller.finish("a"))
    now = time.monotonic()
    monkeypatch.setattr(stream_api, "time", SimpleNamespace(time=time.time, monotonic=lambda: now + 599))
    assert without_time(caller.get("a")) == first
    monkeypatch.setattr(stream_api, "time", SimpleNamespace(time=time.time, monotonic=lambda: now + 601))
    assert caller.post("/get_response", {"request_id": "a"}).status_code == 404
    assert not caller.app.extensions["answers"]._answers


def test_only_the_latest_answers_are_kept(fake):
    with Engine(fake, None) as engine:
        caller = Caller(engine, keep_count=2)
        for name in "abcd":
            caller.chat(name, name)
            caller.finish(name)
        answers = [caller.post("/get_response", {"request_id": name}).status_code for name in "abcd"]
        assert answers == [404, 404, 200, 200]


def test_an_id_used_again_is_not_forgotten_with_its_first_answer(fake):
    with Engine(fake, None) as engine:
        caller = Caller(engine, keep_count=2)
        for name in "aab":
            caller.chat(name, name)
            caller.finish(name)
        caller.chat("a", "等")
        caller.chat("c", "三")
        caller.wait("a", handled)
        fake.go.release()
        caller.finish("c")
        assert [caller.finish(name)["response"] for name in "ac"] == ["收到【等】", "收到【三】"]


def test_questions_and_their_history_leave_memory_when_the_answer_is_finished(caller, fake):
    jobs = []
    caller.engine.add_listener(lambda job: jobs.append(weakref.ref(job)))
    for number in range(20):
        caller.chat(f"{number}", "一", history=[["长" * 1000, "答"]])
        caller.finish(f"{number}")
    fake.calls.clear()
    poll(lambda: gc.collect() and None, lambda _: [job() for job in jobs].count(None) == len(jobs) == 20)


def test_memory_is_bounded_by_the_number_kept(fake):
    with Engine(fake, None) as engine:
        caller = Caller(engine, keep_count=10)
        for number in range(100):
            caller.chat(f"{number % 40}", "一")
            caller.finish(f"{number % 40}")
        answers = caller.app.extensions["answers"]
        assert (len(answers._answers), len(answers._finished), len(answers._just_ended)) == (10, 10, 0)


def test_an_answer_that_ends_before_chat_returns_is_kept_like_others(fake):
    class QuickEngine(Engine):
        def submit(self, request):
            job = super().submit(request)
            poll(lambda: answers._just_ended, bool)
            answers.look("somebody else")  # whoever looks meanwhile finds a job that is not in the list yet
            return job

    with QuickEngine(fake, None) as engine:
        caller = Caller(engine, keep_count=2)
        answers = caller.app.extensions["answers"]
        for name in "abc":
            caller.chat(name, name)
            assert caller.get(name)["is_finished"]
        assert caller.post("/get_response", {"request_id": "a"}).status_code == 404
        assert len(answers._answers) == 2


def test_waiting_for_callers_ends_when_the_last_finished_answer_is_fetched(caller):
    answers = caller.app.extensions["answers"]
    for name in "ab":
        caller.chat(name, name)
    caller.finish("b")
    answers.wait_until_fetched(0.01)  # nobody has fetched a: the time is over
    waiting = threading.Thread(target=answers.wait_until_fetched, args=[10 * SECONDS])
    waiting.start()
    assert waiting.is_alive()
    caller.finish("a")
    waiting.join(SECONDS)
    assert not waiting.is_alive()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_503_with_retry_after_and_its_id_stays_free(caller, fake):
    caller.chat("running", "等")
    caller.wait("running", handled)
    for name in "abc":
        assert caller.chat(name, "一").json == STARTED
    answer = caller.chat("d", "一")
    assert (answer.status_code, answer.json["code"]) == (503, 503)
    assert int(answer.headers["Retry-After"]) >= 1 and "3 requests are waiting" in answer.json["msg"]
    assert caller.post("/get_response", {"request_id": "d"}).status_code == 404
    fake.go.release()
    caller.finish("c")
    assert caller.chat("d", "一").json == STARTED


OK = {"request_id": "a", "query": "你好", "history": []}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body must be JSON: Expecting value"),
        (b"{", "the body must be JSON: "),
        (b'{"request_id": "a", "query": "\xff"}', "the body must be JSON: 'utf-8' codec"),
        (b"[" * 100_000, "the body must be JSON that is nested less deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "the body must be JSON: Exceeds the limit"),
        ([], "the body must be a JSON object, got a list"),
        (None, "the body must be a JSON object, got null"),
        ({}, "request_id is missing"),
        ({"request_id": "a"}, "query is missing"),
        ({"request_id": "a", "query": None}, "query is missing"),
        (OK | {"request_id": ""}, 'request_id must be 1 to 128 printable characters or a whole number, got ""'),
        (OK | {"request_id": "x" * 129}, f'whole number, got "{"x" * 36}...'),
        (OK | {"request_id": 10**128}, "request_id must be 1 to 128 printable"),
        (OK | {"request_id": True}, "whole number, got true"),
        (OK | {"request_id": 1.5}, "whole number, got 1.5"),
        (OK | {"request_id": ["a"]}, "whole number, got a list"),
        (OK | {"request_id": "a\nb"}, 'whole number, got "a\\nb"'),
        (OK | {"request_id": "\ud800"}, 'whole number, got "\\ud800"'),
        (OK | {"query": 5}, "query must be a string, got int"),
        (OK | {"query": "\udfff"}, "query must be valid Unicode, got a lone surrogate"),
        (OK | {"history": "旧"}, "history must be a list"),
        (OK | {"history": {"a": "b"}}, "history must be a list"),
        (OK | {"history": [["问"]]}, "history[0] must be a"),
        (OK | {"history": [["问", "答"], ["问", 5]]}, "the response of history[1] must be a string, got int"),
        (OK | {"history": [["问", "\ud83d"]]}, "the response of history[0] must be valid Unicode"),
        (OK | {"max_length": "8"}, "max_length must be a whole number of tokens, at least 1, got str"),
        (OK | {"max_length": -1}, "max_length must be a whole number of tokens, at least 1, got -1"),
        (OK | {"max_length": True}, "max_length must be a whole number"),
        (OK | {"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        (OK | {"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        (OK | {"top_p": 1.1}, "top_p must be a number from 0 to 1, got 1.1"),
        (OK | {"top_p": float("nan")}, "top_p must be a number from 0 to 1, got nan"),
        (OK | {"temperature": float("inf")}, "temperature must be a number from 0 to 100, got inf"),
        (OK | {"temperature": "hot"}, "temperature must be a number from 0 to 100, got str"),
        (OK | {"seed": 2**64}, "seed must be a whole number"),
        (OK | {"stop": [5]}, "a stop string must be a string, got int"),
        (OK | {"stop": 5}, "stop must be a string or a list of strings, got int"),
        (OK | {"stop": ["。"] * 17}, "stop must have at most 16 strings, got 17"),
        (OK | {"stop": [""]}, "a stop string must not be empty"),
    ],
)
def test_a_wrong_body_is_422_with_one_sentence(caller, fake, body, message):
    answer = caller.post("/chat", body)
    assert (answer.status_code, answer.json["code"]) == (422, 422)
    assert message in answer.json["msg"] and len(answer.json["msg"]) < 300
    assert not fake.calls and not caller.engine.running


@pytest.mark.parametrize("field", ["request_id", *stream_api.FIELDS])
def test_no_value_of_any_field_is_an_internal_error(caller, fake, field):
    deep = [json.loads("[" * depth + "]" * depth) for depth in (5, 400, 800, 950)]
    values = [None, True, 0, -1, 1.5, 10**400, float("-inf"), "", "\x00", "\ud800", "长" * 999, [], [[]], [[[]]], {}]
    for value in [*values, {"a": 1}, [None], [["a", "b", "c"]], [{"a": "b"}], *deep]:
        for path in ("/chat", "/get_response", "/cancel"):
            answer = caller.post(path, OK | {field: value})
            assert answer.status_code in (200, 404, 409, 422, 503), (value, answer.json)
            if answer.status_code != 200:
                assert answer.json["code"] == answer.status_code and len(answer.json["msg"]) < 500


def test_a_body_that_is_too_large_is_413(caller):
    answer = caller.chat("a", "长" * 400_000)
    assert (answer.status_code, answer.json["code"]) == (413, 413)
    assert re.fullmatch("the body must have at most 1048576 bytes, got 24000\\d\\d", answer.json["msg"])


def test_a_body_without_the_json_header_is_415(caller):
    answer = caller.app.test_client().post("/chat", data=json.dumps(OK), content_type="text/plain")
    message = "the body must be JSON, sent with the header Content-Type: application/json"
    assert (answer.status_code, answer.json) == (415, {"code": 415, "msg": message})


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/chat", 405), ("POST", "/", 404), ("PUT", "/x", 404)])
def test_an_unknown_route_is_told_in_the_same_shape(caller, method, path, status):
    answer = caller.app.test_client().open(path, method=method)
    routes = "there are POST /chat, POST /get_response, POST /cancel and GET /health"
    assert (answer.status_code, answer.json) == (
        status,
        {"code": status, "msg": f"there is no {method} {path}: {routes}"},
    )


def test_a_bug_is_500_without_a_traceback_and_the_log_has_it(caller, monkeypatch, caplog):
    monkeypatch.setattr(caller.engine, "submit", lambda request: 1 // 0)
    answer = caller.chat("a", "一")
    assert (answer.status_code, answer.json) == (500, {"code": 500, "msg": "the server failed; its log says more"})
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert caller.chat("a", "一").json == STARTED  # its id is free


# Ends that are no answer ----------------------------------------------------------------------------------------------


def test_cancel_ends_a_running_answer_with_what_it_has(caller, fake):
    caller.chat("a", "等")
    caller.wait("a", handled)
    answer = caller.post("/cancel", {"request_id": "a"}).json
    assert (answer["code"], answer["msg"]) == (0, "success")
    assert without_time(answer["response"]) == {
        "is_finished": True, "is_handled": True, "response": "收到", "position": None, "finish_reason": "cancelled",
        "notes": [],
    }  # fmt: skip
    assert caller.chat("b", "二").json == STARTED
    fake.go.release()  # the model notices after its token
    assert caller.finish("b")["response"] == "收到【二】"
    assert caller.get("a")["response"] == "收到"


def test_cancel_takes_a_waiting_question_out_of_the_queue(caller, fake):
    caller.chat("a", "等")
    caller.wait("a", handled)
    caller.chat("b", "二")
    caller.chat("c", "三")
    assert caller.post("/cancel", {"request_id": "b"}).json["response"]["finish_reason"] == "cancelled"
    assert caller.get("c")["position"] == 1
    fake.go.release()
    caller.finish("c")
    assert [query for query, *_ in fake.calls] == ["等", "三"]


def test_cancel_changes_nothing_about_a_finished_answer(caller):
    caller.chat("a", "一")
    finished = without_time(caller.finish("a"))
    for _ in range(2):
        assert without_time(caller.post("/cancel", {"request_id": "a"}).json["response"]) == finished


def test_a_failed_answer_is_500_with_a_sentence_and_the_next_is_answered(caller):
    caller.chat("a", "坏")
    answer = poll(lambda: caller.post("/get_response", {"request_id": "a"}), lambda answer: answer.json["code"])
    assert (answer.status_code, answer.json["code"]) == (500, 500)
    assert "memory" in answer.json["msg"] and "Traceback" not in answer.json["msg"]
    assert without_time(answer.json["response"]) == {
        "is_finished": True, "is_handled": True, "response": "收到", "position": None, "finish_reason": "error",
        "notes": [],
    }  # fmt: skip
    caller.chat("b", "二")
    assert caller.finish("b")["response"] == "收到【二】"
    assert caller.chat("a", "一").json == STARTED  # ids of failed answers are free again


# Around it ------------------------------------------------------------------------------------------------------------


def test_health_answers_while_the_model_works(caller):
    caller.chat("a", "等")
    caller.wait("a", handled)
    caller.chat("b", "二")
    assert caller.app.test_client().get("/health").json == {"status": "ok", "running": 1, "queue_length": 1}


def test_the_key_is_asked_for_everywhere_but_at_health(fake):
    with Engine(fake, None) as engine:
        caller = Caller(engine, api_key="geheim", cors=["http://a.example"])
        for path in ("/chat", "/get_response", "/cancel"):
            missing = caller.post(path, OK)
            assert (missing.status_code, missing.json["code"]) == (401, 401)
            assert missing.headers["WWW-Authenticate"].lower().startswith("bearer")
            assert missing.json["msg"] == "the key is missing: send the header `Authorization: Bearer KEY`"
            for wrong in ("Bearer nein", "Bearer geheimer", "Bearer é", "Basic Z2VoZWltOg==", "geheim", "Bearer"):
                assert caller.post(path, OK, headers={"Authorization": wrong}).status_code == 401
        assert not fake.calls
        assert caller.app.test_client().get("/health").status_code == 200
        assert caller.post("/chat", OK, headers={"Authorization": "Bearer geheim"}).json == STARTED


def test_only_web_pages_of_the_given_origins_may_ask(fake):
    with Engine(fake, None) as engine:
        caller = Caller(engine, api_key="geheim", cors=["http://a.example"])
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        allowed = []
        for origin in ("http://a.example", "http://b.example"):
            answer = caller.app.test_client().options("/chat", headers={"Origin": origin, **asking})
            assert answer.status_code == 200
            allowed.append(answer.headers.get("Access-Control-Allow-Origin"))
        assert allowed == ["http://a.example", None]
        denied = caller.post("/chat", OK, headers={"Origin": "http://a.example"})  # the page may read the refusal
        assert (denied.status_code, denied.headers["Access-Control-Allow-Origin"]) == (401, "http://a.example")


@pytest.mark.parametrize("log_text", [False, True])
def test_the_log_has_one_line_per_question_and_its_text_only_if_asked(fake, caplog, log_text):
    with Engine(fake, None) as engine, caplog.at_level(logging.INFO, "stream_api"):
        caller = Caller(engine, log_text=log_text)
        caller.chat("编号", "秘密")
        caller.finish("编号")
        poll(lambda: len(caplog.messages), lambda count: count == 2)
    chat, end = sorted(caplog.messages, key=lambda line: line.startswith("'"))
    assert re.fullmatch(r"127\.0\.0\.1 POST /chat 200 0\.\d+ s", chat)
    text = "   '秘密' -> '收到【秘密】'" if log_text else ""
    assert re.fullmatch(r"'编号'   0 \+ 0 tokens   stop   \d+\.\d s" + text, end)


# The real server ------------------------------------------------------------------------------------------------------


class Server:
    """A running server: its process, the lines it logged, and its port."""

    def __init__(self, process):
        self.process = process
        self.log = []
        self._ended = False
        self._logged = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.wait_for_line(r"listening on http://127\.0\.0\.1:(\d+)")[1])

    def _read(self):
        for line in self.process.stderr:
            with self._logged:
                self.log.append(line)
                self._logged.notify_all()
        with self._logged:
            self._ended = True
            self._logged.notify_all()

    def wait_for_line(self, pattern):
        def find():
            return next(filter(None, (re.search(pattern, line) for line in self.log)), None)

        with self._logged:
            self._logged.wait_for(lambda: find() or self._ended, STARTING_SECONDS)
            assert find(), self.log
            return find()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def ask(connection, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@contextmanager
def running(*command):
    process = subprocess.Popen(
        [sys.executable, *command, "--port", "0"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


@pytest.fixture(scope="module")
def server():
    with running("tests/stream_api_fake.py", "--max_queue", "200") as server:
        yield server


def test_200_callers_poll_at_once_over_open_connections(server):
    first = server.connect()
    assert ask(first, "/chat", {"request_id": "等", "query": "等"}) == (200, STARTED)
    everybody_waits = threading.Barrier(201, timeout=SECONDS)
    positions, answers, polls = Counter(), {}, Counter()

    def call(number):
        connection = server.connect()
        body = {"request_id": f"c{number}", "query": f"第{number}", "history": []}
        assert ask(connection, "/chat", body) == (200, STARTED)
        status, answer = ask(connection, "/get_response", body)
        assert status == 200 and not answer["response"]["is_handled"]
        everybody_waits.wait()  # all connections are open, and stay so
        positions[ask(connection, "/get_response", body)[1]["response"]["position"]] += 1
        everybody_waits.wait()
        for _ in range(1000):
            status, answer = ask(connection, "/get_response", body)
            polls[status] += 1
            if answer["response"]["is_finished"]:
                break
        answers[number] = answer["response"]["response"]
        connection.close()

    threads = [threading.Thread(target=call, args=[number], daemon=True) for number in range(200)]
    for thread in threads:
        thread.start()
    everybody_waits.wait()
    everybody_waits.wait()
    server.go()
    for thread in threads:
        thread.join(SECONDS)
    assert answers == {number: f"收到【第{number}】" for number in range(200)}
    assert positions == {position: 1 for position in range(1, 201)}
    assert set(polls) == {200}
    assert not [line for line in server.log if "connection limit" in line or "depth" in line or "rror" in line]


@pytest.mark.slow
def test_sigterm_lets_answers_finish_and_callers_fetch_them_and_exits_with_0():
    with running("tests/stream_api_fake.py") as server:
        connection = server.connect()
        assert ask(connection, "/chat", {"request_id": "a", "query": "等"}) == (200, STARTED)
        assert ask(connection, "/chat", {"request_id": "b", "query": "二"}) == (200, STARTED)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("shutting down: 1 running, 1 waiting")

        def ask_more():
            answer = ask(connection, "/chat", {"request_id": "c", "query": "三"})
            ask(connection, "/cancel", {"request_id": "c"})  # it may have come in before the door was closed
            return answer

        refusal = {"code": 503, "msg": "the server is shutting down and takes no new requests"}
        poll(ask_more, lambda answer: answer == (503, refusal))
        assert ask(server.connect(), "/get_response", {"request_id": "b"})[1]["response"]["position"] == 1
        server.go()
        for request_id, text in (("a", "收到【等】"), ("b", "收到【二】")):
            answer = poll(
                lambda request_id=request_id: ask(connection, "/get_response", {"request_id": request_id})[1][
                    "response"
                ],
                lambda response: response["is_finished"],
            )
            assert (answer["finish_reason"], answer["response"]) == ("stop", text)
        assert server.process.wait(SECONDS) == 0
        assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_with_0():
    with running("tests/stream_api_fake.py") as server:
        assert ask(server.connect(), "/chat", {"request_id": "a", "query": "等"}) == (200, STARTED)
        server.process.send_signal(signal.SIGINT)
        server.wait_for_line("shutting down: 1 running, 0 waiting")
        server.process.send_signal(signal.SIGINT)
        server.wait_for_line("not waiting any longer")
        server.go()
        assert server.process.wait(SECONDS) == 0
        assert "Traceback" not in "".join(server.log)


def test_clients_that_leave_or_send_rubbish_do_not_disturb_the_server(server):
    body = json.dumps(OK | {"query": "一"}).encode()
    head = b"POST /chat HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for data in (b"", b"\x16\x03\x01\x02rubbish\r\n\r\n", head % 10**9, head % 500 + body, b"GET / HTTP/1.1\r\n"):
        connection = server.connect()
        connection.connect()
        connection.sock.sendall(data)
        connection.close()
    status, answer = ask(server.connect(), "/chat", b" " * 10_000_000)
    assert (status, answer["code"]) == (413, 413)
    connection = server.connect()
    assert ask(connection, "/chat", OK) == (200, STARTED)
    answer = poll(lambda: ask(connection, "/get_response", OK)[1]["response"], lambda answer: answer["is_finished"])
    assert answer["response"] == "收到【你好】"
    assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
def test_the_script_answers_with_the_embedded_model_and_sigterm_loses_no_answer(model, tokenizer):
    with running("stream_api.py", "--dtype", "float32") as server:
        connection = server.connect()

        def finish(request_id):
            return poll(
                lambda: ask(connection, "/get_response", {"request_id": request_id})[1]["response"],
                lambda response: response["is_finished"],
            )

        question = {"query": "你好", "history": [], "temperature": 0, "max_new_tokens": 12}
        expected, _ = model.chat(tokenizer, "你好", temperature=0, max_new_tokens=12)
        assert ask(connection, "/chat", {"request_id": "a", **question}) == (200, STARTED)
        answer = finish("a")
        assert (answer["response"], answer["finish_reason"]) == (expected, "length")
        status, answer = ask(connection, "/chat", {"request_id": "b", "query": "长" * 3000})
        assert status == 422 and "tokens and max_length is 2048" in answer["msg"]

        for request_id in "cd":
            assert ask(connection, "/chat", {"request_id": request_id, **question}) == (200, STARTED)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("shutting down")
        assert [finish(request_id)["response"] for request_id in "cd"] == [expected, expected]
        assert server.process.wait(SECONDS) == 0
        assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("count", ["0", "2", "-1"])
def test_more_at_once_than_the_model_can_is_refused_in_one_sentence(count, capsys):
    with pytest.raises(SystemExit) as ended:
        stream_api.main(["--max_running", count, "--port", "0"])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"--max_running must be from 1 to 1, more the model cannot answer at once, got {count}" in message
