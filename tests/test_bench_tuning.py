"""The benchmark of a tuning step, on a small quantised model."""

import pytest
import torch

from benchmarks import bench_tuning
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=600, hidden_size=32, num_layers=2, num_attention_heads=4, max_sequence_length=256,
        inner_hidden_size=64, bos_token_id=592, eos_token_id=593, gmask_token_id=591, mask_token_id=590, pad_token_id=3,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).quantize(4, quantize_embeddings=True)
    monkeypatch.setattr(bench_tuning, "load_model", lambda folder, device: (model, None))
    return model


@pytest.mark.parametrize(
    ("method", "trained"),
    [("ptuning", 128 * 2 * 2 * 32), ("lora", 2 * 8 * (32 + 96))],  # 2 layers in both
)
def test_steps_train_what_the_method_adds_and_are_timed(small, method, trained):
    result = bench_tuning.measure("folder", 4, method, steps=2)
    assert result["trained"] == trained / 1e6
    assert len(result["losses"]) == 3 and torch.tensor(result["losses"]).isfinite().all()
    # LoRA's second matrices start as zeros and move only if gradients come through the quantised layers.
    assert all(p.any() for name, p in small.named_parameters() if "lora_B" in name)
    assert result["step_s"] >= result["forward_s"] > 0 and result["backward_s"] > 0
    assert result["peak_gb"] >= result["loaded_gb"] > 0.05


def test_nothing_starts_without_the_memory_for_it(monkeypatch, capsys):
    monkeypatch.setattr(bench_tuning, "free_memory", lambda device: 1e9)
    with pytest.raises(SystemExit, match="2"):
        bench_tuning.main([])
    assert "a step needs 5.6 GB of free memory, and 1.0 GB are free" in capsys.readouterr().err
