"""The page that asks base and tuned model: its events without a browser, both models in one thread, and in Chromium."""

import asyncio
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import utils
import web_demo as root_demo
from chatglm.engine import Engine
from ptuning import web_demo

gr = pytest.importorskip("gradio")

PATIENCE = 60  # seconds; machines that run tests are busy
SIDES = web_demo.SIDES


class FakeModel:
    """Says its name and the question; to one with 慢 the words that a test puts into `words` until it puts None."""

    generation_config = SimpleNamespace(eos_token_id=2)

    def __init__(self, name):
        self.name, self.words, self.asked = name, queue.Queue(), []

    def stream_chat(self, tokenizer, query, history, **options):
        self.asked.append((query, list(history), options))
        if "慢" not in query:
            said = "" if "无言" in query else f"{self.name}：{query}"
            yield said, None
            return
        said = ""
        while (word := self.words.get(timeout=PATIENCE)) is not None:
            if isinstance(word, Exception):
                raise word
            said += word
            yield said, None


class Page:
    """The page over two fake models: their fakes and engines, the page's functions, and what it shows."""

    def __init__(self, max_queue=1, tokenizer=None, **options):
        self.fakes = [FakeModel(name) for name in ("旧", "新")]
        self.engines = [Engine(fake, tokenizer, max_queue=max_queue) for fake in self.fakes]
        self.demo = web_demo.create_demo(self.engines, ["ChatGLM-Tiny", "advert"], **options)
        self.functions = {function.fn.__name__: function.fn for function in self.demo.fns.values() if function.fn}
        self.names, states = {}, iter(("base history", "tuned history"))
        for block in self.demo.blocks.values():
            self.names[block] = next(states) if isinstance(block, gr.State) else getattr(block, "elem_id", None)

    def close(self):
        for fake, engine in zip(self.fakes, self.engines, strict=True):
            fake.words.put(None)
            engine.close(drain=False)

    def request(self, session="甲"):
        return gr.Request(session_hash=session, headers={"accept-language": "zh-CN"})

    def reply(self, query, base=(), tuned=(), session="甲", max_length=2048, top_p=0.7, temperature=0.95):
        options = max_length, top_p, temperature
        return self.functions["reply"](query, list(base), list(tuned), *options, self.request(session))

    def read(self, changes):
        return {self.names[component]: value for component, value in changes.items()}

    async def last(self, generator):
        """All that a generator changed, the newest of each."""
        changed = {}
        async with aclosing(generator):
            async for changes in generator:
                changed |= self.read(changes)
        return changed

    async def until(self, generator, side, answer):
        """Read from a generator until a side shows this answer; returns all that changed."""
        changed = {}
        async for changes in generator:
            changed |= self.read(changes)
            if side in changed and changed[side][-1]["content"] == answer:
                return changed
        raise AssertionError("the answer ended too early")


@pytest.fixture
def page():
    page = Page()
    yield page
    page.close()


