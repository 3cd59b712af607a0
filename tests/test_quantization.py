"""Quantised weights: the arithmetic, the modules that hold them, and what a user of a quantised model may do with it.

That the stored bytes are those of the original is proved in test_golden.py; that kernels agree, in tests/kernels.
"""

import copy
import io
import types

import pytest
import torch
from torch import nn

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, quantization
from chatglm.quantization import (
    CastLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_weight,
    quantize_model,
    quantize_weight,
    set_activations,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "bos_token_id": 92,
    "eos_token_id": 93,
    "gmask_token_id": 91,
    "mask_token_id": 90,
    "pad_token_id": 3,
}
IDS = torch.tensor([[5, 6, 7, 91, 92, 8]])


def small_model(**fields):
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SIZES, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and "layernorm" not in name:
                parameter.normal_(std=0.2)
    return model.eval()


class Reversing:
    """Kernels whose order in memory is the published one backwards, so that a byte out of place shows."""

    def __init__(self):
        self.packed = 0

    def supports(self, out_features, in_features, bits):
        return in_features != 48

    def pack(self, weight, bits):
        self.packed += 1
        return weight.flip(0, 1)

    def unpack(self, packed, bits):
        return packed.flip(0, 1)

    def linear(self, x, packed, scale, bias, bits, activations):
        return quantization.linear(x, packed.flip(0, 1), scale, bias, bits)

    def linear_back(self, grad, packed, scale, bits):
        return grad @ dequantize_weight(packed.flip(0, 1), scale, bits, grad.dtype)

    def embedding(self, ids, packed, scale, bits):
        return dequantize_weight(packed.flip(0, 1)[ids], scale[ids], bits, torch.float32)


@pytest.fixture
def backend(monkeypatch):
    backend = Reversing()
    kernels = types.SimpleNamespace(cpu_backend=lambda: backend)
    monkeypatch.setattr(quantization, "fast_kernels", lambda: kernels)
    return backend


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(quantization, "fast_kernels", lambda: None)


# arithmetic


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step_per_weight(bits):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    packed, scale = quantize_weight(weight, bits)
    error = (dequantize_weight(packed, scale, bits, torch.float32) - weight).abs()
    assert bool((error <= scale[:, None] * 0.5001).all())


def test_rows_are_quantized_alike_in_one_block_or_many():
    rows = quantization.CPU_BLOCK // 4096 + 3
    weight = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(2)).half()
    packed, scale = quantize_weight(weight, 4)
    last = quantize_weight(weight[-5:].clone(), 4)
    assert torch.equal(packed[-5:], last[0]) and torch.equal(scale[-5:], last[1])


def test_row_of_zeros_has_scale_zero_and_comes_back_as_zeros():
    packed, scale = quantize_weight(torch.zeros(2, 8), 4)
    assert scale.tolist() == [0, 0] and not packed.any()
    assert dequantize_weight(packed, scale, 4, torch.float32).tolist() == [[0.0] * 8] * 2


def test_bfloat16_weights_are_quantized_in_float32():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    packed, scale = quantize_weight(weight, 8)
    assert scale.dtype == torch.float32
    assert torch.equal(packed, quantize_weight(weight.float(), 8)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value):
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(weight, 8)


def test_other_bits_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits, got 3"):
        quantize_weight(torch.ones(2, 4), 3)
    with pytest.raises(ValueError, match="must be even, got 7: use 8 bits"):
        quantize_weight(torch.ones(2, 7), 4)
    assert quantize_weight(torch.ones(2, 7), 8)[0].shape == (2, 7)
    with pytest.raises(ValueError, match="must be even, got 5"):
        QuantizedLinear(5, 2, bits=4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [1 << 24, 1, None])  # the whole matrix at once, row by row, and kernels
