"""The queue in front of the model: answers, places, limits, ends of every kind, watchers, and what must not be left."""

import asyncio
import gc
import queue
import random
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from chatglm import engine as engine_module
from chatglm.chat import cut_at_stop, decode_response, hold_back, process_response
from chatglm.engine import Engine, EngineClosedError, QueueFullError, Request, settled
from chatglm.tokenization_chatglm import ChatGLMTokenizer, decode_whitespace

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds until a test gives up waiting for what should come at once


class Gated:
    """A model that says its query again and again, once for each `release`."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.started, self.stopped = queue.Queue(), queue.Queue()

    def release(self, tokens=1):
        self.gate.release(tokens)

    def stream_chat(self, tokenizer, query, history, **options):
        self.started.put(query)
        text = ""
        try:
            while len(text) < 100:
                self.gate.acquire()
                text += query
                yield text, [(query, text)]
        finally:
            self.stopped.put(query)


class Echo:
    """A model that spells its query, and fails on queries that name an exception."""

    def stream_chat(self, tokenizer, query, history, **options):
        for length in range(1, len(query) + 1):
            yield query[:length], [(query, query[:length])]


@pytest.fixture
def gated():
    model = Gated()
    with Engine(model, None, max_queue=3) as engine:
        yield model, engine
        model.release(1000)


@pytest.fixture
def echo():
    with Engine(Echo(), None) as engine:
        yield engine


@pytest.fixture(scope="module")
def tiny(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        yield engine


def until(claim):
    """Wait until claim() is true; for what is not announced by an event, such as the end of a thread."""
    end = time.monotonic() + PATIENCE
    while not claim():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def answered(engine, request):
    return engine.submit(request).result(PATIENCE)


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 7},
        {"seed": 8, "top_p": 1.0, "temperature": 2.0, "max_new_tokens": 20},
        {"temperature": 0, "history": [("我叫小明", "你好，小明！")], "max_new_tokens": 12},
        {"temperature": 0, "stop": ["ChatGLM"]},
        {"temperature": 0, "stop": "，"},
        {"temperature": 0, "max_new_tokens": 3},
        {"temperature": 0, "max_length": 10},
    ],
)
def test_final_text_is_the_answer_of_chat(tiny, model, tokenizer, options):
    state = answered(tiny, Request("你好", **options))
    assert state.text == model.chat(tokenizer, "你好", **options)[0] != ""
    assert (state.position, state.error, state.notes) == (None, None, ())


def test_tokens_are_counted_and_the_end_is_named(tiny, tokenizer):
    prompt = len(tokenizer("你好")["input_ids"])
    whole = answered(tiny, Request("你好", temperature=0))
    assert (whole.finish_reason, whole.prompt_tokens) == ("stop", prompt)
    count = whole.completion_tokens
    assert count == len(tokenizer.encode(whole.text, add_special_tokens=False)) + 1  # and <eop>

    for options in ({"max_new_tokens": 5}, {"max_length": prompt + 5}):
        short = answered(tiny, Request("你好", temperature=0, **options))
        assert (short.finish_reason, short.completion_tokens) == ("length", 5)
        assert whole.text.startswith(short.text) and short.text
    # The last token allowed is <eop>, or completes a stop string: the answer is whole.
    assert answered(tiny, Request("你好", temperature=0, max_new_tokens=count)).finish_reason == "stop"
    assert answered(tiny, Request("你好", temperature=0, max_new_tokens=count - 1)).finish_reason == "length"
    stop = short.text[-1]
    stopped = answered(tiny, Request("你好", temperature=0, max_new_tokens=5, stop=(stop,)))
    assert (stopped.finish_reason, stopped.text) == ("stop", short.text[:-1].rstrip())


def test_seed_repeats_an_answer_whatever_else_is_asked(tiny):
    request = Request("写一首关于春天的诗", seed=3, max_new_tokens=12, temperature=1.5, top_p=1.0)
    jobs = [tiny.submit(r) for r in (request, Request("hello", max_new_tokens=2), request)]
    first, _, second = [job.result(PATIENCE).text for job in jobs]
    assert first == second != ""
    assert answered(tiny, Request(request.query, seed=4, max_new_tokens=12, temperature=1.5, top_p=1.0)).text != first


def test_every_state_of_a_quick_reader_grows_to_the_answer(tiny):
    states = list(tiny.submit(Request("你好", temperature=0)).states())
    assert states[0].text == "" and states[-1].finish_reason == "stop"
    assert all(state.finish_reason is None for state in states[:-1])
    counts = [state.completion_tokens for state in states]
    assert counts == sorted(counts)
    for state in states:
        assert states[-1].text.startswith(settled(state.text))


def test_dropped_history_is_noted_without_a_warning(tiny, model, tokenizer):
    history = [("第一个问题", "很长的回答" * 20), ("第二个问题", "也很长的回答" * 20), ("我叫小明", "你好，小明！")]
    with pytest.warns(UserWarning, match="dropped the oldest 2 of 3 rounds"):
        expected, _ = model.chat(tokenizer, "你好", history, temperature=0, max_length=80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = tiny.submit(Request("你好", history, temperature=0, max_length=80))
        state = job.result(PATIENCE)
    assert state.text == expected
    assert state.notes == (
        "dropped the oldest 2 of 3 rounds of history to leave room for an answer within max_length 80",
    )
    assert job.state.notes == state.notes
    assert len(history) == 3


def test_first_rounds_are_kept_if_asked(tiny, model, tokenizer):
    history = [("你是小明的朋友", "好的"), ("第一个问题", "很长的回答" * 20), ("第二个问题", "也很长的回答" * 20)]
    job = tiny.submit(Request("你好", history, temperature=0, max_length=80, keep=1))
    assert job.request.history == (history[0],)
    assert job.state.notes[0].startswith("dropped the oldest 2 of 3 rounds")
    expected, _ = model.chat(tokenizer, "你好", history[:1], temperature=0, max_length=80)
    assert job.result(PATIENCE).text == expected
    with pytest.raises(ValueError, match="query and history have"):
        tiny.submit(Request("你好", history, max_length=80, keep=2))
    # Kept even where it leaves less room than an answer should have.
    prompt = job.state.prompt_tokens
    assert answered(tiny, Request("你好", history, max_length=prompt + 1, keep=1)).completion_tokens == 1


def test_request_is_taken_as_it_is_at_submission(gated):
    _, engine = gated
    history, stop = [("a", "b")], ["x"]
    job = engine.submit(Request("q", history, stop=stop))
    history.clear()
    stop.clear()
    assert job.request.history == (("a", "b"),) and job.request.stop == ("x",)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query": None}, TypeError, "query must be a string, got NoneType"),
        ({"query": "\ud800"}, ValueError, "lone surrogate"),
        ({"history": "abc"}, TypeError, "history must be a list"),
        ({"history": [("a",)]}, ValueError, "history[0] must be"),
        ({"history": [("a", 1)]}, TypeError, "the response of history[0] must be a string"),
        ({"max_length": 0}, ValueError, "max_length must be a whole number of tokens, at least 1, got 0"),
        ({"max_length": 2.5}, TypeError, "max_length"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens"),
        ({"top_p": float("nan")}, ValueError, "top_p must be a number from 0 to 1, got nan"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number from 0 to 100, got str"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"stop": [""]}, ValueError, "a stop string must not be empty"),
        ({"stop": 5}, TypeError, "stop must be a string or a list of strings, got int"),
        ({"stop": [5]}, TypeError, "a stop string must be a string, got int"),
        ({"keep": -1}, ValueError, "keep must be a whole number of rounds, at least 0, got -1"),
        ({"deadline": -1}, ValueError, "deadline must be a number of seconds"),
        ({"deadline": float("inf")}, ValueError, "deadline"),
        ({"deadline": 1e7}, ValueError, "deadline"),  # some systems cannot wait so long
        ({"max_length": 3}, ValueError, "shorten the text or raise max_length"),
    ],
)
def test_bad_values_are_refused_at_submission(tiny, options, error, words):
    before = tiny.stats
    with pytest.raises(error) as raised:
        tiny.submit(Request(**{"query": "你好", **options}))
    assert words in str(raised.value)
    assert (tiny.queue_length, tiny.running) == (0, 0)
    assert tiny.stats == before


def test_bad_sizes_of_an_engine_are_refused(echo):
    with pytest.raises(ValueError, match="max_queue"):
        Engine(Echo(), None, max_queue=-1)
    with pytest.raises(ValueError, match="max_running must be a whole number from 1 to 1, got 2"):
        Engine(Echo(), None, max_running=2)


# The queue ------------------------------------------------------------------------------------------------------------


def test_requests_move_up_in_their_order(gated):
    model, engine = gated
    jobs = [engine.submit(Request(query)) for query in "abcd"]
    assert model.started.get(timeout=PATIENCE) == "a"
    assert [job.state.position for job in jobs] == [0, 1, 2, 3]
    assert (engine.running, engine.queue_length) == (1, 3)
    places = [job.states() for job in jobs]
    assert [next(states).position for states in places] == [0, 1, 2, 3]

    jobs[2].cancel()  # waiting: it leaves at once, and those behind it move up
    assert (jobs[2].state.position, jobs[2].state.finish_reason) == (None, "cancelled")
    assert [state.finish_reason for state in places[2]] == ["cancelled"]
    assert next(places[3]).position == 2
    assert engine.queue_length == 2

    jobs[0].cancel()
    model.release()
    assert model.started.get(timeout=PATIENCE) == "b"
    assert next(places[1]).position == 0
    assert next(places[3]).position == 1
    model.release(200)
    assert jobs[1].result(PATIENCE).text == "b" * 100
    assert jobs[3].result(PATIENCE).text == "d" * 100
    assert model.started.get(timeout=PATIENCE) == "d"  # "c" never began


def test_full_queue_says_when_to_come_back(gated):
    _, engine = gated
    jobs = [engine.submit(Request("a")) for _ in range(4)]  # even if none has begun
    with pytest.raises(QueueFullError, match="3 requests are waiting") as raised:
        engine.submit(Request("b"))
    assert raised.value.retry_after == 1  # nothing is known yet
    engine._recent.extend([2.0, 5.0])
    with pytest.raises(QueueFullError, match="try again in 4 s") as raised:
        engine.submit(Request("b"))
    assert raised.value.retry_after == 4
    jobs[3].cancel()
    engine.submit(Request("c"))
    with pytest.raises(QueueFullError):
        engine.submit(Request("d"))


def test_engine_without_a_queue_answers_one_after_the_other():
    with Engine(Echo(), None, max_queue=0) as engine:
        for _ in range(50):
            assert answered(engine, Request("abc")).text == "abc"


# Ends -----------------------------------------------------------------------------------------------------------------


def test_cancelled_answer_stops_within_one_token(gated):
    model, engine = gated
    job = engine.submit(Request("a"))
    states = job.states()
    model.started.get(timeout=PATIENCE)
    model.release()
    while next(states).text != "a":
        pass
    job.cancel()
    job.cancel()
    assert (job.state.finish_reason, job.state.text, job.state.position) == ("cancelled", "a", None)
    assert engine.running == 0
    model.release()  # the token that was under way
    assert model.stopped.get(timeout=PATIENCE) == "a"
    assert job.state.text == "a"
    assert engine.stats.requests == {"cancelled": 1}


def test_cancel_during_the_prompt_ends_the_answer_before_its_second_token(tiny, model, tokenizer):
    job, steps = None, []

    def cancel(module, args):
        steps.append(1)
        job.cancel()

    ready = threading.Event()
    hook = model.transformer.register_forward_pre_hook(lambda module, args: ready.wait(PATIENCE) and cancel(0, 0))
    try:
        job = tiny.submit(Request("你好", temperature=0))
        ready.set()
        assert job.result(PATIENCE).finish_reason == "cancelled"
    finally:
        hook.remove()
    assert answered(tiny, Request("你好", temperature=0)).finish_reason == "stop"
    assert len(steps) == 1


def test_leaving_the_block_cancels(gated):
    _, engine = gated
    with engine.submit(Request("a")) as job:
        next(job.states())
    assert job.state.finish_reason == "cancelled"


def test_leaving_the_block_after_the_end_changes_nothing(echo):
    with echo.submit(Request("abc")) as job:
        final = job.result(PATIENCE)
    assert job.state == final and final.finish_reason == "stop"


def test_cancel_needs_no_second_lock_when_garbage_is_collected_inside_the_engine(gated):
    _, engine = gated

    def forgotten():
        with engine.submit(Request("a")) as job:
            yield job

    generator = forgotten()
    job = next(generator)
    with engine._lock:  # as if the collector ran while the engine held it
        generator.close()
    assert job.state.finish_reason == "cancelled"


def test_garbage_may_be_collected_at_any_step_of_waking_watchers(gated):
    model, engine = gated
    engine.submit(Request("a"))
    model.started.get(timeout=PATIENCE)
    states = engine.submit(Request("b")).states()
    next(states)
    ends = []

    def forgotten():
        with engine.submit(Request("forgotten")) as job:
            yield job

    def cancel_at_every_step():
        for step in range(80):
            generator = forgotten()
            left, job = next(generator), engine.submit(Request("c"))
            events = iter(range(1000))
            sys.setprofile(lambda *_: generator.close() if next(events) == step else None)  # noqa: B023
            job.cancel()
            sys.setprofile(None)
            generator.close()
            ends.append((left.state.finish_reason, job.state.finish_reason))

    thread = threading.Thread(target=cancel_at_every_step, daemon=True)
    thread.start()
    try:
        thread.join(PATIENCE)
        assert ends == [("cancelled", "cancelled")] * 80
    finally:
        states.close()


def test_deadline_ends_waiting_and_running_requests(gated):
    model, engine = gated
    running = engine.submit(Request("a", deadline=0.05))
    waiting = engine.submit(Request("b", deadline=0.02))
    patient = engine.submit(Request("c", deadline=1000))
    assert waiting.result(PATIENCE).finish_reason == "deadline"  # although the model does not move
    assert running.result(PATIENCE).finish_reason == "deadline"
    assert 0.05 <= running.seconds < PATIENCE
    assert patient.state.finish_reason is None
    model.release(200)
    assert patient.result(PATIENCE).finish_reason == "stop"
    assert answered(engine, Request("d", deadline=0)).finish_reason == "deadline"


class Failing:
    """Fails in the middle of an answer, holding a tensor, if `failure` makes an exception."""

    failure = None

    def stream_chat(self, tokenizer, query, history, **options):
        cache = torch.zeros(10)
        self.cache = weakref.ref(cache)
        knot = [cache]
        knot.append(knot)  # only the garbage collector unties it
        yield query[:1], []
        if self.failure:
            raise self.failure()
        yield query, []


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (lambda: RuntimeError("shapes"), "the model failed (RuntimeError): the log of the server says why"),
        (lambda: SystemExit(3), "the model failed (SystemExit): the log of the server says why"),
        (lambda: MemoryError(), "the model ran out of memory: shorten the text or the history, or lower max_length"),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the model ran out of memory"),
        (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the model ran out of memory"),
    ],
)
def test_crash_fails_one_request_and_frees_what_it_held(caplog, failure, sentence):
    model = Failing()
    model.failure = failure
    gc.disable()  # so that the engine must do it
    try:
        with Engine(model, None) as engine:
            job = engine.submit(Request("abc"))
            state = job.result(PATIENCE)
            assert (state.finish_reason, state.position, state.text) == ("error", None, "a")
            assert state.error.startswith(sentence)
            until(lambda: model.cache() is None)
            model.failure = None
            assert answered(engine, Request("abc")).text == "abc"
            assert engine.stats.requests == {"error": 1, "stop": 1}
    finally:
        gc.enable()
    assert f"request {job.id} failed" in caplog.text and type(failure()).__name__ in caplog.text


def test_engine_goes_on_although_a_broken_gpu_cannot_be_freed(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    model = Failing()
    model.failure = lambda: RuntimeError("CUDA error: device-side assert triggered")
    with Engine(model, None) as engine:
        for _ in range(2):
            assert answered(engine, Request("abc")).finish_reason == "error"


def test_error_before_the_first_token_is_an_error_too(echo, monkeypatch):
    monkeypatch.setattr(Echo, "stream_chat", lambda *args, **options: 1 / 0)
    assert (
        answered(echo, Request("abc")).error == "the model failed (ZeroDivisionError): the log of the server says why"
    )
    monkeypatch.undo()
    assert answered(echo, Request("abc")).text == "abc"


# Closing --------------------------------------------------------------------------------------------------------------


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("engine")]


def test_draining_finishes_everything_and_leaves_no_thread():
    before = len(engine_threads())
    engine = Engine(Echo(), None)
    assert len(engine_threads()) == before + 2
    jobs = [engine.submit(Request("abc" * 10)) for _ in range(20)]
    assert engine.close() is True
    assert {job.state.finish_reason for job in jobs} == {"stop"}
    assert len(engine_threads()) == before
    with pytest.raises(EngineClosedError, match="shutting down"):
        engine.submit(Request("a"))
    assert engine.close() is True


def test_draining_cancels_what_needs_too_long():
    model = Gated()
    engine = Engine(model, None)
    running, waiting = engine.submit(Request("a")), engine.submit(Request("b"))
    model.started.get(timeout=PATIENCE)
    result = []
    closing = threading.Thread(target=lambda: result.append(engine.close(timeout=0.05)))
    closing.start()
    assert running.result(PATIENCE).finish_reason == waiting.result(PATIENCE).finish_reason == "cancelled"
    model.release()
    closing.join(PATIENCE)
    assert result == [False]
    until(lambda: not {engine._worker, engine._clock} & set(threading.enumerate()))


def test_closing_without_draining_cancels_at_once_even_if_the_model_hangs(monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "STOP_SECONDS", 0.05)
    model = Gated()
    engine = Engine(model, None)
    running, waiting = engine.submit(Request("a")), engine.submit(Request("b"))
    model.started.get(timeout=PATIENCE)
    assert engine.close(drain=False) is False
    assert running.state.finish_reason == waiting.state.finish_reason == "cancelled"
    assert "still busy" in caplog.text
    model.release()
    until(lambda: not {engine._worker, engine._clock} & set(threading.enumerate()))


@pytest.mark.slow
def test_program_may_end_in_the_middle_of_an_answer():
    program = """
