"""A chatglm.cpp model file of the full 6B shape with random weights, for bench_quantization.py --chatglm_cpp_model.

    python benchmarks/make_chatglm_cpp_model.py model-q4_0.bin q4_0      3.5 GB, one minute
    python benchmarks/make_chatglm_cpp_model.py model-q8_0.bin q8_0      6.6 GB

Layout (chatglm.cpp 0.4, model type 1, config version 2): "ggml", type, version, 13 fields, the size of a SentencePiece
model and the model, then tensors: name, number of dimensions, shape, type, and data that starts at a multiple of 16.
Needs protobuf beside requirements.txt.
"""

import argparse
import struct
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2

LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 28, 4096, 32, 16384, 130528
PIECES = 130344
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<pad>", 130000: "[MASK]", 130001: "[gMASK]", 130002: "[sMASK]"}
SPECIAL |= {130003: "<unused_0>", 130004: "<sop>", 130005: "<eop>"}
FLOAT32, TYPES = 0, {"q4_0": 2, "q8_0": 8}  # numbers of the tensor types
GROUP = 32  # weights that share a float16 scale
BYTES = {2: 16, 8: 32}  # of a group, without its scale
SCALES = {2: 0.02 / 4.6, 8: 0.02 / 74}  # uniform integers deviate by 4.6 and 74: weights deviate by 0.02


def vocabulary():
    """A serialised SentencePiece model with the published number of pieces and its special ids."""
    model = sentencepiece_model_pb2.ModelProto()
    for index in range(PIECES):
        piece = model.pieces.add()
        piece.piece = SPECIAL.get(index, f"\u2581w{index}")
        piece.score = 0.0 if index in SPECIAL else -index / 1e4
        kind = "UNKNOWN" if index == 0 else "CONTROL" if index < 4 else "USER_DEFINED" if index in SPECIAL else "NORMAL"
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type.Value(kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = PIECES
    model.normalizer_spec.name = "identity"
    return model.SerializeToString()


def write_header(file, name, shape, kind):
    """Everything of a tensor in front of its data."""
    text = name.encode()
    file.write(struct.pack("i", len(text)) + text + struct.pack(f"{2 + len(shape)}i", len(shape), *shape, kind))
    file.seek(-file.tell() % 16, 1)


def write_norm(file, name):
    """A layer norm that changes nothing."""
    write_vector(file, f"{name}.weight", WIDTH, 1)
    write_vector(file, f"{name}.bias", WIDTH, 0)


def write_vector(file, name, size, value):
    write_header(file, name, (size,), FLOAT32)
    np.full(size, value, np.float32).tofile(file)


def write_matrix(file, name, rows, columns, kind, generator):
    """Groups of random bytes behind a float16 scale."""
    write_header(file, name, (rows, columns), kind)
    step = (1 << 24) // columns
    for start in range(0, rows, step):
        groups = min(step, rows - start) * columns // GROUP
        data = generator.integers(0, 256, (groups, 2 + BYTES[kind]), dtype=np.uint8)
        data[:, :2] = np.array([SCALES[kind]], np.float16).view(np.uint8)
        data.tofile(file)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a chatglm.cpp model file of the 6B shape with random weights.")
    parser.add_argument("output", type=Path)
    parser.add_argument("type", choices=list(TYPES))
    args = parser.parse_args(argv)
    kind, generator = TYPES[args.type], np.random.default_rng(0)
    with args.output.open("wb") as file:
        sizes = (2, kind, VOCABULARY, WIDTH, HEADS, HEADS, LAYERS, INNER)
        file.write(b"ggml" + struct.pack("9ififiii", 1, *sizes, 1e-5, 0, 10000.0, 2048, 130005, 3))
        text = vocabulary()
        file.write(struct.pack("i", len(text)) + text)
        write_matrix(file, "transformer.word_embeddings.weight", VOCABULARY, WIDTH, kind, generator)
        for layer in range(LAYERS):
            prefix = f"transformer.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                write_norm(file, f"{prefix}.{norm}")
            for name, rows, columns in (
                ("attention.query_key_value", 3 * WIDTH, WIDTH),
                ("attention.dense", WIDTH, WIDTH),
                ("mlp.dense_h_to_4h", INNER, WIDTH),
                ("mlp.dense_4h_to_h", WIDTH, INNER),
            ):
                write_matrix(file, f"{prefix}.{name}.weight", rows, columns, kind, generator)
                write_vector(file, f"{prefix}.{name}.bias", rows, 0)
        write_norm(file, "transformer.final_layernorm")


if __name__ == "__main__":
    main()
