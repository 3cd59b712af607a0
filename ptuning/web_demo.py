"""Ask a model before and after tuning, side by side: `python ptuning/web_demo.py --adapter FOLDER`, made with Gradio.

Unusual here:
- Base and tuned model share their weights (unless all of them were tuned), and each has an engine with a queue of its
  own. They compute in one thread, a token of one, a token of the other, so both answers grow: see `InTurns`.
- Without --seed each question gets a seed of its own, the same for both models: what differs is the tuning.
- The rest of the page is that of web_demo.py in the folder above.
"""

import asyncio
import html
import random
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # first: there, web_demo is not this file

import utils  # noqa: E402
import web_demo  # noqa: E402
from web_demo import to_markdown, to_messages  # noqa: E402

SIDES = ("base", "tuned")
TEXTS = {
    "zh": web_demo.TEXTS["zh"]
    | {
        "base": "微调前",
        "tuned": "微调后",
        "welcome": "同一个问题，两个模型各自回答。",
        "nothing": "一个字也没有回答。",
    },
    "en": web_demo.TEXTS["en"]
    | {
        "base": "Before tuning",
        "tuned": "After tuning",
        "welcome": "One question, an answer from each model.",
        "nothing": "it said nothing.",
    },
}
CSS = (
    web_demo.CSS
    + """
.gradio-container main { max-width: 1400px !important }
.side { gap: 4px }
.side h3 { font-size: 1rem; margin: 0 }
.chat { height: calc(100dvh - 18rem); min-height: 14rem }
.chat .top-panel { display: none }
.chat .placeholder-content { justify-content: center }
#clear { align-self: center }
@media (max-width: 700px) { .chat { height: 38dvh } }
"""
)


def build_parser():
    """The command line: the flags of the other page, and those that the original page had."""
    parser = web_demo.build_parser()
    parser.description = "Ask a ChatGLM before and after tuning, side by side in the browser."
    group = parser.add_argument_group("of the original page")
    group.add_argument("--ptuning_checkpoint", dest="adapter", metavar="FOLDER", help="the same as --adapter")
    group.add_argument(
        "--pre_seq_len",
        type=int,
        metavar="TOKENS",
        help="length of the prefix: the adapter knows it, another one is refused (default: what the adapter says)",
    )
    group.add_argument(
        "--prefix_projection",
        action="store_true",
        help="the prefix comes out of an MLP: the adapter knows it, one without is refused (default: what it says)",
    )
    return parser


def load(args):
    """Models, tokenizers and names of both sides, as the flags say.

    Raises ValueError, OSError or MemoryError.
    """
    from chatglm.adapters import adapter_kind, apply_adapter, open_adapter, shared_copy

    if args.adapter is None:
        raise ValueError("what is to be compared? Give the folder of an adapter or of a tuned model: --adapter FOLDER")
    options = utils.model_options(args) | {"adapter": None}
    is_model = adapter_kind(args.adapter) is None
    what = "all parameters" if is_model else open_adapter(args.adapter).title
    base, tokenizer = utils.load_model(**options)
    if is_model:
        tuned, tuned_tokenizer = utils.load_model(**options | {"model_name_or_path": args.adapter, "revision": None})
    else:
        tuned, tuned_tokenizer = apply_adapter(shared_copy(base), args.adapter), tokenizer
        print(f"adapter {args.adapter}   {what}", file=sys.stderr)
    for flag in ("pre_seq_len", "prefix_projection"):
        given, found = getattr(args, flag), getattr(tuned.config, flag)
        if given and given != found:
            raise ValueError(f"{flag} is {found} in {args.adapter}, got {given}: leave out --{flag}")
    folder = Path(args.adapter).resolve()
    name = f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
    return (base, tuned), (tokenizer, tuned_tokenizer), (utils.model_title(base), f"{name} ({what})")


class InTurns:
    """A model whose answers are computed in the thread of worker: token by token in turn with others that do so.

    One thread, because two that compute at the same time wait for each other's cores longer than they compute. Its
    queue is first come, first served.
    """

    def __init__(self, model, worker: ThreadPoolExecutor):
        self.generation_config = model.generation_config
        self._model, self._worker = model, worker

    def stream_chat(self, *args, **options):
        """As that of the model."""
        with closing(self._model.stream_chat(*args, **options)) as stream:
            while (step := self._worker.submit(next, stream, None).result()) is not None:
                yield step