import torch
from chatglm.engine import Engine, Request

class Busy:
    def stream_chat(self, tokenizer, query, history, **options):
        while True:
            torch.rand(500, 500) @ torch.rand(500, 500)
            yield query, []

job = Engine(Busy(), None).submit(Request("endless"))
print(next(state.text for state in job.states() if state.text))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=60, check=True)
    assert (ended.stdout.strip(), ended.stderr) == (b"endless", b"")


# What is left behind --------------------------------------------------------------------------------------------------


def test_ended_jobs_are_forgotten(gated):
    model, engine = gated
    model.release(1000)
    jobs = [engine.submit(Request("abc", deadline=100)), engine.submit(Request("b")), engine.submit(Request("c"))]
    jobs[1].cancel()
    for job in jobs:
        job.result(PATIENCE)
    left = [weakref.ref(job) for job in jobs]
    del job, jobs
    until(lambda: not any(reference() for reference in left))


def test_forgotten_jobs_are_answered_all_the_same(echo):
    ended = queue.Queue()
    echo.add_listener(lambda job: ended.put(job.state))
    for _ in range(3):
        echo.submit(Request("abc"))
    gc.collect()
    assert [ended.get(timeout=PATIENCE).text for _ in range(3)] == ["abc"] * 3


def test_listener_hears_of_every_end_once(gated, caplog):
    model, engine = gated
    ended = queue.Queue()

    def broken(job):
        raise RuntimeError("listener")

    engine.add_listener(broken)
    engine.add_listener(ended.put)
    jobs = [engine.submit(Request(query)) for query in "ab"] + [engine.submit(Request("c", deadline=0))]
    model.started.get(timeout=PATIENCE)
    assert ended.get(timeout=PATIENCE) is jobs[2]
    jobs[1].cancel()
    assert ended.get(timeout=PATIENCE) is jobs[1]
    model.release(100)
    assert ended.get(timeout=PATIENCE) is jobs[0]
    jobs[0].cancel()
    assert ended.empty()
    assert engine.stats.requests == {"deadline": 1, "cancelled": 1, "stop": 1}
    assert caplog.text.count("a listener failed") == 3


