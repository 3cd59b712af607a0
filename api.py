"""Answer questions over HTTP, one JSON answer per question: `python api.py`, then

    curl http://127.0.0.1:8000 -H "Content-Type: application/json" -d '{"prompt": "你好", "history": []}'

http://127.0.0.1:8000/docs describes all fields.
"""

import argparse
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

import serving
import utils

if TYPE_CHECKING:  # importing it imports torch, and `--help` need not wait
    from chatglm.engine import Engine


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="ChatGLM as an HTTP server: one JSON answer per question.")
    utils.add_model_arguments(parser)
    serving.add_server_arguments(parser, port=8000)
    serving.add_api_arguments(parser)
    return parser


def _check_pair(value):
    if not isinstance(value, list) or len(value) != 2:
        got = f"a list of {len(value)}" if isinstance(value, list) else serving.describe_value(value)
        raise ValueError(f"must be a pair [prompt, response] of strings, got {got}")
    return value


Pair = Annotated[
    list[serving.Text],
    Field(min_length=2, max_length=2, title="[prompt, response]"),
    BeforeValidator(_check_pair),
]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1), serving.WHOLE]


class Question(BaseModel):
    """A prompt, and how to answer it: everything else may be left out or null, which is the default."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {"prompt": "你好", "history": [], "max_length": 2048, "top_p": 0.7, "temperature": 0.95},
                {"prompt": "你叫什么名字？", "history": [["你好", "你好！很高兴见到你。"]], "temperature": 0},
            ]
        },
    )

    prompt: Annotated[serving.Text, Field(description="The question.")]
    history: Annotated[
        Annotated[list[Pair], Field(fail_fast=True)] | None,
        Field(description="Earlier rounds, oldest first, `[prompt, response]` each."),
    ] = None
    max_length: Annotated[Tokens | None, Field(description="Most tokens of prompt + answer (default: 2048).")] = None
    top_p: Annotated[
        float | None,
        Field(ge=0, le=1, description="Sample among the likeliest tokens that reach this probability (default: 0.7)."),
    ] = None
    temperature: Annotated[
        float | None,
        Field(ge=0, le=100, description="Higher = more varied, 0 = always the likeliest token (default: 0.95)."),
    ] = None
    max_new_tokens: Annotated[
        Tokens | None, Field(description="Most tokens of the answer alone (default: no limit of its own).")
    ] = None
    seed: Annotated[
        Annotated[int, Field(ge=1 - 2**53, le=2**53 - 1), serving.WHOLE] | None,
        Field(description="Makes the answer repeatable (default: different every time)."),
    ] = None
    stop: Annotated[
        serving.stop_strings(16) | None,
        Field(description="The answer ends before this string, or the first of these."),
    ] = None


class Answer(BaseModel):
    """What the model said."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "response": "你好！很高兴见到你。",
                    "history": [["你好", "你好！很高兴见到你。"]],
                    "status": 200,
                    "time": "2026-01-31 12:00:00",
                }
            ]
        }
    )

    response: Annotated[str, Field(description="The answer.")]
    history: Annotated[list[Pair], Field(description="The rounds that came, and this one: send it with the next.")]
    status: Annotated[int, Field(description="Always 200; errors have the HTTP status and `detail`.")]
    time: Annotated[str, Field(description="When the answer was ready, YYYY-mm-dd HH:MM:SS, local time of the server.")]


def create_app(engine: "Engine", **options) -> FastAPI:
    """The application that answers with engine; options: api_key, cors and log_text of `serving.create_app`."""
    from chatglm.engine import Request as EngineRequest

    router = APIRouter(tags=["chat"], responses=serving.error_responses())

    @router.post("/", summary="Ask a question")
    async def ask(request: Request, question: Question) -> Answer:
        """Waits for the whole answer. A client that leaves before has it cancelled."""
        given = question.model_dump(exclude={"prompt"}, exclude_none=True)
        state = await serving.answer(request, engine, EngineRequest(question.prompt, **given))
        return Answer(
            response=state.text,
            history=[*(question.history or []), [question.prompt, state.text]],
            status=200,
            time=datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        )

    return serving.create_app(
        engine, router, title="ChatGLM", description="One question, one answer, as JSON.", **options
    )


def main(argv=None):
    """Serve with the command line argv; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with utils.main_errors(parser):
        listener = serving.bind(args)
        model, tokenizer = utils.load_model(**utils.model_options(args))
    from chatglm.engine import Engine

    with Engine(model, tokenizer, args.max_queue) as engine:
        return serving.run(create_app(engine, **serving.app_options(args)), engine, listener)


if __name__ == "__main__":
    sys.exit(main())
