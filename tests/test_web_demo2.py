"""The Streamlit page: what it shows, one session after another without a browser, and the page in headless Chromium."""

import inspect
import json
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

import web_demo2
from chatglm.chat import history_from_json, history_to_json
from chatglm.engine import Engine, State

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60  # seconds; machines that run tests are busy


# What is shown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shown",
    [
        ("**粗** [链接](https://example.com)", "**粗** [链接](https://example.com)"),
        ("<script>alert(1)</script>", r"\<script>alert(1)\</script>"),
        ('<b style="color:red"> a < b', r'\<b style="color\:red"> a < b'),
        ("<https://a.b/c:d>", "<https://a.b/c:d>"),
        ("![图](http://example.com/a.png)", r"\![图](http://example.com/a.png)"),
        ("[1]: http://example.com", r"\[1]: http://example.com"),
        (":red[红] std::vector 10:30 https://a.b", r"\:red[红] std:\:vector 10:30 https://a.b"),
        ("床前明月光\n疑是地上霜", "床前明月光  \n疑是地上霜"),
        ("甲\r\n乙\r丙\x0b丁", "甲  \n乙  \n丙\x0b丁"),
        ("`:a $x$ ![`，``a ` $``", "`:a $x$ ![`，``a ` $``"),
        ("```py\n:a $x$ ![\n```\n$", "```py\n:a $x$ ![\n```\n\\$"),
        ("```py\n$x$ 还没写完", "```py\n$x$ 还没写完"),
        ("- 一\n\n  ~~~\n  $x$\n  ~~~\n", "- 一  \n  \n  ~~~\n  $x$\n  ~~~\n"),
        ("甲\n\n    $x$\n", "甲  \n  \n    $x$\n"),
        (r"\$ \![ \:a", r"\$ \![ \:a"),
    ],
)
def test_all_of_a_text_is_shown_as_text(text, shown):
    assert web_demo2.to_markdown(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("$x_1$，$$", r"$x_1$，\$\$"),
        (r"\(x_1 \)", "$x_1$"),
        ("甲 $$x$$ 乙", "甲 \n$$\nx\n$$\n 乙"),
        ("\\[\nx:y\n\\]", "\n$$\nx:y\n$$\n"),
        (r"\begin{align*}a&=b\\c\end{align*}", "\n$$\n\\begin{align*}a&=b\\\\c\\end{align*}\n$$\n"),
        ("1. 甲 $$x$$", "1. 甲 \n   $$\n   x\n   $$\n   "),
        ("- 甲\n  - \\[a\nb\\]", "- 甲  \n  - \n    $$\n    a\n    b\n    $$\n    "),
        ("$5 和 $6", r"\$5 和 \$6"),
        ("价格 $5，公式 $x$", r"价格 \$5，公式 $x$"),
        (r"还没写完 \(x", r"还没写完 \(x"),
    ],
)
def test_formulas_get_the_delimiters_of_streamlit(text, shown):
    assert web_demo2.to_markdown(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"\\begin{{a{n}}}" for n in range(4_000)),
        "".join("`" * n + "a" for n in range(1, 600)),
        r"\( \[ $$ $ ` " * 5_000,
        "$a" * 50_000,
    ],
)
def test_a_text_made_to_be_slow_is_not(text):
    start = time.process_time()
    web_demo2.to_markdown(text)
    assert time.process_time() - start < 5  # quadratic would be minutes


def test_both_languages_have_the_same_texts():
    def shape(texts):
        return {name: text.count("{}") for name, text in texts.items()}

    assert shape(web_demo2.TEXTS["zh"]) == shape(web_demo2.TEXTS["en"])
    source = inspect.getsource(web_demo2)
    assert all(f'texts["{name}"]' in source or name in source for name in web_demo2.TEXTS["en"])


# A session without a browser ------------------------------------------------------------------------------------------


class FakeModel:
    """Says what it was asked, letter by letter; breaks at 坏; to 慢 it says the words a test puts into `words`."""

    def __init__(self):
        self.words = queue.Queue()
        self.asked = []

    def stream_chat(self, tokenizer, query, history, **options):
        self.asked.append((query, list(history), options))
        if query == "坏":
            raise RuntimeError("secret path")
        if query == "慢":
            yield self.words.get(timeout=PATIENCE), None
        for end in range(1, len(query) + 1):
            yield query[:end], None


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def engine(model):
    with Engine(model, tokenizer=None, max_queue=0) as engine:
        yield engine


def page(engine, options):
    import web_demo2

    web_demo2.show_page(engine, "ChatGLM-6B", **options)


