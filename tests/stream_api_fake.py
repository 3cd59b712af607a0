"""stream_api.py with a model that needs no weights, for the tests to talk to; on "等" it waits for a line of stdin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import serving
import stream_api
from chatglm.engine import Engine


class FakeModel:
    def stream_chat(self, tokenizer, query, history, **options):
        answer = f"收到【{query}】"
        for end in range(1, len(answer) + 1):
            if query == "等" and end == 3:
                sys.stdin.readline()
            yield answer[:end], [*history, (query, answer[:end])]


if __name__ == "__main__":
    args = stream_api.build_parser().parse_args()
    listener = serving.bind(args)
    with Engine(FakeModel(), None, args.max_queue, args.max_running) as engine:
        sys.exit(stream_api.serve(stream_api.create_app(engine, **serving.app_options(args)), engine, listener))
