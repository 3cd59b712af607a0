"""What the HTTP scripts share: flags, the FastAPI application around an engine, errors in one sentence, a polite end.

What is unusual here:
- A script brings its routes as an APIRouter; `create_app` puts the key check, the documentation of errors, request
  logs, `GET /health` and `GET /metrics` around them.
- Every wrong request gets one sentence that names the field, what came and what is allowed; its status is 422 also when
  the body is too large or no JSON. A script may give its errors another shape and other statuses.
- No endpoint ever blocks the event loop: the model works in the engine's thread, and checks of a prompt in another.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING, Annotated, ClassVar
from urllib.parse import quote

import prometheus_client
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:  # importing it imports torch, and `--help` need not wait
    from chatglm.engine import Engine, Job, State
    from chatglm.engine import Request as EngineRequest

logger = logging.getLogger(__name__)

MAX_BODY = 2**20  # bytes; a prompt of 2048 tokens has less than a hundredth of it
BODY_SECONDS = 30  # a body must be here by then, and on a new connection the head of a request
SHUTDOWN_SECONDS = 300  # after SIGTERM or Ctrl-C, answers running and waiting may take so long
FETCH_SECONDS = 30  # and then clients have so long to take them
LEFT = 499  # status in logs and metrics of a request whose client left before the answer; nobody receives it
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper ends of the latency histogram


# Flags ----------------------------------------------------------------------------------------------------------------


def add_server_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add --host, --port (default: port) and --max_queue."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=_port, default=port, help=f"port to listen on, 0 = any free (default: {port})")
    group.add_argument(
        "--max_queue",
        type=_queue_size,
        default=64,
        help="most requests that wait while another is answered; more are sent away (default: 64)",
    )


def add_api_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --api_key, --cors and --log_text; `app_options` reads them."""
    group = parser.add_argument_group("API")
    group.add_argument(
        "--api_key",
        type=_key,
        default=os.environ.get("CHATGLM_API_KEY") or None,
        metavar="KEY",
        help="clients must send `Authorization: Bearer KEY`, except to /health and /docs; the environment variable "
        "CHATGLM_API_KEY does the same unseen by other users of this machine (default: everybody may ask)",
    )
    group.add_argument(
        "--cors",
        nargs="+",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="web pages of these origins may ask from a browser, such as https://example.org; * = all (default: none)",
    )
    group.add_argument(
        "--log_text", action="store_true", help="write questions and answers into the log, too (default: neither)"
    )


def app_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `create_app` that the flags stand for."""
    return {name: getattr(args, name) for name in ("api_key", "cors", "log_text")}


def _number(low: int, high: int):
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text}")
        return int(text)

    return parse


_port = _number(0, 65535)
_queue_size = _number(0, 10**6)


def _key(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("must be ASCII letters, digits and signs, without spaces")
    return text


def _origin(text: str) -> str:
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/*\s]+", text):
        raise argparse.ArgumentTypeError(f"must be * or an origin such as https://example.org, got {text}")
    return text


def bind(args: argparse.Namespace) -> socket.socket:
    """A socket bound to --host and --port that does not listen yet: a taken port shows before a model is loaded.

    Raises OSError in one sentence.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would share a port that another program listens on
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen on {args.host} port {args.port}: {error.strerror}; choose another --host or --port"
        ) from error
    return listener


# Requests and errors --------------------------------------------------------------------------------------------------


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must be valid Unicode, got a lone surrogate at index {error.start}") from error
    return text


def _as_whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value  # JSON's 5.0 is whole


def _as_list(value):
    if not isinstance(value, str | list):
        raise ValueError(f"must be a string or a list of strings, got {describe_value(value)}")
    return [value] if isinstance(value, str) else value


# Types for the fields of a request. A script may add limits, in front of the validators so that they are documented.
# Lists without a limit need fail_fast: a sentence for each of 300,000 wrong items takes seconds.
Text = Annotated[str, AfterValidator(_check_unicode)]
WHOLE = BeforeValidator(_as_whole)  # int, Field(ge=1), WHOLE
StopString = Annotated[Text, Field(min_length=1)]


