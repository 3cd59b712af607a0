"""cli_demo.py with a slow model that needs no weights, as a program for the tests to type at."""

import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli_demo

ANSWERS = {
    "数数": "".join(f"{number}、" for number in range(1, 1000)),
    "代码": "这样写：\n\n```python\nprint('你好')\n```\n\n- **第一**\n- 第二",
    "长表": "\n".join(f"{number}. 第{number}条" for number in range(1, 31)),
    "控制": "红\x1b[31m色\x07、标题\x1b]0;改名\x07、\x9b2J清屏\r、[bold]标记[/bold]",
}


class SlowModel:
    config = SimpleNamespace(name_or_path="somewhere/chatglm-6b")

    def stream_chat(self, tokenizer, query, history, seconds_per_character=0.002, **options):
        if query == "太长":
            raise ValueError("the question has 3000 tokens, max_length is 2048")
        if query == "忘记":
            warnings.warn("dropped the oldest round", UserWarning, stacklevel=2)
        answer = ANSWERS.get(query, f"收到【{query}】")
        if query == "历史":
            answer = f"共 {len(history)} 轮，上次说到【{history[-1][1][-8:] if history else ''}】"
        for end in range(1, len(answer) + 1):
            time.sleep(0.05 if query == "数数" else seconds_per_character)
            yield answer[:end], [*history, (query, answer[:end])]


if __name__ == "__main__":
    cli_demo.talk(SlowModel(), tokenizer=None)
