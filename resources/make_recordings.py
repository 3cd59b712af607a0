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

from resources import make_screenshots  # noqa: E402

COMMAND = "python cli_demo.py"
TERMINAL = ["你好", "晚上睡不着应该怎么办", "我叫小林", "我叫什么名字？", "What is the capital of France?"]
PAGE = ["晚上睡不着应该怎么办", "我叫小林", "我叫什么名字？"]
COLUMNS, ROWS = 84, 40  # enough rows for the whole conversation: nothing scrolls
KEY, READING, LAST = 0.09, 1.0, 4.0  # seconds: between two keys, with an answer, with the last one
LONGEST, FRAME = 0.4, 0.12  # seconds that a picture stays at most while the terminal or the page works
PATIENCE = 300  # seconds; the machine may be busy

# A terminal as SVG ----------------------------------------------------------------------------------------------------

CELL, LINE, MARGIN, BAR = 8.4, 20, 16, 30  # pixels: width and height of a cell, around the text, above it
COLOURS = {"default": "#d8dee9", "yellow": "#ebcb8b", "brown": "#ebcb8b", "cyan": "#88c0d0", "green": "#a3be8c"}
FONT = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Noto Sans Mono CJK SC",monospace'
STYLE = (
    f"text{{font:14px {FONT};white-space:pre}}g{{animation:%.2fs step-end infinite}}"
    "@media(prefers-reduced-motion){g{animation:none}}"
)


def record_terminal():
    """(pictures, seconds): pictures of the terminal as {(row, column): (text, colour, bold)}, seconds each stays."""
    import pexpect
    import pyte

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    pictures, seconds = [], []

    def snap(duration=0):
        picture = {
            (row, column): (cell.data, COLOURS.get(cell.fg, COLOURS["default"]), cell.bold)
            for row in range(ROWS)
            for column in range(COLUMNS)
            if (cell := screen.buffer[row][column]).data.strip()
        }
        if pictures and pictures[-1] == picture:
            seconds[-1] += duration
        else:
            pictures.append(picture)
            seconds.append(duration)

    for end in range(len(COMMAND) + 1):
        screen.reset()
        screen.draw(f"$ {COMMAND[:end]}")
        snap(KEY)
    stream.feed(b"\r\n")
    child = pexpect.spawn(
        sys.executable,
        [str(FOLDER.parent / "cli_demo.py"), "--temperature", "0"],
        dimensions=(ROWS, COLUMNS),
        env={**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )

    def watch(is_done):
        started = before = time.monotonic()
        while not is_done():
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError("\n".join(screen.display))
            try:
                stream.feed(child.read_nonblocking(65536, timeout=0.1))
            except pexpect.TIMEOUT:
                continue
            now = time.monotonic()
            seconds[-1] += min(now - before, LONGEST)
            snap()
            before = now

    def prompts():
        return sum(line.startswith("用户：") for line in screen.display)

    watch(lambda: prompts() == 1)
    for number, question in enumerate(TERMINAL, start=1):
        for end, key in enumerate(question, start=1):
            child.send(key)
            watch(lambda end=end, question=question: f"用户：{question[:end]}" in "\n".join(plain(screen)))
            snap(KEY)
        child.send("\r")
        watch(lambda number=number: prompts() == number + 1)
        snap(READING)
    snap(LAST)
    child.sendline("stop")
    child.expect(pexpect.EOF, timeout=PATIENCE)
    return pictures, seconds


def plain(screen):
    """The lines of the screen; a character two cells wide counts once."""
    return ["".join(screen.buffer[row][column].data for column in range(COLUMNS)) for row in range(ROWS)]


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


def to_svg(pictures, seconds):
    """The recording as an SVG that repeats for ever; where animations are unwanted it shows the last picture."""
    starts = [sum(seconds[:number]) for number in range(len(seconds) + 1)]
    last, total = len(seconds), starts[-1]
    rows = 1 + max(row for picture in pictures for row, _ in picture)
    width, height = round(COLUMNS * CELL + 2 * MARGIN), BAR + rows * LINE + MARGIN
    rules, groups = [STYLE % total], []
    for number, ((first, end), pieces) in enumerate(sorted(stretches(pictures).items())):
        if starts[end] - starts[first] < 0.02:  # nobody sees it
            continue
        steps = ["0%{opacity:0}"] * (first > 0)
        steps.append(f"{100 * starts[first] / total:.2f}%{',to' * (end == last)}{{opacity:1}}")
        steps += [f"{100 * starts[end] / total:.2f}%,to{{opacity:0}}"] * (end < last)
        rules.append(f"@keyframes k{number}{{{''.join(steps)}}}")
        hidden = ' opacity="0"' if end < last else ""
        groups.append(f'<g style="animation-name:k{number}"{hidden}>')
        for row, column, cells, text, colour, bold in pieces:
            x, y = MARGIN + column * CELL, BAR + row * LINE + 15
            weight = ' font-weight="bold"' if bold else ""
            hue = "" if colour == COLOURS["default"] else f' fill="{colour}"'
            groups.append(
                f'<text x="{x:.1f}" y="{y}" textLength="{cells * CELL:.1f}" lengthAdjust="spacingAndGlyphs"'
                f"{hue}{weight}>{escape(text)}</text>"
            )
        groups.append("</g>")
    box = f'viewBox="0 0 {width} {height}"'
    dots = "".join(
        f'<circle cx="{18 + 18 * number}" cy="15" r="5" fill="{colour}"/>'
        for number, colour in enumerate(("#bf616a", "#ebcb8b", "#a3be8c"))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {box}>',
            f"<title>{COMMAND}</title>",
            f"<style>{''.join(rules)}</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#242933" stroke="#4c566a"/>{dots}',
            f'<g fill="{COLOURS["default"]}" style="animation:none">',
            *groups,
            "</g>",
            "</svg>",
            "",
        ]
    )