async def states_of(jobs) -> AsyncIterator:
    """Yields (index, state) whenever the state of one of the jobs has changed, the final ones last."""
    streams = [job.states_async() for job in jobs]
    coming = {asyncio.ensure_future(anext(stream, None)): index for index, stream in enumerate(streams)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, state = coming.pop(task), task.result()
                if state is not None:
                    yield index, state
                    coming[asyncio.ensure_future(anext(streams[index], None))] = index
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def create_demo(engines, names, max_length=2048, top_p=0.7, temperature=0.95, max_new_tokens=None, seed=None):
    """The page as gr.Blocks; `web_demo.launch` serves it with TEXTS and CSS.

    engines, names                   of base and tuned model: an Engine and what to call it
    max_length, top_p, temperature   where the sliders stand at first
    max_new_tokens, seed             as `chat` takes them, for every answer; without a seed both get the same new one
    """
    import gradio as gr

    from chatglm.engine import EngineClosedError, QueueFullError, Request

    text = gr.I18n(**TEXTS)
    turns = web_demo.Turns()
    histories, chatbots = [], []

    with gr.Blocks(
        title=names[1], analytics_enabled=False, fill_height=True, fill_width=True, delete_cache=(3600, 3600)
    ) as demo:
        web_demo.add_head(text, names[0])
        with gr.Row(elem_id="page"):
            for side, name in zip(SIDES, names, strict=True):
                with gr.Column(min_width=300, elem_classes="side"):
                    gr.Markdown(f"### {text(side)} · {name}", elem_id=f"{side}_name")
                    histories.append(gr.State([]))
                    chatbots.append(
                        gr.Chatbot(
                            placeholder=text("welcome"),
                            show_label=False,
                            elem_id=side,
                            elem_classes="chat",
                            height=None,
                            buttons=["copy"],
                            latex_delimiters=web_demo.LATEX,
                            allow_tags=False,
                            sanitize_html=True,
                        )
                    )
        question, submit, stop = web_demo.add_question(text)
        with gr.Row(elem_id="controls"):
            sliders = web_demo.add_sliders(text, max_length, top_p, temperature)
            clear = gr.Button(text("clear"), size="md", elem_id="clear", scale=0, min_width=140)
        gr.Markdown(text("caution"), elem_id="caution")

        async def reply(query, base_rounds, tuned_rounds, max_length, top_p, temperature, request: gr.Request):
            """Ask both models query, each after its own rounds; yields what changes on the page."""
            if not query.strip():
                yield nothing
                return
            texts = web_demo.texts_for(request, TEXTS)
            rounds = base_rounds, tuned_rounds
            options = max_length, max_new_tokens, top_p, temperature, random.getrandbits(63) if seed is None else seed
            async with turns.begin(request.session_hash) as turn:
                before = [await asyncio.to_thread(to_messages, earlier) for earlier in rounds]
                asked = {"role": "user", "content": await asyncio.to_thread(to_markdown, query)}
                with ExitStack() as jobs_to_end:
                    jobs = []
                    try:
                        for engine, earlier in zip(engines, rounds, strict=True):
                            job = await asyncio.to_thread(engine.submit, Request(query, earlier, *options))
                            jobs.append(jobs_to_end.enter_context(job))
                    except (TypeError, ValueError, QueueFullError, EngineClosedError) as error:
                        web_demo.complain(error, request)
                        yield {question: query, **idle}
                        return
                    for job in jobs:
                        turn.start(job)
                    yield {question: "", submit: gr.update(visible=False), stop: gr.update(visible=True)}
                    async with aclosing(states_of(jobs)) as states:
                        async for i, state in states:
                            if not turns.is_newest(request.session_hash, turn):
                                return
                            answer = to_markdown(state.text) or "…"
                            if state.position and engines[i].running:  # else it is about to begin
                                answer = texts["queued"].format(state.position)
                            yield {
                                histories[i]: [*rounds[i], (query, state.text)] if state.text else rounds[i],
                                chatbots[i]: [*before[i], asked, {"role": "assistant", "content": answer}],
                            }
                changes = dict(idle)
                for i, side in enumerate(SIDES):
                    state = jobs[i].state
                    if state.error:
                        web_demo.complain(f"{texts[side]}: {state.error}", request)
                    notes = [*state.notes, *[texts["length"]] * (state.finish_reason == "length")]
                    notes += [texts["nothing"]] * (state.finish_reason == "stop" and not state.text)
                    for note in notes:
                        gr.Info(f"{texts['note']}{texts[side]}: {html.escape(note)}")
                    if not state.text:
                        changes[chatbots[i]] = before[i]
                if all(chatbot in changes for chatbot in chatbots):
                    changes[question] = query  # it is not lost
                yield changes

        async def forget(request: gr.Request):
            async with turns.begin(request.session_hash):
                yield {**{part: [] for part in (*histories, *chatbots)}, **idle}

        async def interrupt(request: gr.Request):
            turns.cancel(request.session_hash)

        nothing = {question: gr.skip()}  # a generator that yields nothing at all would empty the page
        idle = {submit: gr.update(visible=True), stop: gr.update(visible=False)}
        page = [*histories, *chatbots, question, submit, stop]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}

        asking = [question.submit, submit.click]
        gr.on(asking, reply, [question, *histories, *sliders], page, trigger_mode="multiple", **quiet)
        stop.click(interrupt, **quiet)
        gr.on([clear.click, *(chatbot.clear for chatbot in chatbots)], forget, None, page, **quiet)
        demo.unload(interrupt)  # the tab was closed or reloaded
    return demo


def main(argv=None):
    """Serve the page as the command line argv says, until Ctrl-C or SIGTERM; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with utils.main_errors(parser):
        web_demo.prepare(args)
        models, tokenizers, names = load(args)

    from chatglm.engine import Engine

    with ThreadPoolExecutor(1) as worker, ExitStack() as engines_to_end:
        engines = [
            engines_to_end.enter_context(Engine(InTurns(model, worker), tokenizer, max_queue=args.max_queue))
            for model, tokenizer in zip(models, tokenizers, strict=True)
        ]
        demo = create_demo(engines, names, **utils.generation_options(args))
        with utils.main_errors(parser):
            web_demo.serve(demo, args, texts=TEXTS, css=CSS)
    demo.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
