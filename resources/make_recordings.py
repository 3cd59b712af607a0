"""Recordings for the READMEs: `python resources/make_recordings.py`, with the embedded model at temperature 0.

cli_demo.svg   cli_demo.py in a terminal, an animation in CSS
web_demo.gif   web_demo.py in a browser

Needs Chromium and requirements-test.txt, which brings pexpect, pyte and playwright; Pillow comes with Gradio. Answers
grow at the speed of this machine; only pauses are shortened, such as loading the model.

Unusual here: the SVG holds no pictures. Each stretch of cells that appears and vanishes at the same times is one piece
of text, put where its cells are and stretched to their width: so Chinese aligns in any font.
"""

import argparse
import io
import os
import sys
import time
from collections import defaultdict
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from resources.make_screenshots import opened_chat  # noqa: E402

COMMAND = "python cli_demo.py"
TERMINAL = ["你好", "晚上睡不着应该怎么办", "我叫小林", "我叫什么名字？", "What is the capital of France?"]
PAGE = ["晚上睡不着应该怎么办", "我叫小林", "我叫什么名字？"]
COLUMNS, ROWS = 84, 40  # enough rows for the whole conversation: nothing scrolls
KEY, READING, LAST = 0.09, 1.0, 4.0  # seconds: between two keys, with an answer, with the last one
LONGEST, FRAME = 0.4, 0.12  # seconds that a picture stays at most while the terminal or the page works
PATIENCE = 300  # seconds; the machine may be busy


class Film:
    """Pictures, and how many seconds each of them stays."""

    def __init__(self):
        self.pictures, self.seconds = [], []

    def show(self, picture, seconds=0.0):
        """The next picture; one like the last only stays longer."""
        if self.pictures and self.pictures[-1] == picture:
            self.seconds[-1] += seconds
        else:
            self.pictures.append(picture)
            self.seconds.append(seconds)

    def stay(self, seconds):
        """The last picture stays that much longer."""
        self.seconds[-1] += seconds


# A terminal as SVG ----------------------------------------------------------------------------------------------------

CELL, LINE, MARGIN, BAR = 8.4, 20, 16, 30  # pixels: width and height of a cell, around the text, above it
COLOURS = {"default": "#d8dee9", "yellow": "#ebcb8b", "brown": "#ebcb8b", "cyan": "#88c0d0", "green": "#a3be8c"}
FONT = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Noto Sans Mono CJK SC",monospace'
STYLE = (
    f"text{{font:14px {FONT};white-space:pre}}g{{animation:%.2fs step-end infinite}}"
    "@media(prefers-reduced-motion){g{animation:none}}"
)


