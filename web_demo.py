"""Talk with ChatGLM in the browser: `python web_demo.py`, a page made with Gradio.

Unusual here:
- Waiting happens in the engine, which knows everybody's place; Gradio's own queue lets all requests through.
- A session does one thing at a time, see `Turns`: whatever else a user asks for first ends the answer being given.
- What is shown is not quite what was said, see `to_markdown`; the model and saved files get what was said.
"""

import argparse
import asyncio
import html
import os
import re
import signal
import sys
import time
from contextlib import aclosing, asynccontextmanager, suppress

from markdown_it import MarkdownIt

import serving
import utils

TEXTS = {
    "zh": {
        "welcome": "想聊点什么？可以从下面的例子开始。",
        "ask": "输入问题",
        "submit": "提交",
        "stop": "停止",
        "clear": "清空对话历史",
        "save": "下载对话",
        "restore": "恢复对话",
        "dark": "深色 / 浅色",
        "max_length": "最大长度",
        "max_length_info": "提示与回答的词元数",
        "top_p": "Top P",
        "top_p_info": "候选词的累积概率",
        "temperature": "Temperature",
        "temperature_info": "越小越稳定",
        "caution": "Shift + 回车换行。回答可能有误，请核对。",
        "queued": "*排队等候中：第 {} 位*",
        "note": "提示：",
        "problem": "没有成功：",
        "length": "已达到最大长度，回答到此截断。",
        "examples": ["你好，介绍一下你自己", "晚上睡不着应该怎么办", "写一首关于秋天的诗", "法国的首都是哪里？"],
    },
    "en": {
        "welcome": "What is on your mind? Here are some ideas.",
        "ask": "Your question",
        "submit": "Submit",
        "stop": "Stop",
        "clear": "Clear history",
        "save": "Download conversation",
        "restore": "Restore conversation",
        "dark": "Dark / light",
        "max_length": "Maximum length",
        "max_length_info": "Tokens, with prompt",
        "top_p": "Top P",
        "top_p_info": "Probability kept",
        "temperature": "Temperature",
        "temperature_info": "Lower is steadier",
        "caution": "Shift + Enter starts a new line. Please check answers.",
        "queued": "*Waiting: number {} in the queue*",
        "note": "Note: ",
        "problem": "That did not work: ",
        "length": "The answer was cut off at the maximum length.",
        "examples": [
            "Who are you?",
            "I cannot sleep at night. What can I do?",
            "Write a short poem about autumn",
            "What is the capital of France?",
        ],
    },
}


def build_parser():
    """The command line: the flags all scripts share, and those of the page."""
    parser = argparse.ArgumentParser(description="Talk with ChatGLM in the browser.")
    utils.add_model_arguments(parser)
    utils.add_generation_arguments(parser)
    serving.add_server_arguments(parser, port=7860)
    group = parser.add_argument_group("page")
    group.add_argument("--inbrowser", action="store_true", help="open the page in this machine's browser")
    group.add_argument(
        "--share", action="store_true", help="also reach the page through a public address that Gradio's servers lend"
    )
    return parser


# What is shown --------------------------------------------------------------------------------------------------------

PARSER = MarkdownIt("commonmark", {"html": False}).disable("inline")  # where code blocks are is all it is asked
# Outside of code blocks. What is matched only to be left alone comes before what it may hold. Takes time in proportion
# to the length whatever the text: hence few lengths of ticks, few names.
SPECIAL = re.compile(
    r"""
      (?<!`) (?P<ticks>`{1,4}) (?!`) (?: (?! \n[ \t]*\n ) . )+? (?<!`) (?P=ticks) (?!`)  # `code`
    | \$\$ (?P<dollars> (?: (?! \$\$ ) . )+ ) \$\$
    | \\\[ (?P<brackets> (?: \\ [^\[\]] | [^\\] )+ ) \\\]
    | (?P<environment>
        \\begin\{ (?P<name> (?: equation | align(?:ed|at)? | gather(?:ed)? | array | cases | [bBpvV]?matrix ) \*? ) \}
        (?: (?! \\begin\{ (?P=name) \} ) . )+?
        \\end\{ (?P=name) \} )
    | \\\( (?P<parentheses> (?: \\ [^()] | (?! \n[ \t]*\n ) [^\\] )+ ) \\\)
    | \$ (?! [\s$] ) (?P<dollar> [^$\n]*? [^\s$\\] ) \$ (?! [\d$] )  # not "$5 and $10"
    | \\ [^\w\s]  # a sign made harmless
    | <https?://[^\s<>]+>
    | (?P<swallowed> < (?= [A-Za-z/!?] ) | ! (?= \[ ) | (?<= \] ) : | \* (?= \w+\# ) )
    """,
    re.VERBOSE | re.DOTALL,
)
LATEX = [
    {"left": r"\[{", "right": r"}\]", "display": True},
    {"left": r"\({", "right": r"}\)", "display": False},
]


