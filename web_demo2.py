"""Talk with ChatGLM in the browser: `python web_demo2.py` or `streamlit run web_demo2.py`, a page made with Streamlit.

Unusual here:
- Streamlit runs this file again, from top to bottom, whenever somebody touches the page. So an answer belongs to the
  Conversation of its session, not to the run that draws it: moving a slider does not break it off.
- Streamlit ends a run, such as that of a closed tab, only where the run shows or reads something. So `show_answer`
  reads something many times a second.
- What is shown is not quite what was said, see `to_markdown`; the model and saved files get what was said.
- Addresses, and what Streamlit is not to do, are in .streamlit/config.toml.
"""

import argparse
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field

import streamlit as st
from markdown_it import MarkdownIt
from streamlit.runtime.scriptrunner import StopException

import serving
import utils

TEXTS = {
    "zh": {
        "welcome": "有什么想聊的？",
        "ask": "输入问题，按回车提交；换行用 Shift + 回车",
        "stop": "停止",
        "clear": "清空对话历史",
        "save": "下载对话",
        "restore": "恢复对话",
        "max_length": "最大长度",
        "max_length_help": "提示与回答一共最多多少个词元",
        "top_p": "Top P",
        "top_p_help": "只在概率合计达到此值的词里选",
        "temperature": "Temperature",
        "temperature_help": "越小越稳定，0 总选最可能的词",
        "caution": "回答由模型生成，可能有误，请自行核对。",
        "loading": "正在加载模型……",
        "queued": "*排队等候中：第 {} 位*",
        "problem": "没有成功：",
        "length": "已达到最大长度，回答到此截断。",
        "restored": "已恢复 {} 轮对话。",
        "earlier": "更早的 {} 轮没有显示，但仍在对话历史里。",
    },
    "en": {
        "welcome": "What is on your mind?",
        "ask": "Ask anything; Enter sends, Shift + Enter starts a new line",
        "stop": "Stop",
        "clear": "Clear history",
        "save": "Download conversation",
        "restore": "Restore conversation",
        "max_length": "Maximum length",
        "max_length_help": "Most tokens of prompt and answer together",
        "top_p": "Top P",
        "top_p_help": "Choose among the likeliest words that reach this probability",
        "temperature": "Temperature",
        "temperature_help": "Lower is steadier; 0 always takes the likeliest word",
        "caution": "Answers come from a model and may be wrong: please check them.",
        "loading": "Loading the model…",
        "queued": "*Waiting: number {} in the queue*",
        "problem": "That did not work: ",
        "length": "The answer was cut off at the maximum length.",
        "restored": "Rounds restored: {}.",
        "earlier": "Earlier rounds not shown, but part of the history: {}.",
    },
}
PORT = 8501
FRAME_SECONDS = 0.05  # between two drawings of a growing answer
CURSOR = "▌"
SHOWN_ROUNDS = 100  # all that is shown is sent anew whenever somebody touches the page


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError, because a page cannot exit."""

    def error(self, message):
        raise ValueError(message)


def build_parser():
    """The command line: the flags all scripts share. Host and port are None if not given."""
    parser = Parser(prog="web_demo2.py", description="Talk with ChatGLM in the browser.")
    utils.add_model_arguments(parser)
    utils.add_generation_arguments(parser)
    serving.add_server_arguments(parser, port=PORT)
    parser.set_defaults(host=None, port=None)
    return parser


@st.cache_resource(show_spinner=False)
def start_engine(argv):
    """The engine and the title of the model, once for all sessions.

    argv  the command line, a tuple

    Raises what `utils.main_errors` expects.
    """
    from chatglm.engine import Engine

    args = build_parser().parse_args(argv)
    model, tokenizer = utils.load_model(**utils.model_options(args))
    return Engine(model, tokenizer, args.max_queue), utils.model_title(model)


# What is shown --------------------------------------------------------------------------------------------------------

PARSER = MarkdownIt("commonmark", {"html": False})
# Outside of code blocks. What is only matched to be left alone comes before what it may hold. The limits keep the time
# linear for a text made to be slow.
SPECIAL = re.compile(
    r"""
      (?<!`) (?P<ticks>`+) (?!`) (?: (?! \n[ \t]*\n ) . ){1,3000}? (?<!`) (?P=ticks) (?!`)           # `code`
    | \$\$ (?P<dollars> (?: (?! \$\$ ) . )+ ) \$\$
    | \\\[ (?P<brackets> (?: (?! \\\[ ) . )+? ) \\\]
    | (?P<environment> \\begin\{ (?P<name> \w+ \*? ) \} .{1,3000}? \\end\{ (?P=name) \} )
    | \$ (?P<dollar> (?! [\s$] ) [^$\n]*? [^\s$\\] ) \$ (?! [\d$] )                           # not "$5 and $10"
    | \\\( (?P<parentheses> (?: (?! \\\( | \n[ \t]*\n ) . )+? ) \\\)
    | \\ [^\w\s]                                                                              # a sign made harmless
    | <https?://[^\s<>]+>
    | (?P<swallowed> \$ | < (?= [A-Za-z/!?] ) | : (?= [A-Za-z] ) | ! (?= \[ ) | ^[ ]{0,3} \[ (?= [^\]\n]+ \]: ) )
    | (?P<line> \n )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
LIST_ITEM = re.compile(r" *(?:(?:[-*+]|\d+[.)]) +)*")  # up to where its text begins


def to_markdown(text):
    """The Markdown that makes Streamlit show all of a text.

    - Formulas get the delimiters Streamlit knows: `$`, and `$$` on lines of their own. Other dollars are money.
    - Pictures stay text, for the page would fetch them from anywhere; so do `:red[...]` and `[1]: ...`.
    - The lines of a poem stay apart.
    - HTML is text. Streamlit shows it so, but with our signs in it, if it may see that it is HTML.
    - Code is left alone.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = re.split("(?<=\n)", text)
    shown, start = [], 0
    for token in PARSER.parse(text):
        if token.type in ("fence", "code_block") and token.map[0] >= start:
            first, end = token.map
            shown += [SPECIAL.sub(_replacement, "".join(lines[start:first])), *lines[first:end]]
            start = end
    return "".join(shown) + SPECIAL.sub(_replacement, "".join(lines[start:]))


def _replacement(match):
    if formula := match["dollars"] or match["brackets"] or match["environment"]:
        line = match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.start()]
        indent = " " * len(LIST_ITEM.match(line)[0])
        return f"\n$$\n{formula.strip()}\n$$\n".replace("\n", "\n" + indent)
    if formula := match["dollar"] or match["parentheses"]:
        return f"${formula.strip()}$"
    if match["swallowed"]:
        return match[0][:-1] + "\\" + match[0][-1]
    return "  \n" if match["line"] else match[0]


def show_question(query):
    """Draw a question as it was typed."""
    with st.chat_message("user"):
        st.text(query)


def show_answer(job, texts, stop):
    """Draw the answer of a job while it grows, and a button that calls stop; returns the final state."""
    place, button = st.empty(), st.empty()
    button.button(texts["stop"], on_click=stop)
    shown = None
    while shown is None or shown.finish_reason is None:
        st.session_state.get("question")  # here Streamlit may end this run
        state = job.state
        if state != shown:
            ending = "" if state.finish_reason else CURSOR
            waiting = texts["queued"].format(state.position) if state.position else ""
            place.markdown(waiting or to_markdown(state.text) + ending)
            shown = state
        with suppress(TimeoutError):
            job.result(FRAME_SECONDS)
    button.empty()
    return shown


# The page -------------------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """What a session has said so far, and the job that answers its last question.

    remark  what to tell the user once: a function of Streamlit, and its text
    files   how many were restored

    As a context manager it breaks off the answer when Streamlit stops the run: the user has left.
    """

    history: list = field(default_factory=list)
    job: object = None
    remark: tuple | None = None
    files: int = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind is StopException:
            self.end_answer()

    def end_answer(self):
        """Break off the answer if it is unfinished; what was said joins the history."""
        if self.job:
            self.job.cancel()
            if answer := self.job.state.text:
                self.history.append((self.job.request.query, answer))
            self.job = None


def show_page(engine, title, max_length=2048, top_p=0.7, temperature=0.95, max_new_tokens=None, seed=None):
    """Draw the page for one session, and answer its question.

    engine                          answers the questions, an Engine
    title                           name of the model
    max_length, top_p, temperature  where the sliders stand at first
    max_new_tokens, seed            as `chat` takes them, for every answer
    """
    from chatglm.chat import history_from_json, history_to_json
    from chatglm.engine import EngineClosedError, QueueFullError, Request

    texts, session = texts_of_browser(), st.session_state
    conversation = session.setdefault("conversation", Conversation())

    def refuse(error):
        conversation.remark = (st.error, texts["problem"] + to_markdown(str(error)))

    def ask():
        conversation.end_answer()
        sampling = {name: session[name] for name in ("max_length", "top_p", "temperature")}
        request = Request(
            session.question, tuple(conversation.history), max_new_tokens=max_new_tokens, seed=seed, **sampling
        )
        try:
            conversation.job = engine.submit(request)
        except (TypeError, ValueError, QueueFullError, EngineClosedError) as error:
            refuse(error)
            session.question = request.query  # back into the box

    def stop():
        job = conversation.job
        conversation.end_answer()
        if job and not job.state.text:
            session.question = job.request.query

    def clear():
        conversation.end_answer()
        conversation.history = []

    def restore():
        file = session[f"file {conversation.files}"]
        conversation.files += 1  # a new uploader, without this file
        try:
            history = history_from_json(file.getvalue())
        except ValueError as error:
            refuse(error)
            return
        conversation.end_answer()
        conversation.history = history
        conversation.remark = (st.success, texts["restored"].format(len(history)))

    with conversation:
        with st.sidebar:
            st.title(title)
            for name, start, most in (
                ("max_length", max_length, max(4096, max_length)),
                ("top_p", float(top_p), 1.0),
                ("temperature", float(temperature), max(1.0, temperature)),
            ):
                st.slider(texts[name], type(start)(0), most, start, key=name, help=texts[f"{name}_help"])
            st.button(texts["clear"], on_click=clear, width="stretch")
            st.download_button(
                texts["save"],
                lambda: history_to_json(conversation.history).encode(),
                "chatglm.json",
                "application/json",
                on_click="ignore",
                width="stretch",
            )
            st.file_uploader(texts["restore"], "json", key=f"file {conversation.files}", on_change=restore)
            st.caption(texts["caution"])

        st.chat_input(texts["ask"], key="question", on_submit=ask)
        if not conversation.history and not conversation.job:
            st.markdown(f"## {texts['welcome']}")
        if earlier := len(conversation.history[:-SHOWN_ROUNDS]):
            st.caption(texts["earlier"].format(earlier))
        for query, answer in conversation.history[-SHOWN_ROUNDS:]:
            show_question(query)
            with st.chat_message("assistant"):
                st.markdown(to_markdown(answer))
        if conversation.remark:
            show, text = conversation.remark
            conversation.remark = None
            show(text)
        if conversation.job:
            show_question(conversation.job.request.query)
            with st.chat_message("assistant"):
                state = show_answer(conversation.job, texts, stop)
                conversation.end_answer()
                if state.error:
                    st.error(texts["problem"] + to_markdown(state.error))
                for note in [*state.notes, *[texts["length"]] * (state.finish_reason == "length")]:
                    st.caption(note)


def texts_of_browser():
    """The TEXTS in the language of the browser: Chinese, or else English."""
    return TEXTS["zh" if (st.context.locale or "").lower().startswith("zh") else "en"]


def run_page():
    """What one run of this file by Streamlit does."""
    argv = tuple(sys.argv[1:])
    try:
        args = build_parser().parse_args(argv)
        if args.host is not None and args.host != st.get_option("server.address"):
            raise ValueError("with `streamlit run` write --server.address before the --, instead of --host behind it")
        if args.port and args.port != st.get_option("server.port"):  # 0 has become a free one
            raise ValueError("with `streamlit run` write --server.port before the --, instead of --port behind it")
        with st.spinner(texts_of_browser()["loading"]):
            engine, title = start_engine(argv)
    except (ValueError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        print(f"web_demo2.py: error: {message}", file=sys.stderr)
        st.error(message)
        return
    except SystemExit:  # after --help
        st.code(build_parser().format_help())
        return
    st.set_page_config(page_title=title)
    show_page(engine, title, **utils.generation_options(args))


def main(argv=None):
    """Load the model and serve the page, with the command line argv; ends the program."""
    from streamlit.web import cli

    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    with utils.main_errors(parser):
        args = parser.parse_args(argv)
        start_engine(tuple(argv))
        port = PORT if args.port is None else args.port
        address = ["--server.address", args.host or "127.0.0.1", "--server.port", str(port)]
        cli.main(["run", *address, __file__, "--", *argv], prog_name="streamlit")


if __name__ == "__main__":
    if st.runtime.exists():
        run_page()
    else:
        main()