class Terminal:
    """A terminal that is filmed, in pictures {(row, column): (text, colour, bold)}, and the program that runs in it."""

    def __init__(self):
        import pyte

        self.screen = pyte.Screen(COLUMNS, ROWS)
        self.stream = pyte.ByteStream(self.screen)
        self.film = Film()
        self.child = None

    def snap(self, seconds=0.0):
        """Film what the screen shows."""
        picture = {
            (row, column): (cell.data, COLOURS.get(cell.fg, COLOURS["default"]), cell.bold)
            for row in range(ROWS)
            for column in range(COLUMNS)
            if (cell := self.screen.buffer[row][column]).data.strip()
        }
        self.film.show(picture, seconds)

    def start(self):
        """Type the command, and start it."""
        import pexpect

        for end in range(len(COMMAND) + 1):
            self.screen.reset()
            self.screen.draw(f"$ {COMMAND[:end]}")
            self.snap(KEY)
        self.stream.feed(b"\r\n")
        self.child = pexpect.spawn(
            sys.executable,
            [str(FOLDER.parent / "cli_demo.py"), "--temperature", "0"],
            dimensions=(ROWS, COLUMNS),
            env={**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
        )

    def watch(self, is_done):
        """Film what the program draws, until is_done(). Raises TimeoutError with the screen."""
        import pexpect

        started = before = time.monotonic()
        while not is_done():
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError("\n".join(self.screen.display))
            try:
                self.stream.feed(self.child.read_nonblocking(65536, timeout=0.1))
            except pexpect.TIMEOUT:
                continue
            now = time.monotonic()
            self.film.stay(min(now - before, LONGEST))
            self.snap()
            before = now

    def lines(self):
        """The lines of the screen; a character two cells wide counts once."""
        return ["".join(self.screen.buffer[row][column].data for column in range(COLUMNS)) for row in range(ROWS)]


def record_terminal():
    """The Film of a conversation in the terminal."""
    import pexpect

    terminal = Terminal()

    def questions():
        return [line for line in terminal.lines() if line.startswith("用户：")]

    terminal.start()
    terminal.watch(lambda: len(questions()) == 1)
    for number, question in enumerate(TERMINAL, start=1):
        for end, key in enumerate(question, start=1):
            terminal.child.send(key)
            typed = f"用户：{question[:end]}"
            terminal.watch(lambda typed=typed: questions()[-1].startswith(typed))
            terminal.snap(KEY)
        terminal.child.send("\r")
        terminal.watch(lambda number=number: len(questions()) == number + 1)
        terminal.snap(READING)
    terminal.snap(LAST)
    terminal.child.sendline("stop")
    terminal.child.expect(pexpect.EOF, timeout=PATIENCE)
    return terminal.film


def is_wide(character):
    """Whether a terminal gives a character two cells."""
    from wcwidth import wcwidth

    return wcwidth(character) == 2


def stretches(pictures):
    """{(first, end): [(row, column, cells, text, colour, bold), ...]}: seen in the pictures first to end - 1."""
    lives = []  # (row, first, end, column, cell)
    seen = {}
    for number, picture in enumerate([*pictures, {}]):
        for place, (cell, first) in list(seen.items()):
            if picture.get(place) != cell:
                lives.append((place[0], first, number, place[1], cell))
                del seen[place]
        for place, cell in picture.items():
            seen.setdefault(place, (cell, number))
    found = defaultdict(list)
    for row, first, end, column, (text, colour, bold) in sorted(lives):
        cells = 2 if is_wide(text) else 1
        pieces = found[first, end]
        if pieces:
            *place, before, said, hue, weight = pieces[-1]
            is_same = (hue, weight) == (colour, bold) and is_wide(said[0]) == (cells == 2)
            if is_same and place == [row, column - before]:
                pieces[-1] = (*place, before + cells, said + text, hue, weight)
                continue
        pieces.append((row, column, cells, text, colour, bold))
    return found


def to_svg(film):
    """The recording as an SVG that repeats for ever; where animations are unwanted it shows the last picture."""
    starts = [sum(film.seconds[:number]) for number in range(len(film.seconds) + 1)]
    last, total = len(film.seconds), starts[-1]
    rows = 1 + max(row for picture in film.pictures for row, _ in picture)
    width, height = round(COLUMNS * CELL + 2 * MARGIN), BAR + rows * LINE + MARGIN
    rules, groups = [STYLE % total], []
    for number, ((first, end), pieces) in enumerate(sorted(stretches(film.pictures).items())):
        if starts[end] - starts[first] < 0.02:  # nobody sees it
            continue
        steps = ["0%{opacity:0}"] * (first > 0)
        steps.append(f"{100 * starts[first] / total:.2f}%{',to' * (end == last)}{{opacity:1}}")
        steps += [f"{100 * starts[end] / total:.2f}%,to{{opacity:0}}"] * (end < last)
        rules.append(f"@keyframes k{number}{{{''.join(steps)}}}")
        hidden = ' opacity="0"' if end < last else ""
        groups += [f'<g style="animation-name:k{number}"{hidden}>', *map(text_element, pieces), "</g>"]
    dots = "".join(
        f'<circle cx="{18 + 18 * number}" cy="15" r="5" fill="{colour}"/>'
        for number, colour in enumerate(("#bf616a", "#ebcb8b", "#a3be8c"))
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<title>{COMMAND}</title>",
        f"<style>{''.join(rules)}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#242933" stroke="#4c566a"/>{dots}',
        f'<g fill="{COLOURS["default"]}" style="animation:none">',
        *groups,
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text_element(piece):
    """The SVG of a piece of `stretches`, stretched to the width of its cells."""
    row, column, cells, text, colour, bold = piece
    x, y = MARGIN + column * CELL, BAR + row * LINE + 15
    weight = ' font-weight="bold"' if bold else ""
    hue = "" if colour == COLOURS["default"] else f' fill="{colour}"'
    return (
        f'<text x="{x:.1f}" y="{y}" textLength="{cells * CELL:.1f}" lengthAdjust="spacingAndGlyphs"'
        f"{hue}{weight}>{escape(text)}</text>"
    )


# A page as GIF --------------------------------------------------------------------------------------------------------


def record_page():
    """The Film of a conversation on the page, in PNG pictures."""
    film = Film()
    with opened_chat() as (browser, url):
        page = browser.new_page(locale="zh-CN", viewport={"width": 900, "height": 560})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(url)
        page.locator("#chat button.example").first.wait_for()
        film.show(page.screenshot(), READING)
        for number, question in enumerate(PAGE, start=1):
            page.locator("#question textarea").focus()
            for key in question:
                page.keyboard.insert_text(key)
                film.show(page.screenshot(), KEY)
            page.keyboard.press("Enter")
            before = time.monotonic()
            while page.locator("#chat .bot").count() < number or not page.locator("#submit").is_visible():
                page.wait_for_timeout(50)
                now = time.monotonic()
                film.stay(min(now - before, FRAME))
                film.show(page.screenshot())
                before = now
            film.show(page.screenshot(), READING)
        page.wait_for_timeout(1000)  # scrolling and the appearance of buttons are animated
        film.show(page.screenshot(), LAST / 2)
    return film


def save_gif(film, path):
    """Write an animation that repeats for ever, in the 48 colours of its last picture."""
    from PIL import Image

    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in film.pictures]
    palette = images[-1].quantize(48)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [max(20, round(100 * duration) * 10) for duration in film.seconds]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)


def main():
    """Make both recordings."""
    parser = argparse.ArgumentParser(description="Recordings of the terminal and of the page for the READMEs.")
    parser.add_argument("--only", choices=["cli_demo", "web_demo"], help="make this one (default: both)")
    args = parser.parse_args()
    if args.only != "web_demo":
        (FOLDER / "cli_demo.svg").write_text(to_svg(record_terminal()), encoding="utf-8", newline="\n")
    if args.only != "cli_demo":
        save_gif(record_page(), FOLDER / "web_demo.gif")


if __name__ == "__main__":
    main()