def test_totals_add_up(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        queries = ("你好", "hello")
        states = [answered(engine, Request(query, temperature=0, max_new_tokens=4)) for query in queries]
        until(lambda: engine.stats.seconds > 0)
        stats = engine.stats
    assert stats.requests == {"length": 2}
    assert stats.prompt_tokens == sum(state.prompt_tokens for state in states)
    assert stats.completion_tokens == sum(state.completion_tokens for state in states)


# Watchers -------------------------------------------------------------------------------------------------------------


def test_slow_reader_misses_states_but_not_the_last(gated):
    model, engine = gated
    states = engine.submit(Request("x")).states()
    assert next(states).finish_reason is None
    model.release(100)
    until(lambda: engine.stats.requests == {"stop": 1})
    assert [state.text for state in states] == ["x" * 100]


def test_result_gives_up_after_its_time(gated):
    _, engine = gated
    job = engine.submit(Request("a"))
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        job.result(timeout=0.01)
    assert job.state.finish_reason is None
    assert not job._watchers


def test_states_of_an_ended_job_are_its_last(echo):
    job = echo.submit(Request("abc"))
    final = job.result(PATIENCE)
    assert list(job.states()) == [final]

    async def collect():
        return [state async for state in job.states_async()]

    assert asyncio.run(collect()) == [final]


def test_hundreds_of_threads_watch_one_answer(echo):
    model = Gated()
    with Engine(model, None) as engine:
        job = engine.submit(Request("ab"))
        finals = queue.Queue()
        threads = [threading.Thread(target=lambda: finals.put(list(job.states())[-1])) for _ in range(200)]
        for thread in threads:
            thread.start()
        model.release(50)
        assert {finals.get(timeout=PATIENCE).text for _ in threads} == {"ab" * 50}
        for thread in threads:
            thread.join(PATIENCE)
        assert not job._watchers


def test_hundreds_of_tasks_watch_without_a_thread_each(gated):
    model, engine = gated

    async def watch(job):
        seen = [state async for state in job.states_async()]
        return seen[-1], threading.active_count()

    async def main():
        jobs = [engine.submit(Request(query)) for query in ("ab", "cd")]
        before = threading.active_count()
        tasks = [asyncio.create_task(watch(jobs[i % 2])) for i in range(500)]
        await asyncio.sleep(0)
        model.release(100)
        ends = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert {state.text for state, _ in ends} == {"ab" * 50, "cd" * 50}
        assert {count for _, count in ends} == {before}
        assert not any(job._watchers for job in jobs)

    asyncio.run(main())


def test_cancelled_task_and_closed_iterator_leave_no_watcher(gated):
    _, engine = gated

    async def main():
        job = engine.submit(Request("a"))

        async def watch():
            with job:
                async for _ in job.states_async():
                    watching.set()

        watching = asyncio.Event()
        task = asyncio.create_task(watch())
        await watching.wait()
        states = job.states_async()
        await anext(states)
        assert len(job._watchers) == 2
        await states.aclose()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert job.state.finish_reason == "cancelled"
        until(lambda: not job._watchers)

    asyncio.run(main())


def test_loop_that_ends_early_disturbs_nobody(gated):
    model, engine = gated
    job = engine.submit(Request("a"))
    loop = asyncio.new_event_loop()
    states = job.states_async()
    loop.run_until_complete(anext(states))
    loop.close()
    model.release(100)
    assert job.result(PATIENCE).text == "a" * 100
    assert not job._watchers
    assert engine.submit(Request("b")).request.query == "b"


def test_many_threads_ask_cancel_and_watch_at_once():
    with Engine(Echo(), None, max_queue=1000) as engine:
        ended = queue.Queue()
        engine.add_listener(ended.put)
        wrong = queue.Queue()

        def client(number):
            chance = random.Random(number)
            for _ in range(20):
                text = "x" * chance.randrange(1, 60)
                with engine.submit(Request(text, deadline=chance.choice([None, 0.001, 100]))) as job:
                    kind = chance.randrange(3)
                    if kind == 0:
                        job.cancel()
                    elif kind == 1:
                        state = job.result(PATIENCE)
                        if state.finish_reason == "stop" and state.text != text:
                            wrong.put(state)
                    else:
                        for _, state in zip(range(3), job.states(), strict=False):
                            if not text.startswith(state.text):
                                wrong.put(state)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert engine.close(timeout=PATIENCE)
        assert wrong.empty()
        assert ended.qsize() == 400 == sum(engine.stats.requests.values())
        assert (engine.queue_length, engine.running) == (0, 0)


# What can be sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("Hello", "Hello"),
        ("Hello.", "Hello."),
        ("你好,", "你好"),  # never comes from the model, but a Hanzi would make it ，
        ("Hello,", "Hello"),
        ("你好，", "你好，"),  # already what it will be
        ("好!!", "好!"),
        ("a:b", "a:b"),
        ("I do n", "I do"),
        ("I do not", "I do not"),
        ("it's", "it's"),
        ("it '", "it"),
        ("the dogs'", "the dogs"),
        ("now [[训练", "now"),
        ("now [[训练]]", "now [[训练]]"),
        ("a <n", "a"),
        ("a <|blank_1", "a"),
        ("a <|tab", "a"),
        ("a < b", "a < b"),
        ("end  \n", "end"),
    ],
)
def test_only_what_can_no_longer_change_is_settled(text, expected):
    assert settled(text) == expected