def stop_strings(most: int):
    """The type of a field that holds a string or a list of at most so many: a list."""
    strings = Annotated[list[StopString], Field(max_length=most)]
    return Annotated[strings, BeforeValidator(_as_list, json_schema_input_type=StopString | strings)]


class Error(BaseModel):
    """What was wrong with the request, or with the server."""

    # What `serving` raises -> what the client gets. 413: body too large, 422: wrong request, 429: queue full.
    STATUS: ClassVar = {413: 422, 429: 503}

    detail: Annotated[
        str,
        Field(
            description="One sentence: what was wrong, what came, what is allowed.",
            examples=["top_p must be at most 1, got 1.5"],
        ),
    ]

    @classmethod
    def make(cls, status: int, message: str, field: str | None, code: str | None) -> "Error":
        """The body of an error.

        status   of HTTP, as the client gets it
        message  one sentence for the user
        field    the field that was wrong, such as "temperature" or "history[0]"; None: no single one
        code     the script's own name of the error; None: it has none
        """
        return cls(detail=message)


class RequestError(HTTPException):
    """An error answer: status, and message, field and code as for `Error.make`."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None, headers=None):
        super().__init__(status, message, headers)
        self.field, self.code = field, code


# What a field must be, by pydantic's name of the error; others keep pydantic's words.
ALLOWED = {
    "string_type": "a string",
    "string_unicode": "valid Unicode",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


def describe(error: dict) -> tuple[str | None, str]:
    """The field, such as "history[0]" or None for no single one, and a sentence, for one of pydantic's `errors()`."""
    kind, value = error["type"], error["input"]
    context = {key: f"{given:g}" if isinstance(given, float) else given for key, given in error.get("ctx", {}).items()}
    place = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    if kind == "json_invalid":
        return None, f"the body must be JSON: {context['error']}" + "".join(f" at character {at}" for at in place)
    if isinstance(value, bytes):
        return None, "the body must be JSON, sent with the header Content-Type: application/json"
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    field = _without_surrogates(path[:100]) or None  # the name of a field that nobody knows may be anything
    name = field or "the body"
    if kind == "missing":
        return field, f"{name} is missing"
    if kind == "extra_forbidden":
        return field, f"{name} is no field of this request"
    if kind == "value_error":
        return field, f"{name} {context['error']}"
    if kind in ("too_short", "string_too_short") and context["min_length"] == 1:
        return field, f"{name} must not be empty"
    if kind == "too_long":
        return field, f"{name} must have at most {context['max_length']} items, got {context['actual_length']}"
    if kind in ALLOWED:
        return field, f"{name} must be {ALLOWED[kind].format(**context)}, got {describe_value(value)}"
    return field, f"{error['msg'].replace('Input should', f'{name} must', 1)}, got {describe_value(value)}"


