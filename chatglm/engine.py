"""One queue in front of a model: submit a question, see its place in the queue, watch the answer grow, cancel it.

The scripts that answer over a network stand on this file; it knows nothing of HTTP, web pages or their libraries.

Unusual here:
- The model runs in one thread of its own. Whoever ends a job (cancel, deadline, close) does so at once; the model's
  thread notices after its token, and then begins the next job. How many answers a step computes is its own affair.
- A state is never pushed: a watcher is told that something changed and takes the newest state. A slow watcher misses
  states in between, never the last one, and holds up nobody.
- Python can collect an abandoned generator anywhere, also in the middle of this file, and with it run a `with job:` to
  its end. So the engine's lock may be entered twice by one thread, and a watcher is woken by a single step in C.
"""

import asyncio
import atexit
import gc
import logging
import math
import re
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from transformers import StoppingCriteria

from .chat import (
    FULL_WIDTH,
    History,
    check_count,
    check_history,
    check_number,
    check_options,
    check_stop,
    check_text,
    cut_at_stop,
    decode_response,
    dropped_note,
    fit_prompt,
    hold_back,
)

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # `close` waits this long for the model to notice that its answer is not wanted any more
RECENT_ANSWERS = 32  # what `retry_after` is estimated from
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)

# Strings that become others as soon as they are complete, see `settled`; so do some behind a `'`, which it never sends.
CHANGING = ("[[训练时间]]", "<n>", "<|tab|>", "<|blank_", " n't", " 've", " 're")
OPEN_BLANK = re.compile(r"<\|blank_\d*\|?$")


class QueueFullError(Exception):
    """No place in the queue; retry_after: whole seconds until there should be one."""

    def __init__(self, max_queue: int, retry_after: int):
        super().__init__(f"{max_queue} requests are waiting and no more may: try again in {retry_after} s")
        self.retry_after = retry_after


class EngineClosedError(Exception):
    """The engine takes no new requests."""

    def __init__(self):
        super().__init__("the server is shutting down and takes no new requests")


@dataclass(frozen=True)
class Request:
    """A question and how it is to be answered; the fields are the arguments of `chat`, except

    keep      the first rounds of history that are never dropped to make room
    deadline  seconds from submission after which the request fails with finish_reason "deadline"; None = never
    """

    query: str
    history: History = ()
    max_length: int = 2048
    max_new_tokens: int | None = None
    top_p: float = 0.7
    temperature: float = 0.95
    seed: int | None = None
    stop: Sequence[str] | str = ()
    keep: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class State:
    """How far a request has come.

    position           n-th in the queue, from 1; 0 = being answered; None = ended
    text               the whole answer so far; its end may still change, see `settled`
    finish_reason      None while unfinished; then "stop", "length", "cancelled", "deadline" or "error"
    error              one sentence for the user if finish_reason is "error"
    prompt_tokens      0 until the model has read the prompt
    completion_tokens  tokens of the answer, with the one that ends it
    notes              sentences for the user about how the request was treated
    """

    position: int | None
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stats:
    """Totals since the engine started: ended requests by finish_reason, tokens, and seconds the model has worked."""

    requests: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class Job:
    """A submitted request. As a context manager it cancels the request on leaving, unless it has ended.

    id       its name, a string that no other job has
    request  the Request, checked; history and stop are tuples
    """

    def __init__(self, engine: "Engine", request: Request, notes: tuple[str, ...]):
        self.id = uuid.uuid4().hex
        self.request = request
        self._engine = engine
        self._state = State(position=0, notes=notes)  # the position of a waiting job is looked up when asked for
        self._watchers: set[Callable[[], None]] = set()
        self._submitted = time.monotonic()
        self._ended: float | None = None

    @property
    def state(self) -> State:
        """The newest state; never waits for the model."""
        return self._engine._state_of(self)

    @property
    def seconds(self) -> float:
        """Time from submission to the end, or until now."""
        return (self._ended or time.monotonic()) - self._submitted

    def cancel(self) -> None:
        """End the request with finish_reason "cancelled" if it has not ended; the model is free within one token."""
        self._engine._end(self, "cancelled")

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception) -> None:
        self.cancel()

    def states(self) -> Iterator[State]:
        """Yields the newest state whenever it has changed, the final one last. Blocks in between."""
        seen = None
        with self._watched() as changed:
            while seen is None or seen.finish_reason is None:
                changed.acquire()
                if (state := self.state) != seen:
                    seen = state
                    yield state

    async def states_async(self) -> AsyncIterator[State]:
        """As `states`, for asyncio: waits without a thread. It may be closed or cancelled anywhere."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake():
            try:
                loop.call_soon_threadsafe(changed.set)
            except RuntimeError:  # the loop has been closed without closing this iterator
                self._watchers.discard(wake)

        seen = None
        with self._watched_by(wake):
            while seen is None or seen.finish_reason is None:
                changed.clear()
                state = self.state
                if state == seen:
                    await changed.wait()
                else:
                    seen = state
                    yield state

    def result(self, timeout: float | None = None) -> State:
        """The final state; raises TimeoutError if the request has not ended within timeout seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._watched() as changed:
            while changed.acquire(timeout=-1 if end is None else max(0.0, end - time.monotonic())):
                state = self.state
                if state.finish_reason is not None:
                    return state
        raise TimeoutError(f"no answer within {timeout} s")

    @contextmanager
    def _watched(self) -> Iterator[threading.Lock]:
        """A lock that is free when the state may have changed; an Event, with its own lock, could deadlock."""
        changed = threading.Lock()

        def wake():
            with suppress(RuntimeError):  # it is free already
                changed.release()

        with self._watched_by(wake):
            yield changed

    @contextmanager
    def _watched_by(self, wake: Callable[[], None]) -> Iterator[None]:
        self._watchers.add(wake)
        try:
            yield
        finally:
            self._watchers.discard(wake)

    def _wake(self) -> None:
        for wake in self._watchers.copy():  # in one step: a tuple could find the set changed by another thread
            wake()


