"""Speed of the servers under load, and what is left of it: `python benchmarks/bench_servers.py`.

    python benchmarks/bench_servers.py                   1, 8 and 64 clients at once on each server
    python benchmarks/bench_servers.py --soak 2000       clients that ask, leave, cancel, send rubbish and half requests

Unusual here: every server is a process of its own, as a user starts it, and every answer is compared with what `chat`
gives in this process. A client is an asynchronous iterator of texts so far; leaving it is what a closed window does.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import psutil

from utils import load_model

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("你好", "你是谁？", "晚上睡不着应该怎么办", "法国的首都是哪里？", "hello", "写一首关于秋天的诗")
CLIENTS = (1, 8, 64)
POLL_SECONDS = 0.05  # between two questions of a client of stream_api.py whether there is more
START_SECONDS = 300
TIMEOUT = httpx.Timeout(300)
MIB = 2**20
ROWS = [  # key of a result, heading, width, format
    ("server", "server", 10, ""),
    ("clients", "clients", 7, "d"),
    ("answers", "answers", 7, "d"),
    ("failures", "failures", 8, "d"),
    ("first_s", "first text, s", 13, ".2f"),
    ("first_p95_s", "95 %", 6, ".2f"),
    ("whole_s", "whole answer, s", 15, ".2f"),
    ("whole_p95_s", "95 %", 6, ".2f"),
    ("tokens_s", "tokens/s", 8, ",.0f"),
    ("memory_mib", "memory, MiB", 11, ",.0f"),
]


# Clients --------------------------------------------------------------------------------------------------------------


async def ask_api(client, question):
    """Yields the answer of api.py, whole."""
    response = await client.post("/", json={"prompt": question, "history": [], "temperature": 0})
    response.raise_for_status()
    yield response.json()["response"]


async def ask_stream_api(client, question):
    """Yields the text so far of stream_api.py, as often as a page that polls would see it."""
    request_id = uuid.uuid4().hex
    body = {"query": question, "history": [], "request_id": request_id, "temperature": 0}
    (await client.post("/chat", json=body)).raise_for_status()
    try:
        while True:
            response = await client.post("/get_response", json={"request_id": request_id})
            response.raise_for_status()
            answer = response.json()["response"]
            yield answer["response"]
            if answer["is_finished"]:
                return
            await asyncio.sleep(POLL_SECONDS)
    except (asyncio.CancelledError, GeneratorExit):
        if int(request_id, 16) % 2:  # the other half is just gone
            await client.post("/cancel", json={"request_id": request_id})
        raise


async def ask_openai_api(client, question):
    """Yields the text so far of openai_api.py, streamed."""
    body = {"model": "chatglm-tiny", "messages": [{"role": "user", "content": question}], "temperature": 0}
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                text += delta.get("content") or ""
                yield text


async def ask_web_demo(client, question):
    """Yields the text so far of web_demo.py, asked as its page asks."""
    from gradio_client.utils import apply_diff

    config = (await client.get("/config")).json()
    call = next(call for call in config["dependencies"] if "submit" in [event for _, event in call["targets"]])
    session = uuid.uuid4().hex[:11]
    body = {"data": [question, None, 2048, 0.7, 0], "fn_index": call["id"], "session_hash": session}
    (await client.post("/gradio_api/queue/join", json=body)).raise_for_status()
    page = None
    async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                return
            if message.get("msg") != "process_generating":
                continue
            changes = message["output"]["data"]
            page = changes if page is None else [apply_diff(*pair) for pair in zip(page, changes, strict=True)]
            messages = page[1]
            if isinstance(messages, list) and messages:
                content = messages[-1]["content"]
                text = content if isinstance(content, str) else content[0]["text"]
                yield "" if text.startswith(("*", "…")) else text


SERVERS = {  # name -> client, and the path that takes questions as JSON
    "api": (ask_api, "/"),
    "stream_api": (ask_stream_api, "/chat"),
    "openai_api": (ask_openai_api, "/v1/chat/completions"),
    "web_demo": (ask_web_demo, None),
}
SOAKED = [name for name, (_, path) in SERVERS.items() if path]


# Servers --------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def started(name):
    """(psutil.Process, URL) of a running server with the embedded model; RuntimeError if it does not start or end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(ROOT / f"{name}.py"), "--port", str(port), "--device", "cpu"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

        def failure(what):
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            return RuntimeError("\n".join([f"{name}.py {what}:", *lines[-10:]]))

        try:
            async with httpx.AsyncClient(base_url=url, timeout=5, trust_env=False) as client:
                end = time.monotonic() + START_SECONDS
                while not await _is_there(client, "/config" if name == "web_demo" else "/health"):
                    if process.poll() is not None or time.monotonic() > end:
                        raise failure("did not start")
                    await asyncio.sleep(0.1)
            yield psutil.Process(process.pid), url
            process.send_signal(signal.SIGTERM)
            try:
                code = await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                raise failure("did not end within 30 s of SIGTERM") from None
            if code != 0:
                raise failure(f"ended with exit code {code}")
        finally:
            process.kill()
            process.wait()


