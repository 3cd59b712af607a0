"""ChatGLM behind OpenAI's wire format: `python openai_api.py`, then give any OpenAI client http://127.0.0.1:8000/v1.

GET /v1/models, GET /v1/models/{model} and POST /v1/chat/completions, whole or streamed. What is unusual:

- The model knows questions and answers, no other roles. All system and developer messages, wherever they stand, become
  one first round, which the model "answered" with ACKNOWLEDGED and which is never dropped to make room. Prefixed to a
  question they lead the embedded model astray.
- Messages of one role in a row are joined by a newline; an answer that nobody asked for (a greeting at the start) gets
  an empty question. The last message must be the user's.
- What would change the answer and cannot be done (tools, JSON mode, logprobs, penalties, images, ...) is refused with
  400, and so are fields that are not known; what changes nothing (user, metadata, ...) is ignored.
- `model` must be the name that /v1/models lists, else 404; `--model_name` sets it for programs that insist on another.
- `max_tokens` is a limit of the answer; prompt and answer together have at most --max_length tokens unless it is given.
- `n` answers are n requests in the engine's queue, with the seeds seed, seed + 1, ...
- Streamed text is never taken back, so an end that may still change (half a stop string, a comma that a Hanzi would
  widen) is held back. While a stream waits, comments tell its place in the queue, or just that the server is there.
- `notes` in an answer, or in the first chunk of a stream, is not OpenAI's: sentences about what had to be left out.
"""

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

import serving
import utils

if TYPE_CHECKING:  # importing it imports torch, and `--help` need not wait
    from chatglm.engine import Engine, Job, State

MAX_CHOICES = 8
KEEPALIVE_SECONDS = 15  # proxies cut a connection that is silent for a minute
LINE_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\x85\u2028\u2029"}  # some clients split events there
SSE_EVENT = {  # for the documentation
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "`error` for a failure, else absent."},
        "data": {"type": "string", "description": "A chat.completion.chunk or an error as JSON, or `[DONE]`."},
    },
}


# Requests -------------------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    """Values of exactly the declared type: no "5" for 5, no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def _or(sentence: str) -> WrapValidator:
    """For a value that is not of the declared type: sentence, with the value in place of {}."""

    def validate(value, handler):
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(sentence.format(serving.describe_value(value))) from None

    return WrapValidator(validate)


def _as_parts(content):
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return content
    raise ValueError(f"must be a string or a list of text parts, got {serving.describe_value(content)}")


Unsupported = _or("is not supported by this model: leave it out")  # for types of values that change nothing
Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]


class TextPart(Strict):
    """A piece of a message."""

    type: Annotated[Literal["text"], _or('must be "text", got {}: this model reads no images, sound or files')]
    text: serving.Text


