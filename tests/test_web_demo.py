"""The web page: its functions, its events without a browser, and the page itself in headless Chromium."""

import asyncio
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

import web_demo
from chatglm.chat import history_from_json, history_to_json
from chatglm.engine import Engine

gr = pytest.importorskip("gradio")

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds; machines that run tests are busy


class FakeModel:
    """Says what it was asked, or, to a question with 慢, the words that a test puts into `words` until it puts None."""

    def __init__(self):
        self.words = queue.Queue()
        self.asked = []

    def stream_chat(self, tokenizer, query, history, **options):
        self.asked.append((query, list(history), options))
        if "慢" not in query:
            said = query.removeprefix("说：")
            yield said[: len(said) // 2], None
            yield said, None
            return
        said = ""
        while (word := self.words.get(timeout=PATIENCE)) is not None:
            if isinstance(word, Exception):
                raise word
            said += word
            yield said, None


# What is shown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shown",
    [
        ("**粗** [链接](https://example.com) a < b", "**粗** [链接](https://example.com) a < b"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<https://example.com/a> <http://x y>", "<https://example.com/a> &lt;http://x y>"),
        ("<!-- x --> <?php <!DOCTYPE", "&lt;!-- x --> &lt;?php &lt;!DOCTYPE"),
        ("![图](http://example.com/a.png)", r"\![图](http://example.com/a.png)"),
        ("[1]: http://example.com", r"[1]\: http://example.com"),
        ("类型#裙*颜色#白色*裙长#连衣裙，*重点*", r"类型#裙\*颜色#白色\*裙长#连衣裙，*重点*"),
        (r"\<b> 已经转义", r"\<b> 已经转义"),
        ("`<b> $x$`，``a ` <b>``", "`<b> $x$`，``a ` <b>``"),
        ("```html\n<b>$x$</b>\n```\n<b>", "```html\n<b>$x$</b>\n```\n&lt;b>"),
        ("```html\n<b> 还没写完", "```html\n<b> 还没写完"),
        ("1. 如下\n\n   ~~~\n   <b>\n   ~~~\n", "1. 如下\n\n   ~~~\n   <b>\n   ~~~\n"),
        ("    <b>\n\n<b>", "    <b>\n\n&lt;b>"),
        ("```mermaid\ngraph TD\n```", "``` mermaid\ngraph TD\n```"),
        ("甲\r\n```\r\n<b>\r\n```\r\n<b>", "甲\n```\n<b>\n```\n&lt;b>"),
        ("甲\x0b乙\u2028```\n<b>", "甲\x0b乙\u2028```\n&lt;b>"),
    ],
)
def test_all_of_a_text_is_shown_as_text(text, shown):
    assert web_demo.to_markdown(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("$x<y$", r"\({x<y}\)"),
        (r"\(x_1\)", r"\({x_1}\)"),
        ("$$\n\\frac{1}{2}\n$$", "\\[{\n\\frac{1}{2}\n}\\]"),
        (r"\[ a \\[2pt] b \]", r"\[{ a \\[2pt] b }\]"),
        (r"\begin{proof}x\end{proof}", r"\begin{proof}x\end{proof}"),
        (r"\begin{align}a&=b\end{align}", r"\[{\begin{align}a&=b\end{align}}\]"),
        ("花了 $5 和 $10，还有$20", "花了 $5 和 $10，还有$20"),
        (r"\$5 与 \$6", r"\$5 与 \$6"),
        (r"没写完的 \(x 与 \[y", r"没写完的 \(x 与 \[y"),
        (r"`\(x\)`", r"`\(x\)`"),
    ],
)
def test_formulas_get_the_delimiters_of_the_page(text, shown):
    assert web_demo.to_markdown(text) == shown


@pytest.mark.parametrize("text", [r"看 <b> 和 ![图](x) 以及 \(x\) 与 \[{y}\]，[1]: z，类型#裙*颜色#白色", "普通的问题"])
def test_an_edited_question_is_what_the_user_meant(text):
    assert web_demo.from_markdown(web_demo.to_markdown(text)) == text


@pytest.mark.parametrize("piece", ["$a ", "$$a", r"\(", r"\[", r"\begin{cases}", "``` `", "<b", "[", "> ", "- "])
def test_no_text_takes_long_to_show(piece):
    started = time.monotonic()
    web_demo.to_markdown(piece * 3000)
    assert time.monotonic() - started < 5  # a tenth of a second where the time grows with the length


