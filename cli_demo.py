"""Talk with ChatGLM in the terminal: `python cli_demo.py`, or `printf '你好\\nstop\\n' | python cli_demo.py`.

What is unusual here:
- An answer is drawn block by block. Finished Markdown blocks are printed once and scroll away as ordinary text; only
  the block still growing is redrawn, never more of it than fits the screen. So nothing flickers and nothing is lost.
- Ctrl-C breaks off the model's step, but never a line half drawn.
- Between model and terminal stands `printable`: no text of a model can send an escape sequence.
- `save` and `load` lose nothing: a file is replaced only by the same conversation grown longer, and a conversation only
  once it is saved. They are commands only with the name of one file that ends in .json, so that "load balancing" and
  "save a.json, how?" are questions.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

from markdown_it import MarkdownIt
from prompt_toolkit import PromptSession
from prompt_toolkit.output import create_output
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown, TableDataElement
from rich.segment import SegmentLines

import utils

WELCOME = (
    "欢迎与 {title} 对话：输入问题后按回车；输入 clear 清空对话历史，输入 stop 结束。回答途中按 Ctrl-C 停止回答。\n"
    "输入 save 文件名.json 保存对话，输入 load 文件名.json 接着保存过的对话谈。"
)
USER = "用户："
FILE_COMMAND = re.compile(r"""(save|load)(?:\s+(?:"([^"]+\.json)"|'([^']+\.json)'|(\S+\.json)))?""")
PREVIEW_ROUNDS, PREVIEW_CHARACTERS = 2, 32  # what is shown of a loaded conversation
FRAME_SECONDS = 0.04  # the model works at least this long between two drawings: a fast one is not slowed down by them

# All but tab and newline; and half surrogate pairs, which stand for keyboard bytes that are not UTF-8.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What a Markdown parser would swallow stays visible: HTML, lines like "[1]: ...", addresses of pictures.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable(["reference", "image"])


def build_parser():
    """The command line: the flags all scripts share."""
    parser = argparse.ArgumentParser(description="Talk with ChatGLM in the terminal.")
    utils.add_model_arguments(parser)
    utils.add_generation_arguments(parser)
    return parser


def printable(text):
    """The text without control characters except tab and newline."""
    return CONTROL_CHARACTERS.sub("", text)


def note(text):
    """Say something about the conversation, on stderr: stdout has the conversation only."""
    print(printable(text), file=sys.stderr, flush=True)


# Drawing an answer ----------------------------------------------------------------------------------------------------


class TableCell(TableDataElement):
    """A table cell that folds a long word, such as any Chinese sentence; rich cuts it off."""

    def __init__(self, justify):
        super().__init__(justify)
        self.content.overflow = "fold"


class AnswerMarkdown(Markdown):
    """Markdown that shows all of a text: the lines of a poem stay apart, a link shows where it leads."""

    elements: ClassVar = {**Markdown.elements, "td_open": TableCell, "th_open": TableCell}

    def __init__(self, text):
        super().__init__(text, justify="default", hyperlinks=False)
        self.parsed = PARSER.parse(text)
        for child in (child for token in self.parsed for child in token.children or ()):
            if child.type == "softbreak":
                child.type = "hardbreak"


def split_blocks(text):
    """Split text into (finished Markdown blocks, the block that may still grow).

    Only complete lines count: "2" may become "2." and continue the list above it.
    """
    lines = text.split("\n")
    starts = [token.map[0] for token in PARSER.parse("\n".join(lines[:-1])) if token.level == 0 and token.map]
    finished = "".join(line + "\n" for line in lines[: starts[-1] if starts else 0])
    return finished, text[len(finished) :]


def with_title(title, answer):
    """The answer after its speaker's name, on the same line where it begins with a plain paragraph."""
    tokens = PARSER.parse(answer)
    return f"{title}：{answer}" if not tokens or tokens[0].type == "paragraph_open" else f"{title}：\n\n{answer}"