class Message(Strict):
    """A message of the conversation. `name` and other fields are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])
    ]
    tool_calls: Annotated[Nothing | None, Unsupported] = None
    function_call: Annotated[None, Unsupported] = None
    audio: Annotated[None, Unsupported] = None

    @property
    def text(self) -> str:
        """The parts joined."""
        return "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: Annotated[bool | None, Field(description="One more chunk with the numbers of tokens.")] = None


class TextFormat(Strict):
    """The only form of answers there is."""

    type: Literal["text"]


Tokens = Annotated[int, Field(ge=1)]  # more than the model can write is allowed


class CompletionRequest(Strict):
    """A conversation to answer. Of OpenAI's fields those that would change the answer in vain are refused."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[serving.Text, Field(description="The name that GET /v1/models lists.")]
    messages: Annotated[
        list[Message], Field(min_length=1, fail_fast=True, description="The last one must be the user's.")
    ]
    stream: Annotated[bool | None, Field(description="Send the answer while it grows, as server-sent events.")] = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[Tokens | None, Field(description="Most tokens of the answer.")] = None
    max_tokens: Annotated[Tokens | None, Field(description="The older name of max_completion_tokens.")] = None
    temperature: Annotated[
        float | None,
        Field(ge=0, le=2, description="Higher = more varied, 0 = always the likeliest token (default: --temperature)."),
    ] = None
    top_p: Annotated[
        float | None,
        Field(ge=0, le=1, description="Sample among the likeliest tokens that reach this (default: --top_p)."),
    ] = None
    seed: Annotated[
        int | None, Field(ge=-(2**63), le=2**63 - 1, description="Makes answers repeatable (default: --seed).")
    ] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="How many answers (default: 1).")] = None
    stop: Annotated[
        serving.stop_strings(4) | None, Field(description="The answer ends before any of these strings.")
    ] = None

    tools: Annotated[Nothing | None, Unsupported] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, Unsupported] = None
    functions: Annotated[Nothing | None, Unsupported] = None
    function_call: Annotated[Literal["none", "auto"] | None, Unsupported] = None
    response_format: Annotated[TextFormat | None, Unsupported] = None
    modalities: Annotated[list[Literal["text"]] | None, Unsupported] = None
    audio: Annotated[None, Unsupported] = None
    logprobs: Annotated[Literal[False] | None, Unsupported] = None
    top_logprobs: Annotated[Literal[0] | None, Unsupported] = None
    logit_bias: Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, Unsupported] = None
    frequency_penalty: Annotated[Zero | None, Unsupported] = None
    presence_penalty: Annotated[Zero | None, Unsupported] = None
    reasoning_effort: Annotated[Literal["none"] | None, Unsupported] = None
    verbosity: Annotated[Literal["medium"] | None, Unsupported] = None
    moderation: Annotated[None, Unsupported] = None
    web_search_options: Annotated[None, Unsupported] = None

    metadata: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None


# Answers --------------------------------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    """A model that answers here."""

    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="Seconds since 1970.")]
    owned_by: str


class ModelList(BaseModel):
    """The models that answer here: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Answer(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: None
    finish_reason: Annotated[
        Literal["stop", "length"], Field(description="It ended by itself or before a stop string; or at its limit.")
    ]


class Usage(BaseModel):
    """Numbers of tokens; the prompt counts once, however many answers there are."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    choices: list[Choice]
    usage: Usage
    notes: Annotated[list[str], Field(description="What had to be left out of the prompt; absent if nothing.")] = []


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: Annotated[str | None, Field(description="The field that was wrong.")]
    code: str | None


class Error(BaseModel):
    """The body of every error."""

    STATUS: ClassVar = {422: 400}
    CODES: ClassVar = {401: "invalid_api_key", 429: "rate_limit_exceeded"}

    error: ErrorDetails

    @classmethod
    def make(cls, status: int, message: str, field: str | None, code: str | None) -> "Error":
        """As `serving.Error.make`; most codes follow from the status."""
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        return cls(error=ErrorDetails(message=message, type=kind, param=field, code=code or cls.CODES.get(status)))


# Between OpenAI's world and the engine's ------------------------------------------------------------------------------


def conversation(messages: Sequence[Message]) -> dict:
    """The fields query, history and keep of a request to the engine; ValueError unless the user spoke last."""
    instructions = [message.text for message in messages if message.role in ("system", "developer") and message.text]
    spoken = [message for message in messages if message.role in ("user", "assistant")]
    turns = [
        (role, "\n".join(message.text for message in group))
        for role, group in groupby(spoken, key=lambda message: message.role)
    ]
    if not turns or turns[-1][0] != "user":
        raise ValueError("the last of messages must have the role user: it is what the model answers")
    if turns[0][0] == "assistant":
        turns.insert(0, ("user", ""))
    *earlier, query = [text for _, text in turns]
    history = list(zip(earlier[::2], earlier[1::2], strict=True))
    if instructions:
        from chatglm.chat import ACKNOWLEDGED

        history.insert(0, ("\n".join(instructions), ACKNOWLEDGED))
    return {"query": query, "history": history, "keep": int(bool(instructions))}


def usage(states: "Sequence[State]") -> dict:
    """The numbers of tokens of all choices together."""
    prompt, answers = states[0].prompt_tokens, sum(state.completion_tokens for state in states)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