def describe_value(value) -> str:
    """A JSON value in a sentence: itself, shortened, or "a list" or "an object"."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = _without_surrogates(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 40 else f"{text[:37]}..."


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _unreadable(cause: BaseException) -> str:
    """The sentence for a body that the JSON reader gave up."""
    if isinstance(cause, RecursionError):
        return "the body must be JSON that is nested less deeply"
    if isinstance(cause, UnicodeDecodeError):
        return f"the body must be JSON in UTF-8, got something else at byte {cause.start}"
    return "the body must be JSON with numbers of at most 4300 digits"


def _add_error_handlers(app: FastAPI, model) -> None:
    def respond(status: int, message: str, field: str | None = None, code: str | None = None, headers=None) -> Response:
        status = model.STATUS.get(status, status)
        return JSONResponse(model.make(status, message, field, code).model_dump(), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        field, message = describe(error.errors()[0])
        return respond(422, message, field)

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return respond(error.status_code, error.detail, error.field, error.code, error.headers)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        cause = error.__cause__  # FastAPI answers 400 when reading the body has raised something unusual
        if isinstance(cause, RecursionError | ValueError):
            return respond(422, _unreadable(cause))
        if isinstance(cause, ClientDisconnect):
            return respond(LEFT, "the client has left")
        message = error.detail
        if error.status_code in (404, 405):  # Starlette knows no such route
            message = f"there is no {_shown(request.scope)}; /docs shows what there is"
        return respond(error.status_code, message, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return respond(500, "the server failed; its log says more")


# Asking the engine ----------------------------------------------------------------------------------------------------


async def submit(http_request: Request, engine: "Engine", engine_request: "EngineRequest") -> "Job":
    """The job for engine_request, which also stands in the log line of http_request.

    Use it as a context manager, so that its slot is free as soon as nobody waits for it.
    Raises RequestError: 422 for values that the engine refuses, 429 with Retry-After when its queue is full, 503 when
    it is closed.
    """
    from chatglm.engine import EngineClosedError, QueueFullError

    try:
        job = await run_in_threadpool(engine.submit, engine_request)  # counts tokens: a long text takes a while
    except (TypeError, ValueError) as error:
        raise RequestError(422, str(error)) from error
    except QueueFullError as error:
        raise RequestError(429, str(error), headers={"Retry-After": str(error.retry_after)}) from error
    except EngineClosedError as error:
        raise RequestError(503, str(error)) from error
    if not hasattr(http_request.state, "jobs"):
        http_request.state.jobs = []
    http_request.state.jobs.append(job)
    return job


async def finish(http_request: Request, job: "Job") -> "State":
    """The final state of job, with finish_reason "stop" or "length".

    Raises RequestError: 499 when the client has left (the caller cancels the job), 500 when the model failed, 503 when
    the server shuts down, 504 after the request's deadline.
    """
    last = asyncio.create_task(_last_state(job))
    leaving = asyncio.create_task(_client_leaves(http_request))
    try:
        await asyncio.wait([last, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not last.done():
            raise RequestError(LEFT, "the client has left")
    finally:
        last.cancel()
        leaving.cancel()
    check_finished(last.result())
    return last.result()


async def answer(http_request: Request, engine: "Engine", engine_request: "EngineRequest") -> "State":
    """The final state of engine_request; cancelled when the client leaves. Raises as `submit` and `finish` do."""
    with await submit(http_request, engine, engine_request) as job:
        return await finish(http_request, job)


def check_finished(state: "State") -> None:
    """Raises RequestError unless the final state is that of a whole answer."""
    if state.finish_reason == "error":
        raise RequestError(500, state.error)
    if state.finish_reason == "deadline":
        raise RequestError(504, "the answer was not ready in time")
    if state.finish_reason == "cancelled":
        raise RequestError(503, "the server is shutting down")


async def _last_state(job: "Job") -> "State":
    return [state async for state in job.states_async()][-1]


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# The application ------------------------------------------------------------------------------------------------------


def create_app(
    engine: "Engine",
    router: APIRouter,
    *,
    title: str,
    description: str,
    error_model=Error,
    api_key: str | None = None,
    cors=(),
    log_text: bool = False,
) -> FastAPI:
    """The application: the routes of router, GET /health, GET /metrics, and their documentation at /docs.

    error_model  a pydantic model with STATUS and a classmethod `make`, as Error has them: status and shape of errors
    api_key      what clients must send as `Authorization: Bearer KEY`, except to /health and /docs; None: nothing
    cors         origins whose web pages may ask; "*" = all
    log_text     write questions and answers into the log
    """
    # No redirects: they would lead to whatever the header Host says.
    app = FastAPIOffline(title=title, description=description, version="1", redoc_url=None, redirect_slashes=False)
    _add_error_handlers(app, error_model)
    registry = prometheus_client.CollectorRegistry()
    registry.register(_EngineCollector(engine))
    prometheus_client.ProcessCollector(registry=registry)
    own = APIRouter(tags=["server"])

    @own.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Requests, seconds, queue and tokens since the server started, in the text format of Prometheus."""
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    guard = {}
    if api_key is not None:
        guard = {
            "dependencies": [Depends(_key_check(api_key))],
            "responses": {401: {"model": error_model, "description": "The key is missing or wrong."}},
        }
    app.include_router(router, **guard)
    app.include_router(own, **guard)

    @app.get("/health", tags=["server"], summary="Is the server there?")
    async def health() -> Health:
        """Answers at once, also while the model works; needs no key."""
        return Health(status="ok", running=engine.running, queue_length=engine.queue_length)

    app.add_middleware(_BodyLimit)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(_RequestLog, registry=registry, log_text=log_text)
    return app