def shown(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Without a browser ----------------------------------------------------------------------------------------------------


def test_both_models_answer_one_question_each_after_its_own_rounds_with_the_same_settings(page):
    base, tuned = [("一", "甲")], [("一", "乙")]
    changed = asyncio.run(page.last(page.reply("你好<b>", base, tuned, top_p=0.5, temperature=0.3, max_length=99)))
    assert changed["base history"] == [*base, ("你好<b>", "旧：你好<b>")]
    assert changed["tuned history"] == [*tuned, ("你好<b>", "新：你好<b>")]
    assert changed["base"] == shown("一", "甲", "你好&lt;b>", "旧：你好&lt;b>")
    assert changed["tuned"] == shown("一", "乙", "你好&lt;b>", "新：你好&lt;b>")
    assert (changed["question"], changed["submit"]["visible"], changed["stop"]["visible"]) == ("", True, False)
    (query, rounds, options), (tuned_query, tuned_rounds, tuned_options) = (fake.asked[0] for fake in page.fakes)
    assert (query, rounds, tuned_query, tuned_rounds) == ("你好<b>", base, "你好<b>", tuned)
    assert (options["max_length"], options["top_p"], options["temperature"]) == (99, 0.5, 0.3)
    assert {**options, "stopping_criteria": 0} == {**tuned_options, "stopping_criteria": 0}


def test_each_question_has_a_new_seed_for_both_models_unless_one_is_given():
    def seeds(**options):
        page = Page(**options)
        for _ in range(2):
            asyncio.run(page.last(page.reply("你好")))
        page.close()
        return [[options["seed"] for _, _, options in fake.asked] for fake in page.fakes]

    base, tuned = seeds()
    assert base == tuned and base[0] != base[1]
    assert seeds(seed=7) == [[7, 7], [7, 7]]


def test_answers_grow_independently_and_stop_ends_both(page):
    async def talk():
        answer = page.reply("慢")
        page.fakes[1].words.put("春眠")
        changed = await page.until(answer, "tuned", "春眠")
        assert changed.get("base", shown("慢", "…")) == shown("慢", "…")
        page.fakes[0].words.put("处处")
        await page.until(answer, "base", "处处")
        await page.functions["interrupt"](page.request("乙"))  # somebody else
        page.fakes[1].words.put("不觉晓")
        await page.until(answer, "tuned", "春眠不觉晓")
        await page.functions["interrupt"](page.request())
        return await page.last(answer)

    changed = asyncio.run(talk())
    assert changed["submit"]["visible"] and not changed["stop"]["visible"]
    for fake, engine in zip(page.fakes, page.engines, strict=True):
        fake.words.put("，")
        engine.close()
        assert engine.stats.requests == {"cancelled": 1}


def test_one_side_may_end_first(page):
    async def talk():
        answer = page.reply("慢")
        for word in ("完", None):
            page.fakes[0].words.put(word)
        page.fakes[1].words.put("还")
        await page.until(answer, "tuned", "还")
        for word in ("没", None):
            page.fakes[1].words.put(word)
        return await page.last(answer)

    changed = asyncio.run(talk())
    assert changed["tuned history"] == [("慢", "还没")] and changed["submit"]["visible"]
    assert [engine.stats.requests for engine in page.engines] == [{"stop": 1}, {"stop": 1}]


def test_clearing_ends_both_answers_and_empties_both_sides(page):
    async def talk():
        answer = page.reply("慢")
        for side, fake in zip(SIDES, page.fakes, strict=True):
            fake.words.put("一")
            await page.until(answer, side, "一")
        cleared = asyncio.create_task(page.last(page.functions["forget"](page.request())))
        assert await page.last(answer) == {}  # nothing that would come back
        return await cleared

    cleared = asyncio.run(talk())
    assert [cleared[name] for name in ("base history", "tuned history", "base", "tuned")] == [[], [], [], []]
    assert [engine.stats.requests for engine in page.engines] == [{"cancelled": 1}, {"cancelled": 1}]


def test_the_end_of_the_event_frees_both_engines(page):
    async def leave():
        answer = page.reply("慢")
        page.fakes[0].words.put("一")
        await page.until(answer, "base", "一")
        await answer.aclose()

    asyncio.run(leave())
    assert [engine.stats.requests for engine in page.engines] == [{"cancelled": 1}, {"cancelled": 1}]


def test_a_blank_question_is_none(page):
    assert asyncio.run(page.last(page.reply(" \n"))) == {"question": gr.skip()}
    assert page.fakes[0].asked == page.fakes[1].asked == []


def test_a_failing_side_is_named_and_the_other_keeps_its_answer(page):
    for word in ("好", None):
        page.fakes[0].words.put(word)
    page.fakes[1].words.put(MemoryError())
    with pytest.warns(UserWarning, match="没有成功：微调后: the model ran out of memory: "):
        changed = asyncio.run(page.last(page.reply("慢")))
    assert (changed["base history"], changed["tuned history"]) == ([("慢", "好")], [])
    assert (changed["base"], changed["tuned"], changed["question"]) == (shown("慢", "好"), [], "")


def test_a_question_that_nobody_answers_is_not_lost(page, capsys):
    changed = asyncio.run(page.last(page.reply("无言", [("一", "甲")], [("一", "乙")])))
    assert changed["question"] == "无言" and changed["tuned"] == shown("一", "乙")
    told = capsys.readouterr().out
    assert "提示：微调前: 一个字也没有回答。" in told and "提示：微调后: 一个字也没有回答。" in told


def test_what_cannot_be_asked_is_told_once_and_not_lost(tokenizer):
    page = Page(tokenizer=tokenizer)
    with pytest.warns(UserWarning) as told:
        changed = asyncio.run(page.last(page.reply("问" * 60, max_length=20)))
    (sentence,) = (str(warning.message) for warning in told)
    assert sentence.startswith("没有成功：the query has 63 tokens and max_length is 20")
    assert changed["question"] == "问" * 60 and changed["submit"]["visible"]
    assert page.fakes[0].asked == page.fakes[1].asked == []
    page.close()


def test_a_full_queue_leaves_no_job_behind(page):
    async def talk():
        first, second = page.reply("慢", session="甲"), page.reply("慢", session="乙")
        page.fakes[0].words.put("一")
        await page.until(first, "base", "一")
        changed = await page.until(second, "tuned", "*排队等候中：第 1 位*")
        with pytest.warns(UserWarning, match="1 requests are waiting and no more may"):
            third = await page.last(page.reply("满", session="丙"))
        await second.aclose()
        await first.aclose()
        return changed, third

    changed, third = asyncio.run(talk())
    assert changed["tuned"] == shown("慢", "*排队等候中：第 1 位*")
    assert third["question"] == "满"
    assert [sum(engine.stats.requests.values()) for engine in page.engines] == [2, 2]  # none of the third


def test_both_languages_say_the_same_things():
    assert web_demo.TEXTS["zh"].keys() == web_demo.TEXTS["en"].keys() >= root_demo.TEXTS["en"].keys()


def test_models_compute_token_by_token_in_turn_in_one_thread():
    steps = []

    class Model:
        generation_config = None

        def __init__(self, name):
            self.name = name

        def stream_chat(self, *args, **options):
            for i in range(5):
                steps.append((self.name, threading.get_ident()))
                yield i
                time.sleep(0.001)  # in which the other one gets in line

    with ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(2) as callers:
        models = [web_demo.InTurns(Model(name), worker) for name in "甲乙"]
        assert list(callers.map(lambda model: list(model.stream_chat()), models)) == [[*range(5)], [*range(5)]]
    assert len({ident for _, ident in steps}) == 1
    names = "".join(name for name, _ in steps)
    assert re.search("甲乙甲乙|乙甲乙甲", names) and names.count("甲") == names.count("乙") == 5


# Both models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_folders(tmp_path_factory):
    """What tuning could have made of the embedded model, by kind."""
    folder = tmp_path_factory.mktemp("output")

    def embedded():
        return utils.load_model(device="cpu", dtype="float32")[0]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = embedded()
        model.add_prefix_encoder(8)
        torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight, std=3)
        model.save_pretrained(folder / "prefix" / "checkpoint-3")
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"], init_lora_weights=False)
        get_peft_model(embedded(), lora).save_pretrained(folder / "lora")
    return {"prefix": folder / "prefix" / "checkpoint-3", "lora": folder / "lora", "model": utils.DEFAULT_MODEL}