class Engine:
    """Answers submitted requests in their order, in a thread of its own, until it is closed.

    model, tokenizer  as `utils.load_model` returns them; nobody else may use the model meanwhile
    max_queue         requests that may wait beside those being answered
    max_running       requests answered at the same time, at most MAX_RUNNING

    As a context manager it is closed on leaving, and what has not ended is cancelled.
    """

    MAX_RUNNING = 1

    def __init__(self, model, tokenizer, max_queue: int = 64, max_running: int = 1):
        check_count("max_queue", max_queue, 0, math.inf, "a whole number of requests, at least 0")
        check_count("max_running", max_running, 1, self.MAX_RUNNING, f"a whole number from 1 to {self.MAX_RUNNING}")
        self.max_queue = max_queue
        self.max_running = max_running
        self._model = model
        self._tokenizer = tokenizer
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # something for the two threads to look at
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._closed = False
        self._listeners: list[Callable[[Job], None]] = []
        self._finished = Counter()
        self._prompt_tokens = self._completion_tokens = 0
        self._seconds = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_ANSWERS)  # seconds of each
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._clock = threading.Thread(target=self._keep_deadlines, name="engine-deadlines", daemon=True)
        self._worker.start()
        self._clock.start()
        # A thread that Python's end finds in the middle of torch's code would abort the process.
        atexit.register(self.close, drain=False)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close(drain=False)

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered."""
        with self._lock:
            return sum(job._state.finish_reason is None for job in self._running)

    @property
    def stats(self) -> Stats:
        """Totals since the engine started."""
        with self._lock:
            return Stats(dict(self._finished), self._prompt_tokens, self._completion_tokens, self._seconds)

    def add_listener(self, callback: Callable[[Job], None]) -> None:
        """Have callback(job) called once for each job that ends, in the thread that ended it: it must be quick."""
        self._listeners.append(callback)

    def submit(self, request: Request) -> Job:
        """Put a request into the queue.

        Long texts take a while to measure (1 MB: about a second), so asyncio code calls this in a thread.

        Raises TypeError or ValueError for what `chat` would refuse, QueueFullError and EngineClosedError.
        """
        request = _checked(request)
        self._check_place()  # before the work of measuring the prompt
        notes = ()
        if callable(self._tokenizer):
            request, notes = _fitted(self._tokenizer, request)
        job = Job(self, request, notes)
        with self._lock:
            self._check_place()
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def close(self, timeout: float | None = None, drain: bool = True) -> bool:
        """Take no new requests and end; True if all requests have ended by themselves.

        timeout  seconds that running and waiting requests have to finish, None = as long as they need; what is left
                 then is cancelled
        drain    False cancels them at once

        Waits at most STOP_SECONDS more for the model to stop. Closing twice is fine.
        """
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        if drain:
            self._worker.join(timeout)
        with self._lock:
            left = [*self._waiting, *self._running]
        cancelled = [self._end(job, "cancelled") for job in left]
        self._worker.join(STOP_SECONDS)
        self._clock.join(STOP_SECONDS)
        if self._worker.is_alive():
            logger.warning("the model is still busy with its last answer")
        else:
            atexit.unregister(self.close)
        return not any(cancelled)

    # Below: called by jobs and by the two threads.

    def _check_place(self) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosedError
            if len(self._waiting) + self.running >= self.max_queue + self.max_running:
                expected = sum(self._recent) / len(self._recent) if self._recent else 1.0
                raise QueueFullError(self.max_queue, max(1, math.ceil(expected)))

    def _state_of(self, job: Job) -> State:
        with self._lock:
            state, queue = job._state, tuple(self._waiting)
            return replace(state, position=queue.index(job) + 1) if job in queue else state

    def _update(self, job: Job, **changes) -> bool:
        """Change the state of a job; False if it has ended."""
        with self._lock:
            if job._state.finish_reason is not None:
                return False
            job._state = replace(job._state, **changes)
        job._wake()
        return True

    def _end(self, job: Job, finish_reason: str, error: str | None = None) -> bool:
        """Give a job its final state; False if it had one."""
        with self._lock:
            if job._state.finish_reason is not None:
                return False
            job._ended = time.monotonic()
            job._state = state = replace(job._state, position=None, finish_reason=finish_reason, error=error)
            self._finished[finish_reason] += 1
            self._prompt_tokens += state.prompt_tokens
            self._completion_tokens += state.completion_tokens
            queue = tuple(self._waiting)
            self._leave_queue(job)
            self._changed.notify_all()
        for changed in (job, *queue):
            changed._wake()
        for callback in tuple(self._listeners):
            try:
                callback(job)
            except Exception:
                logger.exception("a listener failed")
        return True

    def _leave_queue(self, job: Job) -> None:
        with suppress(ValueError):  # the collector can have cancelled it a line ago
            self._waiting.remove(job)

    def _keep_deadlines(self) -> None:
        while True:
            with self._lock:
                if self._closed and not (self._waiting or self.running):
                    return
                due, wait = self._due()
                if not due:
                    self._changed.wait(wait)
            while due:
                self._end(due.pop(), "deadline")

    def _due(self) -> tuple[list[Job], float | None]:
        """Jobs whose deadline is over, and seconds until that of the next."""
        now = time.monotonic()
        left = [
            (job._submitted + job.request.deadline - now, job)
            for job in (*self._waiting, *self._running)
            if job.request.deadline is not None and job._state.finish_reason is None
        ]
        return [job for seconds, job in left if seconds <= 0], min((seconds for seconds, _ in left), default=None)

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (queue := tuple(self._waiting)) and not self._closed:
                    self._changed.wait()
                if not queue:
                    return
                job = queue[0]
                self._running.append(job)
                self._leave_queue(job)
            for moved in queue:
                moved._wake()
            started = time.monotonic()
            if not self._answer(job):
                _free_memory()
            with self._lock:
                self._running.remove(job)
                self._seconds += time.monotonic() - started
                self._recent.append(time.monotonic() - started)
                self._changed.notify_all()
            del job, queue, moved  # while it waits, it must not keep them in memory

    def _answer(self, job: Job) -> bool:
        """Run a job to its end; False if it failed."""
        if job._state.finish_reason is not None:
            return True
        request = job.request
        progress = Progress()
        try:
            stream = self._model.stream_chat(
                self._tokenizer,
                request.query,
                list(request.history),
                max_length=request.max_length,
                top_p=request.top_p,
                temperature=request.temperature,
                max_new_tokens=request.max_new_tokens,
                stop=request.stop,
                seed=request.seed,
                truncate_history=False,
                yield_last=True,
                stopping_criteria=[progress],
            )
            with closing(stream):
                for text, _ in stream:
                    tokens = {"prompt_tokens": progress.prompt_tokens, "completion_tokens": progress.completion_tokens}
                    if not self._update(job, text=text, **tokens):
                        return True
            self._end(job, progress.finish_reason(self._model, self._tokenizer, request))
        except BaseException as error:  # whatever it was, the next request must be answered
            # As text: a record with the exception would keep the tensors of the failed step.
            logger.error("request %s failed\n%s", job.id, traceback.format_exc())
            self._end(job, "error", _sentence(error))
            return False
        return True


class Progress(StoppingCriteria):
    """Stops nothing; sees every token, and so knows how many there are and why there are no more."""

    def __init__(self):
        self.ids = None
        self.prompt_tokens = self.completion_tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Called with all ids [1, length] after each token."""
        if self.ids is None:
            self.prompt_tokens = input_ids.shape[1] - 1
        self.ids = input_ids
        self.completion_tokens = input_ids.shape[1] - self.prompt_tokens
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish_reason(self, model, tokenizer, request: Request) -> str:
        """ "length" if only the limit has ended the answer, else "stop"."""
        limit = request.max_new_tokens or request.max_length - self.prompt_tokens
        if self.ids is None or self.completion_tokens < limit:
            return "stop"
        ends = model.generation_config.eos_token_id
        if int(self.ids[0, -1]) in (ends if isinstance(ends, list) else [ends]):
            return "stop"
        text = decode_response(tokenizer, self.ids[0, self.prompt_tokens :])
        return "stop" if cut_at_stop(text, request.stop)[1] else "length"