def render_lines(console, text):
    """The text as Markdown: lines of the console's width, without the empty ones rich puts around lists and tables."""
    lines = console.render_lines(AnswerMarkdown(text), pad=False)
    filled = [index for index, line in enumerate(lines) if any(map(is_visible, line))]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def is_visible(segment):
    """Whether a piece of a line shows anything: ink, or the background of a code block."""
    return bool(segment.text.strip() or (segment.style and segment.style.bgcolor))


def show_markdown(console, title, answers):
    """Draw a growing answer as Markdown on a terminal.

    answers  iterator of the texts so far, each usually one token longer
    """
    answer, printed, drawn = "", 0, 0.0
    with Live(AnswerMarkdown(with_title(title, "")), console=console, auto_refresh=False) as live:
        try:
            for answer in answers:
                if time.monotonic() - drawn < FRAME_SECONDS:
                    continue
                finished, growing = split_blocks(with_title(title, answer)[printed:])
                visible = render_lines(console, growing)[-console.height :]
                with console:  # one write, so that nobody sees the growing block without the finished ones
                    live.update(SegmentLines(visible, new_lines=True), refresh=True)
                    if finished:  # goes above the growing block
                        console.print(SegmentLines([*render_lines(console, finished), []], new_lines=True))
                        printed += len(finished)
                drawn = time.monotonic()
        finally:  # leaving Live draws once more: now all of the last block, even if it is taller than the screen
            live.update(SegmentLines(render_lines(console, with_title(title, answer)[printed:]), new_lines=True))


def show_plain(title, answers):
    """Print a growing answer as plain text, each line when it is complete: only the last one can still change."""
    print(f"{title}：", end="", flush=True)
    answer, printed = "", 0
    try:
        for answer in answers:
            complete = max(printed, answer.rfind("\n") + 1)
            print(answer[printed:complete], end="", flush=True)
            printed = complete
    finally:
        print(answer[printed:], flush=True)


# Reading a question ---------------------------------------------------------------------------------------------------


def terminal_reader():
    """A function that reads a line with editing: wide characters, and arrow keys for what was typed before."""
    output = create_output(always_prefer_tty=True)  # stderr when answers go to a file
    output.enable_cpr = False  # ask the terminal nothing: a late reply would look like typing
    return partial(PromptSession(output=output).prompt, "\n" + USER)


def read_plain():
    """The next line of stdin, repeated on stdout so that both sides of the conversation can be read there."""
    print("\n" + USER, end="", flush=True)
    line = sys.stdin.readline()
    print(printable(line).rstrip("\n"), flush=True)
    if not line:
        raise EOFError
    return line


# The conversation -----------------------------------------------------------------------------------------------------


class CtrlC:
    """While entered, Ctrl-C only ends the answer: at once in the middle of the model's step, else before the next."""

    def __enter__(self):
        self.pressed = self.in_model = False
        self.handler_before = signal.signal(signal.SIGINT, self.press)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.handler_before)

    def press(self, signal_number, frame):
        is_first, self.pressed = not self.pressed, True
        if is_first and self.in_model:
            raise KeyboardInterrupt

    def guard(self, answers):
        """Yield from the generator answers until it ends or Ctrl-C is pressed."""
        try:
            while not self.pressed:
                self.in_model = True
                answer = next(answers)
                self.in_model = False
                yield answer
        except (StopIteration, KeyboardInterrupt):
            pass
        finally:
            self.in_model = False
            answers.close()


@contextmanager
def silent_keyboard():
    """Keys pressed meanwhile, ^C among them, do not appear inside the answer; they wait for the next prompt."""
    if os.name == "nt" or not sys.stdin.isatty():  # Windows shows a key only when it is read
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    silent[3] |= termios.NOFLSH  # else Ctrl-C throws away what is on its way to the screen, such as half a drawing
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def reply(model, tokenizer, query, history, show, options):
    """Show the answer to query; returns the history with as much of the answer as was said."""

    def answers():
        nonlocal history
        for answer, history_so_far in model.stream_chat(tokenizer, query, history, **options):
            history = history_so_far
            yield printable(answer)

    with warnings.catch_warnings(record=True) as caught, silent_keyboard(), CtrlC() as ctrl_c:
        warnings.simplefilter("always", UserWarning)
        try:
            show(ctrl_c.guard(answers()))
        except (ValueError, RuntimeError) as error:  # too long, out of memory: the next question may do
            note(str(error))
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            note(str(warning.message))
    return history