def open_page(engine, locale="zh-CN", **options):
    session = AppTest.from_function(page, args=(engine, options), default_timeout=PATIENCE)
    session.context = {"locale": locale}
    return session.run()


def ask(session, question):
    return session.chat_input(key="question").set_value(question).run()


def said(session):
    """(who, what) of each message."""
    return [(message.name, (message.text or message.markdown)[0].value) for message in session.chat_message]


def restore(session, content):
    return session.file_uploader[0].set_value(("chatglm.json", content, "application/json")).run()


def test_questions_are_answered_with_the_history_and_the_controls(engine, model):
    session = open_page(engine)
    assert not session.chat_message and not session.exception
    ask(session, "你好")
    session.slider(key="max_length").set_value(512)
    session.slider(key="top_p").set_value(0.5)
    session.slider(key="temperature").set_value(0.0)
    ask(session, "**再见**")
    assert said(session) == [("user", "你好"), ("assistant", "你好"), ("user", "**再见**"), ("assistant", "**再见**")]
    (_, first, usual), (_, second, chosen) = model.asked
    assert (first, second) == ([], [("你好", "你好")])
    assert [usual[name] for name in ("max_length", "top_p", "temperature")] == [2048, 0.7, 0.95]
    assert [chosen[name] for name in ("max_length", "top_p", "temperature")] == [512, 0.5, 0.0]
    assert session.session_state.conversation.history == [("你好", "你好"), ("**再见**", "**再见**")]
    assert not session.exception and [button.label for button in session.button] == ["清空对话历史"]


def test_controls_have_the_ranges_of_the_original_and_begin_at_the_flags(engine, model):
    def ranges(session):
        return [(slider.min, slider.max, slider.value, slider.step) for slider in session.slider]

    assert ranges(open_page(engine)) == [(0, 4096, 2048, 1), (0, 1, 0.7, 0.01), (0, 1, 0.95, 0.01)]
    session = open_page(engine, max_length=8192, top_p=1, temperature=1.5, max_new_tokens=7, seed=3)
    assert ranges(session) == [(0, 8192, 8192, 1), (0, 1, 1, 0.01), (0, 1.5, 1.5, 0.01)]
    ask(session, "你好")
    assert (model.asked[0][2]["max_new_tokens"], model.asked[0][2]["seed"]) == (7, 3)


def test_interface_is_in_the_language_of_the_browser(engine):
    assert open_page(engine, "ZH-TW").button[0].label == "清空对话历史"
    for locale in ("de", None):
        assert open_page(engine, locale).button[0].label == "Clear history"


def test_sessions_do_not_share_their_history(engine, model):
    sessions = [open_page(engine), open_page(engine)]
    for session, question in zip(sessions, ("甲", "乙"), strict=True):
        ask(session, question)
    assert [said(session) for session in sessions] == [[("user", name), ("assistant", name)] for name in ("甲", "乙")]
    assert [history for _, history, _ in model.asked] == [[], []]


def test_clear_forgets_the_history(engine, model):
    session = ask(open_page(engine), "你好")
    session.button[0].click().run()
    assert not session.chat_message and session.markdown[0].value == "## 有什么想聊的？"
    ask(session, "再见")
    assert model.asked[1][1] == []


def test_refused_question_is_one_sentence_and_back_in_the_box(engine, model):
    session = open_page(engine)
    session.slider(key="max_length").set_value(0)
    ask(session, "你好")
    assert [error.value for error in session.error] == [
        "没有成功：max_length must be a whole number of tokens, at least 1, got 0"
    ]
    assert session.chat_input[0].value == "你好" and not session.chat_message
    session.slider(key="max_length").set_value(1).run()
    assert not session.error  # said once


def test_full_queue_is_one_sentence(engine, model):
    from chatglm.engine import Request

    with engine.submit(Request("慢")):
        session = ask(open_page(engine, "en-US"), "你好")
        assert re.fullmatch("That did not work: 0 requests are waiting .*: try again in 1 s", session.error[0].value)
        model.words.put("")
    engine.close()
    ask(session, "你好")
    assert session.error[0].value.endswith("the server is shutting down and takes no new requests")


def test_answer_that_fails_is_one_sentence_and_the_conversation_goes_on(engine, model):
    session = ask(ask(open_page(engine), "你好"), "坏")
    assert len(session.error) == 1 and "the model failed" in session.error[0].value
    assert "secret" not in session.error[0].value and not session.exception
    assert session.session_state.conversation.history == [("你好", "你好")]
    ask(session, "再见")
    assert said(session)[2:] == [("user", "再见"), ("assistant", "再见")] and not session.error


