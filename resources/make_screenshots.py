"""Pictures of the web pages for the READMEs: `python resources/make_screenshots.py`, with the embedded model.

Needs Chromium and requirements-test.txt, which brings playwright. The conversation with formulas and code is restored
from a file, as a user would do it: the embedded model cannot write them. With `--adapter FOLDER`, tuned on
ptuning/data/customers.csv as ptuning/README.md says, the pictures are those of ptuning/web_demo.py. With `--examples`
they are those of examples/ and limitations/: each conversation of conversations.json, on a page made as high as it
needs. These carry their questions as a text chunk of the PNG.
"""

import argparse
import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CONVERSATIONS = FOLDER / "conversations.json"
sys.path.insert(0, str(FOLDER.parent))

import serving  # noqa: E402
import utils  # noqa: E402
import web_demo  # noqa: E402
from ptuning import web_demo as comparison  # noqa: E402

CHINESE = ["你好，介绍一下你自己", "晚上睡不着应该怎么办"]
ENGLISH = ["Who are you?", "I cannot sleep at night. What can I do?"]
OF_THE_SHOP = ["客服几点上班？", "亮度可以调吗？"]
PATIENCE = 120_000  # milliseconds; the machine may be busy
WHOLE_HEIGHT = """() => {
    const log = document.querySelector('#chat [role="log"]');
    return Math.max(520, innerHeight + log.scrollHeight - log.clientHeight);
}"""
MARKDOWN = [
    (
        "怎样求 $ax^2+bx+c=0$ 的根？请给出公式和 Python 代码。",
        r"""当 $a \neq 0$ 时，由**求根公式**：

\[ x_{1,2} = \frac{-b \pm \sqrt{b^2-4ac}}{2a} \]

其中 \(\Delta = b^2-4ac\) 的符号决定有没有实根：

```python
import cmath

def roots(a, b, c):
    d = cmath.sqrt(b * b - 4 * a * c)
    return (-b + d) / (2 * a), (-b - d) / (2 * a)
```

| $\Delta$ | 实根 |
| --- | --- |
| $> 0$ | 两个 |
| $= 0$ | 一个 |
| $< 0$ | 没有 |
""",
    )
]


def ask(page, question):
    """Ask, and wait until the answer is complete."""
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")
    page.locator("#stop").wait_for()
    page.locator("#submit").wait_for()


def restore(page, history):
    """Restore a conversation from a file."""
    from chatglm.chat import history_to_json

    with page.expect_file_chooser() as chooser:
        page.locator("#restore").click()
    file = {"name": "chatglm.json", "mimeType": "application/json", "buffer": history_to_json(history).encode()}
    chooser.value.set_files(file)
    page.locator("#chat .bot").wait_for()


def save_small(png, path, questions):
    """Write a picture in 64 colours, which a page of text does not miss, with the questions it shows."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("Questions", json.dumps(questions, ensure_ascii=False))
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(path, optimize=True, pnginfo=info)


def take(
    browser, url, name, questions=(), history=None, dark=False, fit=False, ready="#chat button.example", **options
):
    """Open the page, talk, and take the picture; with fit, a small one of the whole conversation.

    name     where the picture goes: a path without .png, from this folder
    history  rounds to restore from a file
    ready    what is there once the page can be used
    options  of the browser: locale, viewport, ...
    """
    context = browser.new_context(color_scheme="dark" if dark else "light", **options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.locator(ready).first.wait_for()
    for question in questions:
        ask(page, question)
    if history:
        restore(page, history)
        page.locator("#chat .katex").first.wait_for()
    page.wait_for_timeout(1000)  # scrolling and the appearance of buttons are animated
    if fit:
        page.set_viewport_size({"width": options["viewport"]["width"], "height": page.evaluate(WHOLE_HEIGHT)})
        page.wait_for_timeout(500)
        save_small(page.screenshot(), FOLDER / f"{name}.png", questions)
    else:
        page.screenshot(path=FOLDER / f"{name}.png")
    context.close()


@contextmanager
def opened(demo, **options):
    """A browser, and the address of a page that is served as long."""
    from playwright.sync_api import sync_playwright

    with serving.bind(argparse.Namespace(host="127.0.0.1", port=0)) as listener:
        port = listener.getsockname()[1]
    web_demo.launch(demo, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **options)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser, f"http://127.0.0.1:{port}"
        browser.close()
    demo.close(verbose=False)


@contextmanager
def opened_chat():
    """A browser, and the address of web_demo.py with the embedded model at temperature 0."""
    from chatglm.engine import Engine

    model, tokenizer = utils.load_model(device="cpu")
    with (
        Engine(model, tokenizer) as engine,
        opened(web_demo.create_demo(engine, utils.model_title(model), temperature=0)) as page,
    ):
        yield page


def take_chat():
    """The pictures of web_demo.py."""
    desktop = {"width": 1100, "height": 720}
    phone = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True}
    with opened_chat() as page:
        take(*page, "web_demo", CHINESE, locale="zh-CN", viewport=desktop)
        take(*page, "web_demo_start", locale="zh-CN", viewport=desktop)
        take(*page, "web_demo_en", ENGLISH, locale="en-US", viewport=desktop)
        take(*page, "web_demo_dark", CHINESE, dark=True, locale="zh-CN", viewport=desktop)
        take(*page, "web_demo_markdown", history=MARKDOWN, locale="zh-CN", viewport={"width": 1100, "height": 900})
        take(*page, "web_demo_phone", CHINESE, locale="zh-CN", **phone)


def conversations():
    """The conversations of examples/ and limitations/: {where the picture is, without .png: the entry}."""
    folders = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    return {FOLDER.parent / folder / entry["name"]: entry for folder, entries in folders.items() for entry in entries}


def take_examples(names):
    """The pictures of examples/ and limitations/: those of these names, or all."""
    start = {"width": 900, "height": 520}
    with opened_chat() as page:
        for picture, entry in conversations().items():
            if not names or entry["name"] in names:
                take(*page, picture, entry["questions"], fit=True, locale=entry["locale"], viewport=start)


def take_comparison(adapter):
    """The pictures of ptuning/web_demo.py with the folder of an adapter."""
    from chatglm.engine import Engine

    models, tokenizers, names = comparison.load(comparison.build_parser().parse_args(["--adapter", adapter]))
    with ThreadPoolExecutor(1) as worker:
        base, tuned = (comparison.InTurns(model, worker) for model in models)
        with Engine(base, tokenizers[0]) as first, Engine(tuned, tokenizers[1]) as second:
            demo = comparison.create_demo((first, second), names, temperature=0)
            with opened(demo, texts=comparison.TEXTS, css=comparison.CSS) as page:
                for name, locale in ("ptuning_web_demo", "zh-CN"), ("ptuning_web_demo_en", "en-US"):
                    desktop = {"width": 1280, "height": 760}
                    take(*page, name, OF_THE_SHOP, ready="#tuned .placeholder", locale=locale, viewport=desktop)


def main():
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="Pictures of the web pages for the READMEs.")
    parser.add_argument("--adapter", metavar="FOLDER", help="take those of ptuning/web_demo.py, with this adapter")
    parser.add_argument(
        "--examples",
        nargs="*",
        choices=[entry["name"] for entry in conversations().values()],
        metavar="NAME",
        help="take those of examples/ and limitations/: all, or these",
    )
    args = parser.parse_args()
    if args.adapter:
        take_comparison(args.adapter)
    elif args.examples is not None:
        take_examples(args.examples)
    else:
        take_chat()


if __name__ == "__main__":
    main()