async def changes(jobs: "Sequence[Job]") -> "AsyncIterator[tuple[int, State | None]]":
    """Yields (index, state) as the jobs change, and (0, None) after KEEPALIVE_SECONDS without a change."""
    iterators = [job.states_async() for job in jobs]
    steps = {asyncio.ensure_future(anext(iterator, None)): index for index, iterator in enumerate(iterators)}
    try:
        while steps:
            done, _ = await asyncio.wait(steps, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield 0, None
            for step in done:
                index, state = steps.pop(step), step.result()
                if state is not None:
                    steps[asyncio.ensure_future(anext(iterators[index], None))] = index
                    yield index, state
    finally:
        for step in steps:
            step.cancel()


async def events(jobs: "Sequence[Job]", head: dict, include_usage: bool) -> AsyncIterator[bytes]:
    """The server-sent events of a streamed completion; head is what all its chunks have in common."""
    from chatglm.engine import settled

    def chunk(choices: list[dict], numbers: dict | None = None, **more) -> bytes:
        data = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        if include_usage:
            data["usage"] = numbers
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return format_sse_event(data_str=text.translate(LINE_ENDS))

    def choice(index: int, delta: dict, finish_reason: str | None = None) -> list[dict]:
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]

    for index, job in enumerate(jobs):
        notes = {"notes": job.state.notes} if index == 0 and job.state.notes else {}
        yield chunk(choice(index, {"role": "assistant", "content": "", "refusal": None}), **notes)
    sent = [0] * len(jobs)  # characters of each answer
    final = [None] * len(jobs)
    async for index, state in changes(jobs):
        if state is None:
            yield KEEPALIVE_COMMENT
            continue
        if state.position:
            yield format_sse_event(comment=f"position {state.position} in the queue")
        finished = state.finish_reason is not None
        text = state.text if finished else settled(state.text, jobs[index].request.stop)
        if len(text) > sent[index]:
            yield chunk(choice(index, {"content": text[sent[index] :]}))
            sent[index] = len(text)
        if finished:
            try:
                serving.check_finished(state)
            except serving.RequestError as error:  # too late for a status
                failure = Error.make(error.status_code, error.detail, None, None)
                yield format_sse_event(event="error", data_str=failure.model_dump_json())
                return
            yield chunk(choice(index, {}, state.finish_reason))
            final[index] = state
    if include_usage:
        yield chunk([], usage(final))
    yield format_sse_event(data_str="[DONE]")


# The application ------------------------------------------------------------------------------------------------------


async def _jobs_of_a_request():
    """A stack for jobs that are cancelled when the response has been sent, or the client has left."""
    with ExitStack() as stack:
        yield stack