async def _is_there(client, path):
    try:
        return (await client.get(path)).status_code == 200
    except httpx.TransportError:
        return False


def client_for(url, connections):
    """An HTTP client with so many connections, each of which lives as long as its request."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, trust_env=False)


def expected_answers():
    """The greedy answer of the embedded model to each question, and its number of tokens."""
    model, tokenizer = load_model(device="cpu")
    answers = {question: model.chat(tokenizer, question, temperature=0)[0] for question in QUESTIONS}
    return answers, {
        question: len(tokenizer.encode(answer, add_special_tokens=False)) + 1 for question, answer in answers.items()
    }


# Load -----------------------------------------------------------------------------------------------------------------


async def measure(name, clients, rounds, answers, tokens, server):
    """The result of so many clients that ask `rounds` questions each, one after another: a dictionary, see ROWS.

    server  (psutil.Process, URL) of `started`
    """
    process, url = server
    ask, _ = SERVERS[name]
    firsts, wholes, failures, count = [], [], [], 0

    async def one_client(client, number):
        nonlocal count
        for turn in range(rounds):
            question = QUESTIONS[(number + turn) % len(QUESTIONS)]
            start, first, text = time.perf_counter(), None, ""
            try:
                async with aclosing(ask(client, question)) as texts:
                    async for text in texts:
                        if text and first is None:
                            first = time.perf_counter() - start
                if text != answers[question]:
                    raise ValueError(f"expected {answers[question]!r}, got {text!r}")
            except (httpx.HTTPError, ValueError, LookupError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            firsts.append(first)
            wholes.append(time.perf_counter() - start)
            count += tokens[question]

    async with client_for(url, clients) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one_client(client, number) for number in range(clients)))
        seconds = time.perf_counter() - start
    return {
        "server": name,
        "clients": clients,
        "answers": len(wholes),
        "failures": len(failures),
        "first_s": median(firsts) if name != "api" else None,  # it sends nothing before the whole
        "first_p95_s": percentile(firsts) if name != "api" else None,
        "whole_s": median(wholes),
        "whole_p95_s": percentile(wholes),
        "tokens_s": count / seconds,
        "memory_mib": process.memory_info().rss / MIB,
        "problems": failures[:3],
    }


def median(seconds):
    return statistics.median(seconds) if seconds else None


def percentile(seconds, share=0.95):
    """The value that `share` of all do not exceed; None for an empty list."""
    return sorted(seconds)[round(share * (len(seconds) - 1))] if seconds else None


async def bench(names, counts, rounds):
    """The results of all servers, one after another."""
    answers, tokens = expected_answers()
    results = []
    for name in names:
        async with started(name) as server:
            await measure(name, 1, len(QUESTIONS), answers, tokens, server)  # does not count
            for clients in counts:
                at_least = -(-24 // clients)  # a median of fewer would mean little
                results.append(await measure(name, clients, max(rounds, at_least), answers, tokens, server))
    return results


def table(results):
    """The results as lines, one per server and number of clients."""
    lines = ["  ".join(heading.rjust(width) if style else heading.ljust(width) for _, heading, width, style in ROWS)]
    for result in results:
        cells = []
        for key, _, width, style in ROWS:
            value = result[key]
            text = "-" if value is None else format(value, style)
            cells.append(text.rjust(width) if style else text.ljust(width))
        lines.append("  ".join(cells))
    return "\n".join(lines)


# Soak -----------------------------------------------------------------------------------------------------------------

CLIENTS_OF_SOAK = 16
PHASES = 10
WARM_UP = 2  # phases
FLAT = 1.05  # memory may grow by so much after the warm-up


def bad_bodies():
    """Bodies that no server may take: (bytes, content type)."""
    bodies = [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b'"prompt"',
        b"\xff\xfe\x00",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b'{"prompt": "a", "query": "a", "request_id": "x", "temperature": NaN}',
        b'{"prompt": 5, "query": 5, "messages": 5, "request_id": "x"}',
        b'{"prompt": "\\ud800", "query": "\\ud800", "messages": "\\ud800", "request_id": "x"}',
        b'{"prompt": "a", "query": "a", "messages": [], "history": [["a"]], "request_id": "x"}',
        b'{"prompt": "' + b"a" * (MIB + 1) + b'"}',
        b'{"prompt": "a", "query": "a", "messages": [], "max_length": -1, "request_id": "x"}',
    ]
    return [(body, "application/json") for body in bodies] + [(b"prompt=a", "application/x-www-form-urlencoded")]


async def soak(name, count, server, answers, seed=0):
    """What became of `count` requests, half of them good, and what they left behind in the server: a dictionary.

    server  (psutil.Process, URL) of `started`
    """
    process, url = server
    chance = random.Random(seed)
    ask, path = SERVERS[name]
    outcomes, problems = Counter(), []

    async def good(client):
        question = chance.choice(QUESTIONS)
        async with aclosing(ask(client, question)) as texts:
            *_, text = [text async for text in texts]
        if text != answers[question]:
            problems.append(f"expected {answers[question]!r}, got {text!r}")

    async def leaving(client):
        question = chance.choice(QUESTIONS)
        try:
            async with asyncio.timeout(chance.uniform(0, 2)), aclosing(ask(client, question)) as texts:
                async for _ in texts:
                    if chance.random() < 0.05:
                        break
        except TimeoutError:
            pass

    async def bad(client):
        body, kind = chance.choice(bad_bodies())
        response = await client.post(path, content=body, headers={"Content-Type": kind})
        if not 400 <= response.status_code < 500:
            problems.append(f"status {response.status_code} for {body[:60]!r}")
        elif not isinstance(response.json(), dict):
            problems.append(f"no JSON object for {body[:60]!r}")

    async def broken(client):
        """Half a request, or a whole one whose connection is reset at once."""
        body = b'{"prompt": "a", "query": "a", "request_id": "%d", "model": "chatglm-tiny", ' % chance.getrandbits(60)
        body += b'"messages": [{"role": "user", "content": "a"}]}'
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, port)
        writer.write(whole if chance.random() < 0.5 else whole[: chance.randrange(1, len(whole))])
        await writer.drain()
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def one_client(client, left):
        while left:
            left.pop()
            kind = chance.choices([good, leaving, bad, broken], [50, 20, 15, 15])[0]
            try:
                await kind(client)
            except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
                problems.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            outcomes[kind.__name__] += 1

    async def settle():
        """Wait until the server has nothing to do and no connection; returns what it holds then."""
        end = time.monotonic() + 60
        async with client_for(url, 1) as client:
            while True:
                health = (await client.get("/health")).json()
                idle = health["running"] == health["queue_length"] == 0
                connections = sum(one.status == "ESTABLISHED" for one in process.net_connections("tcp"))
                if idle and connections == 0:
                    break
                if time.monotonic() > end:
                    problems.append(f"left behind: {health}, {connections} connections")
                    break
                await asyncio.sleep(0.2)
        return {"memory_mib": process.memory_info().rss / MIB, "threads": process.num_threads()}

    phases = []
    for phase in range(PHASES):
        left = [None] * (count * (phase + 1) // PHASES - count * phase // PHASES)
        async with client_for(url, CLIENTS_OF_SOAK) as client:
            await asyncio.gather(*(one_client(client, left) for _ in range(CLIENTS_OF_SOAK)))
        phases.append(await settle())
    warm, later = phases[WARM_UP - 1], phases[WARM_UP:]
    growth = max(phase["memory_mib"] for phase in later) / warm["memory_mib"]
    if growth > FLAT:
        problems.append(f"memory grew by {growth - 1:.1%}")
    # Pools of threads grow up to the number of clients.
    if later[-1]["threads"] > warm["threads"] + CLIENTS_OF_SOAK:
        problems.append(f"{later[-1]['threads']} threads, {warm['threads']} after the warm-up")
    return {"server": name, "requests": dict(outcomes), "growth": growth, "phases": phases, "problems": problems}


async def soak_all(names, count):
    """The results of `soak` on one server after another."""
    answers, _ = expected_answers()
    results = []
    for name in names:
        async with started(name) as server:
            results.append(await soak(name, count, server, answers))
    return results


def soak_report(result):
    """A result of `soak` in words."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(result["requests"].items()))
    lines = [
        f"{result['server']}   {sum(result['requests'].values())} requests ({kinds})",
        "  memory, MiB   " + "  ".join(f"{phase['memory_mib']:.0f}" for phase in result["phases"]),
        "  threads       " + "  ".join(f"{phase['threads']}" for phase in result["phases"]),
        f"  memory {result['growth'] - 1:+.1%} after the warm-up   {len(result['problems'])} problems",
    ]
    return "\n".join(lines + [f"  {problem}" for problem in result["problems"][:10]])


