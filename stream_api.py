"""Put a question to ChatGLM and ask again and again how far its answer is: `python stream_api.py`, then

    curl http://127.0.0.1:8000/chat -H "Content-Type: application/json" \
         -d '{"request_id": "a1", "query": "你好", "history": []}'
    curl http://127.0.0.1:8000/get_response -H "Content-Type: application/json" -d '{"request_id": "a1"}'

Every request is a POST with a JSON object, every answer a JSON object with `code` and `msg`. All went well: code 0.
Otherwise code is the HTTP status and msg one sentence.

/chat           asks `query`. `request_id`, chosen by the caller, is 1 to 128 printable characters or a whole number,
                which is the same as its digits. May be given: `history`, a list of [query, response]; `max_length`,
                `max_new_tokens`, `top_p`, `temperature`, `seed`, `stop` (a string, or a list of at most 16); null is
                "not given".
                Answers {"code": 0, "msg": "start process"} at once.
/get_response   answers {"code": 0, "msg": "success", "response": {...}} at once, with
                is_finished    whether `response` is all there will be
                is_handled     false while the question waits in the queue
                response       the answer so far, whole; its last characters may still change until it is finished
                timestamp      when this was so: seconds since 1970
                position       n-th in the queue, from 1; 0 = being answered; null = finished
                finish_reason  null, then "stop", "length" (the answer has reached its limit), "cancelled" or "error"
                notes          sentences about how the question was treated, such as rounds left out of the history
/cancel         ends an answer, and answers as /get_response. What has ended before stays as it is.
GET /health     answers at once, without a key: {"status": "ok", "running": 1, "queue_length": 0}.

status  when
401     the key is missing or wrong (--api_key)
404     an unknown request_id: never asked, refused by /chat, or forgotten
409     /chat with a request_id that is waiting or running; it goes on undisturbed
413     a body of more than 1 MiB
415     no header Content-Type: application/json, which keeps foreign web pages from asking behind a user's back
422     no JSON, a wrong value, a question that does not fit into max_length
500     /get_response and /cancel: the model failed on this question; `response` is there, too
503     /chat: the queue is full (Retry-After: seconds), or the server is shutting down

A caller need not come back: the question is answered anyway. A finished answer is kept for 10 minutes, but never more
than the latest 1000; then its request_id is unknown. Asking with the request_id of a finished answer replaces it.
After SIGTERM or Ctrl-C /chat takes nothing new, what runs and waits has 5 minutes to finish, and then callers have 10
seconds to fetch what is finished. A second Ctrl-C ends all at once.
"""

import argparse
import json
import logging
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import waitress
from flask import Flask, Response, abort, g, jsonify, request
from flask_cors import CORS
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Conflict, HTTPException, InternalServerError, ServiceUnavailable, Unauthorized

import serving
import utils

if TYPE_CHECKING:  # importing it imports torch, and `--help` need not wait
    from chatglm.engine import Engine, Job, State

logger = logging.getLogger(__name__)

ROUTES = "POST /chat, POST /get_response, POST /cancel and GET /health"
FIELDS = "query history max_length max_new_tokens top_p temperature seed stop".split()
LONGEST_ID = 128  # characters
MOST_STOPS = 16  # stop strings: each is looked for after every token
KEEP_SECONDS = 600  # after its end an answer can be fetched so long,
KEEP_COUNT = 1000  # and only so many are kept
FETCH_SECONDS = 10  # at shutdown, callers have so long to fetch the last answers
THREADS = 16  # no request waits for the model: a few threads serve hundreds of callers, even if some check long texts
CONNECTIONS = 512  # open at once, within the usual limit of 1024 files; more wait to be let in
LARGEST_BODY = 16 * serving.MAX_BODY  # up to here a client hears in our words that its body is too large


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="ChatGLM as an HTTP server: ask, then poll the answer as it grows.")
    utils.add_model_arguments(parser)
    serving.add_server_arguments(parser, port=8000)
    parser.add_argument(
        "--max_running",
        type=int,
        default=1,
        help="questions answered at the same time; the model takes one after another today, so 1 is all it can do "
        "(default: 1)",
    )
    serving.add_api_arguments(parser)
    return parser


