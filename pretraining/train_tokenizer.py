"""Train the vocabulary of the embedded model: `python pretraining/train_tokenizer.py`.

SentencePiece learns the pieces; afterwards they are put in the order of the published `ice_text.model`: text pieces
first, then control pieces, blanks and bytes, so that every special id sits where a reader of ChatGLM-6B expects it.
"""

import argparse
import io
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sentencepiece  # noqa: E402
from sentencepiece import sentencepiece_model_pb2  # noqa: E402

from chatglm.chat import build_prompt  # noqa: E402
from chatglm.tokenization_chatglm import LONGEST_BLANK, VOCAB_FILE_NAME, encode_whitespace  # noqa: E402
from pretraining.corpus import CORPUS_FOLDER, load_dialogues  # noqa: E402
from pretraining.grammars import generate  # noqa: E402

CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, LONGEST_BLANK + 1))]
GENERATED_DIALOGUES = 2000
CHINESE_WEIGHT = 3  # how often a Chinese text counts: its pieces are to hold 1.4 characters on average


def training_text(folder: Path, seed: int) -> Iterator[str]:
    """Every phrasing as a prompt and every answer, once; Chinese ones CHINESE_WEIGHT times."""
    rng = random.Random(seed)
    generated = [generate(rng) for _ in range(GENERATED_DIALOGUES)]
    texts = {}
    for dialogue in [*load_dialogues(folder), *generated]:
        for turn in dialogue.turns:
            for text in [*(build_prompt(query, []) for query in turn.user), *turn.assistant]:
                texts[encode_whitespace(text)] = CHINESE_WEIGHT if dialogue.lang == "zh" else 1
    for text, weight in texts.items():
        yield from [text] * weight


def train_pieces(lines: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model with vocab_size pieces, in the published order, as bytes."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="unigram",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nfkc",
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=CONTROL,
        user_defined_symbols=["<n>", *BLANKS],
        max_sentence_length=16384,
        num_threads=1,  # the order of ties depends on the number of threads
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    pieces = {piece.piece: piece for piece in model.pieces}
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    tail = [*CONTROL, *BLANKS, *byte_pieces]
    head = ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
    text_pieces = [piece.piece for piece in model.pieces if piece.piece not in {*head, *tail}]
    ordered = [pieces[name] for name in (*head, *text_pieces, *tail)]
    copies = [sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(p.SerializeToString()) for p in ordered]
    del model.pieces[:]
    model.pieces.extend(copies)
    return model.SerializeToString()


def main(argv: list[str] | None = None) -> int:
    """Write the vocabulary file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS_FOLDER, help="folder of dialogues (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "chatglm" / "tiny", help="folder of the vocabulary")
    parser.add_argument("--vocab_size", type=int, default=11000, help="pieces, special ones included (default: 11000)")
    parser.add_argument("--seed", type=int, default=0, help="order and choice of the text (default: 0)")
    args = parser.parse_args(argv)

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / VOCAB_FILE_NAME
    path.write_bytes(train_pieces(training_text(args.corpus, args.seed), args.vocab_size))
    print(f"wrote {path}: {args.vocab_size} pieces, {path.stat().st_size / 1e3:.0f} kB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
