"""Attention with one query: the C kernel against float64, and where the model uses it."""

import pytest
import torch

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, kernels
from chatglm.modeling_chatglm import OWN_ATTENTION, attention_forward, decode_kernel, eager_attention_forward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOS, EOS, MASK, GMASK = 60, 61, 58, 59
# Sums of a few hundred products in float32, of numbers up to about 4.
TOLERANCE = {"atol": 4e-6, "rtol": 2e-6}


def truth(query, key, value, scaling, mask=None):
    """float64 [batch, 1, heads, head_dim]; a row that sees nothing weighs all keys alike."""
    scores = torch.matmul(query.double(), key.double().transpose(2, 3)) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask.view(mask.shape[0], 1, 1, -1), -1e30)
    return torch.matmul(scores.softmax(-1), value.double()).transpose(1, 2)


def draw(kv_len, head_dim, dtype, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, 1, head_dim, generator=generator)
    key, value = torch.randn(2, batch, heads, kv_len, head_dim, generator=generator).to(dtype)
    return query, key, value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 4, 8, 15, 16, 17, 32, 40, 64, 80, 100, 128, 200, 256])
def test_equals_float64_for_every_width_and_length(backend, head_dim, dtype):
    for kv_len in (1, 2, 15, 16, 63, 64, 65, 200):
        query, key, value = draw(kv_len, head_dim, dtype)
        got = backend.attention(query, key, value, head_dim**-0.5)
        torch.testing.assert_close(got.double(), truth(query, key, value, head_dim**-0.5), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_cache_with_sharp_weights_is_exact(backend, dtype):
    query, key, value = draw(2049, 128, dtype, batch=1, heads=4)
    for scaling in (1e-3, 0.09, 3.0):  # all positions count; some; one alone
        got = backend.attention(query, key, value, scaling)
        torch.testing.assert_close(got.double(), truth(query, key, value, scaling), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("head_dim", [20, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_where_they_are(backend, dtype, head_dim):
    query, key, value = draw(300, head_dim + 16, dtype)
    query, key, value = query[..., :head_dim], key[:, :, 7:131, 3 : head_dim + 3], value[:, :, 7:131, 3 : head_dim + 3]
    expected = truth(query, key, value, 0.2)
    value = value.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # positions first in memory
    got = backend.attention(query, key, value, 0.2)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("head_dim", [24, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_positions_count_for_nothing_whatever_they_hold(backend, dtype, head_dim):
    query, key, value = draw(150, head_dim, dtype, batch=4)
    mask = torch.rand(4, 1, 1, 150, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1, ..., :100] = False  # a whole block and more
    mask[2], mask[2, ..., 149] = False, True
    mask[3] = True
    expected = truth(query, key, value, 0.3, mask)
    key, value = (tensor.masked_fill(~mask.transpose(2, 3), float("nan")) for tensor in (key, value))
    got = backend.attention(query, key, value, 0.3, mask)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)
    assert torch.equal(got, backend.attention(query, key, value, 0.3, mask[:, 0]))


def test_a_row_that_sees_nothing_gets_the_mean_of_all_values(backend):
    query, key, value = draw(70, 16, torch.float16)
    mask = torch.tensor([[False] * 70, [True] * 70])[:, None, None]
    got = backend.attention(query, key, value, 0.25, mask)
    torch.testing.assert_close(got[0, 0], value[0].float().mean(1), **TOLERANCE)
    torch.testing.assert_close(got[1:].double(), truth(query, key, value, 0.25)[1:], **TOLERANCE)


@pytest.mark.parametrize("head_dim", [24, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_numbers_are_passed_on(backend, dtype, head_dim):
    """The guard of generation looks for NaN in the scores: the kernel must not hide it."""
    for place in (0, 70, 149):
        query, key, value = draw(150, head_dim, dtype, batch=1, heads=2)
        key[0, 0, place, 5] = float("nan")
        value[0, 1, place, 5] = float("nan")
        got = backend.attention(query, key, value, 0.3)
        assert bool(got[0, 0, 0].isnan().all())
        assert got[0, 0, 1].isnan().nonzero().tolist() == [[5]]
    query, key, value = draw(150, head_dim, dtype, batch=1, heads=1)
    query[..., 0], key[0, 0, 80, 0] = 1, float("inf")
    assert bool(backend.attention(query, key, value, 0.3).isnan().all())  # inf - inf, as in torch


def test_small_numbers_of_float16_are_not_lost(backend):
    query, key, value = draw(40, 16, torch.float16)
    value = value * 2**-18  # below 2**-14 float16 has fewer digits, and the conversion is another one
    assert bool(((value != 0) & (value.abs() < 2**-14)).any())
    got = backend.attention(query, key, value, 0.25)
    torch.testing.assert_close(got.double(), truth(query, key, value, 0.25), atol=1e-11, rtol=2e-6)


def test_the_number_of_threads_does_not_change_a_bit(backend):
    query, key, value = draw(333, 72, torch.float16, batch=3, heads=5)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(backend.attention(query, key, value, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# In the model ---------------------------------------------------------------------------------------------------------


def small_model(dtype=torch.float32, **fields):
    torch.manual_seed(5)
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=128,
        bos_token_id=BOS, eos_token_id=EOS, mask_token_id=MASK, gmask_token_id=GMASK, pad_token_id=3, use_cache=True,
        **fields,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@pytest.fixture
def calls(library, monkeypatch):
    """The key dtypes of all steps by the kernel in a model, alone or in a fused layer; the kernels are the C ones."""
    seen = []

    class LayerRecorder:
        def __init__(self, layer):
            self.start, self.finish = layer.start, layer.finish
            self.fused_step = layer.step

        def step(self, x, cos, sin, keys, *rest):
            seen.append(keys.dtype)
            return self.fused_step(x, cos, sin, keys, *rest)

    class Recorder:
        def __getattr__(self, name):
            return getattr(library, name)

        def attention(self, query, key, value, *rest):
            seen.append(key.dtype)
            return library.attention(query, key, value, *rest)

        def layer(self, *args):
            return LayerRecorder(library.layer(*args))

    recorder = Recorder()
    monkeypatch.setattr(kernels, "cpu_backend", lambda: recorder)
    return seen


ROWS = torch.tensor([[3, 3, 7, 8, GMASK, BOS], [9, 10, 11, 12, GMASK, BOS]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_steps_of_a_quantised_model_use_it_on_a_float16_cache(calls, options):
    model = small_model().quantize(8)
    assert model.config._attn_implementation == OWN_ATTENTION
    result = model.generate(ROWS, attention_mask=PADDING, return_dict_in_generate=True, **GREEDY, **options)
    assert calls == [torch.float16] * (2 * 5)  # two layers, five steps after the prompt
    assert result.past_key_values.layers[0].keys.dtype == torch.float16
    model.set_attn_implementation("eager")
    eager = model.generate(ROWS, attention_mask=PADDING, return_dict_in_generate=True, **GREEDY, **options)
    assert len(calls) == 10
    assert eager.past_key_values.layers[0].keys.dtype == torch.float32
    assert torch.equal(result.sequences, eager.sequences)


def test_attention_of_a_caller_who_asks_for_sdpa_stays(calls):
    model = small_model(attn_implementation="sdpa").quantize(8)
    assert model.config._attn_implementation == "sdpa"
    model.generate(ROWS, attention_mask=PADDING, **GREEDY)
    assert calls == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_unquantised_models_need_no_compiler(calls, dtype):
    model = small_model(dtype)
    assert model.config._attn_implementation == OWN_ATTENTION
    result = model.generate(ROWS, attention_mask=PADDING, return_dict_in_generate=True, **GREEDY)
    assert calls == []
    assert result.past_key_values.layers[0].keys.dtype == dtype


def test_steps_with_gradients_take_torch(calls):
    model = small_model().quantize(8)
    cache = model(ROWS[1:]).past_key_values
    model(torch.tensor([[20]]), position_ids=torch.tensor([[[4], [2]]]), past_key_values=cache)
    assert calls == []
    with torch.no_grad():
        model(torch.tensor([[20]]), position_ids=torch.tensor([[[4], [3]]]), past_key_values=cache)
    assert len(calls) == 2


def test_weights_are_given_on_request(calls):
    model = small_model().quantize(8)
    with torch.no_grad():
        cache = model(ROWS[1:]).past_key_values
        step = model(
            torch.tensor([[20]]),
            position_ids=torch.tensor([[[4], [2]]]),
            past_key_values=cache,
            output_attentions=True,
        )
    assert calls == []
    assert [tuple(weights.shape) for weights in step.attentions] == [(1, 4, 1, 7)] * 2
    torch.testing.assert_close(step.attentions[0].sum(-1), torch.ones(1, 4, 1))


class Module(torch.nn.Module):
    """What an attention function asks of the module that calls it."""

    is_causal, layer_idx = False, 1

    def __init__(self, quantization_bit):
        super().__init__()
        self.config = ChatGLMConfig(quantization_bit=quantization_bit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("bits", [0, 8])
@torch.no_grad()
def test_own_attention_equals_eager(calls, bits, queries, dtype):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 3, queries, 20, generator=generator)
    key, value = torch.randn(2, 2, 3, 30, 20, generator=generator).to(dtype).unbind(0)
    mask = torch.rand(1, 1, queries, 30, generator=generator) > 0.3  # one mask for both rows
    mask[..., 0] = True
    for visible in (None, mask):
        got, weights = attention_forward(Module(bits), query, key, value, visible, scaling=0.2)
        expected, _ = eager_attention_forward(Module(bits), query, key.float(), value.float(), visible, scaling=0.2)
        assert weights is None
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == (2 if bits and queries == 1 else 0)
    assert (decode_kernel(Module(bits).config) is None) == (bits == 0)