# A page as GIF --------------------------------------------------------------------------------------------------------


def record_page():
    """(pictures, seconds): PNG pictures of the page, seconds each stays."""
    import utils
    import web_demo
    from chatglm.engine import Engine

    pictures, seconds = [], []
    model, tokenizer = utils.load_model(device="cpu")
    with Engine(model, tokenizer) as engine:
        demo = web_demo.create_demo(engine, utils.model_title(model), temperature=0)
        with make_screenshots.opened(demo) as (browser, url):
            page = browser.new_page(locale="zh-CN", viewport={"width": 900, "height": 560})
            page.set_default_timeout(1000 * PATIENCE)
            page.goto(url)
            page.locator("#chat button.example").first.wait_for()

            def snap(duration=0):
                pictures.append(page.screenshot())
                seconds.append(duration)

            snap(READING)
            for number, question in enumerate(PAGE, start=1):
                page.locator("#question textarea").focus()
                for key in question:
                    page.keyboard.insert_text(key)
                    snap(KEY)
                page.keyboard.press("Enter")
                before = time.monotonic()
                while page.locator("#chat .bot").count() < number or not page.locator("#submit").is_visible():
                    page.wait_for_timeout(50)
                    now = time.monotonic()
                    seconds[-1] += min(now - before, FRAME)
                    snap()
                    before = now
                snap(READING)
            page.wait_for_timeout(1000)  # scrolling and the appearance of buttons are animated
            snap(LAST / 2)
    return pictures, seconds


def save_gif(pictures, seconds, path):
    """Write an animation that repeats for ever, in the 48 colours of its last picture."""
    from PIL import Image

    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    palette = images[-1].quantize(48)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [max(20, round(100 * duration) * 10) for duration in seconds]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)


def main():
    """Make both recordings."""
    parser = argparse.ArgumentParser(description="Recordings of the terminal and of the page for the READMEs.")
    parser.add_argument("--only", choices=["cli_demo", "web_demo"], help="make this one (default: both)")
    args = parser.parse_args()
    if args.only != "web_demo":
        (FOLDER / "cli_demo.svg").write_text(to_svg(*record_terminal()), encoding="utf-8", newline="\n")
    if args.only != "cli_demo":
        save_gif(*record_page(), FOLDER / "web_demo.gif")


if __name__ == "__main__":
    main()