# Who asked what -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Answer:
    """What can be asked about a request_id: a job, and once that has ended, only its final state."""

    job: "Job | None"
    final: "State | None" = None
    is_fetched: bool = False

    @property
    def state(self) -> "State":
        return self.final or self.job.state


class Answers:
    """The answers by request_id: unfinished ones, and finished ones for keep_seconds, at most keep_count.

    log_text  write questions and answers into the log
    """

    def __init__(self, engine: "Engine", keep_seconds: float, keep_count: int, log_text: bool):
        from chatglm.engine import Request

        @dataclass(frozen=True)
        class NamedRequest(Request):
            request_id: str = ""

        self._named_request = NamedRequest
        self._engine = engine
        self._keep_seconds = keep_seconds
        self._keep_count = keep_count
        self._log_text = log_text
        self._fetched = threading.Condition()  # its lock is for all that follows
        self._answers: dict[str, Answer] = {}
        self._starting: set[str] = set()
        self._finished: deque[tuple[float, str, Answer]] = deque()  # oldest first, with the time of the end
        # Filled without the lock: a listener of the engine must not wait for somebody who waits for the engine.
        self._just_ended: deque[tuple[float, Job]] = deque()
        engine.add_listener(self._on_end)

    def start(self, request_id: str, fields: dict) -> None:
        """Ask a question; raises Conflict if its id is in use, and what `Engine.submit` raises."""
        with self._fetched:
            self._tidy()
            before = self._answers.get(request_id)
            if request_id in self._starting or (before is not None and before.state.finish_reason is None):
                raise Conflict(f"request_id {request_id!r} is in use: wait for its end, cancel it, or choose another")
            self._starting.add(request_id)
        job = None
        try:
            job = self._engine.submit(self._named_request(**fields, request_id=request_id))  # takes a while: no lock
        finally:
            with self._fetched:
                self._starting.discard(request_id)
                if job is not None:
                    self._answers[request_id] = Answer(job)
                    if job.state.finish_reason is not None:  # perhaps before there was an Answer to put it into
                        self._just_ended.append((time.monotonic(), job))

    def look(self, request_id: str) -> "State | None":
        """How far a question has come; None: unknown."""
        with self._fetched:
            self._tidy()
            answer = self._answers.get(request_id)
            if answer is None:
                return None
            state = answer.state
            if state.finish_reason is not None:
                answer.is_fetched = True
                self._fetched.notify_all()
            return state

    def cancel(self, request_id: str) -> "State | None":
        """End an answer if it has not ended; returns its state then, or None: unknown."""
        with self._fetched:
            answer = self._answers.get(request_id)
            job = answer and answer.job
        if job is not None:
            job.cancel()
        return self.look(request_id)

    def wait_until_fetched(self, timeout: float) -> None:
        """Wait until every answer was looked at after its end, but no longer than timeout seconds."""
        with self._fetched:
            self._fetched.wait_for(lambda: all(answer.is_fetched for answer in self._answers.values()), timeout)

    def _on_end(self, job: "Job") -> None:
        self._just_ended.append((time.monotonic(), job))
        state, text = job.state, ""
        if self._log_text:
            text = f"   {job.request.query!r} -> {state.text!r}"
        logger.info(
            "%r   %d + %d tokens   %s   %.1f s%s",
            job.request.request_id,
            state.prompt_tokens,
            state.completion_tokens,
            state.finish_reason,
            job.seconds,
            "".join(f"   {note}" for note in state.notes) + text,
        )

    def _tidy(self) -> None:
        """With the lock: keep of what has ended only the final state, and forget what is old."""
        while self._just_ended:
            end, job = self._just_ended.popleft()
            request_id = job.request.request_id
            answer = self._answers.get(request_id)
            if answer is not None and answer.job is job:
                answer.final, answer.job = job.state, None  # the job holds the question, too
                self._finished.append((end, request_id, answer))
        oldest = time.monotonic() - self._keep_seconds
        while self._finished and (len(self._finished) > self._keep_count or self._finished[0][0] < oldest):
            _, request_id, answer = self._finished.popleft()
            if self._answers.get(request_id) is answer:  # else its id was used again
                del self._answers[request_id]