def test_gradients_are_those_of_the_dequantized_matrix(bits, block, monkeypatch):
    backend = block is None and Reversing()
    monkeypatch.setattr(
        quantization, "fast_kernels", lambda: types.SimpleNamespace(cpu_backend=lambda: backend or None)
    )
    monkeypatch.setattr(quantization, "CPU_BLOCK", block or 1)
    layer = QuantizedLinear.from_linear(nn.Linear(10, 6), bits)
    x = torch.randn(2, 3, 10, requires_grad=True)
    weight = dequantize_weight(layer.weight.clone(), layer.weight_scale, bits, torch.float32)
    want_x = x.detach().clone().requires_grad_()
    want = nn.functional.linear(want_x, weight, layer.bias.detach())
    got = layer(x)
    torch.testing.assert_close(got, want)
    (got * torch.arange(6.0)).sum().backward()
    (want * torch.arange(6.0)).sum().backward()
    torch.testing.assert_close(x.grad, want_x.grad)
    assert layer.weight.grad is None and layer.weight_scale.grad is None
    torch.testing.assert_close(layer.bias.grad, 6 * torch.arange(6.0))
    assert layer.stored()[1] is (backend or None)  # bytes that kernels have laid out stay so


# models


def test_quantize_changes_the_four_products_of_each_layer_and_no_more(no_kernels):
    model = small_model()
    assert model.quantize(0) is model and model.config.quantization_bit == 0
    assert model.quantize(4) is model and model.config.quantization_bit == 4
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert sum(kind is QuantizedLinear for kind in kinds.values()) == 4 * SIZES["num_layers"]
    assert kinds["lm_head"] is nn.Linear
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_quantized_embedding_and_head_are_one_matrix(no_kernels):
    model = small_model().quantize(4, quantize_embeddings=True)
    embedding, head = model.transformer.word_embeddings, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    model.tie_weights()
    assert head.weight is embedding.weight and head.weight_scale is embedding.weight_scale
    assert model.config.quantization_embeddings is True and model.config.embedding_bits == 4


def test_embedding_may_have_other_bits_than_the_layers(no_kernels):
    model = small_model()
    quantize_model(model, 4, 8)
    assert (model.config.quantization_bit, model.config.embedding_bits) == (4, 8)
    again = ChatGLMForConditionalGeneration(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_untied_head_is_quantized_on_its_own(no_kernels):
    model = small_model(tie_word_embeddings=False)
    quantize_model(model, 8, 8)
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)


def test_quantizing_again(no_kernels, caplog):
    model = small_model().quantize(8)
    state = copy.deepcopy(model.state_dict())
    assert model.quantize(8) is model
    assert "quantised to 8 bits already" in caplog.text
    with pytest.raises(
        ValueError, match="quantised to 8 bits already and cannot be changed to 4: load the unquantised"
    ):
        model.quantize(4)
    assert all(torch.equal(model.state_dict()[key], want) for key, want in state.items())


def test_wrong_arguments_of_quantize_change_nothing(no_kernels):
    model = small_model()
    with pytest.raises(ValueError, match="4 or 8 bits, got 5"):
        model.quantize(5)
    with pytest.raises(TypeError, match="got weight_bit_width as well"):
        model.quantize(4, weight_bit_width=4)
    model.transformer.layers[1].mlp.dense_4h_to_h = nn.Linear(47, 32)
    with pytest.raises(ValueError, match="must be even, got 47"):
        model.quantize(4)
    assert model.config.quantization_bit == 0
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert model.quantize(8, use_quantization_cache=True, empty_init=False) is model  # arguments of the original


def test_embedding_of_other_bits_is_refused(no_kernels):
    model = small_model()
    quantize_model(model, 0, 8)
    with pytest.raises(ValueError, match="the embedding is quantised to 8 bits already and cannot be changed to 4"):
        model.quantize(4, quantize_embeddings=True)
    assert model.quantize(4).config.embedding_bits == 8


def test_model_that_is_offloaded_in_part_is_refused(no_kernels):
    model = small_model()
    model.transformer.layers[1].to("meta")
    with pytest.raises(ValueError, match="offloaded in part cannot be quantised"):
        model.quantize(4)
    assert model.config.quantization_bit == 0