def test_both_languages_say_the_same_things():
    assert web_demo.TEXTS["zh"].keys() == web_demo.TEXTS["en"].keys()
    assert len(web_demo.TEXTS["zh"]["examples"]) == len(web_demo.TEXTS["en"]["examples"])


# The command line -----------------------------------------------------------------------------------------------------


def test_defaults_of_the_command_line():
    args = web_demo.build_parser().parse_args([])
    assert (args.host, args.port, args.share, args.inbrowser) == ("127.0.0.1", 7860, False, False)
    assert (args.max_length, args.top_p, args.temperature, args.max_queue) == (2048, 0.7, 0.95, 64)


def test_help_does_not_wait_for_the_model_or_gradio():
    code = (
        "import sys, web_demo\ntry: web_demo.main(['--help'])\nfinally: print({'torch', 'gradio'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "--share" in done.stdout and "set()" in done.stdout


# The page without a browser -------------------------------------------------------------------------------------------


class Page:
    """The page of one demo: its components by name, and its events as functions."""

    def __init__(self, demo):
        self.demo = demo
        self.components = {block.elem_id: block for block in demo.blocks.values() if getattr(block, "elem_id", None)}
        self.functions = {function.fn.__name__: function.fn for function in demo.fns.values() if function.fn}

    def request(self, session="甲", language="zh-CN,zh;q=0.9"):
        return gr.Request(session_hash=session, headers={"accept-language": language})

    def reply(self, query, rounds=(), session="甲", max_length=2048, top_p=0.7, temperature=0.95):
        return self.functions["reply"](query, list(rounds), max_length, top_p, temperature, self.request(session))

    def read(self, changes):
        """Changes of the page by the names of the components; "history" is the one without a name."""
        return {component.elem_id or "history": value for component, value in changes.items()}

    async def last(self, generator):
        """All that a generator changed, the newest of each."""
        changed = {}
        async with aclosing(generator):
            async for changes in generator:
                changed |= self.read(changes)
        return changed

    async def until(self, generator, is_reached):
        """Read from a generator until the shown answer satisfies is_reached; returns that answer."""
        async for changes in generator:
            if (shown := self.read(changes).get("chat")) and is_reached(shown[-1]["content"]):
                return shown[-1]["content"]
        raise AssertionError("the answer ended too early")


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def engine(fake):
    engine = Engine(fake, None, max_queue=1)
    yield engine
    fake.words.put(None)
    engine.close(drain=False)


@pytest.fixture
def page(engine):
    return Page(web_demo.create_demo(engine, "ChatGLM-Tiny"))


def shown(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_controls_are_those_of_the_original(page):
    sliders = [page.components[name] for name in ("max_length", "top_p", "temperature")]
    assert [(s.minimum, s.maximum, s.value) for s in sliders] == [(0, 4096, 2048), (0, 1, 0.7), (0, 1, 0.95)]
    chat = page.components["chat"]
    assert (chat.allow_tags, chat.sanitize_html, chat.editable) == (False, True, "user")


def test_flags_beyond_the_sliders_widen_them(engine):
    page = Page(web_demo.create_demo(engine, "x", max_length=8192, temperature=1.5))
    assert (page.components["max_length"].maximum, page.components["temperature"].maximum) == (8192, 1.5)


def test_an_answer_is_shown_and_remembered(page, fake):
    changed = asyncio.run(page.last(page.reply("你好<b>", [("一", "二")], top_p=0.5, temperature=0, max_length=99)))
    assert changed["history"] == [("一", "二"), ("你好<b>", "你好<b>")]
    assert changed["chat"] == shown("一", "二", "你好&lt;b>", "你好&lt;b>")
    assert (changed["question"], changed["submit"]["visible"], changed["stop"]["visible"]) == ("", True, False)
    ((query, history, options),) = fake.asked
    assert (query, history) == ("你好<b>", [("一", "二")])
    assert (options["max_length"], options["top_p"], options["temperature"]) == (99, 0.5, 0)


def test_an_empty_question_is_no_question(page, fake):
    assert asyncio.run(page.last(page.reply(" \n"))) == {"question": gr.skip()} and fake.asked == []


def test_an_answer_grows_and_stop_keeps_what_was_said(page, fake, engine):
    async def talk():
        answer = page.reply("慢")
        fake.words.put("春眠")
        assert await page.until(answer, lambda text: text != "…") == "春眠"
        fake.words.put("不觉晓")
        assert await page.until(answer, lambda text: text != "春眠") == "春眠不觉晓"
        await page.functions["interrupt"](page.request("乙"))  # somebody else
        fake.words.put("，")
        assert await page.until(answer, lambda text: text != "春眠不觉晓") == "春眠不觉晓，"
        await page.functions["interrupt"](page.request())
        fake.words.put("处处")
        return await page.last(answer)

    changed = asyncio.run(talk())
    assert changed["history"] == [("慢", "春眠不觉晓，")]
    assert changed["submit"]["visible"] and not changed["stop"]["visible"]
    assert engine.stats.requests == {"cancelled": 1}


def test_a_waiting_user_sees_the_place_and_may_give_up(page, fake, engine):
    async def talk():
        first, second = page.reply("慢", session="甲"), page.reply("等", session="乙")
        fake.words.put("一")
        await page.until(first, lambda text: text == "一")
        place = await page.until(second, lambda text: True)
        with pytest.warns(UserWarning, match="1 requests are waiting and no more may: try again in 1 s"):
            third = await page.last(page.reply("满", [("一", "二")], session="丙"))
        await page.functions["interrupt"](page.request("乙"))
        second = await page.last(second)
        await first.aclose()
        return place, second, third

    place, second, third = asyncio.run(talk())
    assert place == "*排队等候中：第 1 位*"
    assert (second["chat"], second["question"]) == ([], "等")  # the question is not lost
    assert (third["chat"], third["question"], third["history"]) == (shown("一", "二"), "满", [("一", "二")])


def test_the_end_of_the_event_frees_the_engine(page, fake, engine):
    async def leave():
        answer = page.reply("慢")
        fake.words.put("一")
        await page.until(answer, lambda text: text == "一")
        await answer.aclose()

    asyncio.run(leave())
    fake.words.put("二")
    assert engine.stats.requests == {"cancelled": 1}


def test_a_new_question_ends_the_answer_before(page, fake):
    async def talk():
        first = page.reply("慢")
        fake.words.put("一")
        await page.until(first, lambda text: text == "一")
        second = asyncio.create_task(page.last(page.reply("新", [("慢", "一")])))
        left = await page.last(first)
        fake.words.put("二")
        return left, await second

    left, changed = asyncio.run(talk())
    assert left == {}  # nothing that would overwrite the new answer
    assert changed["history"] == [("慢", "一"), ("新", "新")]


@pytest.mark.parametrize(
    "max_length, sentence",
    [(0, "max_length must be a whole number of tokens, at least 1, got 0"), (2, "the query has . tokens")],
)
def test_no_room_for_an_answer_is_said_in_a_sentence(tokenizer, fake, max_length, sentence):
    with Engine(fake, tokenizer) as engine:
        page = Page(web_demo.create_demo(engine, "x"))
        with pytest.warns(UserWarning, match=sentence):
            changed = asyncio.run(page.last(page.reply("你好", max_length=max_length)))
    assert changed["question"] == "你好" and changed["chat"] == [] and fake.asked == []


def test_a_failing_model_is_told_in_a_sentence_and_leaves_what_was_said(page, fake):
    for item in ("一半", MemoryError()):
        fake.words.put(item)
    with pytest.warns(UserWarning, match="the model ran out of memory: "):
        changed = asyncio.run(page.last(page.reply("慢")))
    assert changed["history"] == [("慢", "一半")]


def test_dropped_rounds_are_told(tokenizer, fake, capsys):
    with Engine(fake, tokenizer) as engine:
        page = Page(web_demo.create_demo(engine, "x"))
        asyncio.run(page.last(page.reply("你好", [("问" * 40, "答" * 40)] * 3, max_length=150)))
    assert "dropped the oldest 2 of 3 rounds of history" in capsys.readouterr().out


def test_retry_edit_and_undo(page):
    rounds = [("一", "甲"), ("二", "乙"), ("三", "丙")]
    retry, edit, undo = (page.functions[name] for name in ("retry", "edit", "undo"))

    again = list(retry(rounds, gr.RetryData(None, {"index": 4, "value": "三"})).values())
    assert again == [rounds[:2], "三"]
    assert list(retry([], gr.RetryData(None, {"index": 0, "value": "一"})).values()) == [[], ""]
    edited = edit(rounds, gr.EditData(None, {"index": 2, "value": "二&lt;b>", "previous_value": "二"}))
    assert list(edited.values()) == [rounds[:1], "二<b>"]
    undone = asyncio.run(page.last(undo(rounds, page.request(), gr.UndoData(None, {"index": 4, "value": "三"}))))
    assert (undone["history"], undone["question"]) == (rounds[:2], "三")
    assert undone["chat"] == shown("一", "甲", "二", "乙")


def test_clearing_ends_the_answer(page, fake, engine):
    async def talk():
        answer = page.reply("慢")
        fake.words.put("一")
        await page.until(answer, lambda text: text == "一")
        cleared = asyncio.create_task(page.last(page.functions["forget"](page.request())))
        assert await page.last(answer) == {}
        return await cleared

    cleared = asyncio.run(talk())
    fake.words.put("二")
    assert (cleared["history"], cleared["chat"]) == ([], []) and engine.stats.requests == {"cancelled": 1}


def test_a_saved_conversation_is_restored_and_another_file_is_refused(page):
    rounds = [("一<b>", "甲")]
    read = page.functions["read"]
    changed = asyncio.run(page.last(read(history_to_json(rounds).encode(), page.request())))
    assert changed["history"] == rounds and changed["chat"] == shown("一&lt;b>", "甲")
    for content, sentence in (
        (b"\xff", "a saved conversation is JSON"),
        (history_to_json([("", "")] * 1001).encode(), "at most 1000 rounds can be shown, got 1001"),
    ):
        with pytest.warns(UserWarning, match=sentence):
            assert asyncio.run(page.last(read(content, page.request()))) == {"question": gr.skip()}


@pytest.mark.parametrize(
    "language, first",
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "你好，介绍一下你自己"),
        ("en-GB,zh;q=0.5", "Who are you?"),
        ("", "Who are you?"),
    ],
)
def test_examples_are_in_the_language_of_the_browser(page, language, first):
    assert page.functions["examples"](page.request(language=language)).examples[0]["text"] == first