def save(history, file):
    """Write the conversation to a JSON file; returns its path.

    Raises ValueError if the file exists and has more in it than the beginning of this conversation, OSError if it
    cannot be written.
    """
    from chatglm.chat import history_from_json, history_to_json

    path = Path(os.path.realpath(os.path.expanduser(file)))
    if path.exists():
        try:
            saved = history_from_json(path.read_bytes()) if path.is_file() else None
        except ValueError:
            saved = None
        if saved is None or saved != history[: len(saved)]:
            raise ValueError(f"{path} 已存在，内容不是这次对话的开头，不会覆盖它：请换一个文件名。")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a full disk leaves the file that was there as it was
        part = Path(folder, path.name)
        part.write_text(history_to_json(history), encoding="utf-8", newline="\n")
        part.replace(path)
    return path


def load(file):
    """The path and the conversation of a JSON file.

    Raises ValueError if it holds something else, OSError if it cannot be read.
    """
    from chatglm.chat import history_from_json

    path = Path(os.path.realpath(os.path.expanduser(file)))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} 不是文件。")
    return path, history_from_json(path.read_bytes())


def preview(history):
    """The last rounds of a conversation, a line for each question and answer."""

    def shorten(text):
        line = " ".join(text.split())
        return line if len(line) <= PREVIEW_CHARACTERS else line[:PREVIEW_CHARACTERS] + "…"

    rounds = [f"  问：{shorten(query)}\n  答：{shorten(answer)}" for query, answer in history[-PREVIEW_ROUNDS:]]
    return "\n".join([*["  …"] * (len(history) > PREVIEW_ROUNDS), *rounds])


def use_file(command, file, history, kept):
    """Do `save FILE` or `load FILE`, saying what happened; returns the history and what of it a file holds."""
    try:
        if file is None:
            raise ValueError(f"{command} 需要一个以 .json 结尾的文件名，例如：{command} 对话.json")
        if command == "save":
            note(f"已保存 {len(history)} 轮对话：{save(history, file)}")
        elif history != kept:
            raise ValueError("这次对话还没有保存，所以没有载入：请先用 save 保存，或输入 clear 清空。")
        else:
            path, history = load(file)
            note(f"已载入 {len(history)} 轮对话：{path}\n{preview(history)}".rstrip())
    except OSError as error:
        note(f"{file}：{error.strerror or error}")
        return history, kept
    except ValueError as error:
        note(str(error))
        return history, kept
    return history, history


def chat_loop(model, tokenizer, read, show, **options):
    """Talk until `stop`, the end of input, or Ctrl-C at the prompt; returns the history.

    read()         returns the next line, raises EOFError at the end
    show(answers)  draws one answer from an iterator of its growing texts
    options        what model.stream_chat takes: max_length, top_p, ...
    """
    history = kept = []
    try:
        while (query := printable(read()).strip()) != "stop":
            if query == "clear":
                history = kept = []
                note("对话历史已清空。")
            elif match := FILE_COMMAND.fullmatch(query):
                command, _, quoted, plain = match.groups()
                history, kept = use_file(command, quoted or plain, history, kept)
            elif query:
                history = reply(model, tokenizer, query, history, show, options)
    except (EOFError, KeyboardInterrupt):
        pass
    return history


def talk(model, tokenizer, **options):
    """Welcome the user and talk: drawn and edited on a terminal, plain text where a pipe or file takes part."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    title = printable(utils.model_title(model))
    console = Console()
    keyboard, screen = sys.stdin.isatty(), sys.stdout.isatty()
    read = terminal_reader() if keyboard and (screen or sys.stderr.isatty()) else read_plain
    show = partial(show_markdown, console) if keyboard and screen and console.is_interactive else show_plain
    try:
        print(WELCOME.format(title=title), flush=True)
        chat_loop(model, tokenizer, read, partial(show, title), **options)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv=None):
    """Run the demo with the command line argv; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with utils.main_errors(parser):
        model, tokenizer = utils.load_model(**utils.model_options(args))
    talk(model, tokenizer, **utils.generation_options(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