def test_quantized_embedding_is_not_resized(no_kernels):
    model = small_model().quantize(4, quantize_embeddings=True)
    for options in ({"new_num_tokens": 100}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match="a quantised embedding cannot be resized: resize the unquantised model"):
            model.resize_token_embeddings(**options)
    assert model.resize_token_embeddings(96) is model.transformer.word_embeddings
    assert small_model().quantize(4).resize_token_embeddings(100).weight.shape == (100, 32)


def test_config_refuses_other_bits():
    with pytest.raises(ValueError, match="quantization_bit must be 0, 4 or 8, got 2"):
        ChatGLMConfig(**SIZES, quantization_bit=2)
    with pytest.raises(ValueError, match="quantization_embeddings must be false, true, 4 or 8, got 16"):
        ChatGLMConfig(**SIZES, quantization_bit=4, quantization_embeddings=16)
    assert ChatGLMConfig(**SIZES, quantization_bit=8, quantization_embeddings=True).embedding_bits == 8
    assert ChatGLMConfig(**SIZES, quantization_bit=8, quantization_embeddings=4).embedding_bits == 4


def test_a_model_built_from_a_quantized_config_is_empty_and_of_quantized_size(no_kernels):
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SIZES, quantization_bit=4, quantization_embeddings=True))
    assert model.transformer.layers[0].mlp.dense_h_to_4h.weight.shape == (48, 16)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not model.lm_head.weight.any()


def test_prefix_encoder_takes_gradients_through_quantized_layers(no_kernels):
    model = small_model(pre_seq_len=3).quantize(4)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["transformer.prefix_encoder.embedding.weight"]
    assert grads["transformer.prefix_encoder.embedding.weight"].abs().sum() > 0


def test_gradients_through_the_kernels_of_this_machine_point_where_exact_ones_do():
    gradients = []
    for activations in ("float32", "int16"):  # the first is the plain product
        model = small_model(pre_seq_len=3).quantize(4, quantize_embeddings=True)
        set_activations(model, activations)
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad.flatten())
    exact, got = gradients
    # Each of 3 layers rounds what comes back to bfloat16 four times, by 1 part in 512 at most.
    assert float((got - exact).norm() / exact.norm()) < 0.01
    assert exact.norm() > 0


def test_activations_are_checked_and_set_everywhere():
    model = small_model().quantize(8, quantize_embeddings=True)
    with pytest.raises(ValueError, match="activations must be one of int8, int16, bf16, float32, got fp8"):
        set_activations(model, "fp8")
    assert QuantizedLinear(2047, 4).activations == "int16" and QuantizedLinear(2048, 4).activations == "int8"
    set_activations(model, "bf16")
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(modules) == 9 and {module.activations for module in modules} == {"bf16"}


def test_head_in_bfloat16_takes_and_gives_float32():
    head = CastLinear(8, 5, bias=False).bfloat16()
    x = torch.randn(2, 8)
    assert torch.equal(head(x), nn.functional.linear(x.bfloat16(), head.weight).float())


# the order of the bytes in memory


def packed_model(backend):
    model = small_model().quantize(4, quantize_embeddings=True)
    published = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(IDS).logits
    assert backend.packed == 3 * SIZES["num_layers"] + 1  # all but what the kernels do not support, the tied pair once
    return model, published, logits


def test_kernels_lay_out_each_matrix_once_and_change_no_answer(backend):
    model, published, logits = packed_model(backend)
    stored = model.transformer.layers[0].attention.dense.weight
    assert torch.equal(stored.flip(0, 1), published["transformer.layers.0.attention.dense.weight"])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    assert backend.packed == 3 * SIZES["num_layers"] + 1
    set_activations(model, "float32")  # the plain product reads the packed weights, too
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_state_dict_has_published_bytes_and_later_forwards_leave_it_alone(backend):
    model, published, logits = packed_model(backend)
    state = model.state_dict()
    assert state.keys() == published.keys()
    assert all(torch.equal(state[key], want) for key, want in published.items())
    assert state["lm_head.weight"].data_ptr() == state["transformer.word_embeddings.weight"].data_ptr()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    assert all(torch.equal(state[key], want) for key, want in published.items())