def test_what_gradio_remembers_is_bounded(page):
    web_demo.launch(page.demo, server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True)
    try:
        holder = page.demo.server_app.state_holder
        holder.capacity, capacity = 3, holder.capacity
        for number in range(5):
            holder[str(number)][0] = number
        assert capacity == web_demo.MOST_SESSIONS == 1000 and list(holder.session_data) == ["2", "3", "4"]
    finally:
        page.demo.close(verbose=False)


# The page in a browser ------------------------------------------------------------------------------------------------


class Tab:
    """A tab of the page, in a browser of its own, and what it did that it should not."""

    def __init__(self, context, url):
        self.context, self.url = context, url
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.foreign, self.errors = [], []
        self.page.on(
            "request", lambda request: request.url.startswith((url, "data:")) or self.foreign.append(request.url)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.open()

    def open(self):
        self.page.goto(self.url)
        self.page.locator("#chat button.example").first.wait_for()  # they come last

    def find(self, selector):
        return self.page.locator(selector)

    def ask(self, question):
        self.find("#question textarea").fill(question)
        self.find("#question textarea").press("Enter")

    def restore(self, file):
        with self.page.expect_file_chooser() as chooser:
            self.find("#restore").click()
        chooser.value.set_files(file)

    def answer(self):
        return self.find("#chat .bot .md").last

    def expect(self, locator):
        from playwright.sync_api import expect

        expect.set_options(timeout=PATIENCE * 1000)
        return expect(locator)


@pytest.fixture(scope="module")
def served():
    """A page with a fake model, served for all tests with a browser: (url, fake, engine)."""
    fake = FakeModel()
    with Engine(fake, None) as engine:
        demo = web_demo.create_demo(engine, "ChatGLM-Tiny")
        port = free_port()
        web_demo.launch(demo, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
        yield f"http://127.0.0.1:{port}", fake, engine
        demo.close(verbose=False)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def open_tab(browser, served):
    contexts, tabs = [], []

    def open_tab(locale="zh-CN", url=served[0], **options):
        contexts.append(browser.new_context(locale=locale, **options))
        tabs.append(Tab(contexts[-1], url))
        return tabs[-1]

    yield open_tab
    for context in contexts:
        context.close()
    for tab in tabs:
        assert (tab.foreign, tab.errors) == ([], [])


def wait_until(is_reached, what):
    deadline = time.monotonic() + PATIENCE
    while not is_reached():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)


@pytest.mark.slow
def test_in_a_browser_an_answer_grows_is_stopped_and_cleared(served, open_tab):
    _, fake, engine = served
    tab = open_tab()
    tab.ask("慢慢说")
    tab.expect(tab.find("#chat .user .md")).to_have_text("慢慢说")
    tab.expect(tab.find("#question textarea")).to_have_value("")
    for word, said in ("春眠", "春眠"), ("不觉晓", "春眠不觉晓"):
        fake.words.put(word)
        tab.expect(tab.answer()).to_have_text(said)
    assert engine.running == 1
    tab.find("#stop").click()
    tab.expect(tab.find("#submit")).to_be_visible()
    fake.words.put("，处处闻啼鸟")
    wait_until(lambda: engine.running == 0, "the end of the model's work")
    tab.expect(tab.answer()).to_have_text("春眠不觉晓")

    tab.ask("再来")
    tab.expect(tab.answer()).to_have_text("再来")
    assert fake.asked[-1][:2] == ("再来", [("慢慢说", "春眠不觉晓")])
    with tab.page.expect_response("**/queue/join*"):  # the page reads the box late: no other text before that
        tab.ask(" ")
    tab.ask("还在")
    tab.expect(tab.answer()).to_have_text("还在")
    assert len(fake.asked[-1][1]) == 2
    tab.find("#clear").click()
    tab.expect(tab.find("#chat .message")).to_have_count(0)
    tab.ask("从头")
    tab.expect(tab.answer()).to_have_text("从头")
    assert fake.asked[-1][:2] == ("从头", [])


@pytest.mark.slow
def test_in_a_browser_the_sliders_reach_the_model(served, open_tab):
    tab = open_tab()
    for name, value in ("max_length", 777), ("top_p", 0.25), ("temperature", 0):
        tab.find(f"#{name} input[type=number]").fill(str(value))
        tab.find(f"#{name} input[type=number]").press("Tab")
    tab.find("#question textarea").fill("你好")
    tab.find("#submit").click()
    tab.expect(tab.answer()).to_have_text("你好")
    options = served[1].asked[-1][2]
    assert (options["max_length"], options["top_p"], options["temperature"]) == (777, 0.25, 0)


@pytest.mark.slow
def test_two_browsers_share_nothing_but_the_queue_and_a_closed_tab_frees_it(served, open_tab):
    _, fake, engine = served
    first, second = open_tab(), open_tab(locale="en-US")
    cancelled = engine.stats.requests.get("cancelled", 0)
    first.ask("慢：甲")
    first.expect(first.find("#stop")).to_be_visible()
    wait_until(lambda: engine.running == 1, "the answer")
    second.ask("乙")
    second.expect(second.answer()).to_have_text("Waiting: number 1 in the queue")
    first.page.close(run_before_unload=True)
    wait_until(lambda: engine.stats.requests.get("cancelled", 0) == cancelled + 1, "the cancelled answer")
    fake.words.put("醒")  # the model is between two tokens: with the next it notices
    second.expect(second.answer()).to_have_text("乙")
    assert fake.asked[-1][:2] == ("乙", []) and engine.running == engine.queue_length == 0


@pytest.mark.slow
def test_a_closed_tab_leaves_the_queue(served, open_tab):
    _, fake, engine = served
    first, second = open_tab(), open_tab()
    first.ask("慢：甲")
    wait_until(lambda: engine.running == 1, "the answer")
    second.ask("乙")
    second.expect(second.answer()).to_have_text("排队等候中：第 1 位")
    second.page.close()
    wait_until(lambda: engine.queue_length == 0, "the empty queue")
    assert engine.running == 1
    fake.words.put(None)
    first.expect(first.find("#submit")).to_be_visible()


@pytest.mark.slow
def test_a_reloaded_page_is_new_and_its_answer_cancelled(served, open_tab):
    _, fake, engine = served
    tab = open_tab()
    cancelled = engine.stats.requests.get("cancelled", 0)
    tab.ask("慢慢说")
    fake.words.put("一")
    tab.expect(tab.answer()).to_have_text("一")
    tab.page.reload()
    wait_until(lambda: engine.stats.requests.get("cancelled", 0) == cancelled + 1, "the cancelled answer")
    fake.words.put("二")
    tab.find("#chat button.example").first.wait_for()
    tab.expect(tab.find("#chat .message")).to_have_count(0)
    tab.ask("你好")
    tab.expect(tab.answer()).to_have_text("你好")
    assert fake.asked[-1][:2] == ("你好", [])


@pytest.mark.slow
def test_nothing_is_rendered_as_html_and_all_of_it_is_seen(open_tab):
    tab = open_tab()
    attack = (
        "<script>alert(1)</script><img src=x onerror=alert(2)><b>粗</b> [点我](javascript:alert(3)) "
        "![图](http://127.0.0.1:9/x.png)\n\n<iframe src=http://127.0.0.1:9></iframe>\n\n"
        '<div style="position:fixed">盖住</div>\n\n```mermaid\ngraph TD; A["<img src=x onerror=alert(4)>"]\n```'
    )
    tab.ask("说：" + attack)
    for said in (tab.answer(), tab.find("#chat .user .md").last):
        tab.expect(said).to_contain_text("<script>alert(1)</script><img src=x onerror=alert(2)><b>粗</b> 点我")
        tab.expect(said).to_contain_text("<iframe src=http://127.0.0.1:9></iframe>")
        tab.expect(said).to_contain_text('<div style="position:fixed">盖住</div>')
        tab.expect(said).to_contain_text('A["<img src=x onerror=alert(4)>"]')
        assert said.locator("script, img, iframe, b, .mermaid, [style*=fixed]").count() == 0
        links = [link.get_attribute("href") or "" for link in said.locator("a").all()]
        assert links[:2] == ["", "http://127.0.0.1:9/x.png"] and "javascript" not in "".join(links)


@pytest.mark.slow
def test_markdown_code_and_formulas_are_rendered(open_tab):
    tab = open_tab()
    tab.ask(
        "说：**粗**，`a<b`，花了 $5 和 $10。\n\n"
        "$x^2$、\\(y_1 < 3\\)\n\n$$\\frac{1}{2}$$\n\n\\[\n\\sum_{i=1}^n i\n\\]\n\n"
        "\\begin{align}a&=b\\\\c&=d\\end{align}\n\n"
        '```python\nprint(re.findall("\\[(.*?)\\]", "<b>"))  # $a$ 和 $b$\n```\n\n|甲|乙|\n|-|-|\n|1|2|'
    )
    said = tab.answer()
    tab.expect(said.locator(".katex-display")).to_have_count(3)
    tab.expect(said.locator(".katex")).to_have_count(5)
    tab.expect(said.locator(".katex-error")).to_have_count(0)
    tab.expect(said).to_contain_text("花了 $5 和 $10。")
    tab.expect(said.locator("strong")).to_have_text("粗")
    tab.expect(said.locator("p code")).to_have_text("a<b")
    tab.expect(said.locator("pre code")).to_have_text('print(re.findall("\\[(.*?)\\]", "<b>"))  # $a$ 和 $b$\n')
    assert said.locator("pre code .token.string").count() == 2
    tab.expect(said.locator("td")).to_have_text(["1", "2"])


@pytest.mark.slow
def test_retry_edit_undo_copy_and_examples(served, open_tab):
    _, fake, _ = served
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    tab.find("#chat button.example").nth(3).click()
    tab.expect(tab.answer()).to_have_text("法国的首都是哪里？")
    tab.ask("说：第二问<b>")
    tab.expect(tab.answer()).to_have_text("第二问<b>")

    count = len(fake.asked)
    tab.find("#chat").get_by_label("重试").click()
    wait_until(lambda: len(fake.asked) == count + 1, "the question again")
    assert fake.asked[-1][:2] == ("说：第二问<b>", [("法国的首都是哪里？", "法国的首都是哪里？")])

    tab.expect(tab.find("#submit")).to_be_visible()
    tab.find("#chat").get_by_label("编辑").last.click()
    tab.find("#chat textarea").fill("说：改过的<i>")
    tab.find("#chat").get_by_label("发送").click()
    tab.expect(tab.answer()).to_have_text("改过的<i>")
    assert fake.asked[-1][:2] == ("说：改过的<i>", [("法国的首都是哪里？", "法国的首都是哪里？")])

    tab.find("#chat").get_by_label("Copy message").last.click()
    wait_until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == "改过的&lt;i>", "the copied answer")

    tab.find("#chat").get_by_label("撤销").click()
    tab.expect(tab.find("#question textarea")).to_have_value("说：改过的<i>")
    tab.expect(tab.find("#chat .bot")).to_have_count(1)