def load(*flags):
    return web_demo.load(
        web_demo.build_parser().parse_args(["--device", "cpu", "--dtype", "float32", *map(str, flags)])
    )


@pytest.mark.parametrize(
    "kind, name",
    [
        ("prefix", "prefix/checkpoint-3 (P-Tuning v2, 8 tokens)"),
        ("lora", "lora (LoRA, rank 2)"),
    ],
)
def test_an_adapter_is_put_onto_a_second_model_with_the_same_weights(tuned_folders, kind, name, model):
    (base, tuned), _, names = load("--adapter", tuned_folders[kind])
    assert names == ("ChatGLM-Tiny", name)
    assert tuned.lm_head.weight.data_ptr() == base.lm_head.weight.data_ptr()
    expected = load_tuned(tuned_folders[kind])
    ids = torch.tensor([[5, 20, 30, model.config.gmask_token_id, model.config.bos_token_id]])
    with torch.no_grad():
        assert torch.equal(base(ids).logits, model(ids).logits)
        assert torch.equal(tuned(ids).logits, expected(ids).logits)
        assert not torch.allclose(tuned(ids).logits, base(ids).logits, atol=0.1)


def load_tuned(folder):
    return utils.load_model(adapter=folder, device="cpu", dtype="float32")[0]


def test_a_wholly_tuned_folder_is_a_second_model(tuned_folders):
    (base, tuned), _, names = load("--adapter", tuned_folders["model"])
    assert names == ("ChatGLM-Tiny", "tiny (all parameters)")
    assert tuned.lm_head.weight.data_ptr() != base.lm_head.weight.data_ptr()