# The application ------------------------------------------------------------------------------------------------------


def create_app(
    engine: "Engine",
    *,
    api_key: str | None = None,
    cors=(),
    log_text: bool = False,
    keep_seconds: float = KEEP_SECONDS,
    keep_count: int = KEEP_COUNT,
) -> Flask:
    """The application that answers with engine; its Answers are app.extensions["answers"].

    api_key       what clients must send as `Authorization: Bearer KEY`, except to /health; None: nothing
    cors          origins whose web pages may ask; "*" = all
    log_text      write questions and answers into the log
    keep_seconds  how long a finished answer can be fetched
    keep_count    how many finished answers are kept at most
    """
    from chatglm.engine import EngineClosedError, QueueFullError

    app = Flask(__name__, static_folder=None)
    app.json.ensure_ascii = app.json.sort_keys = False
    answers = app.extensions["answers"] = Answers(engine, keep_seconds, keep_count, log_text)

    @app.before_request
    def check_key():
        g.started = time.monotonic()
        if api_key is None or request.endpoint == "health" or request.method == "OPTIONS":
            return
        sent = request.authorization
        if sent is None or not secrets.compare_digest((sent.token or "").encode(), api_key.encode()):
            what = "the key is missing" if sent is None else "the key is wrong"
            raise Unauthorized(
                f"{what}: send the header `Authorization: Bearer KEY`", www_authenticate=WWWAuthenticate("bearer")
            )

    @app.post("/chat")
    def chat():
        body = read_body()
        request_id = read_id(body)
        fields = {name: body[name] for name in FIELDS if body.get(name) is not None}
        if "query" not in fields:
            abort(422, "query is missing")
        if isinstance(fields.get("stop"), list) and len(fields["stop"]) > MOST_STOPS:
            abort(422, f"stop must have at most {MOST_STOPS} strings, got {len(fields['stop'])}")
        try:
            answers.start(request_id, fields)
        except (TypeError, ValueError) as error:
            abort(422, str(error))
        except QueueFullError as error:
            raise ServiceUnavailable(str(error), retry_after=error.retry_after) from error
        except EngineClosedError as error:
            raise ServiceUnavailable(str(error)) from error
        return {"code": 0, "msg": "start process"}

    @app.post("/get_response")
    def get_response():
        request_id = read_id(read_body())
        return describe(request_id, answers.look(request_id))

    @app.post("/cancel")
    def cancel():
        request_id = read_id(read_body())
        return describe(request_id, answers.cancel(request_id))

    @app.get("/health")
    def health():
        return {"status": "ok", "running": engine.running, "queue_length": engine.queue_length}

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> Response:
        message = error.description
        if error.code in (404, 405) and message == type(error).description:
            message = f"there is no {request.method} {quote(request.path)[:80]}: there are {ROUTES}"
        elif isinstance(error, InternalServerError):
            message = "the server failed; its log says more"
        response = error.get_response()  # with its headers: Allow, Retry-After, WWW-Authenticate
        response.data = jsonify(code=error.code, msg=message).data
        response.content_type = "application/json"
        return response

    @app.after_request
    def log(response: Response) -> Response:
        is_news = request.endpoint not in ("get_response", "health") or response.status_code != 200
        logger.log(
            logging.INFO if is_news else logging.DEBUG,
            "%s %s %s %d %.3f s",
            request.remote_addr,
            request.method,
            quote(request.path)[:80],
            response.status_code,
            time.monotonic() - g.started,
        )
        return response

    if cors:
        CORS(app, origins=list(cors))
    return app


