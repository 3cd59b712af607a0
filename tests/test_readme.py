"""What the two READMEs promise holds: same commands, existing files, memory, running snippets, the command of CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHINESE = (ROOT / "README.md").read_text(encoding="utf-8")
ENGLISH = (ROOT / "README_en.md").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("text", [CHINESE, ENGLISH], ids=["README.md", "README_en.md"])


def code_blocks(text):
    """(language, code) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def table_keys(text, pattern):
    """First cells of the table rows that match pattern, in order."""
    return re.findall(rf"^\| ({pattern}) \|", text, flags=re.MULTILINE)


def paths(text):
    """Targets of all links into the repository, without anchors, in order."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [target for target in targets if not re.match(r"\w+:", target)]


def test_both_readmes_have_the_same_code_blocks():
    assert code_blocks(CHINESE) == code_blocks(ENGLISH)
    assert len(code_blocks(CHINESE)) >= 10


def test_both_readmes_have_the_same_sections_flags_and_files():
    def levels(text):
        return re.findall(r"^#+(?= )", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)

    assert levels(CHINESE) == levels(ENGLISH)
    assert table_keys(CHINESE, r"`--\w+`") == table_keys(ENGLISH, r"`--\w+`")
    assert paths(CHINESE)[1:] == paths(ENGLISH)[1:]  # the first link is the one to the other language


@BOTH
def test_linked_files_exist(text):
    assert [path for path in paths(text) if not (ROOT / path).exists()] == []


@BOTH
def test_anchors_name_a_heading(text):
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= slugs


def test_flag_table_lists_every_flag_of_the_terminal_chat():
    from cli_demo import build_parser

    flags = [action.option_strings[-1] for action in build_parser()._actions if action.dest != "help"]
    assert sorted(table_keys(CHINESE, r"`--\w+`")) == sorted(f"`{flag}`" for flag in flags)


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


def test_dialogue_is_what_the_embedded_model_says(model, tokenizer):
    (dialogue,) = (code for language, code in code_blocks(CHINESE) if language == "text")
    history = []
    for part in dialogue.strip().split("用户：")[1:]:
        query, answer = part.strip().split("\nChatGLM-Tiny：")
        response, history = model.chat(tokenizer, query, history, temperature=0)
        assert response == answer
    assert len(history) == 6


def test_python_snippets_run(embedded):
    code = "".join(code for language, code in code_blocks(CHINESE) if language == "python")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 3


def test_ci_runs_exactly_the_test_command():
    commands = [code.strip() for language, code in code_blocks(CHINESE) if language == "bash" and "pytest" in code]
    assert len(commands) == 1
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == commands[0]
