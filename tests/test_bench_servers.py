"""The benchmark of the servers: its table, and short runs against real server processes."""

import asyncio

import pytest

from benchmarks import bench_servers
from benchmarks.bench_servers import (
    QUESTIONS,
    ROWS,
    SOAKED,
    main,
    measure,
    percentile,
    soak,
    soak_report,
    started,
    table,
)


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    return {question: model.chat(tokenizer, question, temperature=0)[0] for question in QUESTIONS}


def test_percentile_is_a_value_that_so_many_do_not_exceed():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(101)]) == 95.0
    assert percentile([7.0]) == 7.0
    assert percentile([]) is None


def test_table_is_aligned_and_shows_what_was_not_measured():
    result = {key: 1 for key, *_ in ROWS} | {"server": "stream_api", "clients": 64, "first_s": None}
    heading, line, again = table([result, result]).splitlines()
    assert len(heading) == len(line) and line == again
    assert line.split()[:5] == ["stream_api", "64", "1", "1", "-"]


def test_report_of_a_soak_names_what_went_wrong():
    phases = [{"memory_mib": 400.0 + phase, "threads": 9} for phase in range(10)]
    result = {"server": "api", "requests": {"good": 5, "bad": 2}, "growth": 1.02, "phases": phases}
    report = soak_report(result | {"problems": ["status 500"]})
    assert "api   7 requests (2 bad, 5 good)" in report
    assert "memory +2.0% after the warm-up   1 problems\n  status 500" in report


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--soak", "9", "--servers", "api", "web_demo"],
            "--soak is for api, stream_api, openai_api, got api web_demo",
        ),
        (["--clients", "8", "0"], "--clients must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_clients_of_a_real_server_get_the_answers_of_chat(answers):
    async def run():
        async with started("web_demo") as server:
            return await measure("web_demo", 3, 1, answers, dict.fromkeys(QUESTIONS, 10), server)

    result = asyncio.run(run())
    assert result["problems"] == []
    assert (result["answers"], result["failures"]) == (3, 0)
    assert 0 < result["first_s"] <= result["whole_s"] <= result["whole_p95_s"]
    assert result["tokens_s"] > 0 and result["memory_mib"] > 100


@pytest.mark.slow
def test_servers_survive_clients_that_leave_cancel_and_send_rubbish(answers, monkeypatch):
    monkeypatch.setattr(bench_servers, "PHASES", 3)
    # Memory is flat only after hundreds of requests: benchmarks/README.md has the long run.
    monkeypatch.setattr(bench_servers, "FLAT", 2)

    async def run(name):
        async with started(name) as server:  # it must also end, with exit code 0
            return await soak(name, 40, server, answers)

    async def run_all():
        return await asyncio.gather(*map(run, SOAKED))

    for result in asyncio.run(run_all()):
        assert result["problems"] == [], result["server"]
        assert sum(result["requests"].values()) == 40 and len(result["requests"]) == 4