def test_beginning_of_a_stop_string_is_not_settled():
    assert settled("one, tw", ["two"]) == "one,"
    assert settled("a '", ["a's"]) == ""
    assert settled("a,b", ["，c"]) == "a,b"


PIECES = [*" ''nstmvre<>|.,?!;:中年a[]\n训", "[[训练时间]]", "<n>", "<|tab|>", "<|blank_12|>", " ' ", " n't", " 's"]
PIECES += ["'ve", "'re", "<|blank_", "_2", "|>", "  ", "[[训练"]
STOPS = ["a'", "中", ",中", "n't", "2023", "\n", "' ", "a", ", a", "t "]


def test_settled_text_stays_whatever_follows():
    chance = random.Random(0)
    changed = 0
    for _ in range(1500):
        raw = "".join(chance.choice(PIECES) for _ in range(chance.randrange(2, 12)))
        stop = chance.sample(STOPS, chance.choice([0, 0, 1, 2]))
        shown, finals = [], []
        for length in range(len(raw) + 1):
            text = ChatGLMTokenizer.clean_up_tokenization(None, decode_whitespace(raw[:length]))
            final, stopped = cut_at_stop(process_response(text), stop)
            finals.append(final)
            shown.append(final if stopped else hold_back(final, stop))
            if stopped:
                break
        for i, text in enumerate(shown):
            changed += not all(final.startswith(text) for final in finals[i:])
            sent = settled(text, stop)
            assert text.startswith(sent)
            assert all(final.startswith(sent) for final in finals[i:]), (raw, stop, text, sent)
    assert changed > 500  # the texts do what settled is about