def to_markdown(text):
    r"""The Markdown that shows all of a text on a page that reads LaTeX between the delimiters LATEX only.

    - HTML is text. So are pictures (the page would fetch them from anywhere), `[1]: ...` (it would vanish) and the
      stars of attribute lists, `type#dress*colour#white*...`.
    - Formulas in `$`, `$$`, `\(`, `\[` and environments get the delimiters of LATEX, which Gradio would otherwise find
      in code, too; other dollars are money.
    - Code is left alone. A diagram is code.
    """
    lines = re.findall(r"[^\n]*\n|[^\n]+", re.sub(r"\r\n?", "\n", text))  # lines as the parser counts them
    shown, start = [], 0
    for token in PARSER.parse(text):
        if token.type in ("fence", "code_block") and token.map[0] >= start:
            first, end = token.map
            shown.append(SPECIAL.sub(_shown, "".join(lines[start:first])))
            if token.info.startswith("mermaid"):
                lines[first] = lines[first].replace("mermaid", " mermaid", 1)
            shown += lines[first:end]
            start = end
    return "".join(shown) + SPECIAL.sub(_shown, "".join(lines[start:]))


def _shown(match):
    if match["swallowed"]:
        return "&lt;" if match[0] == "<" else "\\" + match[0]
    if formula := match["dollars"] or match["brackets"] or match["environment"]:
        return rf"\[{{{formula}}}\]"
    if formula := match["parentheses"] or match["dollar"]:
        return rf"\({{{formula}}}\)"
    return match[0]


def from_markdown(text):
    """What a user means who has edited the output of to_markdown: without what it put in."""
    text = re.sub(r"&lt;(?=[A-Za-z/!?])", "<", text)
    return re.sub(r"\\(?=!\[|\*\w+#)|(?<=\])\\(?=:)|(?<=\\[(\[])\{|\}(?=\\[)\]])", "", text)