@pytest.mark.slow
def test_a_conversation_is_downloaded_and_restored(served, open_tab, tmp_path):
    tab = open_tab()
    tab.ask("说：“引号”<b>\n换行")
    tab.expect(tab.answer()).to_have_text("“引号”<b>换行")
    with tab.page.expect_download() as download:
        tab.find("#save").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    rounds = [("说：“引号”<b>\n换行", "“引号”<b>\n换行")]
    assert re.fullmatch(r"chatglm-[\d-]+\.json", file.name)
    assert history_from_json(file.read_bytes()) == rounds

    other = open_tab()
    other.restore(file)
    other.expect(other.answer()).to_have_text("“引号”<b>换行")
    other.ask("继续")
    other.expect(other.answer()).to_have_text("继续")
    assert served[1].asked[-1][:2] == ("继续", rounds)

    file.write_text(json.dumps({"format": "<b>别的</b>"}))
    other.restore(file)
    other.expect(other.find(".toast-wrap")).to_contain_text('a saved conversation has "format"')
    other.expect(other.answer()).to_have_text("继续")


@pytest.mark.slow
def test_errors_are_sentences_in_the_page(served, open_tab):
    tab = open_tab()
    tab.find("#max_length input[type=number]").fill("0")
    tab.find("#max_length input[type=number]").press("Tab")
    tab.ask("你好")
    tab.expect(tab.find(".toast-wrap")).to_contain_text("没有成功")
    tab.expect(tab.find(".toast-wrap")).to_contain_text(
        "max_length must be a whole number of tokens, at least 1, got 0"
    )
    tab.expect(tab.find("#question textarea")).to_have_value("你好")


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale, submit, clear", [("zh-CN", "提交", "清空对话历史"), ("de-DE", "Submit", "Clear history")]
)
def test_the_interface_speaks_the_language_of_the_browser(open_tab, locale, submit, clear):
    tab = open_tab(locale=locale)
    tab.expect(tab.find("#submit")).to_have_text(submit)
    tab.expect(tab.find("#clear")).to_have_text(clear)
    assert "__i18n__" not in tab.page.inner_text("body") and "undefined" not in tab.page.inner_text("body")


