"""The benchmark of quantised models measures what it says, on networks small enough for a test."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_quantization, make_chatglm_cpp_model
from benchmarks.bench_quantization import (
    PEER,
    ROWS,
    Session,
    Worker,
    main,
    make_checkpoint,
    measure_quality,
    needed_memory,
    quality_table,
    quantized_config,
    read_bandwidth,
    speed_table,
    take_turns,
)
from chatglm import ChatGLMConfig
from utils import load_model

WIDTH, LAYERS, INNER, VOCABULARY = 32, 2, 64, 8000


def small_config(tokenizer, bits):
    return ChatGLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_attention_heads=2,
        inner_hidden_size=INNER,
        quantization_bit=bits,
        **tokenizer.config_ids,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return make_checkpoint(tmp_path_factory.mktemp("bench") / "int4", small_config(tokenizer, 4))


@pytest.fixture(scope="module")
def session(checkpoint):
    return Session(load_model(checkpoint, device="cpu")[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_checkpoint_of_random_bytes_loads_and_its_weights_are_of_usual_size(tmp_path, tokenizer, bits):
    folder = make_checkpoint(tmp_path / "made", small_config(tokenizer, bits))
    model, _ = load_model(folder, device="cpu", embedding_bit=16, activations="float32")
    assert model.config.quantization_bit == bits
    linear = model.transformer.layers[1].mlp.dense_h_to_4h
    identity = torch.eye(linear.in_features)
    assert (linear(identity) - linear.bias).std().item() == pytest.approx(0.02, rel=0.1)
    assert model.transformer.word_embeddings.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert model(torch.tensor([[5, tokenizer.gmask_token_id, tokenizer.bos_token_id]])).logits.isfinite().all()


def test_checkpoint_is_made_once(checkpoint, tokenizer):
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert make_checkpoint(checkpoint, small_config(tokenizer, 4)) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(bench_quantization.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.0 GB of disk, and .* has 0\.0 GB: give --folder"):
        make_checkpoint(tmp_path, small_config(tokenizer, 4))
    assert list(tmp_path.iterdir()) == []


def test_session_decodes_behind_the_prompt_it_read(session):
    assert session.prefill(16) > 0
    assert len(session.decode(3)) == 3
    assert session.output.past_key_values.get_seq_length() == 19
    session.prefill(8)  # another prompt starts anew
    assert session.output.past_key_values.get_seq_length() == 8


def test_session_positions_are_those_of_one_whole_forward(session):
    session.prefill(8)
    with torch.no_grad():
        token = session.output.logits[:, -1:].argmax(-1)
        prompt = bench_quantization.random_prompt(session.model.config, 8)
        expected = session.model(torch.cat((prompt, token), dim=-1)).logits[:, -1]
    session.decode(1)
    assert (session.output.logits[:, -1] - expected).abs().max() < 0.02 * expected.abs().max()  # 8-bit activations


def test_bytes_of_a_step_are_counted_by_hand(session):
    session.prefill(8)
    matrices = (3 * WIDTH + WIDTH + 2 * INNER) * WIDTH // 2  # two weights per byte
    rows = 3 * WIDTH + WIDTH + INNER + WIDTH  # each with a scale and a bias
    scale_and_bias = 2 + 4  # float16 as stored, float32
    norms = 4 * WIDTH * 4
    head = VOCABULARY * (WIDTH + 4)  # INT8, with float32 scales made on loading
    weights, per_token = session.bytes_per_step()
    assert weights == LAYERS * (matrices + rows * scale_and_bias + norms) + 2 * WIDTH * 4 + head
    assert per_token == 2 * LAYERS * WIDTH * 2  # keys and values in float16


class FakeWorker:
    """Answers like a candidate that always takes the same time."""

    def __init__(self, name, prefill, steps, memory=3e9):
        self.name, self.log = name, []
        self.facts = {"weight_bytes": 1_000_000, "cache_bytes": 1000}
        self.answers = {"prefill": prefill, "decode": steps, "chat": 5.0, "memory": memory}

    def ask(self, request, *numbers):
        self.log.append((request, *numbers))
        return self.answers[request]


def test_candidates_take_turns_and_medians_are_those_of_the_answers():
    ours, peer = FakeWorker("default", 2.0, [0.2, 0.1, 0.1, 0.3]), FakeWorker(PEER, 4.0, [0.2] * 4)
    block = torch.ones(1 << 16, dtype=torch.int64)
    results = take_turns([ours, peer], block, rounds=2, steps=4, contexts=(10, 20), decode_contexts=(20,))
    assert results["default"]["prefill_20_tok_s"] == 10
    assert results["default"]["decode_20_tok_s"] == pytest.approx(1 / 0.15)
    assert results[PEER]["decode_20_tok_s"] == pytest.approx(5)
    assert "decode_10_tok_s" not in results["default"]
    assert results["default"]["decode_20_read_gb"] == pytest.approx((1_000_000 + (20 + 4 + 2) * 1000) / 1e9)
    assert results["default"]["memory_peak_gb"] == 3
    assert results["default"]["decode_20_share"] > 0
    assert results["default"]["stream_chat_tok_s"] == 5 and "stream_chat_tok_s" not in results[PEER]
    turns = [("prefill", 10), ("prefill", 20), *[("decode", 4)] * bench_quantization.TURNS]
    assert peer.log == turns * 2 + [("memory",)]


def test_bandwidth_is_bytes_per_second():
    block = torch.ones(1 << 20, dtype=torch.int64)
    assert 1e8 < read_bandwidth(block) < 1e13


def test_worker_that_ends_is_an_error_with_its_name():
    script = "import json; print(json.dumps({'load_s': 1.5}), flush=True); print(json.dumps(input()), flush=True)"
    worker = Worker("ours", [sys.executable, "-c", script], {})
    assert worker.facts == {"load_s": 1.5}
    assert worker.ask("prefill", 32) == "prefill 32"
    worker.process.wait()
    with pytest.raises(ChildProcessError, match="ours ended with exit code 0"):
        worker.ask("prefill", 32)
    worker.close()


@pytest.mark.slow
def test_served_model_answers_every_request(checkpoint):
    request = json.dumps([str(checkpoint), {"activations": "bf16"}, 1])
    worker = Worker("ours", [sys.executable, bench_quantization.__file__, "--serve", request], {})
    try:
        assert 0 < worker.facts["load_s"] < worker.facts["first_token_s"]
        assert worker.facts["cache_bytes"] == 2 * LAYERS * WIDTH * 2
        assert worker.ask("prefill", 40) > 0
        assert len(worker.ask("decode", 3)) == 3
        assert worker.ask("chat", 4) > 0
        assert 1e8 < worker.ask("memory") < 4e9
    finally:
        worker.close()
    assert worker.process.returncode == 0


def test_speed_table_is_aligned_and_says_how_many_times_the_peer():
    ours = {"bits": 4, "candidate": "default", **{key: 6.0 for key, *_ in ROWS}}
    peer = {"bits": 4, "candidate": PEER, **{key: 4.0 for key, *_ in ROWS if key != "stream_chat_tok_s"}}
    lines = speed_table([ours, peer]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["INT4", "default", PEER]
    assert lines[-1].split()[-2:] == ["1.50", "1.00"]
    assert sum("x chatglm.cpp" in line for line in lines) == 5  # three prompts, two contexts of decoding
    assert next(line for line in lines if "stream_chat" in line).split()[-1] == "-"
    assert len(speed_table([ours]).splitlines()) == 1 + len(ROWS)


def test_full_shape_is_the_published_one():
    config = quantized_config(8)
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.quantization_bit) == (28, 4096, 130528, 8)
    assert not config.embedding_bits
    # 28 layers of 12 * 4096^2 weights in 4 bits, and a head of one byte each: 3.35 GB beside what a program needs.
    assert 3.3e9 < needed_memory(4, ["default"]) - bench_quantization.PROBE_BYTES < 5e9


def test_impossible_requests_end_with_a_sentence(tmp_path, capsys, monkeypatch):
    def said(*args):
        with pytest.raises(SystemExit) as caught:
            main([*args])
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "--rounds must be at least 1, got 0" in said("--rounds", "0")
    assert "chatglm.cpp needs --chatglm_cpp and 1 --chatglm_cpp_model, got 0" in said("--chatglm_cpp", "x")
    assert f"there is no file {tmp_path / 'x'}" in said(
        "--chatglm_cpp", str(tmp_path / "x"), "--chatglm_cpp_model", str(tmp_path / "y")
    )
    monkeypatch.setattr(bench_quantization, "free_memory", lambda device: 1e9)
    assert "GB of free memory together with INT4, and 1.0 GB are free: name fewer --candidates" in said()


@pytest.mark.slow
def test_quality_of_dequantised_weights_is_that_of_the_embedded_model(capsys):
    results = measure_quality(limit=1, settings=((8, "float32"),))
    assert [(result["bits"], result["embedding"]) for result in results] == [(32, 32), (8, 8), (4, 8)]
    assert results[0]["change"] == 0 and results[0]["perplexity"] > 1
    assert abs(results[1]["change"]) < 5  # percent, of one example; wrong scales change it by hundreds
    assert results[2]["same_answers"] == results[2]["answers"] == 1  # compared with themselves
    lines = quality_table(results).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[2].split()[:3] == ["INT8", "INT8", "float32"]


def test_chatglm_cpp_file_has_its_tensors_where_the_format_says(tmp_path, monkeypatch):
    monkeypatch.setattr(make_chatglm_cpp_model, "LAYERS", 1)
    monkeypatch.setattr(make_chatglm_cpp_model, "WIDTH", 64)
    monkeypatch.setattr(make_chatglm_cpp_model, "INNER", 128)
    monkeypatch.setattr(make_chatglm_cpp_model, "VOCABULARY", 320)
    make_chatglm_cpp_model.main([str(tmp_path / "model.bin"), "q4_0"])
    data = (tmp_path / "model.bin").read_bytes()
    assert data[:4] == b"ggml"
    place = 4 + 4 + 14 * 4
    place += 4 + struct.unpack_from("i", data, place)[0]
    sizes = {}
    while place < len(data):
        length = struct.unpack_from("i", data, place)[0]
        name = data[place + 4 : place + 4 + length].decode()
        place += 4 + length
        dimensions = struct.unpack_from("i", data, place)[0]
        *shape, kind = struct.unpack_from(f"{dimensions + 1}i", data, place + 4)
        place += 4 * (dimensions + 2)
        place += -place % 16
        count = torch.Size(shape).numel()
        sizes[name] = (shape, kind)
        place += count * 18 // 32 if kind == 2 else count * 4
    assert place == len(data)
    assert sizes["transformer.word_embeddings.weight"] == ([320, 64], 2)
    assert sizes["transformer.layers.0.mlp.dense_4h_to_h.weight"] == ([64, 128], 2)
    assert sizes["transformer.final_layernorm.bias"] == ([64], 0)
    assert len(sizes) == 1 + 12 + 2