def test_flags_of_the_original_page_are_checked_against_the_adapter(tuned_folders):
    original = "--ptuning_checkpoint", tuned_folders["prefix"], "--pre_seq_len"
    assert load(*original, 8)[2][1] == "prefix/checkpoint-3 (P-Tuning v2, 8 tokens)"
    with pytest.raises(ValueError, match=r"pre_seq_len is 8 in .*checkpoint-3, got 16: leave out --pre_seq_len"):
        load(*original, 16)
    with pytest.raises(ValueError, match=r"prefix_projection is False in .*, got True"):
        load(*original, 8, "--prefix_projection")


@pytest.mark.parametrize(
    "flags, sentence",
    [([], "what is to be compared? Give the folder"), (["--adapter", "nowhere"], "there is no folder nowhere")],
)
def test_a_missing_adapter_is_a_sentence_before_a_model_is_loaded(flags, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        web_demo.main(["--port", "0", *flags])
    told = capsys.readouterr().err
    assert end.value.code == 2 and sentence in told and "loaded" not in told


# In a browser ---------------------------------------------------------------------------------------------------------


class Tab:
    """A tab of the page, and what it did that it should not."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.problems = []
        self.page.on("request", lambda asked: asked.url.startswith((url, "data:")) or self.problems.append(asked.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.find("#tuned .placeholder").wait_for()

    def find(self, selector):
        return self.page.locator(selector)

    def ask(self, question):
        """Ask, and wait until the server has it: the page reads the box late."""
        with self.page.expect_response("**/queue/join*"):
            self.find("#question textarea").fill(question)
            self.find("#question textarea").press("Enter")

    def expect_answers(self, base, tuned):
        for side, said in (("base", base), ("tuned", tuned)):
            self.expect(self.find(f"#{side} .bot .md").last).to_have_text(said)

    def expect(self, locator):
        from playwright.sync_api import expect

        expect.set_options(timeout=PATIENCE * 1000)
        return expect(locator)


@pytest.fixture(scope="module")
def served():
    page = Page(max_queue=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root_demo.launch(
        page.demo, web_demo.TEXTS, web_demo.CSS, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True,
        quiet=True,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}", page
    page.close()
    page.demo.close(verbose=False)


@pytest.fixture
def open_tab(browser, served):
    with ExitStack() as contexts:
        tabs = []

        def open_tab(locale="zh-CN", **options):
            tabs.append(Tab(browser, served[0], locale=locale, **options))
            contexts.callback(tabs[-1].context.close)
            return tabs[-1]

        yield open_tab
    assert [tab.problems for tab in tabs] == [[]] * len(tabs)


@pytest.mark.slow
def test_in_a_browser_both_answers_grow_are_stopped_and_cleared(served, open_tab):
    base, tuned = served[1].fakes
    tab = open_tab()
    tab.expect(tab.find("#base_name")).to_have_text("微调前 · ChatGLM-Tiny")
    tab.expect(tab.find("#tuned_name")).to_have_text("微调后 · advert")
    tab.ask("你好")
    tab.expect_answers("旧：你好", "新：你好")
    tab.expect(tab.find("#submit")).to_be_visible()
    tab.ask("慢慢说")
    for fake, word in ((base, "春眠"), (tuned, "处处")):
        fake.words.put(word)
    tab.expect_answers("春眠", "处处")
    tab.find("#stop").click()
    tab.expect(tab.find("#submit")).to_be_visible()
    for fake in (base, tuned):
        fake.words.put("，")
    tab.ask(" ")  # nothing to see of it
    tab.ask("再来")
    tab.expect_answers("旧：再来", "新：再来")
    assert base.asked[-1][1] == [("你好", "旧：你好"), ("慢慢说", "春眠")]
    assert tuned.asked[-1][1] == [("你好", "新：你好"), ("慢慢说", "处处")]
    tab.find("#clear").click()
    for side in SIDES:
        tab.expect(tab.find(f"#{side} .message")).to_have_count(0)
    tab.ask("从头")
    tab.expect_answers("旧：从头", "新：从头")
    assert base.asked[-1][1] == tuned.asked[-1][1] == []


@pytest.mark.slow
def test_in_a_browser_the_sliders_reach_both_models(served, open_tab):
    tab = open_tab("en-GB")
    tab.expect(tab.find("#base_name")).to_have_text("Before tuning · ChatGLM-Tiny")
    for name, value in ("max_length", 777), ("top_p", 0.25), ("temperature", 0):
        tab.find(f"#{name} input[type=number]").fill(str(value))
        tab.find(f"#{name} input[type=number]").press("Tab")
    tab.find("#question textarea").fill("hello")
    tab.find("#submit").click()
    tab.expect_answers("旧：hello", "新：hello")
    for fake in served[1].fakes:
        options = fake.asked[-1][2]
        assert (options["max_length"], options["top_p"], options["temperature"]) == (777, 0.25, 0)
    assert "__i18n__" not in tab.page.inner_text("body") and "undefined" not in tab.page.inner_text("body")


@pytest.mark.slow
def test_the_sides_stand_beside_each_other_and_on_a_phone_one_below_the_other(open_tab):
    def boxes(**options):
        tab = open_tab(**options)
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.expect(tab.find("#submit")).to_be_in_viewport()
        return [tab.find(f"#{side}").bounding_box() for side in SIDES]

    base, tuned = boxes(viewport={"width": 1280, "height": 720})
    assert base["y"] == tuned["y"] and base["x"] + base["width"] <= tuned["x"]
    assert abs(base["width"] - tuned["width"]) <= 1
    base, tuned = boxes(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert base["x"] == tuned["x"] and base["y"] + base["height"] <= tuned["y"]


@pytest.mark.slow
def test_the_script_serves_both_models_until_sigterm(browser, tuned_folders, model, tokenizer):
    flags = "--port 0 --device cpu --dtype float32 --temperature 0 --adapter".split()
    script = subprocess.Popen(
        [sys.executable, "web_demo.py", *flags, tuned_folders["prefix"]],
        cwd=Path(web_demo.__file__).parent,  # as the original was started
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = ""
        while not (match := re.search(r"listening on (http://[\d.]+:\d+)", log)):
            line = script.stderr.readline()
            assert line, f"the script ended: {log}"
            log += line
        tab = Tab(browser, match[1], locale="zh-CN")
        question = "法国的首都是哪里？"
        tuned = load_tuned(tuned_folders["prefix"])
        expected = [side.chat(tokenizer, question, temperature=0, max_new_tokens=20)[0][:12] for side in (model, tuned)]
        assert expected[0] != expected[1]
        tab.ask(question)
        for side, said in zip(SIDES, expected, strict=True):
            tab.expect(tab.find(f"#{side} .bot .md").last).to_contain_text(said)
        script.send_signal(signal.SIGTERM)
        assert script.wait(PATIENCE) == 0  # while the answers still grow
        tab.context.close()
        assert tab.problems == [] and "Traceback" not in script.stderr.read()
    finally:
        script.kill()
        script.communicate()
