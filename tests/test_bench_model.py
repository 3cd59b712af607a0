"""The benchmark measures what it says, on networks small enough for a test."""

import pytest
import torch

from benchmarks.bench_model import ROWS, build_random, full_config, measure, random_prompt, table
from chatglm import ChatGLMConfig


@pytest.fixture(scope="module")
def small_model():
    config = ChatGLMConfig(
        vocab_size=200,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        inner_hidden_size=64,
        bos_token_id=104,
        eos_token_id=105,
        mask_token_id=100,
        gmask_token_id=101,
    )
    return build_random(config, torch.float32)


def test_random_network_has_finite_logits_and_one_shared_embedding(small_model):
    logits = small_model(random_prompt(small_model.config, 16)).logits
    assert logits.shape == (1, 16, 200)
    assert logits.isfinite().all() and logits.std() > 0
    assert small_model.lm_head.weight is small_model.transformer.word_embeddings.weight
    assert small_model.transformer.final_layernorm.weight.eq(1).all()


def test_full_config_has_the_published_size(tokenizer):
    config = full_config(tokenizer)
    with torch.device("meta"):
        from chatglm import ChatGLMForConditionalGeneration

        model = ChatGLMForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_173_286_400
    assert config.bos_token_id == tokenizer.bos_token_id


def test_every_row_of_the_table_is_measured(model, tokenizer):
    results = measure(model, tokenizer, contexts=(8, 16, 24), repeats=1, steps=4)
    assert all(value > 0 for key, value in results.items() if not key.startswith("overhead"))
    assert results["parameters"] * 1e6 == sum(parameter.numel() for parameter in model.parameters())

    measured = {"shape": "tiny", "dtype": "float32", **{key: 1.0 for key, *_ in ROWS}}
    lines = table([measured, measured]).splitlines()
    assert len(lines) == len(ROWS) + 1
    assert len({len(line) for line in lines}) == 1  # aligned