def _checked(request: Request) -> Request:
    """The request with history and stop as tuples; TypeError or ValueError for what makes no sense."""
    check_text("query", request.query)
    history = check_history(request.history)
    check_options(request.max_length, request.max_new_tokens, request.top_p, request.temperature, request.seed)
    check_count("keep", request.keep, 0, math.inf, "a whole number of rounds, at least 0")
    if request.deadline is not None:
        check_number("deadline", request.deadline, 0, 1e6, "a number of seconds from 0 to 1e6")
    stop = tuple(check_stop(request.stop))
    return replace(request, history=tuple(history), stop=stop)


def _fitted(tokenizer, request: Request) -> tuple[Request, tuple[str, ...]]:
    """The request without the oldest rounds if they leave no room for an answer, and a note that says so.

    Found out here, not from the warning that `chat` would give: which of several threads a warning belongs to, nobody
    can tell. Raises ValueError if the query alone does not fit.
    """
    history, keep = request.history, request.keep
    _, dropped = fit_prompt(tokenizer, request.query, history, request.max_length, request.max_new_tokens, keep)
    if not dropped:
        return request, ()
    note = dropped_note(dropped, len(history), request.max_length)
    return replace(request, history=history[:keep] + history[keep + dropped :]), (note,)


def _sentence(error: BaseException) -> str:
    """What the user is told; the log has the rest."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return "the model ran out of memory: shorten the text or the history, or lower max_length"
    return f"the model failed ({type(error).__name__}): the log of the server says why"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a failed kernel the GPU refuses everything
            torch.cuda.empty_cache()


def settled(text: str, stop: Sequence[str] = ()) -> str:
    """The beginning of a growing answer that later tokens cannot change, whatever they are.

    text  an answer so far, as in State
    stop  the stop strings of the request

    Held back are ends that the tokenizer or `process_response` would write otherwise once more follows: `,` before a
    Hanzi becomes `，`, ` n't` becomes `n't`. The final text of an answer needs no settling.
    """
    text = OPEN_BLANK.sub("", hold_back(text, CHANGING))
    if text.endswith((*FULL_WIDTH, "'")):
        text = text[:-1]
    return hold_back(text, stop).rstrip()
