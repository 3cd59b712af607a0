"""Generation: what ChatGLM's two position streams change in transformers' loop, and a loop that yields every token."""

import warnings
from collections.abc import Iterator

import torch
from transformers import GenerationMixin, LogitsProcessor

from .cache import CACHE_NAME

SAFE_TOKEN_ID = 5  # "▁" of a vocabulary without image tokens
SAFE_TOKEN_SCORE = 5e4


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Replaces all scores by a choice of one safe token if any score of the batch is NaN or infinite."""

    def __init__(self, token_id: int = SAFE_TOKEN_ID):
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [batch, vocab_size] -> the same tensor, changed in place if it was broken."""
        if not bool(torch.isfinite(scores).all()):
            scores.zero_()
            scores[..., self.token_id] = SAFE_TOKEN_SCORE
        return scores


def check_hidden_mask(attention_mask: torch.Tensor) -> None:
    """Raises ValueError unless a 4-D mask is bool, which is how the original tells True = hidden from 1 = visible."""
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"a 4-D attention_mask must be bool with True = hidden, got {attention_mask.dtype}")


def decode_steps(
    model,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    generator: torch.Generator | None = None,
    **model_kwargs,
) -> Iterator[tuple[torch.Tensor, bool]]:
    """All ids so far [batch, length] and whether this was the last step, after each new token.

    A decoding method for `generate(custom_generate=...)`: transformers prepares processors, criteria and cache.
    generator makes sampling repeatable without touching torch's global seed. Closing the iterator stops the work.
    Raises ValueError for what cannot be streamed: beams, several answers to one prompt, a cache that holds tokens.
    """
    if generation_config.num_beams > 1 or generation_config.num_return_sequences > 1:
        raise ValueError("stream_generate gives one answer to each prompt, without beams: use generate")
    cache = model_kwargs.get(CACHE_NAME)
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "stream_generate starts from an empty cache: a prompt read in both directions has no reusable part"
        )
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    new_tokens = None  # everything on the first step, then one token, unless the cache is off
    while True:
        # Entered anew for each step: grad mode must not leak to the caller between two tokens.
        with torch.no_grad():
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=new_tokens, is_first_iteration=new_tokens is None, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            new_tokens = 1 if model_kwargs.get("use_cache") else None
            scores = outputs.logits[:, -1].to(device=input_ids.device, dtype=torch.float32)
            for process in logits_processor:  # as the list itself does, without inspecting each signature every step
                scores = process(input_ids, scores)
            del outputs
            if generation_config.do_sample:
                next_ids = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator)
            else:
                next_ids = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat((input_ids, next_ids), dim=-1)
            unfinished = unfinished & ~stopping_criteria(input_ids, scores)
            finished = not bool(unfinished.any())
        yield input_ids, finished
        if finished:
            return


class ChatGLMGenerationMixin(GenerationMixin):
    """transformers' generation with two position streams, and `stream_generate`."""

    def generate(self, inputs=None, *args, attention_mask=None, **kwargs):
        """As in transformers; takes the tokenizer's 4-D mask [batch, 1, seq_len, seq_len] (True = hidden) too."""
        if attention_mask is not None and attention_mask.dim() == 4:
            check_hidden_mask(attention_mask)
            attention_mask = (~attention_mask[:, 0, -1]).long()  # what the last token does not see is padding
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        return super().generate(inputs, *args, **kwargs)

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        **kwargs,
    ) -> Iterator[torch.Tensor]:
        """All ids so far [batch, length] after each token, as the original yields them.

        The token that ends the text (eos, or the one that reaches max_length) is not yielded unless yield_last=True.
        generator, a torch.Generator, makes sampling repeatable. Other keywords are those of `generate`.
        """
        if kwargs.get("streamer") is not None:
            raise ValueError("stream_generate yields every token itself: use generate with a streamer")
        yield_last = kwargs.pop("yield_last", False)
        steps = self.generate(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            custom_generate=decode_steps,
            **kwargs,
        )
        for ids, finished in steps:
            if not finished or yield_last:
                yield ids

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        if input_ids_length < generation_config.max_length:
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
            return
        # As in the original: one token, which stream_generate does not yield.
        warnings.warn(
            f"the prompt has {input_ids_length} tokens and max_length is {generation_config.max_length}: "
            "only one token is generated",
            UserWarning,
            stacklevel=2,
        )

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        # The guard judges the network, so it comes first: filters that forbid tokens write -inf on purpose.
        processors.sort(key=lambda processor: not isinstance(processor, InvalidScoreLogitsProcessor))
        return processors

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # Only what would become a DynamicCache: a cache of the caller, or of another kind that was asked for, stays.
        kind, given = generation_config.cache_implementation, model_kwargs.get(CACHE_NAME)
        if kind in (None, "dynamic") and given is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = self.new_cache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size cannot be used: the prompt attends to itself in both directions")
        cache = model_kwargs.get(CACHE_NAME)
        if self.config.pre_seq_len and cache is not None and cache.get_seq_length():
            # transformers would take the prefix in the cache for tokens of input_ids.
            raise ValueError(f"a model with a prefix encoder starts from an empty cache: leave {CACHE_NAME} out")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        raise ValueError("assisted decoding and prompt lookup cannot extend two position streams: use plain generation")

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if inputs_tensor.dim() != 2:
            raise ValueError("generate needs input_ids: positions cannot be made from inputs_embeds")
        return self.get_position_ids(inputs_tensor, model_kwargs.get("attention_mask"))

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # transformers takes three dimensions for [3, batch, seq_len]; ours are [batch, 2, seq_len].
        position_ids = model_kwargs.pop("position_ids", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if position_ids is not None:
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        position_ids = model_kwargs.pop("position_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if position_ids is not None:
            steps = torch.arange(1, num_new_tokens + 1, device=position_ids.device)
            last = position_ids[..., -1:]
            if position_ids.dim() == 3:  # the place in the prompt stays, the place in the answer moves on
                added = torch.stack((last[:, 0].expand(-1, num_new_tokens), last[:, 1] + steps), dim=1)
            else:  # one stream: behind [MASK] the whole answer keeps the place of the gap
                moving = last > position_ids[..., -2:-1]
                added = last + steps * moving
            model_kwargs["position_ids"] = torch.cat((position_ids, added), dim=-1)
        return model_kwargs
