"""The loops that choose tokens: sampling filters by hand, streams, seeds, beams, cancelling."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.generation import InvalidScoreLogitsProcessor

BOS, EOS, MASK, GMASK = 60, 61, 58, 59
PROMPT = [[7, 8, 9, GMASK, BOS]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, inner_hidden_size=64,
        bos_token_id=BOS, eos_token_id=EOS, mask_token_id=MASK, gmask_token_id=GMASK, pad_token_id=3, use_cache=True,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # larger weights: a random network then does not repeat one token for ever
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def kept_tokens(model, probabilities, **options):
    """Which tokens the filters of `generate` keep, for scores with the given probabilities."""
    config = GenerationConfig(do_sample=True, **options)
    filters = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    scores = filters(torch.tensor([[1]]), torch.tensor([probabilities]).log())
    return scores.isfinite()[0].tolist()


def test_top_p_keeps_the_smallest_set_that_reaches_it(model):
    assert kept_tokens(model, [0.5, 0.3, 0.15, 0.05], top_p=0.7, top_k=0) == [True, True, False, False]


def test_temperature_comes_before_top_p(model):
    # At temperature 0.5 the probabilities become 0.68, 0.25, 0.06, 0.01: the first reaches 0.6 alone.
    assert kept_tokens(model, [0.5, 0.3, 0.15, 0.05], top_p=0.6, temperature=0.5, top_k=0) == [True] + 3 * [False]
    assert kept_tokens(model, [0.5, 0.3, 0.15, 0.05], top_p=0.6, top_k=0) == [True, True, False, False]


def test_top_k_counts_tokens(model):
    assert kept_tokens(model, [0.4, 0.3, 0.2, 0.1], top_k=3, top_p=1.0) == [True, True, True, False]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_guard_turns_broken_scores_into_token_5(broken):
    scores = torch.randn(2, 10)
    scores[1, 3] = broken
    guarded = InvalidScoreLogitsProcessor()(None, scores)
    assert guarded.tolist() == [[5e4 if token == 5 else 0.0 for token in range(10)]] * 2


def test_guard_leaves_sound_scores_alone():
    scores = torch.randn(2, 10)
    assert torch.equal(InvalidScoreLogitsProcessor()(None, scores.clone()), scores)


def test_stream_equals_generate_without_its_last_token(model):
    ids = torch.tensor(PROMPT)
    whole = model.generate(ids, do_sample=False, max_length=15, eos_token_id=None)
    stream = list(model.stream_generate(ids, do_sample=False, max_length=15, eos_token_id=None))
    assert [step.shape[1] for step in stream] == list(range(6, 15))
    assert torch.equal(stream[-1], whole[:, :-1])
    *_, last = model.stream_generate(ids, do_sample=False, max_length=15, eos_token_id=None, yield_last=True)
    assert torch.equal(last, whole)


def test_stream_without_cache_is_the_same(model):
    ids = torch.tensor(PROMPT)
    options = {"do_sample": False, "max_length": 15, "eos_token_id": None}
    cached = list(model.stream_generate(ids, use_cache=True, **options))
    plain = list(model.stream_generate(ids, use_cache=False, **options))
    assert [step.tolist() for step in cached] == [step.tolist() for step in plain]


def test_own_generator_repeats_and_leaves_the_global_seed_alone(model):
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        steps = model.stream_generate(
            torch.tensor(PROMPT), do_sample=True, max_length=25, eos_token_id=None, generator=generator
        )
        *_, last = steps
        return last.tolist()

    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.rand(1), expected)


def test_gradients_are_on_again_between_two_tokens(model):
    for _ in model.stream_generate(torch.tensor(PROMPT), do_sample=False, max_length=9):
        assert torch.is_grad_enabled()


def test_closing_the_stream_stops_the_work(model, monkeypatch):
    calls = []
    forward = model.transformer.forward
    monkeypatch.setattr(model.transformer, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    steps = model.stream_generate(torch.tensor(PROMPT), do_sample=False, max_length=40, eos_token_id=None)
    next(steps)
    next(steps)
    steps.close()
    assert len(calls) == 2


def test_beam_scores_are_the_log_probabilities_of_their_answers(model):
    result = model.generate(
        torch.tensor(PROMPT), do_sample=False, max_new_tokens=8, eos_token_id=None, num_beams=6, num_return_sequences=6,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert len({tuple(row) for row in result.sequences.tolist()}) == 6
    with torch.no_grad():
        logits = model(result.sequences).logits.log_softmax(-1)
    chosen = logits[:, 4:-1].gather(-1, result.sequences[:, 5:, None]).sum((1, 2))
    # Cached steps of reordered beams against one full forward, in float32.
    torch.testing.assert_close(result.sequences_scores, chosen, atol=1e-4, rtol=1e-4)


def test_filters_that_forbid_tokens_do_not_look_like_broken_scores(model):
    guard = LogitsProcessorList([InvalidScoreLogitsProcessor()])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    free = model.generate(torch.tensor(PROMPT), logits_processor=guard, **options)[0, 5:].tolist()
    other = model.generate(torch.tensor(PROMPT), logits_processor=guard, suppress_tokens=free[:1], **options)
    assert free[0] not in other[0, 5:].tolist()
    assert other[0, 5:].tolist() != [5] * 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 2}, "stream_generate gives one answer to each prompt"),
        ({"num_return_sequences": 2, "do_sample": True}, "stream_generate gives one answer to each prompt"),
        ({"streamer": object()}, "stream_generate yields every token itself"),
        ({"cache_implementation": "static"}, "the cache must grow, got StaticCache"),
    ],
)
def test_what_cannot_be_streamed_is_refused(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(model.stream_generate(torch.tensor(PROMPT), max_new_tokens=3, **options))


def test_filled_cache_and_lookup_are_refused(model):
    cache = model(torch.tensor(PROMPT), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="starts from an empty cache"):
        list(model.stream_generate(torch.tensor(PROMPT), past_key_values=cache, max_new_tokens=3))
    with pytest.raises(ValueError, match="cannot extend two position streams"):
        model.generate(torch.tensor(PROMPT), prompt_lookup_num_tokens=2, max_new_tokens=3)


def test_rows_of_a_batch_follow_their_own_positions(model):
    rows = [[7, 8, GMASK, BOS], [9, 10, 11, 12, MASK, 13, BOS]]
    ids = torch.tensor([[3, 3, 3, *rows[0]], rows[1]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    options = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=mask, **options)
    single = [model.generate(torch.tensor([row]), **options)[0, -7:].tolist() for row in rows]
    assert [row[-7:].tolist() for row in batch] == single


def test_processors_of_the_caller_run_and_their_list_is_not_touched(model):
    class Only20:
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e4).index_fill_(-1, torch.tensor([20]), 0.0)

    processors = LogitsProcessorList([Only20()])
    *_, last = model.stream_generate(torch.tensor(PROMPT), logits_processor=processors, do_sample=False, max_length=9)
    assert last[0, 5:].tolist() == [20, 20, 20]
    assert len(processors) == 1