def to_messages(history):
    """The rounds as gr.Chatbot takes them: two messages each."""
    return [
        {"role": role, "content": to_markdown(text)}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def texts_for(request, texts=TEXTS):
    """The texts in the language that the browser of a request asks for: Chinese, or else English."""
    return texts["zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"]


# Turns ----------------------------------------------------------------------------------------------------------------


class Turn:
    """One thing a session does, perhaps with jobs of an engine; `cancel` ends the jobs, even those yet to come."""

    def __init__(self):
        self.jobs = []
        self.is_cancelled = False
        self.ended = asyncio.Event()

    def start(self, job):
        self.jobs.append(job)
        if self.is_cancelled:
            job.cancel()

    def cancel(self):
        self.is_cancelled = True
        for job in self.jobs:
            job.cancel()


class Turns:
    """What each session is doing: one turn at a time, the newest. Lives in the event loop of the server."""

    def __init__(self):
        self._turns = {}

    @asynccontextmanager
    async def begin(self, session):
        """A Turn, once the one before it, cancelled now, has ended and shown its last state."""
        before, turn = self._turns.get(session), Turn()
        self._turns[session] = turn
        try:
            if before:
                before.cancel()
                await before.ended.wait()
            yield turn
        finally:
            turn.ended.set()
            if self.is_newest(session, turn):
                del self._turns[session]

    def is_newest(self, session, turn):
        return self._turns.get(session) is turn

    def cancel(self, session):
        if session in self._turns:
            self._turns[session].cancel()


# The page -------------------------------------------------------------------------------------------------------------

MOST_SESSIONS = 1000  # that Gradio remembers, closed tabs as well: some 150 kB each, and what was said
MOST_ROUNDS = 1000  # of a restored conversation: with each token the page looks at all of them
FONTS = ["-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "system-ui", "sans-serif"]
CSS = """
.gradio-container .main { padding: 16px 16px 0 !important }
.gradio-container main { width: 100%; max-width: 1080px !important; margin: auto; padding: 0 !important }
#head { align-items: center; flex-wrap: nowrap }
#head h1 { font-size: 1.25rem; margin: 0 }
#theme { font-weight: 400 }
#chat { height: calc(100dvh - 12rem); min-height: 18rem }
#chat .top-panel { display: none }  /* a second "clear" over the messages */
#chat .placeholder-content { justify-content: center; gap: 8px }
#chat .placeholder { height: auto; flex: none; text-align: center; opacity: .8 }
#chat .examples { width: 100%; max-width: 34rem; margin: 0 auto; box-sizing: border-box }
#talk { gap: 10px }
#ask { flex-wrap: nowrap; gap: 10px; align-items: flex-end }
.toast-title { display: none }  /* "Warning" in any language */
#caution { opacity: .55; text-align: center }
#caution p { font-size: .8rem; margin: 0 }
#controls { gap: 10px }
#controls button { font-weight: 500 }
footer { margin: 0 !important; opacity: .7 }
footer .divider { display: none !important }
@media (max-width: 640px) {
    #chat { height: calc(100dvh - 11rem) }
    #question textarea { font-size: 16px }  /* smaller ones make phones zoom in */
}
"""
SAVE_FILE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "chatglm-" + new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-") + ".json";
    link.click();
    URL.revokeObjectURL(link.href);
}"""
SWITCH_THEME = """() => {
    const dark = document.body.classList.toggle("dark");
    localStorage.setItem("theme", dark ? "dark" : "light");
}"""
RECALL_THEME = """() => {
    const theme = localStorage.getItem("theme");
    if (theme) document.body.classList.toggle("dark", theme === "dark");
}"""


def add_head(text, title):
    """The first line of a page: its title, and the button between dark and light; text is a gr.I18n."""
    import gradio as gr

    with gr.Row(elem_id="head"):
        gr.Markdown(f"# {title}")
        theme = gr.Button(f"◐ {text('dark')}", size="sm", elem_id="theme", scale=0, min_width=120)
    theme.click(None, js=SWITCH_THEME)


def add_question(text):
    """Where a question is typed, with the buttons to submit it and, hidden at first, to stop its answer: all three."""
    import gradio as gr

    with gr.Row(elem_id="ask"):
        question = gr.Textbox(
            label=text("ask"),  # for those who hear the page
            placeholder=text("ask"),
            show_label=False,
            container=False,
            lines=1,
            max_lines=8,
            autofocus=True,
            elem_id="question",
            scale=1,
        )
        submit = gr.Button(text("submit"), variant="primary", elem_id="submit", scale=0, min_width=88)
        stop = gr.Button(text("stop"), elem_id="stop", scale=0, min_width=88, visible=False)
    return question, submit, stop


def add_sliders(text, max_length, top_p, temperature):
    """The three gr.Sliders of an answer, standing at these values; text is a gr.I18n."""
    import gradio as gr

    return [
        gr.Slider(0, max(top, value), value, step=step, label=text(name), info=text(f"{name}_info"), elem_id=name)
        for name, value, top, step in (
            ("max_length", max_length, 4096, 1),
            ("top_p", top_p, 1, 0.01),
            ("temperature", temperature, 1, 0.01),
        )
    ]


def complain(error, request):
    """Tell the user what went wrong, in a sentence that stays until it is closed."""
    import gradio as gr

    gr.Warning(texts_for(request)["problem"] + html.escape(str(error)), duration=None)


def create_demo(engine, title, max_length=2048, top_p=0.7, temperature=0.95, max_new_tokens=None, seed=None):
    """The page as gr.Blocks; `launch` serves it.

    engine                           answers the questions, an Engine
    title                            name of the model
    max_length, top_p, temperature   where the sliders stand at first
    max_new_tokens, seed             as `chat` takes them, for every answer
    """
    import gradio as gr

    from chatglm.chat import history_from_json, history_to_json
    from chatglm.engine import EngineClosedError, QueueFullError, Request

    text = gr.I18n(**TEXTS)
    turns = Turns()

    with gr.Blocks(
        title=title, analytics_enabled=False, fill_height=True, fill_width=True, delete_cache=(3600, 3600)
    ) as demo:
        history = gr.State([])
        asked = gr.State("")
        file = gr.Textbox(visible="hidden")
        add_head(text, title)
        with gr.Row(elem_id="page"):
            with gr.Column(scale=4, elem_id="talk"):
                chatbot = gr.Chatbot(
                    placeholder=text("welcome"),
                    show_label=False,
                    elem_id="chat",
                    height=None,
                    editable="user",
                    buttons=["copy"],
                    latex_delimiters=LATEX,
                    allow_tags=False,
                    sanitize_html=True,
                )
                question, submit, stop = add_question(text)
                gr.Markdown(text("caution"), elem_id="caution")
            with gr.Column(scale=1, min_width=240, elem_id="controls"):
                sliders = add_sliders(text, max_length, top_p, temperature)
                clear = gr.Button(text("clear"), size="md", elem_id="clear")
                save = gr.Button(text("save"), size="md", elem_id="save")
                restore = gr.UploadButton(
                    text("restore"), size="md", file_types=[".json"], type="binary", elem_id="restore"
                )

        async def reply(query, rounds, max_length, top_p, temperature, request: gr.Request):
            """Ask query after rounds; yields what changes on the page."""
            if not query.strip():
                yield nothing
                return
            texts = texts_for(request)
            async with turns.begin(request.session_hash) as turn:
                before = await asyncio.to_thread(to_messages, rounds)
                before_and_query = [*before, {"role": "user", "content": await asyncio.to_thread(to_markdown, query)}]
                try:
                    job = await asyncio.to_thread(
                        engine.submit,
                        Request(query, rounds, max_length, max_new_tokens, top_p, temperature, seed),
                    )
                except (TypeError, ValueError, QueueFullError, EngineClosedError) as error:
                    complain(error, request)
                    yield {history: rounds, chatbot: before, question: query, **idle}
                    return
                with job:
                    turn.start(job)
                    yield {question: "", submit: gr.update(visible=False), stop: gr.update(visible=True)}
                    async with aclosing(job.states_async()) as states:
                        async for state in states:
                            if not turns.is_newest(request.session_hash, turn):
                                return
                            answer = to_markdown(state.text) or "…"
                            if state.position and engine.running:  # else it is about to begin
                                answer = texts["queued"].format(state.position)
                            yield {
                                history: [*rounds, (query, state.text)] if state.text else rounds,
                                chatbot: [*before_and_query, {"role": "assistant", "content": answer}],
                            }
                if state.error:
                    complain(state.error, request)
                for note in state.notes:
                    gr.Info(texts["note"] + html.escape(note))
                if state.finish_reason == "length":
                    gr.Info(texts["note"] + texts["length"])
                if state.text:
                    yield idle
                else:  # the question is not lost
                    yield {chatbot: before, question: query, **idle}

        def retry(rounds, event: gr.RetryData):
            rounds = rounds[: event.index // 2 + 1]
            return {history: rounds[:-1], asked: rounds[-1][0] if rounds else ""}  # none: the session is forgotten

        def edit(rounds, event: gr.EditData):
            return {history: rounds[: event.index // 2], asked: from_markdown(event.value)}

        def choose(event: gr.SelectData):
            return event.value["text"]

        async def undo(rounds, request: gr.Request, event: gr.UndoData):
            async with turns.begin(request.session_hash):
                kept, undone = rounds[: event.index // 2], rounds[event.index // 2 :]
                shown = await asyncio.to_thread(to_messages, kept)
                yield {history: kept, chatbot: shown, question: undone[0][0] if undone else "", **idle}

        async def forget(request: gr.Request):
            async with turns.begin(request.session_hash):
                yield {history: [], chatbot: [], **idle}

        async def read(content, request: gr.Request):
            try:
                rounds = await asyncio.to_thread(history_from_json, content)
                if len(rounds) > MOST_ROUNDS:
                    raise ValueError(f"a conversation of at most {MOST_ROUNDS} rounds can be shown, got {len(rounds)}")
            except ValueError as error:
                complain(error, request)
                yield nothing
                return
            async with turns.begin(request.session_hash):
                yield {history: rounds, chatbot: await asyncio.to_thread(to_messages, rounds), **idle}

        async def interrupt(request: gr.Request):
            turns.cancel(request.session_hash)

        def examples(request: gr.Request):
            return gr.Chatbot(examples=[{"text": example} for example in texts_for(request)["examples"]])

        nothing = {question: gr.skip()}  # a generator that yields nothing at all would empty the page
        idle = {submit: gr.update(visible=True), stop: gr.update(visible=False)}
        page = [history, chatbot, question, submit, stop]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        often = {"trigger_mode": "multiple", **quiet}

        gr.on([question.submit, submit.click], reply, [question, history, *sliders], page, **often)
        for event in (
            chatbot.retry(retry, history, [history, asked], **quiet),
            chatbot.edit(edit, history, [history, asked], **quiet),
            chatbot.example_select(choose, None, asked, **quiet),
        ):
            event.then(reply, [asked, history, *sliders], page, **often)
        chatbot.undo(undo, history, page, **quiet)
        stop.click(interrupt, **quiet)
        gr.on([clear.click, chatbot.clear], forget, None, page, **quiet)
        restore.upload(read, restore, page, **quiet)
        save.click(history_to_json, history, file, **quiet).then(None, file, None, js=SAVE_FILE)
        demo.load(examples, None, chatbot, **quiet)
        demo.unload(interrupt)  # the tab was closed or reloaded
    return demo


def launch(demo, texts=TEXTS, css=CSS, **options):
    """Serve a page whose gr.I18n has these texts; the options are those of demo.launch."""
    import gradio as gr

    demo.queue(default_concurrency_limit=None)
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS)
    demo.launch(
        i18n=gr.I18n(**texts),
        theme=theme,
        css=css,
        js=RECALL_THEME,
        footer_links=["settings"],
        run_history=False,
        max_file_size="1mb",
        state_session_capacity=MOST_SESSIONS,
        **options,
    )


def prepare(args):
    """What comes before a model is loaded: a taken port shows, and args.port is one that is free. Raises OSError."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before anything imports gradio
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # after each answer Gradio adds up as many
    with serving.bind(args) as listener:
        args.port = listener.getsockname()[1]


def serve(demo, args, **options):
    """Serve a page where the flags say, until Ctrl-C or SIGTERM; the options are those of `launch`. Raises OSError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where = {"server_name": args.host, "server_port": args.port, "inbrowser": args.inbrowser, "share": args.share}
    launch(demo, **options, **where, prevent_thread_lock=True, quiet=True)
    print(f"listening on {demo.local_url}   Ctrl-C ends", file=sys.stderr)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def main(argv=None):
    """Serve the page as the command line argv says, until Ctrl-C or SIGTERM; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with utils.main_errors(parser):
        prepare(args)
        model, tokenizer = utils.load_model(**utils.model_options(args))

    from chatglm.engine import Engine

    with Engine(model, tokenizer, max_queue=args.max_queue) as engine:
        demo = create_demo(engine, utils.model_title(model), **utils.generation_options(args))
        with utils.main_errors(parser):
            serve(demo, args)
    demo.close(verbose=False)  # at once, or within 5 s if an answer was being given
    return 0


if __name__ == "__main__":
    sys.exit(main())
