"""What the two READMEs promise holds: commands, flags, files, memory, snippets, curl lines, the command of CI."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from chatglm.kernels.cpu import find_compilers

ROOT = Path(__file__).resolve().parents[1]
CHINESE = (ROOT / "README.md").read_text(encoding="utf-8")
ENGLISH = (ROOT / "README_en.md").read_text(encoding="utf-8")
TUNING = [(ROOT / "ptuning" / name).read_text(encoding="utf-8") for name in ("README.md", "README_en.md")]
PAIRS = pytest.mark.parametrize(
    "chinese, english", [(CHINESE, ENGLISH), TUNING], ids=["README.md", "ptuning/README.md"]
)
BOTH = pytest.mark.parametrize("text", [CHINESE, ENGLISH], ids=["README.md", "README_en.md"])
SCRIPTS = ["cli_demo", "web_demo", "web_demo2", "api", "stream_api", "openai_api"]
INTERFACES = {"api.py": 3, "stream_api.py": 2, "openai_api.py": 2}  # and how many curl lines their sections have
ENVIRONMENT = {
    **os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "2", "CHATGLM_API_KEY": "", "no_proxy": "127.0.0.1"
}  # fmt: skip
PATIENCE = 60  # seconds; machines that run tests are busy
NOT_RUN = {  # commands of README.md that no test runs, as patterns of fnmatch, and why
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python cli_demo.py":
        "installs from the network, as .ci/run does; its last part is a command of its own",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -r ptuning/requirements.txt":
        "installs from the network, as .ci/run does",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements-test.txt && .venv/bin/python -m pytest":
        "runs this test; it is the end of .ci/run, see below",
    ".venv/bin/python cli_demo.py --model_name_or_path path/to/chatglm-6b --num_gpus 2":
        "needs two GPUs; its flags are parsed below, and tests/test_multi_gpu.py splits models without them",
    ".venv/bin/python ptuning/main.py --do_train *":
        "trains for minutes; it stands in ptuning/README.md too, whose tests parse it",
    ".venv/bin/python cli_demo.py --adapter ptuning/output/advert":
        "needs what that trains; tests/test_adapters.py loads such folders",
}  # fmt: skip


def code_blocks(text):
    """(language, code) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def section(text, heading):
    """What stands between a heading and the next one, of whatever level."""
    (body,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return body


def headings(text):
    """(#s, words) of every heading, in order."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(#+) (.+)$", without_code, flags=re.MULTILINE)


def table_keys(text, pattern):
    """First cells of the table rows that match pattern, in order."""
    return re.findall(rf"^\| ({pattern}) \|", text, flags=re.MULTILINE)


def paths(text):
    """Targets of all links into the repository, without anchors, in order."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [target for target in targets if not re.match(r"\w+:", target)]


@PAIRS
def test_both_languages_have_the_same_code_blocks(chinese, english):
    assert code_blocks(chinese) == code_blocks(english)
    assert len(code_blocks(chinese)) >= 10


@PAIRS
def test_both_languages_have_the_same_sections_flags_and_files(chinese, english):
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert table_keys(chinese, r"`--\w+`") == table_keys(english, r"`--\w+`")
    in_english = [re.sub(r"_en\.(png|md)$", r".\1", path) for path in paths(english)]  # what has a language of its own
    assert paths(chinese)[1:] == in_english[1:]  # the first link is the one to the other language


@BOTH
def test_files_of_the_model_and_all_scripts_are_listed(text):
    modules = [f"chatglm/{file.name}" for file in (ROOT / "chatglm").glob("*.py") if file.name != "__init__.py"]
    assert {*modules, *(f"{script}.py" for script in SCRIPTS), "serving.py", "utils.py"} <= set(paths(text))


def parser_of(script):
    return importlib.import_module(script).build_parser()


@BOTH
@pytest.mark.parametrize("script", SCRIPTS)
def test_flag_tables_list_every_flag_of_a_script(text, script):
    listed = []
    tables = section(text, "参数" if text is CHINESE else "Flags").strip().split("\n\n")
    for introduction, table in zip(tables[::2], tables[1::2], strict=True):
        for flag, second_cell in re.findall(r"^\| `(--\w+)` \| ([^|]+)", table, flags=re.MULTILINE):
            scripts = re.findall(r"`(\w+)\.py`", second_cell) or re.findall(r"`(\w+)\.py`", introduction)
            listed += [flag] * (script in scripts)
    flags = [action.option_strings[-1] for action in parser_of(script)._actions if action.dest != "help"]
    assert sorted(listed) == sorted(flags)


def test_commands_have_flags_that_their_scripts_understand():
    commands = "".join(code for language, code in code_blocks(CHINESE) if language == "bash")
    calls = re.findall(rf"(?<!/)\b({'|'.join(SCRIPTS)})\.py(?: --)?((?: [^|&\n]+)?)$", commands, flags=re.MULTILINE)
    assert {script for script, _ in calls} == set(SCRIPTS)
    for script, flags in calls:
        parser_of(script).parse_args(flags.split())  # exits if it does not


@BOTH
def test_addresses_are_those_the_servers_have_without_flags(text):
    import web_demo2

    ports = {str(parser_of(script).get_default("port")) for script in ("web_demo", "api", "stream_api", "openai_api")}
    assert set(re.findall(r"http://127\.0\.0\.1:(\d+)", text)) == {*ports, str(web_demo2.PORT)}


@BOTH
def test_tables_list_every_field(text):
    import api
    import stream_api

    options = [*api.Question.model_fields]
    assert table_keys(section(text, "api.py"), r"`\w+`") == [f"`{name}`" for name in options]
    assert {"request_id", "query", *options} - {"prompt"} == {"request_id", *stream_api.FIELDS}
    shown = [json.loads(code) for language, code in code_blocks(section(text, "stream_api.py")) if language == "json"]
    assert table_keys(section(text, "stream_api.py"), r"`\w+`") == [f"`{name}`" for name in shown[-1]["response"]]


@BOTH
def test_memory_table_is_what_the_program_computes(text):
    import utils

    def figures(device, dtype, bits):
        needs = utils.memory_needs(utils.published_checkpoint(), device, dtype, bits)
        return [f"{size / 1e9:.1f}" for size in (needs.weights, needs.cache, needs.loading_peak, needs.total)]

    rows = re.findall(r"^\| (GPU|CPU)[，,] ?`?(\w+)`? \| (.+) \|$", text, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("GPU", "float16"), ("GPU", "INT8"), ("GPU", "INT4"), ("CPU", "bfloat16"), ("CPU", "INT8"), ("CPU", "INT4")
    ]  # fmt: skip
    for place, form, numbers in rows:
        device, dtype = {"GPU": ("cuda:0", "float16"), "CPU": ("cpu", "float32")}[place]
        bits = {"INT8": 8, "INT4": 4}.get(form)
        assert numbers.split(" | ") == figures(device, dtype if bits else form, bits), (place, form)
    assert f"{figures('cpu', 'float32', None)[-1]} GB" in text


@BOTH
def test_measured_figures_are_those_of_the_benchmarks(text):
    results = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ChatGLM-\w+[，,].*? \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for figure in re.findall(r"[\d.,]+", " ".join(rows)):
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,])", results), figure