@pytest.mark.slow
def test_dark_mode_follows_the_system_and_the_button(open_tab):
    is_dark = "document.body.classList.contains('dark')"
    assert open_tab(color_scheme="dark").page.evaluate(is_dark)
    tab = open_tab(color_scheme="light")
    assert not tab.page.evaluate(is_dark)
    tab.find("#theme").click()
    tab.page.wait_for_function(is_dark)
    tab.open()
    tab.page.wait_for_function(is_dark)


@pytest.mark.slow
def test_a_phone_shows_the_page_without_scrolling_sideways(open_tab):
    tab = open_tab(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    tab.find("#question textarea").fill("说：" + "长" * 200 + "x" * 200)
    tab.find("#submit").tap()
    tab.expect(tab.answer()).to_contain_text("xxx")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
def test_the_script_serves_the_embedded_model_until_sigterm(browser, model, tokenizer):
    script = subprocess.Popen(
        [sys.executable, "web_demo.py", "--port", "0", "--device", "cpu", "--temperature", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = ""
        while "http://" not in line:
            line = script.stderr.readline()
            assert line, "the script ended"
        context = browser.new_context(locale="zh-CN")
        tab = Tab(context, re.search(r"http://[\d.]+:\d+", line)[0])
        tab.ask("法国的首都是哪里？")
        tab.expect(tab.find("#submit")).to_be_visible()
        tab.expect(tab.answer()).to_have_text(model.chat(tokenizer, "法国的首都是哪里？", temperature=0)[0])
        assert (tab.foreign, tab.errors) == ([], [])
        script.send_signal(signal.SIGTERM)
        assert script.wait(PATIENCE) == 0  # whoever has the page open
        context.close()
        assert "Traceback" not in script.stderr.read()
    finally:
        script.kill()
        script.communicate()


def test_a_taken_port_is_a_sentence_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        port = taken.getsockname()[1]
        web_demo.main(["--port", str(port)])
    assert end.value.code == 2 and f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