def create_app(
    engine: "Engine",
    model_name: str,
    *,
    max_length: int = 2048,
    max_new_tokens: int | None = None,
    top_p: float = 0.7,
    temperature: float = 0.95,
    seed: int | None = None,
    **app_options,
) -> FastAPI:
    """The FastAPI application around an Engine.

    model_name           what clients call the model
    max_length ... seed  as `utils.add_generation_arguments` has them: used where a request says nothing
    app_options          api_key, cors and log_text of `serving.create_app`
    """
    from chatglm.engine import Request as EngineRequest

    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "chatglm"}
    question = {"model": model_name, "messages": [{"role": "user", "content": "你好"}]}
    examples = {"whole": {"value": question}, "streamed": {"value": {**question, "stream": True}}}
    not_found = {404: {"model": Error, "description": "The model has another name."}}

    def check_name(name: str) -> None:
        if name != model_name:
            sentence = f'there is no model {serving.describe_value(name)} here, only "{model_name}"'
            raise serving.RequestError(404, sentence, "model", "model_not_found")

    @router.get("/models", summary="Which models are there?")
    async def list_models() -> ModelList:
        """One: the model that the server was started with."""
        return {"object": "list", "data": [card]}

    @router.get("/models/{model:path}", summary="Is this model there?", responses=not_found)
    async def retrieve_model(model: str) -> ModelCard:
        """The model, if this is its name."""
        check_name(model)
        return card

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        response_model=Completion,
        response_model_exclude_unset=True,  # no `notes` without notes
        responses={
            200: {"content": {EventSourceResponse.media_type: {"itemSchema": SSE_EVENT}}},
            **not_found,
            **serving.error_responses(Error),
            413: {"model": Error, "description": "The body is too large."},
            "default": {"model": Error, "description": "Any other error."},
        },
    )
    async def create_completion(
        request: Annotated[CompletionRequest, Body(openapi_examples=examples)],
        http_request: Request,
        stack: Annotated[ExitStack, Depends(_jobs_of_a_request)],
    ):
        """The next answer in a conversation, or n of them.

        A stream has the events of OpenAI's: a chunk with the role, chunks with pieces of the answer, one with
        finish_reason, one with the numbers of tokens if asked for, then `[DONE]`. A failure is an event `error`.
        """
        check_name(request.model)
        try:
            prompt = conversation(request.messages)
        except ValueError as error:
            raise serving.RequestError(422, str(error), "messages") from error
        limits = (request.max_tokens, request.max_completion_tokens)
        # What prompt and answer together cannot reach is no limit.
        limit = min((limit for limit in limits if limit is not None and limit < max_length), default=max_new_tokens)
        first_seed = seed if request.seed is None else request.seed
        jobs = []
        for index in range(request.n or 1):
            engine_request = EngineRequest(
                **prompt,
                max_length=max_length,
                max_new_tokens=limit,
                top_p=top_p if request.top_p is None else request.top_p,
                temperature=temperature if request.temperature is None else request.temperature,
                seed=None if first_seed is None else first_seed + index,
                stop=tuple(request.stop or ()),
            )
            jobs.append(stack.enter_context(await submit(http_request, engine_request)))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        if request.stream:
            include_usage = bool(request.stream_options and request.stream_options.include_usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return EventSourceResponse(events(jobs, head, include_usage), headers=headers)
        states = [await serving.finish(http_request, job) for job in jobs]
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": state.text, "refusal": None},
                "logprobs": None,
                "finish_reason": state.finish_reason,
            }
            for index, state in enumerate(states)
        ]
        notes = {"notes": list(states[0].notes)} if states[0].notes else {}
        return {**head, "object": "chat.completion", "choices": choices, "usage": usage(states), **notes}

    async def submit(http_request: Request, engine_request):
        try:
            return await serving.submit(http_request, engine, engine_request)
        except serving.RequestError as error:
            if error.status_code != 422:
                raise
            # All else has been checked. LangChain knows this error by these words.
            sentence = f"the prompt is too long: {error.detail}"
            raise serving.RequestError(422, sentence, "messages", "context_length_exceeded") from error

    return serving.create_app(
        engine,
        router,
        title="ChatGLM for OpenAI clients",
        description="OpenAI's chat completions, answered by ChatGLM.",
        error_model=Error,
        **app_options,
    )


# The program ----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve ChatGLM to OpenAI clients: their base URL is .../v1.")
    utils.add_model_arguments(parser)
    utils.add_generation_arguments(parser)
    serving.add_server_arguments(parser, port=8000)
    serving.add_api_arguments(parser)
    parser.add_argument(
        "--model_name", help="what clients must call the model (default: its own name in small letters, chatglm-tiny)"
    )
    return parser


def main(argv=None) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with utils.main_errors(parser):
        listener = serving.bind(args)
        model, tokenizer = utils.load_model(**utils.model_options(args))

    from chatglm.engine import Engine

    name = args.model_name or utils.model_title(model).lower()
    with Engine(model, tokenizer, max_queue=args.max_queue) as engine:
        app = create_app(engine, name, **utils.generation_options(args), **serving.app_options(args))
        return serving.run(app, engine, listener)


if __name__ == "__main__":
    sys.exit(main())