def read_body() -> dict:
    """The JSON object that came with the request; aborts with 413, 415 or 422 if it is none."""
    if not request.is_json:
        abort(415, "the body must be JSON, sent with the header Content-Type: application/json")
    if (request.content_length or 0) > serving.MAX_BODY:
        abort(413, f"the body must have at most {serving.MAX_BODY} bytes, got {request.content_length}")
    try:
        body = json.loads(request.get_data())
    except RecursionError:
        abort(422, "the body must be JSON that is nested less deeply")
    except ValueError as error:
        abort(422, f"the body must be JSON: {error}")
    if not isinstance(body, dict):
        abort(422, f"the body must be a JSON object, got {serving.describe_value(body)}")
    return body


def read_id(body: dict) -> str:
    """The request_id of a body; aborts with 422 if it is none."""
    value = body.get("request_id")
    if value is None:
        abort(422, "request_id is missing")
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_ID or not text.isprintable():
        got = serving.describe_value(value)
        abort(422, f"request_id must be 1 to {LONGEST_ID} printable characters or a whole number, got {got}")
    return text


def describe(request_id: str, state: "State | None") -> tuple[dict, int]:
    """What /get_response answers; aborts with 404 if there is no state."""
    if state is None:
        abort(404, f"there is no request_id {request_id!r}: it was never started, or its answer is forgotten")
    code = 500 if state.finish_reason == "error" else 0
    body = {
        "code": code,
        "msg": state.error if code else "success",
        "response": {
            "is_finished": state.finish_reason is not None,
            "is_handled": not state.position,
            "response": state.text,
            "timestamp": time.time(),
            "position": state.position,
            "finish_reason": state.finish_reason,
            "notes": state.notes,
        },
    }
    return body, code or 200


# Running --------------------------------------------------------------------------------------------------------------


def serve(app: Flask, engine: "Engine", listener: socket.socket) -> int:
    """Serve app on the socket of `serving.bind` until SIGTERM or Ctrl-C; returns the exit code 0."""
    logger.setLevel(logging.INFO)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that many ask at once is no news
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=THREADS,
        connection_limit=CONNECTIONS,
        asyncore_use_poll=True,  # select() knows no file above number 1023
        max_request_body_size=LARGEST_BODY,
        log_socket_errors=False,  # clients may leave
        ident=None,
    )

    def drain():
        engine.close(serving.SHUTDOWN_SECONDS)
        app.extensions["answers"].wait_until_fetched(FETCH_SECONDS)

    try:
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: KeyboardInterrupt
            serving.start_log(listener)
            run_in_thread(server.run)
        except KeyboardInterrupt:
            logger.info("shutting down: %d running, %d waiting", engine.running, engine.queue_length)
            run_in_thread(drain)
    except KeyboardInterrupt:
        logger.info("not waiting any longer")
    server.task_dispatcher.shutdown()  # lets requests finish that are being served
    return 0


def run_in_thread(work: Callable[[], None]) -> None:
    """Have a thread do the work, and wait for it; KeyboardInterrupt comes within a second."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1)  # a signal that arrives just before a long wait would not end it


def main(argv=None):
    """Serve with the command line argv; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with utils.main_errors(parser):
        listener = serving.bind(args)
        from chatglm.engine import Engine

        if not 1 <= args.max_running <= Engine.MAX_RUNNING:
            raise ValueError(
                f"--max_running must be from 1 to {Engine.MAX_RUNNING}, more the model cannot answer at once, "
                f"got {args.max_running}"
            )
        model, tokenizer = utils.load_model(**utils.model_options(args))
    with Engine(model, tokenizer, args.max_queue, args.max_running) as engine:
        return serve(create_app(engine, **serving.app_options(args)), engine, listener)


if __name__ == "__main__":
    sys.exit(main())