# The program ----------------------------------------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser(description="Measure the servers with the embedded model, on the CPU.")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, metavar="NAME", help=f"of {', '.join(SERVERS)} (default: all)"
    )
    parser.add_argument(
        "--clients",
        nargs="+",
        type=int,
        default=CLIENTS,
        help=f"clients at once (default: {' '.join(map(str, CLIENTS))})",
    )
    parser.add_argument("--rounds", type=int, default=3, help="least questions of each client (default: 3)")
    parser.add_argument(
        "--soak",
        type=int,
        metavar="REQUESTS",
        help=f"instead: so many good, bad and broken requests on each of {', '.join(SOAKED)} (default: no)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of a table")
    return parser


def main(argv=None):
    """Print the results; returns 1 if anything failed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag, value in (("clients", min(args.clients)), ("rounds", args.rounds), ("soak", args.soak)):
        if value is not None and value < 1:
            parser.error(f"--{flag} must be at least 1, got {value}")
    if args.soak:
        if not set(args.servers or SOAKED) <= set(SOAKED):
            parser.error(f"--soak is for {', '.join(SOAKED)}, got {' '.join(args.servers)}")
        results = asyncio.run(soak_all(args.servers or SOAKED, args.soak))
        report = "\n".join(map(soak_report, results))
    else:
        results = asyncio.run(bench(args.servers or list(SERVERS), args.clients, args.rounds))
        report = "\n".join([table(results), *(problem for result in results for problem in result["problems"])])
    print(json.dumps(results, indent=2, ensure_ascii=False) if args.json else report)
    return int(any(result["problems"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