def test_dialogue_is_what_the_embedded_model_says(model, tokenizer):
    (dialogue,) = (code for language, code in code_blocks(CHINESE) if language == "text")
    history = []
    for part in dialogue.strip().split("用户：")[1:]:
        query, answer = part.strip().split("\nChatGLM-Tiny：")
        response, history = model.chat(tokenizer, query, history, temperature=0)
        assert response == answer
    assert len(history) == 6


# Commands -------------------------------------------------------------------------------------------------------------


def bash_lines():
    """Every line of the bash blocks of README.md."""
    return [line for language, code in code_blocks(CHINESE) if language == "bash" for line in code.splitlines()]


def who_runs(line):
    """What is done with a command below: it is `excused`, asked by `curl`, an `interface`, a `page` or a `program`."""
    if any(fnmatchcase(line, pattern) for pattern in NOT_RUN):
        return "excused"
    if line.startswith("curl "):
        return "curl"
    if line.removeprefix(".venv/bin/python ") in INTERFACES:
        return "interface"
    if re.match(r"\.venv/bin/(python|streamlit run) web_demo2?\.py", line):
        return "page"
    if re.search(r"\.venv/bin/python (cli_demo\.py|utils\.py|-m chatglm\.kernels)", line):
        return "program"
    raise AssertionError(f"no test runs {line!r}: run it below, or name it in NOT_RUN with the reason")


def test_every_command_is_run_or_excused():
    lines = bash_lines()
    kinds = [who_runs(line) for line in lines]
    assert {"excused", "curl", "interface", "page", "program"} == set(kinds)
    assert kinds.count("interface") == len(INTERFACES) and kinds.count("curl") == 1 + sum(INTERFACES.values())
    for pattern in NOT_RUN:  # no excuse outlives its command
        assert any(fnmatchcase(line, pattern) for line in lines), pattern
    tuning = code_blocks(TUNING[0])
    assert all(("bash", f"{line}\n") in tuning for line in lines if "ptuning/" in line)


@BOTH
def test_windows_commands_are_the_others_in_powershell(text):
    install = [line for line in bash_lines() if line.startswith("python3 ") and "ptuning" not in line]
    expected = [
        line.replace("python3", "py").replace(" &&", ";").replace(".venv/bin/", ".venv\\Scripts\\") + "\n"
        for line in install
    ]
    assert [code for language, code in code_blocks(text) if language == "powershell"] == expected


def published(cache):
    """A cache of the model hub in which v1.1.0 of THUDM/chatglm-6b is the embedded checkpoint."""
    repository, commit = cache / "models--THUDM--chatglm-6b", "1" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1.1.0").write_text(commit, encoding="utf-8")
    shutil.copytree(ROOT / "chatglm" / "tiny", repository / "snapshots" / commit)
    return str(cache)


