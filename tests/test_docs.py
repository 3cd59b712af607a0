"""What FAQ, UPDATE, PROJECT and CONTRIBUTING promise: both languages, commands, flags, the worked example.

And the links of every document for users.
"""

import importlib
import re
import shlex

import pytest

import utils
from ptuning import arguments
from tests.test_readme import ROOT, SCRIPTS, code_blocks, headings, paths

NAMES = ["FAQ", "UPDATE", "PROJECT"]
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in [*(f"{name}{end}.md" for name in NAMES for end in ("", "_en")), "CONTRIBUTING.md"]
}
EACH = pytest.mark.parametrize("name", TEXTS)
PAIRS = pytest.mark.parametrize(
    ("chinese", "english"), [(TEXTS[f"{name}.md"], TEXTS[f"{name}_en.md"]) for name in NAMES], ids=NAMES
)
READMES = ["README", "README_en", "ptuning/README", "ptuning/README_en", "examples/README", "limitations/README"]
THEMES = ["安装与加载", "内存与速度", "回答", "终端、网页与接口", "微调", "平台"]
OTHERS_FLAGS = {"--register-api-endpoint-file", "--check"}  # of FastChat and ruff


def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@PAIRS
def test_both_languages_have_the_same_headings_code_flags_and_tables(chinese, english):
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert code_blocks(chinese) == code_blocks(english)
    for pattern in (r"--\w[\w-]+", r"^\|", r"^- "):
        counts = [len(re.findall(pattern, text, flags=re.MULTILINE)) for text in (chinese, english)]
        assert counts[0] == counts[1], pattern


@PAIRS
def test_both_languages_link_the_same_files_and_sites(chinese, english):
    def targets(text):
        return [re.sub(r"_en\.md$", ".md", path) for path in paths(text)][1:], re.findall(r"https?://[^\s)`]+", text)

    assert targets(chinese) == targets(english)


@pytest.mark.parametrize("name", [*TEXTS, *(f"{readme}.md" for readme in READMES)])
def test_linked_files_and_headings_exist(name):
    file = ROOT / name
    text = file.read_text(encoding="utf-8")
    assert [path for path in paths(text) if not (file.parent / path).exists()] == []
    for path, anchor in re.findall(r"\]\(([\w./]*)#([^)]+)\)", text):
        there = (file.parent / path if path else file).read_text(encoding="utf-8")
        assert anchor in [slug(heading) for _, heading in headings(there)], f"{path}#{anchor}"


def test_faq_covers_the_themes_with_questions():
    levels = headings(TEXTS["FAQ.md"])[1:]
    assert [heading for level, heading in levels if level == "##"] == THEMES
    for heading, below in zip(levels, [*levels[1:], ("", "")], strict=True):
        assert heading[0] == "###" or below[0] == "###", heading


def calls(text):
    """(script, flags) of every line of a bash block that starts one of the project's scripts."""
    lines = "".join(code for language, code in code_blocks(text) if language == "bash").splitlines()
    for line in lines:
        if "python" in line and ".py" in line and "pytest" not in line:
            script, flags = re.fullmatch(r"(?:\w+=\S+ )?\.venv/bin/python ((?:\w+/)?\w+)\.py( .*)?", line).groups()
            yield script.replace("/", "."), shlex.split(flags or "")


@EACH
def test_commands_have_flags_that_their_scripts_understand(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for script, flags in calls(TEXTS[name]):
        if script == "ptuning.main":
            arguments.parse_arguments(flags)  # exits if it does not understand, or if a file is not there
        elif script == "utils":
            assert flags == ["--plan"] and "--plan" in help_of(script, capsys)
        else:
            importlib.import_module(script).build_parser().parse_args(flags)


def help_of(script, capsys):
    with pytest.raises(SystemExit):
        if script == "ptuning.main":
            arguments.parse_arguments(["--help"])
        elif script == "utils":
            utils.main(["--help"])
        else:
            importlib.import_module(script).build_parser().parse_args(["--help"])
    return capsys.readouterr().out


def test_flags_in_the_prose_exist(capsys):
    scripts = [*SCRIPTS, "utils", "ptuning.main", "ptuning.convert", "ptuning.web_demo"]
    known = set(re.findall(r"--\w+", "".join(help_of(script, capsys) for script in scripts)))
    for name, text in TEXTS.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known - OTHERS_FLAGS == set(), name


@EACH
def test_python_snippets_are_python(name):
    for language, code in code_blocks(TEXTS[name]):
        if language == "python":
            compile(code, name, "exec")


def test_worked_example_of_contributing_fits_the_code():
    """Its diffs apply: what they leave and take away stands in the files, in one piece."""
    diffs = [code for language, code in code_blocks(TEXTS["CONTRIBUTING.md"]) if language == "diff"]
    assert len(diffs) == 2
    for diff in diffs:
        path = re.search(r"^\+\+\+ b/(.+)$", diff, flags=re.MULTILINE)[1]
        body = diff.split("@@\n")[1]
        before = "".join(line[1:] for line in body.splitlines(keepends=True) if line[0] in " -")
        assert before in (ROOT / path).read_text(encoding="utf-8"), path
        added = [line for line in body.splitlines() if line.startswith("+")]
        assert added and max(map(len, added)) <= 121


def test_dates_of_news_go_backwards():
    dates = [heading for _, heading in headings(TEXTS["UPDATE.md"]) if re.fullmatch(r"\d{4}-\d\d-\d\d", heading)]
    assert dates and dates == sorted(set(dates), reverse=True)