class Health(BaseModel):
    """How busy the server is."""

    status: Annotated[str, Field(description="Always `ok`.")]
    running: Annotated[int, Field(description="Requests that are being answered.")]
    queue_length: Annotated[int, Field(description="Requests that wait.")]


def error_responses(error_model=Error) -> dict:
    """What a route that asks the engine documents as its `responses`."""
    causes = {
        408: f"The body was not here within {BODY_SECONDS} s.",
        422: "Something in the request is wrong: the sentence says what.",
        429: "The queue is full: try again after Retry-After.",
        500: "The model failed on this request.",
        503: "The server is shutting down.",
    }
    responses = {}
    for status, cause in causes.items():
        response = responses.setdefault(error_model.STATUS.get(status, status), {"model": error_model})
        response["description"] = f"{response.get('description', '')} {cause}".strip()
        if status == 429:
            response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return responses


def _key_check(api_key: str):
    header = HTTPBearer(auto_error=False, description="The key that the server was started with.")

    async def check(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(header)]) -> None:
        if sent is None or not secrets.compare_digest(sent.credentials.encode(), api_key.encode()):
            message = f"the key is {'wrong' if sent else 'missing'}: send the header `Authorization: Bearer KEY`"
            raise RequestError(401, message, headers={"WWW-Authenticate": "Bearer"})

    return check


class _BodyLimit:
    """Middleware: a body larger than MAX_BODY or slower than BODY_SECONDS is refused while it arrives."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        deadline = time.monotonic() + BODY_SECONDS
        size, complete = 0, False

        async def limited():
            nonlocal size, complete
            if complete:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                headers = {"Connection": "close"}
                raise RequestError(408, f"the body must be here within {BODY_SECONDS} s", headers=headers) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > MAX_BODY:
                raise RequestError(413, f"the body must have at most {MAX_BODY} bytes, got more")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


# Logs and metrics -----------------------------------------------------------------------------------------------------


class _RequestLog:
    """Middleware: one log line per request, and its numbers for /metrics."""

    def __init__(self, app, registry, log_text):
        self.app, self.log_text = app, log_text
        self.requests = prometheus_client.Counter(
            "chatglm_http_requests", "HTTP requests answered", ["path", "status"], registry=registry
        )
        self.seconds = prometheus_client.Histogram(
            "chatglm_http_request_seconds", "From request to whole answer", ["path"], registry=registry, buckets=SECONDS
        )

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 500

        async def watched(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.app(scope, receive, watched)
        finally:
            seconds = time.monotonic() - started
            path = getattr(scope.get("route"), "path", "other")  # as declared: addresses made up do not grow /metrics
            self.requests.labels(path, status).inc()
            self.seconds.labels(path).observe(seconds)
            level = logging.DEBUG if path in ("/health", "/metrics") and status == 200 else logging.INFO
            client = (scope.get("client") or ["-"])[0]
            line = f"{client} {_shown(scope)} {status} {seconds:.3f} s"
            logger.log(level, "%s", line + "".join(map(self._describe, scope["state"].get("jobs", []))))

    def _describe(self, job: "Job") -> str:
        state, notes = job.state, ""
        if self.log_text:
            notes = f"   {job.request.query!r} -> {state.text!r}"
        notes = "".join(f"   {note}" for note in state.notes) + notes
        tokens = f"{state.prompt_tokens} + {state.completion_tokens} tokens"
        return f"   {tokens} {state.finish_reason or 'cancelled'}{notes}"


def _shown(scope) -> str:
    """Method and path of a request, safe and short."""
    return f"{scope['method'][:20]} {quote(scope['path'])[:80]}"


class _EngineCollector(prometheus_client.registry.Collector):
    """The engine's own numbers, read when Prometheus asks."""

    def __init__(self, engine):
        self.engine = engine

    def collect(self):
        stats = self.engine.stats
        yield GaugeMetricFamily("chatglm_running", "Requests that are being answered", self.engine.running)
        yield GaugeMetricFamily("chatglm_queue_length", "Requests that wait", self.engine.queue_length)
        answers = CounterMetricFamily("chatglm_answers", "Requests that ended, by reason", labels=["finish_reason"])
        for reason, count in stats.requests.items():
            answers.add_metric([reason], count)
        yield answers
        yield CounterMetricFamily("chatglm_prompt_tokens", "Tokens read", stats.prompt_tokens)
        yield CounterMetricFamily("chatglm_completion_tokens", "Tokens written", stats.completion_tokens)
        yield CounterMetricFamily("chatglm_model_seconds", "Seconds in which the model worked", stats.seconds)