@contextmanager
def server(command, **environment):
    """The URL at which a command serves; it ends with the context."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, **environment}, **streams) as process:
        try:
            log = ""
            while not (match := re.search(r"(?:listening on|URL:) (http://127\.0\.0\.1:\d+)", log)):
                line = process.stdout.readline()
                assert line, f"{command} ended: {log}"
                log += line
            yield match[1]
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


def interface(script):
    """A script of INTERFACES, started as the README says, but at a free port and on the CPU."""
    return server([sys.executable, script, "--port", "0", "--device", "cpu"])


def try_out(line, **environment):
    """Run a command as it stands, but with this Python, the embedded model and a free port; fails if it fails."""
    line = line.replace("path/to/chatglm-6b", "chatglm/tiny")
    if who_runs(line) == "page":
        line = line.replace("streamlit run", "python -m streamlit run --server.port 0")
        line += " --port 0" * ("streamlit" not in line)
    line = line.replace(".venv/bin/python", shlex.quote(sys.executable))
    if "web_demo" in line:
        with server(shlex.split(line), **environment) as url, urllib.request.urlopen(url, timeout=PATIENCE) as page:
            assert "<html" in page.read().decode(), line
        return
    run = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env={**ENVIRONMENT, **environment}, input="你好\nstop\n", capture_output=True,
        encoding="utf-8", timeout=2 * PATIENCE,
    )  # fmt: skip
    assert run.returncode == 0, (line, run.stderr)
    if "cli_demo" in line:
        assert re.search(r"^用户：你好\n\S+：\S(?s:.+)\n\n用户：stop\n$", run.stdout, flags=re.MULTILINE), line
    else:
        assert run.stdout.strip(), line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_run(tmp_path):
    lines = [line for line in bash_lines() if who_runs(line) in ("program", "page")]
    if not find_compilers():
        lines = [line for line in lines if "chatglm.kernels" not in line]
    environment = {"HF_HUB_CACHE": published(tmp_path), "CHATGLM_KERNELS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(2) as pool:  # a program spends most of its time importing, on one core
        list(pool.map(lambda line: try_out(line, **environment), lines))


def run_python(code):
    """What a snippet prints; it runs in the repository's folder."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_python_snippets_run(embedded):
    codes = [code for language, code in code_blocks(CHINESE) if language == "python"]
    output = run_python("".join(code for code in codes if "base_url" not in code))  # those need a server, see below
    assert len(output.splitlines()) >= 3
    assert [code in section(CHINESE, "openai_api.py") for code in codes if "base_url" in code] == [True]


def curl_lines(text):
    """(command, answer that the README shows or None) of every curl line, in order."""
    return re.findall(r"^```bash\n(curl .*)\n```$(?:\n\n```json\n([^`]+)^```$)?", text, flags=re.MULTILINE)


def fixed(answer):
    """What of an answer is the same every time."""
    if isinstance(answer, dict):
        varying = ("id", "created", "time", "timestamp")
        return {name: fixed(value) if name not in varying else "..." for name, value in answer.items()}
    return answer


def at(url, code):
    """A command or snippet, but asking the server at that URL."""
    assert code.count("http://127.0.0.1:8000") == 1
    return code.replace("http://127.0.0.1:8000", url)


def ask(url, line):
    """What a curl line gets; that of /get_response is asked again until the answer is complete."""
    deadline = time.monotonic() + PATIENCE
    while True:
        run = subprocess.run(shlex.split(at(url, line)), env=ENVIRONMENT, capture_output=True, timeout=PATIENCE)
        assert run.returncode == 0, run.stderr
        answer = run.stdout.decode()
        if "/get_response" not in line or json.loads(answer)["response"]["is_finished"]:
            return answer
        assert time.monotonic() < deadline


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("script", INTERFACES)
def test_curl_lines_and_snippets_get_the_answers_that_are_shown(script):
    common, own = section(CHINESE, "HTTP 接口"), section(CHINESE, script)
    assert ("bash", f".venv/bin/python {script}\n") in code_blocks(own)
    lines = curl_lines(common) + curl_lines(own)
    assert len(lines) == 1 + INTERFACES[script] == (common + own).count("\ncurl ")

    with interface(script) as url:
        for line, shown in lines:
            answer = ask(url, line)
            if shown:
                assert fixed(json.loads(answer)) == fixed(json.loads(shown))
                whole = json.loads(shown)
            else:  # the question before, streamed
                chunks = re.findall(r"^data: (.+)$", answer, flags=re.MULTILINE)
                assert chunks.pop() == "[DONE]"
                pieces = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
                assert "".join(pieces) == whole["choices"][0]["message"]["content"]
        for language, code in code_blocks(own):
            if language == "python":
                assert run_python(at(url, code)) == whole["choices"][0]["message"]["content"]


def test_ci_runs_exactly_the_test_command():
    commands = [code.strip() for language, code in code_blocks(CHINESE) if language == "bash" and "pytest" in code]
    assert len(commands) == 1
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == commands[0]
