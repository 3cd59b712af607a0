"""Shapes, dtypes, padding, prefixes and bad input of the network; its numbers are in test_golden.py."""

import pytest
import torch

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

BOS, EOS, MASK, GMASK = 60, 61, 58, 59
ROWS = [[7, 8, GMASK, BOS], [9, 10, 11, 12, 13, GMASK, BOS]]


def small_model(seed=0, attn_implementation="sdpa", **fields):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 64}
    tokens = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "mask_token_id": MASK,
        "gmask_token_id": GMASK,
        "pad_token_id": 3,
    }
    torch.manual_seed(seed)
    config = ChatGLMConfig(**sizes, **tokens, **fields, attn_implementation=attn_implementation)
    return ChatGLMForConditionalGeneration(config).eval()


def left_padded(rows, width=None):
    width = width or max(map(len, rows))
    ids = torch.tensor([[3] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", None])
def test_model_runs_in_every_dtype(dtype, attn_implementation):
    model = small_model(attn_implementation=attn_implementation).to(dtype)
    logits = model(torch.tensor([ROWS[1]])).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())


def test_eager_and_sdpa_agree():
    ids, mask = left_padded(ROWS)
    eager = small_model(attn_implementation="eager")(ids, attention_mask=mask).logits
    sdpa = small_model(attn_implementation="sdpa")(ids, attention_mask=mask).logits
    # Two orders of float32 sums; rows of padding may differ.
    torch.testing.assert_close(eager[mask == 1], sdpa[mask == 1], atol=1e-5, rtol=1e-4)


def test_padded_batch_equals_single_rows():
    model = small_model()
    ids, mask = left_padded(ROWS, width=9)
    batch = model(ids, attention_mask=mask).logits
    for row, logits in zip(ROWS, batch, strict=True):
        single = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[-len(row) :], single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fully_hidden_row_gives_no_nan(attn_implementation, dtype):
    model = small_model(attn_implementation=attn_implementation).to(dtype)
    ids = torch.tensor([[3, 3, 3, GMASK, BOS], [3, 3, 3, 3, 3]])
    hidden = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    hidden[0, :, 3:, 3:] = False  # the second row, and the pads of the first, see nothing at all
    positions = torch.zeros(2, 2, 5, dtype=torch.long)
    logits = model(ids, position_ids=positions, attention_mask=hidden).logits
    assert not bool(logits.isnan().any())


def test_only_padding_in_a_two_dimensional_mask_gives_no_nan():
    model = small_model()
    ids = torch.tensor([ROWS[0], ROWS[0]])
    logits = model(ids, attention_mask=torch.tensor([[1] * 4, [0] * 4])).logits
    assert not bool(logits.isnan().any())
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [[7, 8, 9, BOS], [7, 8, GMASK, 9], [7, 8, 9, 10]])
def test_row_without_its_control_tokens_is_refused(bad):
    with pytest.raises(ValueError, match=r"every row of input_ids needs <sop> \(id 60\)"):
        small_model()(torch.tensor([[7, 8, GMASK, BOS], bad]))


def test_positions_are_asked_for_when_the_cache_holds_tokens():
    model = small_model()
    cache = model(torch.tensor([ROWS[0]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids must be given"):
        model(torch.tensor([[5]]), past_key_values=cache)


def test_positions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"position_ids must be \[batch, 2, seq_len\], got \[1, 4\]"):
        small_model()(torch.tensor([ROWS[0]]), position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match=r"position_ids must be \[batch, seq_len\], got \[1, 2, 4\]"):
        small_model(position_encoding_2d=False)(
            torch.tensor([ROWS[0]]), position_ids=torch.zeros(1, 2, 4, dtype=torch.long)
        )


def test_four_dimensional_mask_that_is_not_bool_is_refused():
    hidden = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    for call in (small_model(), small_model().generate):
        with pytest.raises(ValueError, match=r"must be bool with True = hidden, got torch[.]int64"):
            call(torch.tensor([ROWS[0]]), attention_mask=hidden)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"hidden_size": 30}, "hidden_size must be num_attention_heads times a multiple of 4, got hidden_size 30"),
        ({"hidden_size": 8}, "got hidden_size 8 and num_attention_heads 4"),
        ({"pre_seq_len": 0}, "pre_seq_len must be a positive number of tokens or None, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ChatGLMConfig(**{"num_attention_heads": 4, "hidden_size": 32} | fields)


@pytest.mark.parametrize("prefix_projection", [False, True])
def test_checkpointing_leaves_prefix_gradients_unchanged(prefix_projection):
    ids = torch.tensor([[*ROWS[0], 20, 21, EOS], [7, GMASK, BOS, 20, 21, EOS, 3]])
    labels = torch.tensor([[-100] * 3 + [BOS, 20, 21, EOS], [-100] * 2 + [BOS, 20, 21, EOS, -100]])
    gradients = []
    for checkpointing in (False, True):
        model = small_model(pre_seq_len=5, prefix_projection=prefix_projection).train()
        model.transformer.prefix_encoder.dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=labels).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if ".prefix_encoder." in name}
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", None])
@pytest.mark.parametrize("choice", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_steps_with_prefix_and_padding_equal_single_rows(attn_implementation, choice):
    model = small_model(pre_seq_len=5, attn_implementation=attn_implementation)
    torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight)
    ids, mask = left_padded(ROWS)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, **choice}
    batch = model.generate(ids, attention_mask=mask, **options)
    for row, answer in zip(ROWS, batch, strict=True):
        single = model.generate(torch.tensor([row]), **options)
        assert answer[-6:].tolist() == single[0, -6:].tolist()


def test_tied_head_follows_the_embedding_and_a_separate_one_does_not():
    tied, separate = small_model(), small_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.word_embeddings.weight
    assert separate.lm_head.weight is not separate.transformer.word_embeddings.weight


def test_logits_to_keep_are_the_last_ones():
    model = small_model()
    ids = torch.tensor([ROWS[1]])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_bfloat16_tells_late_positions_apart():
    """The angles of bfloat16 positions would be those of every second one from 256 on."""
    model = small_model()
    with torch.no_grad():  # larger than freshly made ones, so that places matter
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.bfloat16()
    ids = torch.tensor([[7] * 300 + [8, GMASK, BOS]])
    places = model.get_position_ids(ids)
    shifted = places.clone()
    shifted[0, 0, 300] = 299  # the one token that differs
    with torch.no_grad():
        assert not torch.equal(model(ids, position_ids=places).logits, model(ids, position_ids=shifted).logits)


def test_input_on_another_device_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"input_ids are on meta and the model is on cpu: move them"):
        small_model()(torch.tensor([ROWS[0]], device="meta"), position_ids=torch.zeros(1, 2, 4, dtype=torch.long))