class FakeEngine:
    """Has one job, which goes through states each time it is looked at."""

    def __init__(self, *states):
        self.states = list(states)
        self.shown = []

    def submit(self, request):
        self.request = request
        return self

    @property
    def state(self):
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def result(self, timeout):
        raise TimeoutError

    def cancel(self):
        pass


def test_place_in_the_queue_the_growing_answer_and_notes_are_shown(monkeypatch):
    engine = FakeEngine(
        State(2),
        State(2),
        State(1),
        State(0),
        State(0, "一"),
        State(0, "一，二"),
        State(None, "一，二", "length", notes=("dropped the oldest round",)),
    )
    shown = []
    place = SimpleNamespace(markdown=shown.append, button=lambda *_, **__: None, empty=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(web_demo2.st, "empty", lambda: place)
        ask(open_page(engine, "en-US"), "数")
    assert shown == [
        "*Waiting: number 2 in the queue*",
        "*Waiting: number 1 in the queue*",
        "▌",
        "一▌",
        "一，二▌",
        "一，二",
    ]
    session = ask(open_page(engine, "en-US"), "数")
    assert said(session) == [("user", "数"), ("assistant", "一，二")]
    assert [caption.value for caption in session.main.caption] == [
        "dropped the oldest round",
        "The answer was cut off at the maximum length.",
    ]


def test_restored_conversation_goes_on(engine, model):
    session = ask(open_page(engine), "忘记")
    restore(session, history_to_json([("问", "答 ![图](a.png)"), ("二", "")]).encode())
    assert [success.value for success in session.success] == ["已恢复 2 轮对话。"]
    assert said(session) == [("user", "问"), ("assistant", r"答 \![图](a.png)"), ("user", "二"), ("assistant", "")]
    ask(session, "三")
    assert model.asked[-1][1] == [("问", "答 ![图](a.png)"), ("二", "")] and not session.success


def test_long_conversation_shows_its_end(engine):
    session = restore(open_page(engine), history_to_json([(str(n), "") for n in range(150)]).encode())
    assert [text for who, text in said(session) if who == "user"] == [str(n) for n in range(50, 150)]
    assert session.main.caption[0].value == "更早的 50 轮没有显示，但仍在对话历史里。"
    assert len(session.session_state.conversation.history) == 150


def test_file_that_is_no_conversation_is_one_sentence_and_changes_nothing(engine):
    session = ask(open_page(engine), "你好")
    for content, sentence in ((b"\xff", "UTF-8"), (b"![x](http://a.b)", "JSON"), (b'["ab"]', "pair")):
        restore(session, content)
        assert len(session.error) == 1 and sentence in session.error[0].value and "![" not in session.error[0].value
        assert said(session) == [("user", "你好"), ("assistant", "你好")]


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--top_p", "2"], "argument --top_p: must be from 0 to 1, got 2"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--model_name_or_path", str(ROOT / "tests")], str(ROOT / "tests")),
        (["--port", "9999"], "write --server.port before the --"),
        (["--host", "0.0.0.0"], "write --server.address before the --"),
    ],
)
def test_wrong_flags_behind_streamlit_run_are_one_sentence_on_the_page(monkeypatch, capsys, argv, sentence):
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", *argv])
    session = AppTest.from_file(ROOT / "web_demo2.py", default_timeout=PATIENCE).run()
    assert not session.exception and len(session.error) == 1 and sentence in session.error[0].value
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and sentence in errors[0]


