"""The pictures of the READMEs: each conversation has one, of the size promised, and charts show the tables' figures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from resources import make_charts, make_recordings, make_screenshots

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = ROOT / "resources"
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
CONVERSATIONS = make_screenshots.conversations()
PICTURES = pytest.mark.parametrize("place", CONVERSATIONS, ids=lambda place: f"{place.parent.name}/{place.name}")
SVG = "{http://www.w3.org/2000/svg}"


# Conversations --------------------------------------------------------------------------------------------------------


@PICTURES
def test_picture_of_a_conversation_is_small_and_shows_the_questions_of_the_file(place):
    file = place.with_suffix(".png")
    with Image.open(file) as picture:
        assert (picture.format, picture.width) == ("PNG", 900)
        assert picture.height >= 520
        assert json.loads(picture.text["Questions"]) == CONVERSATIONS[place]["questions"]
    assert file.stat().st_size < 70_000


@PICTURES
def test_picture_of_a_conversation_has_its_lines_in_the_readme(place):
    readme = (place.parent / "README.md").read_text(encoding="utf-8")
    (section,) = [part for part in re.split(r"^## ", readme, flags=re.MULTILINE) if f"]({place.name}.png)" in part]
    heading, chinese, english = re.match(r"(.+)\n\n(.+)<br>\n(.+)\n", section).groups()
    assert re.search(r"[\u4e00-\u9fff].* · [A-Z]", heading)
    assert re.search(r"[\u4e00-\u9fff]", chinese)
    assert len(re.findall(r"[A-Za-z]{2,}", english)) >= 5
    assert f"`make_screenshots.py --examples {place.name}`" in section


@pytest.mark.parametrize("folder", ["examples", "limitations"])
def test_folder_holds_the_pictures_of_its_conversations_and_no_others(folder):
    pictures = {place.with_suffix(".png") for place in CONVERSATIONS if place.parent.name == folder}
    assert pictures == set((ROOT / folder).glob("*.png"))


def test_names_of_conversations_are_unique():
    names = [place.name for place in CONVERSATIONS]
    assert len(names) == len(set(names))


# Recordings -----------------------------------------------------------------------------------------------------------


def texts(svg):
    """The lines that stay at the end of a recording, from the pieces that its groups hold."""
    pieces = [
        (float(piece.get("y")), float(piece.get("x")), piece.text)
        for group in svg.iter(f"{SVG}g")
        if group.get("opacity") != "0"
        for piece in group.findall(f"{SVG}text")
    ]
    rows = {}
    for y, _, text in sorted(pieces):
        rows[y] = rows.get(y, "") + text
    return list(rows.values())


def test_recording_of_the_terminal_is_a_small_svg_with_all_questions():
    file = RESOURCES / "cli_demo.svg"
    svg = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    assert svg.tag == f"{SVG}svg"
    lines = [line.replace(" ", "") for line in texts(svg)]
    assert lines[0] == f"${make_recordings.COMMAND}".replace(" ", "")
    for question in make_recordings.TERMINAL:
        assert f"用户：{question}".replace(" ", "") in lines
    assert "infinite" in svg.find(f"{SVG}style").text
    assert file.stat().st_size < 60_000


def test_recording_of_the_page_is_a_small_gif_that_repeats():
    file = RESOURCES / "web_demo.gif"
    with Image.open(file) as gif:
        assert (gif.format, gif.width) == ("GIF", 900)
        assert gif.info["loop"] == 0
        assert gif.n_frames > sum(map(len, make_recordings.PAGE))
        milliseconds = 0
        for number in range(gif.n_frames):
            gif.seek(number)
            milliseconds += gif.info["duration"]
    assert 6_000 < milliseconds < 60_000
    assert file.stat().st_size < 400_000


def cells(line, row=0):
    """A picture of the terminal with one line, as record_terminal takes it."""
    column, picture = 0, {}
    for character in line:
        if character != " ":
            picture[row, column] = (character, "white", False)
        column += 2 if make_recordings.is_wide(character) else 1
    return picture


def test_what_appears_and_vanishes_together_is_one_piece_of_text():
    pictures = [cells("ab"), cells("ab你好"), cells("ab你们x")]
    assert make_recordings.stretches(pictures) == {
        (0, 3): [(0, 0, 2, "ab", "white", False)],
        (1, 3): [(0, 2, 2, "你", "white", False)],
        (1, 2): [(0, 4, 2, "好", "white", False)],
        (2, 3): [(0, 4, 2, "们", "white", False), (0, 6, 1, "x", "white", False)],
    }


def test_film_keeps_a_picture_that_does_not_change_once():
    film = make_recordings.Film()
    film.show("a", 1)
    film.show("a", 2)
    film.show("b")
    film.stay(4)
    film.show("a", 8)
    assert (film.pictures, film.seconds) == (["a", "b", "a"], [3, 4, 8])


def test_svg_shows_each_piece_where_its_cells_are_as_long_as_they_were_seen():
    film = make_recordings.Film()
    film.show(cells("a<"), 1)
    film.show(cells("a你"), 3)
    svg = ElementTree.fromstring(make_recordings.to_svg(film))
    (style,) = (element.text for element in svg.iter(f"{SVG}style"))
    assert "4.00s step-end infinite" in style
    assert "@keyframes k0{0.00%{opacity:1}25.00%,to{opacity:0}}" in style  # "<", in the first second only
    assert "@keyframes k1{0.00%,to{opacity:1}}" in style
    assert "@keyframes k2{0%{opacity:0}25.00%,to{opacity:1}}" in style
    pieces = {element.text: element for element in svg.iter(f"{SVG}text")}
    assert {text: piece.get("textLength") for text, piece in pieces.items()} == {"a": "8.4", "<": "8.4", "你": "16.8"}
    assert float(pieces["你"].get("x")) - float(pieces["a"].get("x")) == pytest.approx(8.4)
    assert texts(svg) == ["a你"]


# Charts ---------------------------------------------------------------------------------------------------------------


def test_charts_show_the_figures_of_the_benchmarks():
    for name, panels in make_charts.figures(BENCHMARKS).items():
        with Image.open(RESOURCES / f"{name}.png") as picture:
            assert json.loads(picture.text["Figures"]) == panels, "run resources/make_charts.py again"


def test_figures_of_the_charts_stand_in_the_tables():
    def line(start, *numbers):
        return re.search(rf"^{start} .*" + r" +".join(map(re.escape, numbers)), BENCHMARKS, flags=re.MULTILINE)

    speed, memory = make_charts.figures(BENCHMARKS).values()
    answering, reading = speed.values()
    for row, bars in (("decode after 32 tokens +tokens/s", answering), ("prefill, 256 tokens +tokens/s", reading)):
        for bits in ("INT8", "INT4"):
            assert line(row, f"{bars[bits]:g}", f"{bars[f'{bits}, chatglm.cpp']:g}")
    used, tuned = memory.values()
    for bits in ("INT8", "INT4"):
        assert line("peak memory, context 1024 +GB", f"{used[bits]:g}", f"{used[f'{bits}, chatglm.cpp']:g}")
        assert line(f"{bits} +ptuning", f"{tuned[f'{bits}, P-Tuning v2']:.2f}")
        assert line(f"{bits} +lora", f"{tuned[f'{bits}, LoRA']:.2f}")


def test_charts_follow_the_last_table_and_complain_without_one():
    table = "```\nINT4     default  chatglm.cpp\ndecode   tokens/s  1,234.5   2\n" + "decode   x peer    3  -\n```\n"
    assert make_charts.benchmark(table.replace("1,234.5", "9") + table, "INT4", "default", "chatglm.cpp") == {
        ("default", "decode", "tokens/s"): 1234.5,
        ("chatglm.cpp", "decode", "tokens/s"): 2,
        ("default", "decode", "x peer"): 3,
    }
    with pytest.raises(ValueError, match=r"no table INT8 \| default \| chatglm.cpp"):
        make_charts.benchmark(table, "INT8", "default", "chatglm.cpp")


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["make_charts", "make_recordings", "make_screenshots"])
def test_help_needs_nothing_that_only_tests_install(program):
    missing = dict.fromkeys(["playwright", "matplotlib", "pexpect", "pyte"])
    code = (
        f"import runpy, sys; sys.modules.update({missing}); sys.argv = ['{program}.py', '--help']; "
        f"runpy.run_path(r'{RESOURCES / program}.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {program}.py")
