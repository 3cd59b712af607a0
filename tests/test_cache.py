"""The growing cache: the same numbers as transformers' DynamicCache, without its copies."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, DynamicLayer

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.cache import BLOCK, CACHE_NAME, GrowingCache, GrowingLayer

BOS, EOS, MASK, GMASK = 60, 61, 58, 59


def states(tokens, batch=2, heads=3, head_dim=4, dtype=torch.float32):
    return tuple(torch.randn(batch, heads, tokens, head_dim).to(dtype) for _ in range(2))


def assert_same(layer, reference):
    assert layer.get_seq_length() == reference.get_seq_length()
    assert layer.get_mask_sizes(3) == reference.get_mask_sizes(3)
    for name in ("keys", "values"):
        ours, theirs = getattr(layer, name), getattr(reference, name)
        assert ours is theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


def random_step(choose, batch):
    """A method of a cache layer with arguments, drawn as generation draws them: mostly one more token."""
    kind = choose.choices(
        ("token", "tokens", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"),
        weights=(60, 10, 6, 2, 2, 6, 1),
    )[0]
    if kind in ("token", "tokens"):
        return "update", states(1 if kind == "token" else choose.choice((2, 7, BLOCK - 1, BLOCK)), batch)
    if kind == "reorder_cache":
        return kind, (torch.tensor([choose.randrange(batch) for _ in range(batch)]),)
    if kind == "batch_repeat_interleave":
        return kind, (2,) if batch <= 4 else (1,)
    if kind == "batch_select_indices":
        return kind, (torch.arange(1 + choose.randrange(batch)),)
    return kind, (-choose.choice((0, 1, 2)),) if kind == "crop" else ()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grad", [False, True, None])
def test_any_sequence_of_calls_gives_what_the_dynamic_layer_gives(seed, grad):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    ours, theirs, seen, batch = GrowingLayer(), DynamicLayer(), [], 2
    for _ in range(120):
        name, arguments = random_step(choose, batch)
        with torch.set_grad_enabled(choose.random() < 0.5 if grad is None else grad):
            results = [getattr(layer, name)(*arguments) for layer in (ours, theirs)]
        assert_same(ours, theirs)
        if name == "update":
            assert all(map(torch.equal, *results))
            seen.extend((tensor, tensor.clone()) for tensor in results[0])
        if ours.keys is not None and ours.keys.dim() == 4:
            batch = ours.keys.shape[0]
    assert all(torch.equal(tensor, before) for tensor, before in seen), "something returned earlier was overwritten"


@torch.no_grad()
def test_a_token_is_written_into_the_room_that_is_left():
    layer = GrowingLayer()
    layer.update(*states(10))
    places = []
    for _ in range(2 * BLOCK):
        layer.update(*states(1))
        places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
        spare = layer.keys.untyped_storage().nbytes() // (4 * 2 * 3 * 4) - layer.get_seq_length()
        assert 0 <= spare <= BLOCK
    assert len(set(places)) == 3  # the block of the prompt, and one more for each BLOCK tokens


@torch.no_grad()
def test_an_outgrown_or_replaced_buffer_is_released():
    layer = GrowingLayer()
    layer.update(*states(10))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # without room: made by the reordering
    before = layer.keys.clone()
    layer.offload()
    layer.prefetch()
    keys, _ = layer.update(*states(1))
    assert torch.equal(keys[:, :, :10], before)


def test_gradients_reach_every_state():
    layer = GrowingLayer()
    parts = [states(n) for n in (4, 1, 1)]
    for key, value in parts:
        keys, values = layer.update(key.requires_grad_(), value.requires_grad_())
    (keys.pow(2).sum() + values.pow(3).sum()).backward()
    for key, value in parts:
        torch.testing.assert_close(key.grad, 2 * key)
        torch.testing.assert_close(value.grad, 3 * value**2)


def test_steps_without_gradients_do_not_disturb_a_graph():
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(4))
    weight = torch.ones((), requires_grad=True)
    key, value = states(1)
    keys, _ = layer.update(key * weight, value)
    product = (keys * weight).sum()  # saves keys for the way back
    with torch.no_grad():
        layer.update(*states(1))
    product.backward()
    expected = keys.detach().sum() + key.sum()
    torch.testing.assert_close(weight.grad, expected)


def test_a_cache_filled_in_inference_mode_goes_on_outside():
    ours, theirs = GrowingLayer(), DynamicLayer()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        step = states(3)
        with mode():
            ours.update(*step)
            theirs.update(*step)
        assert_same(ours, theirs)


@pytest.mark.parametrize("grad", [False, True])
def test_narrow_storage_returns_the_exact_prompt_once_and_rounded_values_afterwards(grad):
    layer, prompt, token = GrowingLayer(torch.float16), states(5), states(1)
    with torch.set_grad_enabled(grad):
        first = layer.update(*prompt)
        second = layer.update(*token)
    assert all(map(torch.equal, first, prompt))
    for got, parts in zip(second, zip(prompt, token, strict=True), strict=True):
        assert got.dtype == torch.float16
        assert torch.equal(got, torch.cat(parts, dim=2).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_only_float32_is_stored_in_another_dtype(dtype):
    layer = GrowingLayer(torch.float16)
    with torch.no_grad():
        assert layer.update(*states(2, dtype=dtype))[0].dtype == dtype
        assert layer.update(*states(1, dtype=dtype))[0].dtype == dtype


@torch.no_grad()
def test_copies_of_a_cache_go_their_own_ways():
    cache = GrowingCache()
    cache.update(*states(4), layer_idx=0)
    other = copy.deepcopy(cache)
    step, other_step = states(1), states(1)
    keys, _ = cache.update(*step, layer_idx=0)
    other_keys, _ = other.update(*other_step, layer_idx=0)
    assert torch.equal(keys[:, :, :4], other_keys[:, :, :4])
    assert torch.equal(keys[:, :, 4:], step[0])
    assert torch.equal(other_keys[:, :, 4:], other_step[0])


@torch.no_grad()
def test_every_layer_stays_on_the_device_of_its_keys():
    cache = GrowingCache()
    for index, device in enumerate(("cpu", "meta", "cpu")):
        for tokens in (3, 1):
            cache.update(*(tensor.to(device) for tensor in states(tokens)), layer_idx=index)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta", "cpu"]
    assert not cache.is_compileable
    assert cache.is_croppable


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"batch": 1}, {"heads": 1}, {"head_dim": 1}])
def test_states_that_do_not_fit_are_refused(sizes):
    layer = GrowingLayer()
    layer.update(*states(4))
    with pytest.raises(ValueError, match=r"the cache holds keys or values of shape \[2, 3, 4, 4\], got"):
        layer.update(*states(1, **sizes))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_room_that_the_caller_fills_is_what_update_would_have_stored(tokens, dtype):
    ours, theirs = GrowingCache(dtype), GrowingCache(dtype)
    prompt = states(tokens)
    for layer in (0, 1):
        ours.update(*prompt, layer), theirs.update(*prompt, layer)
    for count in (1, 1, 3, BLOCK):
        step = states(count)
        before = [tensor.clone() for tensor in (ours.layers[1].keys, ours.layers[1].values)]
        room = ours.extend(2, count, 1)
        for tensor, old, new in zip(room, before, step, strict=True):
            assert tensor.shape == (2, 3, old.shape[2] + count, 4)
            assert tensor.dtype == (dtype or torch.float32)
            assert torch.equal(tensor[:, :, :-count], old)
            tensor[:, :, -count:] = new
        theirs.update(*step, 1)
        assert_same(ours.layers[1], theirs.layers[1])
        for tensor, name in zip(room, ("keys", "values"), strict=True):
            assert tensor.data_ptr() == getattr(ours.layers[1], name).data_ptr()
    assert_same(ours.layers[0], theirs.layers[0])


@torch.no_grad()
def test_an_empty_cache_or_one_of_another_batch_is_left_alone():
    cache = GrowingCache()
    assert cache.extend(2, 1, 0) is None and len(cache.layers) == 0
    cache.update(*states(2), 0)
    assert cache.extend(2, 1, 1) is None
    for batch in (1, 4):
        assert cache.extend(batch, 1, 0) is None
    assert cache.get_seq_length() == 2


@torch.no_grad()
def test_room_is_made_behind_what_was_returned_or_assigned_and_never_in_it():
    """Beams, cropping and selection forget the room: what is behind them may belong to somebody else."""
    layer = GrowingLayer()
    for change in (
        lambda: None,
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.crop(-2),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.batch_select_indices(torch.tensor([0, 2])),
    ):
        if not layer.get_seq_length():
            layer.update(*states(BLOCK - 2))
        seen = [(tensor, tensor.clone()) for tensor in (layer.keys, layer.values)]
        change()
        now = [tensor.clone() for tensor in (layer.keys, layer.values)]
        for _ in range(3):
            for tensor in layer.extend(len(layer.keys), 1):
                tensor[:, :, -1] = 7
        assert all(torch.equal(tensor, before) for tensor, before in seen)
        for tensor, before in zip((layer.keys, layer.values), now, strict=True):
            assert torch.equal(tensor[:, :, :-3], before)
            assert bool((tensor[:, :, -3:] == 7).all())


def test_a_cache_filled_in_inference_mode_is_extended_outside():
    layer, prompt = GrowingLayer(), states(3)
    with torch.inference_mode():
        layer.update(*prompt)
    with torch.no_grad():
        for tensor, old in zip(layer.extend(2, 1), prompt, strict=True):
            tensor[:, :, -1] = 1
            assert torch.equal(tensor[:, :, :3], old)
        layer.update(*states(1))
    with torch.inference_mode():
        assert layer.extend(2, 2)[0].shape == (2, 3, 7, 4)


# With the model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(5)
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, inner_hidden_size=64,
        bos_token_id=BOS, eos_token_id=EOS, mask_token_id=MASK, gmask_token_id=GMASK, pad_token_id=3, use_cache=True,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def long_prompt(tokens):
    ids = torch.randint(4, 58, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    ids[0, -2:] = torch.tensor([GMASK, BOS])
    return ids


def test_greedy_steps_across_a_full_buffer_equal_full_forwards(small):
    ids = small.generate(long_prompt(BLOCK - 5), do_sample=False, max_new_tokens=12, eos_token_id=None)
    with torch.no_grad():
        logits = small(ids, use_cache=False).logits
    assert logits[0, BLOCK - 6 : -1].argmax(-1).tolist() == ids[0, BLOCK - 5 :].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}])
def test_answers_equal_those_with_a_cache_of_the_caller(small, options):
    prompt = long_prompt(BLOCK - 3)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None} | options
    given = DynamicCache(config=small.config)
    expected = small.generate(
        prompt, past_key_values=given, return_dict_in_generate=True, output_scores=True, **options
    )
    result = small.generate(prompt, return_dict_in_generate=True, output_scores=True, **options)
    assert expected.past_key_values is given
    assert isinstance(result.past_key_values, GrowingCache)
    assert torch.equal(result.sequences, expected.sequences)
    for scores, expected_scores in zip(result.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_a_cache_are_understood(small, name):
    ids, given = long_prompt(9), small.new_cache()
    places = small.get_position_ids(torch.cat((ids, torch.tensor([[5]])), dim=1))
    with torch.no_grad():
        expected = small(torch.cat((ids, torch.tensor([[5]])), dim=1), use_cache=False).logits[:, -1]
        output = small(ids, **{name: given})
        step = small(torch.tensor([[5]]), position_ids=places[..., -1:], **{name: given})
    assert output[CACHE_NAME] is step[CACHE_NAME] is given
    torch.testing.assert_close(step.logits[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_generate_makes_no_cache_of_its_own_where_another_kind_or_none_is_wanted(small):
    options = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True}
    assert small.generate(long_prompt(6), use_cache=False, **options).past_key_values is None
    with pytest.raises(ValueError, match="the cache must grow, got StaticCache"):
        small.generate(long_prompt(6), cache_implementation="static", **options)


def test_an_answer_goes_on_from_the_cache_of_its_beginning(small):
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = small.generate(long_prompt(9), max_new_tokens=8, **options)
    begun = small.generate(long_prompt(9), max_new_tokens=4, **options)
    ended = small.generate(begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=4, **options)
    assert torch.equal(ended.sequences, whole.sequences)


def test_a_cache_behind_a_prefix_is_refused(small):
    config = copy.deepcopy(small.config)
    config.pre_seq_len = 3
    model = ChatGLMForConditionalGeneration(config).eval()
    begun = model.generate(long_prompt(9), do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="with a prefix encoder starts from an empty cache"):
        model.generate(begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=2)


def test_prompt_is_not_read_in_chunks(small):
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be used"):
        small.generate(long_prompt(8), prefill_chunk_size=2, do_sample=False, max_new_tokens=3)


def test_prefix_gradients_are_the_same_with_a_cache():
    gradients = []
    for use_cache in (False, True):
        torch.manual_seed(1)
        config = ChatGLMConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, inner_hidden_size=64, pre_seq_len=3,
            bos_token_id=BOS, eos_token_id=EOS, mask_token_id=MASK, gmask_token_id=GMASK, pad_token_id=3,
        )  # fmt: skip
        model = ChatGLMForConditionalGeneration(config).eval()
        ids = torch.tensor([[7, 8, GMASK, BOS, 20, 21, EOS]])
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert float(gradients[0].abs().max()) > 0
    assert torch.equal(*gradients)