def test_loading_into_a_packed_model(backend):
    model, _, _ = packed_model(backend)
    torch.manual_seed(5)
    other = small_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.quantize(4, quantize_embeddings=True)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_copies_pickles_and_casts_see_published_bytes(backend):
    model, published, logits = packed_model(backend)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.word_embeddings.weight
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    revived = torch.load(buffer, weights_only=False)
    for other in (twin, revived, model):
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, logits)
    half = model.half()
    key = "transformer.layers.0.attention.dense.weight"
    assert torch.equal(half.get_parameter(key), published[key])
    with torch.no_grad():
        torch.testing.assert_close(half(IDS).logits.float(), logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_scales_keep_their_dtype_when_the_model_is_cast(no_kernels, stored, dtype):
    model = small_model().to(stored).quantize(8, quantize_embeddings=True)
    before = model.state_dict()
    after = model.to(dtype).state_dict()
    assert model.dtype == dtype
    for name in (name for name in before if name.endswith("weight_scale")):
        assert after[name].dtype == stored and torch.equal(after[name], before[name]), name
    assert model.lm_head.weight_scale is model.transformer.word_embeddings.weight_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scales_of_an_empty_model_are_float32_in_other_formats_than_float16(no_kernels, dtype):
    model = small_model().quantize(4, quantize_embeddings=True)
    empty = ChatGLMForConditionalGeneration._from_config(model.config, dtype=dtype)
    empty.load_state_dict(model.state_dict())
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_scale"):
            assert torch.equal(empty.get_parameter(name), tensor)


def test_weights_packed_before_the_way_back_give_the_same_gradients(backend):
    gradients = []
    for evaluates in (False, True):
        model = small_model(pre_seq_len=3).quantize(4)
        loss = model(IDS, labels=IDS).loss
        if evaluates:
            with torch.no_grad():
                model(IDS)
            assert backend.packed > 0
        loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_training_keeps_one_copy_of_the_weights(backend):
    layer = QuantizedLinear.from_linear(nn.Linear(8, 4), 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(1, 8, requires_grad=True))
    assert layer.stored()[1] is backend
    assert layer.weight.data_ptr() in [tensor.data_ptr() for tensor in kept]


def test_table_is_read_while_another_thread_lays_it_out(backend):
    """What a thread has read of the order and of the bytes belongs together."""
    model = small_model().quantize(4, quantize_embeddings=True)
    embedding = model.transformer.word_embeddings
    expected = embedding(IDS)
    bytes_, order = embedding.stored()
    assert order is None
    model.lm_head.pack()
    assert torch.equal(bytes_, embedding.publish())
    model.lm_head.pack()
    bytes_, order = embedding.stored()
    assert order is backend
    embedding.publish()
    assert torch.equal(order.embedding(IDS, bytes_, embedding.weight_scale, 4), expected)


def test_forward_in_inference_mode_leaves_the_model_trainable(backend):
    model = small_model(pre_seq_len=3).quantize(4)
    with torch.inference_mode():
        model(IDS)
    model(IDS, labels=IDS).loss.backward()
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().sum() > 0


def test_a_split_model_forgets_the_address_of_a_table_that_moved(backend, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = small_model().quantize(4, quantize_embeddings=True)
    embedding, expected = model.transformer.word_embeddings, model(IDS).logits
    embedding.publish()
    names = ("word_embeddings", "layers.0", "layers.1", "final_layernorm")
    places = {f"transformer.{name}": "disk" if name == "layers.1" else "cpu" for name in names} | {"lm_head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    addresses = model.lm_head._hf_hook.tied_params_map
    for move in (model.lm_head.pack, embedding.publish):
        before = embedding.weight.data_ptr()
        move()
        assert embedding.weight.data_ptr() != before
        assert before not in addresses
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
