"""Pictures of web_demo.py for the READMEs: `python resources/make_screenshots.py`, with the embedded model.

Needs playwright and Chromium. The conversation with formulas and code is restored from a file, as a user would do it:
the embedded model cannot write them.
"""

import argparse
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import serving  # noqa: E402
import utils  # noqa: E402
import web_demo  # noqa: E402

CHINESE = ["你好，介绍一下你自己", "晚上睡不着应该怎么办"]
ENGLISH = ["Who are you?", "I cannot sleep at night. What can I do?"]
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


def take(browser, url, name, questions=(), history=None, dark=False, **options):
    """Open the page, talk, and take the picture."""
    context = browser.new_context(color_scheme="dark" if dark else "light", **options)
    page = context.new_page()
    page.goto(url)
    page.locator("#chat button.example").first.wait_for()
    for question in questions:
        ask(page, question)
    if history:
        restore(page, history)
        page.locator("#chat .katex").first.wait_for()
    page.wait_for_timeout(1000)  # scrolling and the appearance of buttons are animated
    page.screenshot(path=FOLDER / f"{name}.png")
    context.close()


def main():
    """Serve the page, and take all pictures in Chromium."""
    from playwright.sync_api import sync_playwright

    from chatglm.engine import Engine

    with serving.bind(argparse.Namespace(host="127.0.0.1", port=0)) as listener:
        port = listener.getsockname()[1]
    model, tokenizer = utils.load_model(device="cpu")
    with Engine(model, tokenizer) as engine, sync_playwright() as playwright:
        demo = web_demo.create_demo(engine, utils.model_title(model), temperature=0)
        web_demo.launch(demo, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        url, desktop = f"http://127.0.0.1:{port}", {"width": 1100, "height": 720}
        phone = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True}
        take(browser, url, "web_demo", CHINESE, locale="zh-CN", viewport=desktop)
        take(browser, url, "web_demo_start", locale="zh-CN", viewport=desktop)
        take(browser, url, "web_demo_en", ENGLISH, locale="en-US", viewport=desktop)
        take(browser, url, "web_demo_dark", CHINESE, dark=True, locale="zh-CN", viewport=desktop)
        take(
            browser, url, "web_demo_markdown", history=MARKDOWN, locale="zh-CN", viewport={"width": 1100, "height": 900}
        )
        take(browser, url, "web_demo_phone", CHINESE, locale="zh-CN", **phone)
        browser.close()
        demo.close(verbose=False)


if __name__ == "__main__":
    main()