def test_settled_text_stays_for_any_tokens(tokenizer):
    """Not only texts but pieces: bytes of one character, lone spaces, control tokens."""
    vocabulary = tokenizer.get_vocab()
    special = "▁ ' n ▁n t s < > | <n> <|tab|> <|blank_2|> . , ? ! [ ] 中 a <0xE4> <0xBD> <0xA0> <0xEF> <eop> <unk>"
    special = [vocabulary[piece] for piece in special.split() if piece in vocabulary]
    assert len(special) > 20
    chance = random.Random(0)
    for _ in range(300):
        ids = [
            chance.choice(special) if chance.random() < 0.9 else chance.randrange(len(vocabulary)) for _ in "12345678"
        ]
        texts = [decode_response(tokenizer, torch.tensor(ids[:count])) for count in range(len(ids) + 1)]
        for i, text in enumerate(texts):
            assert all(later.startswith(settled(text)) for later in texts[i:]), (ids, text)


def test_pieces_sent_one_by_one_make_the_answer(tiny):
    chance = random.Random(0)
    for query in ("你好", "写一首诗", "Tell me a story", "你是谁？你能做什么？"):
        stop = chance.choice([(), ("。",), ("you",)])
        options = {"seed": chance.randrange(1000), "temperature": chance.choice([0.95, 3.0]), "top_p": 1.0}
        sent = ""
        job = tiny.submit(Request(query, max_new_tokens=24, stop=stop, **options))
        for state in job.states():
            piece = state.text if state.finish_reason else settled(state.text, stop)
            if len(piece) > len(sent):
                assert piece.startswith(sent)
                sent = piece
        assert sent == state.text != ""