def test_help_behind_streamlit_run_is_on_the_page(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", "--help"])
    session = AppTest.from_file(ROOT / "web_demo2.py", default_timeout=PATIENCE).run()
    assert not session.exception and "--model_name_or_path" in session.code[0].value


def test_flags_behind_streamlit_run_choose_model_and_controls(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", "--device", "cpu", "--max_new_tokens", "8", "--top_p", "0.6"])
    session = AppTest.from_file(ROOT / "web_demo2.py", default_timeout=PATIENCE).run()
    assert session.title[0].value == "ChatGLM-Tiny" and session.slider(key="top_p").value == 0.6
    ask(session, "你好")
    assert not session.exception and len(said(session)[1][1]) > 1


def test_wrong_flags_are_one_line_and_exit_code_2(tmp_path, capsys):
    for argv, sentence in (
        (["--top_p", "2"], "from 0 to 1"),
        (["--model_name_or_path", str(tmp_path)], str(tmp_path)),
    ):
        with pytest.raises(SystemExit) as end:
            web_demo2.main(argv)
        shown = capsys.readouterr()
        assert end.value.code == 2
        assert shown.err.startswith("web_demo2.py: error: ") and sentence in shown.err and shown.err.count("\n") == 1


def test_help_names_every_flag():
    done = subprocess.run([sys.executable, ROOT / "web_demo2.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for flag in ("--model_name_or_path", "--device", "--max_length", "--top_p", "--host", "--port", "--max_queue"):
        assert flag in done.stdout


# In a browser ---------------------------------------------------------------------------------------------------------


@contextmanager
def serve(*command):
    """A server of Streamlit on a free port; its address and its process."""
    command = [sys.executable, *command]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = next((line.split()[1] for line in server.stdout if "URL:" in line), None)
        assert address, "the server did not start"
        assert address.startswith("http://127.0.0.1:")
        yield address, server
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None or CHROMIUM is None:
        pytest.skip("needs playwright and Chromium")
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Somebody with the page open."""

    def __init__(self, browser, address, locale="zh-CN"):
        self.page = browser.new_page(locale=locale)
        self.page.set_default_timeout(PATIENCE * 1000)
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.box = self.page.get_by_test_id("stChatInputTextArea")
        self.messages = self.page.get_by_test_id("stChatMessage")
        self.box.wait_for()

    def ask(self, question):
        self.box.fill(question)
        self.box.press("Enter")

    def sees(self, text):
        expect(self.messages.last).to_contain_text(text)

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).last.click()


@pytest.mark.slow
def test_page_in_a_browser(browser):
    fake = ROOT / "tests" / "web_demo2_fake.py"
    with serve("-m", "streamlit", "run", fake, "--server.port", "0") as (address, _):
        first, second = Visitor(browser, address), Visitor(browser, address, "en-US")
        first.ask("数数")
        first.sees("1、2、3、")
        first.page.get_by_role("slider").last.press("ArrowLeft")  # does not break it off
        second.ask("hello")
        second.sees("Waiting: number 1 in the queue")
        first.press("停止")
        second.sees("收到【hello】")
        first.ask("历史")
        first.sees("共 1 轮")
        assert first.messages.nth(1).inner_text().rpartition("1、2、3、")[1]

        # Clearing ends an answer, and so does leaving.
        first.ask("数数")
        first.sees("1、2、3、")
        first.press("清空对话历史")
        expect(first.messages).to_have_count(0)
        first.ask("数数")
        first.sees("1、2、3、")
        second.ask("again")
        second.sees("Waiting: number 1 in the queue")
        second.press("Stop")
        expect(second.box).to_have_value("again")
        second.box.press("Enter")
        second.sees("Waiting: number 1 in the queue")
        first.page.close()
        second.sees("收到【again】")

        with second.page.expect_download() as download:
            second.press("Download conversation")
        saved = Path(download.value.path()).read_bytes()
        assert history_from_json(saved) == [("hello", "收到【hello】"), ("again", "收到【again】")]

        answer = "<script>document.title='x'</script><b style=\"color:red\">\n```python\nprint(1)\n```\n\\(x^2\\) ![](http://example.com/a.png)"
        content = json.dumps([["*问*", answer]]).encode()
        second.page.locator("input[type=file]").set_input_files(
            {"name": "a.json", "mimeType": "application/json", "buffer": content}
        )
        second.sees("<script>document.title='x'</script><b style=\"color:red\">")
        assert second.messages.first.inner_text().endswith("*问*")
        expect(second.messages.last.locator("code")).to_have_text("print(1)")
        expect(second.messages.last.locator(".katex")).to_have_count(1)
        assert second.page.title() != "x"
        second.page.reload()
        expect(second.messages).to_have_count(0)
        assert {url.split("/")[2] for url in first.requests + second.requests if url.startswith("http")} == {
            address.removeprefix("http://")
        }


@pytest.mark.slow
def test_embedded_model_answers_in_a_browser(browser):
    with serve("web_demo2.py", "--port", "0", "--device", "cpu", "--max_new_tokens", "40") as (address, server):
        visitor = Visitor(browser, address)
        visitor.ask("你好")
        expect(visitor.messages).to_have_count(2)
        visitor.page.get_by_role("button", name="停止", exact=True).wait_for(state="detached")
        assert re.search(r"\w", visitor.messages.last.inner_text().replace("smart_toy", ""))
        assert visitor.page.title() == "ChatGLM-Tiny"
        server.send_signal(signal.SIGTERM)
        rest = server.stdout.read()
        assert server.wait(PATIENCE) == 0
        assert "Traceback" not in rest and "loaded" not in rest  # once, before the page was served