# Running --------------------------------------------------------------------------------------------------------------


def start_log(listener: socket.socket) -> None:
    """Have logs written to stderr, a line each with the time, and say where listener can be reached."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logger.setLevel(logging.INFO)
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


class _Connection(H11Protocol):
    """uvicorn's, closed when it brings no request: connections that nobody uses would take all files one may open."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.patience = self.loop.call_later(BODY_SECONDS, self._close_unused)

    def _close_unused(self):
        if self.cycle is None:  # no request has begun
            self.transport.close()

    def connection_lost(self, exc):
        self.patience.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """uvicorn that drains the engine while connections wait for their answers, but not for who does not take them."""

    def __init__(self, config, engine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets=None):
        logger.info("shutting down: %d running, %d waiting", self.engine.running, self.engine.queue_length)
        draining = asyncio.create_task(asyncio.to_thread(self.engine.close, SHUTDOWN_SECONDS))
        closing = asyncio.create_task(super().shutdown(sockets))
        while not draining.done() and not self.force_exit:  # a second Ctrl-C sets it
            await asyncio.wait([draining], timeout=0.1)
        end = time.monotonic() + FETCH_SECONDS
        while not closing.done() and not self.force_exit and time.monotonic() < end:
            await asyncio.wait([closing], timeout=0.1)
        await asyncio.to_thread(self.engine.close, drain=False)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=1)  # those cut off are told so
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.force_exit = True
        await asyncio.gather(closing, draining)


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves app."""
    return uvicorn.Config(
        app,
        http=_Connection,
        backlog=128,  # when no more files may be opened, asyncio complains so many times a second
        log_config=None,
        lifespan="off",  # the application needs none, and a second Ctrl-C would end it with a traceback
        access_log=False,  # _RequestLog writes one
        proxy_headers=False,  # else a client may write what it likes in place of its address into the log
        server_header=False,
    )


def run(app: FastAPI, engine: "Engine", listener: socket.socket) -> int:
    """Serve app on the socket of `bind` until SIGTERM or Ctrl-C; returns the exit code 0.

    Then nobody new is let in, and requests running and waiting get their answers. After SHUTDOWN_SECONDS, or at a
    second Ctrl-C, those that are left are cancelled and answered with 503. Who has not taken an answer FETCH_SECONDS
    later is cut off.
    """
    config = server_config(app)
    server = _Server(config, engine)
    # uvicorn raises the signal again at its end, for whoever handled it before: that would end us with another code.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    listener.listen(config.backlog)
    start_log(listener)
    server.run(sockets=[listener])
    return 0
