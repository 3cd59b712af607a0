"""The terminal demo through its front doors: a real terminal (pty, drawn by pyte), a pipe, and `chat_loop` itself."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import cli_demo
from chatglm.chat import history_from_json

pexpect = pytest.importorskip("pexpect")
pyte = pytest.importorskip("pyte")
if sys.platform != "win32":
    import termios

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "cli_demo.py"
FAKE = ROOT / "tests" / "cli_demo_fake.py"
PATIENCE = 60  # seconds; machines that run tests are busy
CTRL_C, CTRL_D, BACKSPACE, UP = "\x03", "\x04", "\x7f", "\x1b[A"

on_a_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")


# A terminal -----------------------------------------------------------------------------------------------------------


def all_lines(screen):
    """The lines of a terminal window, those scrolled away included; a character two cells wide counts once."""
    gone = ["".join(line[x].data for x in range(screen.columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*gone, *screen.display]]


class Terminal:
    """A program in a terminal window of the given size, and what a person would see there."""

    def __init__(self, program=FAKE, arguments=(), rows=24, columns=80, **environment):
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.child = pexpect.spawn(
            sys.executable,
            [str(program), *arguments],
            dimensions=(rows, columns),
            env={**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1", **environment},
        )

    def type(self, keys):
        self.child.send(keys)

    def modes(self):
        """The local modes of the terminal, bits of termios."""
        return termios.tcgetattr(self.child.child_fd)[3]

    def text(self):
        return "\n".join(all_lines(self.screen))

    def wait_for(self, pattern, count=1):
        """Wait until the regular expression is seen count times."""
        self._read_until(lambda: len(re.findall(pattern, self.text())) >= count, pattern)

    def wait_for_end(self):
        """Wait for the program to end; returns its exit code."""
        self._read_until(lambda: not self.child.isalive(), "the end of the program")
        return self.child.exitstatus

    def _read_until(self, is_reached, what):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                data = self.child.read_nonblocking(65536, timeout=0.02)
            except (pexpect.TIMEOUT, pexpect.EOF):
                data = b""
            self.raw += data
            self.stream.feed(data)
            if not data and is_reached():
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come; the screen shows:\n{self.text()}")

    def ask(self, question, pattern):
        self.type(question + "\r")
        self.wait_for(pattern)


@pytest.fixture
def open_terminal():
    terminals = []

    def start(*arguments, prompt="用户：", **options):
        terminals.append(Terminal(*arguments, **options))
        terminals[-1].wait_for(prompt)
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.child.close(force=True)


@on_a_terminal
def test_conversation_on_a_terminal(open_terminal):
    terminal = open_terminal()
    welcome = terminal.text().splitlines()[0]
    assert "ChatGLM-6B" in welcome and "clear" in terminal.text() and "stop" in terminal.text()

    terminal.ask("你好", r"用户：你好\nChatGLM-6B：收到【你好】\n\n用户：")
    terminal.ask("历史", "ChatGLM-6B：共 1 轮，上次说到【收到【你好】】")
    terminal.ask("clear", "对话历史已清空。\n\n用户：")
    terminal.ask("历史", "ChatGLM-6B：共 0 轮")
    terminal.type("stop\r")
    assert terminal.wait_for_end() == 0
    assert b"\x1b[6n" not in terminal.raw  # no question to the terminal: its reply would look like typing


@on_a_terminal
def test_backspace_erases_whole_wide_characters(open_terminal):
    terminal = open_terminal()
    terminal.type("今天好吗")
    terminal.wait_for("用户：今天好吗")
    terminal.type(BACKSPACE * 2)
    terminal.wait_for(r"(?m)用户：今天$")
    terminal.ask("冷a吗" + BACKSPACE * 2, "收到【今天冷】")


@on_a_terminal
def test_arrow_up_brings_back_what_was_typed(open_terminal):
    terminal = open_terminal()
    terminal.ask("第一问", "收到【第一问】\n\n用户：")
    terminal.ask("第二问", "收到【第二问】\n\n用户：")
    terminal.type(UP + UP)
    terminal.wait_for("用户：第一问", count=2)
    terminal.ask("呢", "收到【第一问呢】")


@on_a_terminal
def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(open_terminal):
    terminal = open_terminal()
    at_the_prompt = terminal.modes()
    terminal.ask("数数", "ChatGLM-6B：1、2、3、4、")
    # Their effects show only now and then: keys that mix with the answer, a drawing that Ctrl-C cuts in half.
    assert not terminal.modes() & termios.ECHO and terminal.modes() & termios.NOFLSH
    terminal.type("历史" + CTRL_C)  # typed during the answer: seen at the prompt after it
    terminal.wait_for("用户：历史")
    assert terminal.modes() == at_the_prompt
    said = re.search(r"ChatGLM-6B：([\d、\n]+)", terminal.text())[1].replace("\n", "")
    assert said.startswith("1、2、3、4、") and len(said) < 1000
    assert terminal.text().count("历史") == 2 and "^C" not in terminal.text()  # the other one is in the welcome

    terminal.ask("", f"共 1 轮，上次说到【{said[-8:]}】")
    terminal.ask("数数", "(?s)共 1 轮.*：1、2、")
    terminal.type(CTRL_C * 3)  # an impatient user
    terminal.wait_for("用户：", count=4)


@pytest.mark.slow
@on_a_terminal
def test_conversation_is_saved_and_goes_on_later(open_terminal, tmp_path):
    terminal = open_terminal(HOME=str(tmp_path), USERPROFILE=str(tmp_path))
    assert "save 文件名.json" in terminal.text() and "load 文件名.json" in terminal.text()
    terminal.ask("你好", r"收到【你好】\n\n用户：")
    terminal.ask("save ~/对话.json", r"已保存 1 轮对话：(?s:.*)\n\n用户：")
    assert (tmp_path / "对话.json").is_file()

    terminal.ask("再见", r"收到【再见】\n\n用户：")
    terminal.ask("load ~/对话.json", r"还没有保存，所以没有载入(?s:.*)\n\n用户：")
    terminal.ask("clear", r"清空。\n\n用户：")
    terminal.ask("load ~/对话.json", r"已载入 1 轮对话：(?s:.*)\n  问：你好\n  答：收到【你好】\n\n用户：")
    terminal.ask("历史", r"共 1 轮，上次说到【收到【你好】】\n\n用户：")


@on_a_terminal
@pytest.mark.parametrize("key", [CTRL_C, CTRL_D])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_with_exit_code_0(open_terminal, key):
    terminal = open_terminal()
    terminal.type(key)
    assert terminal.wait_for_end() == 0
    assert "Traceback" not in terminal.text()


@on_a_terminal
def test_markdown_is_drawn_and_its_marks_are_not(open_terminal):
    terminal = open_terminal()
    terminal.ask("代码", "第二\n\n用户：")
    assert re.search(r"：这样写：\n\n+ print\('你好'\)\n\n+ • 第一\n • 第二\n", terminal.text())
    assert "`" not in terminal.text() and "*" not in terminal.text()


@on_a_terminal
def test_narrow_low_terminal_shows_a_long_answer_whole(open_terminal):
    terminal = open_terminal(rows=8, columns=24)
    terminal.ask("长表", "第30条\n\n用户：")
    assert re.findall(r"第(\d+)条", terminal.text()) == [str(number) for number in range(1, 31)]
    terminal.ask("很长的问题" * 4, "】\n\n用户：")
    assert f"收到【{'很长的问题' * 4}】" in terminal.text().replace("\n", "")


@on_a_terminal
def test_control_characters_of_the_model_never_reach_the_terminal(open_terminal):
    terminal = open_terminal()
    terminal.ask("控制", r"红\[31m色、标题\]0;改名、2J清屏、\[bold\]标记\[/bold\]\n\n用户：")
    answer = terminal.raw[terminal.raw.rindex(b"ChatGLM-6B") :]
    for sent in (b"\x1b[31m", b"\x1b]", b"\x07", b"\xc2\x9b"):
        assert sent not in answer


@on_a_terminal
def test_errors_and_warnings_of_one_question_are_a_line_each(open_terminal):
    terminal = open_terminal()
    terminal.ask("太长", r"the question has 3000 tokens, max_length is 2048\n\n用户：")
    terminal.ask("忘记", r"收到【忘记】\ndropped the oldest round\n\n用户：")
    terminal.ask("  ", "用户：\n\n用户：")
    assert "Traceback" not in terminal.text() and "Warning" not in terminal.text()


@on_a_terminal
def test_terminal_without_cursor_movement_gets_plain_text(open_terminal):
    terminal = open_terminal(TERM="dumb")
    terminal.ask("代码", r"- \*\*第一\*\*\n- 第二")
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0


@on_a_terminal
def test_invalid_utf8_from_the_keyboard_is_no_traceback(open_terminal):
    terminal = open_terminal()
    terminal.type(b"\xc4\xe3a\r")  # GBK
    terminal.wait_for("收到【.*a】")


# A pipe ---------------------------------------------------------------------------------------------------------------


def run(stdin, program=FAKE, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE * 2,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
    )


def test_pipe_gets_plain_text_with_both_sides():
    done = run("你好\n代码\n控制\nstop\n不再回答\n".encode(), FORCE_COLOR="1")
    assert done.returncode == 0 and done.stderr == b""
    out = done.stdout.decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
    assert "\n\n用户：你好\nChatGLM-6B：收到【你好】\n\n用户：代码\n" in out
    assert "ChatGLM-6B：这样写：\n\n```python\nprint('你好')\n```\n\n- **第一**\n- 第二\n\n用户：" in out
    assert out.endswith("用户：stop\n")


def test_pipe_ends_at_end_of_input_and_reads_bytes_that_are_not_utf8():
    done = run(b"\xc4\xe3\xba\xc3a")  # GBK, no newline at the end
    assert done.returncode == 0 and done.stderr == b""
    assert re.search(r"收到【\ufffd+.*a】\n\n用户：\n$", done.stdout.decode())


def test_remarks_go_to_stderr():
    done = run("太长\n忘记\nclear\n".encode())
    assert done.returncode == 0
    assert done.stderr.decode().splitlines() == [
        "the question has 3000 tokens, max_length is 2048",
        "dropped the oldest round",
        "对话历史已清空。",
    ]


@pytest.mark.slow
def test_pipe_saves_and_loads(tmp_path):
    file = tmp_path / "a b.json"
    done = run(f"你好\nsave '{file}'\n再见\nsave '{file}'\nclear\nload '{file}'\n历史\n".encode())
    assert done.returncode == 0
    assert json.loads(file.read_text("utf-8")) == {
        "format": "chatglm-conversation",
        "version": 1,
        "history": [["你好", "收到【你好】"], ["再见", "收到【再见】"]],
    }
    assert done.stderr.decode().splitlines() == [
        f"已保存 1 轮对话：{file}",
        f"已保存 2 轮对话：{file}",
        "对话历史已清空。",
        f"已载入 2 轮对话：{file}",
        "  问：你好",
        "  答：收到【你好】",
        "  问：再见",
        "  答：收到【再见】",
    ]
    assert done.stdout.decode().endswith("ChatGLM-6B：共 2 轮，上次说到【收到【再见】】\n\n用户：\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_reader_that_leaves_early_is_no_error():
    command = f"printf '长表\\n长表\\n' | '{sys.executable}' '{FAKE}' | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=PATIENCE)
    assert done.stderr == b""


def test_help_names_every_flag_and_needs_no_torch():
    done = run(b"", DEMO, "--help", COLUMNS="80")
    assert done.returncode == 0
    for flag in ("--model_name_or_path", "--device", "--max_length", "--top_p", "--temperature", "--seed"):
        assert flag in done.stdout.decode()
    subprocess.run(
        [sys.executable, "-c", "import sys, cli_demo; sys.exit('torch' in sys.modules)"], cwd=ROOT, check=True
    )


def test_wrong_folder_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli_demo.main(["--model_name_or_path", str(tmp_path)])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert str(tmp_path) in shown.err and shown.err.count("\n") == 1 and shown.out == ""


# The loop itself ------------------------------------------------------------------------------------------------------


class CountingModel:
    """Says "1", "12", ..., "123456789"; before the token interrupt_at it presses Ctrl-C."""

    def __init__(self, interrupt_at=None):
        self.interrupt_at = interrupt_at
        self.calls, self.made, self.closed = [], 0, False

    def stream_chat(self, tokenizer, query, history, **options):
        self.calls.append((query, history, options))
        try:
            for self.made in range(1, 10):
                if self.made == self.interrupt_at:
                    signal.raise_signal(signal.SIGINT)
                answer = "123456789"[: self.made]
                yield answer, [*history, (query, answer)]
        finally:
            if self.interrupt_at:
                signal.raise_signal(signal.SIGINT)  # an impatient user presses it again while the model cleans up
            self.closed = True


def reader(*lines):
    """A read() that gives lines, then ends."""
    iterator = iter(lines)

    def read():
        try:
            return next(iterator)
        except StopIteration:
            raise EOFError from None

    return read


def test_chat_loop_passes_history_and_options():
    model, shown = CountingModel(), []
    history = cli_demo.chat_loop(model, None, reader(" a ", "", "b", "stop", "c"), lambda a: shown.extend(a), top_p=0.5)
    assert shown == ["123456789"[:end] for end in range(1, 10)] * 2
    assert model.calls == [("a", [], {"top_p": 0.5}), ("b", [("a", "123456789")], {"top_p": 0.5})]
    assert history == [("a", "123456789"), ("b", "123456789")]


def test_ctrl_c_in_the_models_step_breaks_it_off():
    model, shown = CountingModel(interrupt_at=4), []
    handler = signal.getsignal(signal.SIGINT)
    assert cli_demo.chat_loop(model, None, reader("a"), shown.extend) == [("a", "123")]
    assert shown == ["1", "12", "123"]
    assert model.made == 4 and model.closed
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_drawing_waits_for_the_line_and_stops_before_the_next_token():
    model, shown = CountingModel(), []

    def show(answers):
        for answer in answers:
            if answer == "123":
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            shown.append(answer)
        shown.append("end")

    assert cli_demo.chat_loop(model, None, reader("a"), show) == [("a", "123")]
    assert shown == ["1", "12", "123", "end"]
    assert model.made == 3 and model.closed


def test_ctrl_c_before_the_first_token_leaves_the_history_as_it_was():
    assert cli_demo.chat_loop(CountingModel(interrupt_at=1), None, reader("a"), list) == []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that file names are relative to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat(*lines):
    """The history after a conversation of these lines with a CountingModel."""
    return cli_demo.chat_loop(CountingModel(), None, reader(*lines), list)


def test_save_never_replaces_another_conversation(folder, capsys):
    chat("a", "b", "save ab.json")
    saved = (folder / "ab.json").read_bytes()
    for lines in (["c", "save ab.json"], ["a", "save ab.json"], ["save ab.json"]):  # another, shorter, empty
        capsys.readouterr()
        chat(*lines)
        assert "ab.json 已存在，内容不是这次对话的开头，不会覆盖它" in capsys.readouterr().err
        assert (folder / "ab.json").read_bytes() == saved
    for content in ("", "{}", "[]x"):
        (folder / "other.json").write_text(content)
        chat("a", "save other.json")
        assert (folder / "other.json").read_text() == content


def test_save_replaces_the_beginning_of_the_same_conversation(folder):
    chat("a", "save a.json", "b", "save a.json")
    assert history_from_json((folder / "a.json").read_bytes()) == [("a", "123456789"), ("b", "123456789")]
    assert chat("load a.json", "c", "save a.json", "save a.json") == [(name, "123456789") for name in "abc"]
    assert len(history_from_json((folder / "a.json").read_bytes())) == 3
    assert os.listdir(folder) == ["a.json"]


def test_save_that_fails_leaves_the_earlier_file(folder, capsys, monkeypatch):
    chat("a", "save a.json")
    saved = (folder / "a.json").read_bytes()

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert len(chat("load a.json", "b", "save a.json", "c")) == 3
    assert "a.json：No space left on device\n" in capsys.readouterr().err
    assert (folder / "a.json").read_bytes() == saved and os.listdir(folder) == ["a.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_save_through_a_link_keeps_the_link(folder):
    (folder / "link.json").symlink_to(folder / "real.json")
    chat("a", "save link.json")
    assert (folder / "link.json").is_symlink() and (folder / "real.json").is_file()


def test_load_never_throws_away_what_was_said(folder, capsys):
    chat("a", "save a.json")
    assert chat("b", "load a.json") == [("b", "123456789")]
    assert "还没有保存，所以没有载入" in capsys.readouterr().err
    assert chat("b", "save b.json", "load a.json") == chat("b", "clear", "load a.json") == [("a", "123456789")]


def test_load_that_fails_is_one_sentence_and_the_conversation_goes_on(folder, capsys):
    (folder / "folder.json").mkdir()
    (folder / "text.json").write_text("hello")
    (folder / "GBK.json").write_bytes("你好".encode("gbk"))
    chat("a", "save a.json")
    lines = ["load a.json", *(f"load {name}" for name in ("none.json", "folder.json", "text.json", "no/a.json"))]
    capsys.readouterr()
    assert chat(*lines, "load GBK.json", "load", "save no/a.json", "b") == [
        ("a", "123456789"),
        ("b", "123456789"),
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"已载入 1 轮对话：{folder / 'a.json'}",
        "  问：a",
        "  答：123456789",
        "none.json：No such file or directory",
        f"{folder / 'folder.json'} 不是文件。",
        "a saved conversation is JSON, got something else: Expecting value: line 1 column 1 (char 0)",
        "no/a.json：No such file or directory",
        "a saved conversation is JSON in UTF-8, got the byte 0xC4 at 0",
        "load 需要一个以 .json 结尾的文件名，例如：load 对话.json",
        "no/a.json：No such file or directory",
    ]


@pytest.mark.parametrize(
    "question",
    [
        "save the whales",
        "load balancing",
        "save a.json, how?",
        "save a b.json",
        "load data from a.json",
        "saved.json",
        'save "a" or "b.json"',
        "Save a.json",
    ],
)
def test_question_that_begins_like_a_command_is_answered(folder, question):
    assert chat(question) == [(question, "123456789")]
    assert os.listdir(folder) == []


def test_preview_of_a_loaded_conversation_is_short():
    history = [("a", "b"), ("长" * 500, "一\n\n二"), ("", "x" * 32)]
    assert cli_demo.preview(history) == f"  …\n  问：{'长' * 32}…\n  答：一 二\n  问：\n  答：{'x' * 32}"
    assert cli_demo.preview([]) == ""


def test_warning_filters_of_the_caller_are_left_alone():
    before = list(warnings.filters)
    cli_demo.chat_loop(CountingModel(), None, reader("a"), list)
    assert warnings.filters == before


def test_printable_keeps_text_and_drops_what_steers_a_terminal():
    assert (
        cli_demo.printable("好\t😀\né" + "".join(map(chr, range(9))) + "\r\x1b\x7f\x80\x9f\udc80\u2028")
        == "好\t😀\né\u2028"
    )


# Drawing --------------------------------------------------------------------------------------------------------------


def on_screen(console, width, height):
    """The terminal window after all that was printed on console."""
    screen = pyte.HistoryScreen(width, height, history=10000, ratio=0.5)
    pyte.Stream(screen).feed(console.file.getvalue().replace("\n", "\r\n"))
    return screen


@pytest.mark.parametrize("seed", range(4))
def test_growing_answer_is_neither_lost_nor_doubled(seed, monkeypatch):
    monkeypatch.setattr(cli_demo, "FRAME_SECONDS", 0)  # draw every letter
    random.seed(seed)
    pieces = [
        "# 标题",
        "- 一项",
        "1. 甲",
        "  - 小",
        "| 左 | 右侧 |\n|---|---|\n| 一二三四五六 | b |",
        "```",
        "x = 1  # 注",
        "> 引用",
    ]
    pieces += [
        "**粗** 与 `码`",
        "床前明月光，疑是地上霜。",
        "plain words in a row",
        "<div>",
        "[1]: 注",
        "---",
        "",
        "",
        "",
    ]
    answer = "\n".join(random.choices(pieces, k=24)).strip()
    width, height = random.choice([12, 20, 30]), random.choice([4, 8, 50])

    expected = Console(file=io.StringIO(), width=width)
    expected.print(cli_demo.AnswerMarkdown(cli_demo.with_title("M", answer)))
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, legacy_windows=False)
    cli_demo.show_markdown(console, "M", (answer[:end] for end in range(1, len(answer) + 1)))
    shown = "".join(all_lines(on_screen(console, width, height)))
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", expected.file.getvalue())


def test_block_taller_than_the_screen_shows_its_end_while_it_grows(monkeypatch):
    monkeypatch.setattr(cli_demo, "FRAME_SECONDS", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=5, legacy_windows=False)
    seen = []

    def answers():
        for end in (1, 9):
            yield "始\n\n" + "\n".join(f"- 第{number}项" for number in range(1, end + 1)) + "\n"
            seen.append([line.rstrip() for line in on_screen(console, 20, 5).display])

    cli_demo.show_markdown(console, "M", answers())
    assert seen == [["M：始", "", " • 第1项", "", ""], [f" • 第{number}项" for number in range(5, 10)]]


def test_blocks_are_finished_only_when_nothing_can_change_them():
    assert cli_demo.split_blocks("一\n二") == ("", "一\n二")
    assert cli_demo.split_blocks("一\n\n二") == ("", "一\n\n二")  # "二" may become "二\n==="
    assert cli_demo.split_blocks("一\n\n二\n") == ("一\n\n", "二\n")
    assert cli_demo.split_blocks("1. 一\n\n2") == ("", "1. 一\n\n2")  # the list may go on
    assert cli_demo.split_blocks("1. 一\n\n2. 二\n") == ("", "1. 一\n\n2. 二\n")
    assert cli_demo.split_blocks("一\n\n```\n\n二\n\n") == ("一\n\n", "```\n\n二\n\n")


def test_markdown_keeps_what_parsers_swallow():
    console = Console(file=io.StringIO(), width=60)
    console.print(
        cli_demo.AnswerMarkdown("一\n二 <br>\n\n<div>\n\n[1]: 注\n\n![图](a.png) [这里](http://b.c) [red]x[/red]")
    )
    assert console.file.getvalue() == "一\n二 <br>\n\n<div>\n\n[1]: 注\n\n!图 (a.png) 这里 (http://b.c) [red]x[/red]\n"


def test_narrow_table_folds_long_cells():
    console = Console(file=io.StringIO(), width=16)
    console.print(cli_demo.AnswerMarkdown("| 名 | 说明 |\n|---|---|\n| 甲 | 一二三四五六七八九十 |"))
    assert "".join(re.findall("[一二三四五六七八九十]", console.file.getvalue())) == "一二三四五六七八九十"


def test_plain_text_comes_line_by_line(capsys):
    seen = []

    def answers():
        for answer in (
            "一",
            "一,",
            "一，二",
            "一，二\n三",
            "一，二\n三四",
        ):  # punctuation may change while it is the end
            yield answer
            seen.append(capsys.readouterr().out)

    cli_demo.show_plain("M", answers())
    assert seen == ["M：", "", "", "一，二\n", ""] and capsys.readouterr().out == "三四\n"


# The embedded checkpoint ----------------------------------------------------------------------------------------------


def test_embedded_model_answers_in_a_pipe():
    done = run("你好\nstop\n".encode(), DEMO, "--temperature", "0", "--device", "cpu", "--max_new_tokens", "40")
    assert done.returncode == 0
    assert re.search(r"用户：你好\nChatGLM-Tiny：\S.*\n\n用户：stop\n$", done.stdout.decode(), re.DOTALL)
    assert b"\x1b" not in done.stdout
    assert re.fullmatch(r"loaded ChatGLM-Tiny .*\n", done.stderr.decode())


@pytest.mark.slow
def test_quantised_embedded_model_answers_in_a_pipe():
    done = run("你好\nstop\n".encode(), DEMO, "--quantization_bit", "4", "--device", "cpu", "--max_new_tokens", "40")
    assert done.returncode == 0
    assert re.search(r"用户：你好\nChatGLM-Tiny：\S.*\n\n用户：stop\n$", done.stdout.decode(), re.DOTALL)
    assert re.fullmatch(r"loaded ChatGLM-Tiny .* int4, embedding int8, float32 .*\nkernels: .*\n", done.stderr.decode())


@pytest.mark.slow
@on_a_terminal
def test_embedded_model_answers_on_a_terminal(open_terminal):
    terminal = open_terminal(DEMO, ["--seed", "1", "--device", "cpu", "--max_new_tokens", "40"])
    terminal.ask("你好", r"ChatGLM-Tiny：\S+[^\0]*\n\n用户：")
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
