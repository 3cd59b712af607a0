"""Keys and values of earlier tokens, in buffers with room for the next ones.

transformers' DynamicCache copies everything it holds for every new token, which at 1024 tokens takes longer than the
attention itself. Here a token is written into the room that is left; a full buffer is copied into one that is BLOCK
tokens longer.
"""

from dataclasses import fields
from functools import partial

import torch
from transformers import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls a cache that it passes on: "cache" since 5.24.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
# Tokens by which a buffer grows. A copy of 1024 tokens of ChatGLM-6B takes about 0.1 s, spread over 64 steps of 0.1 s;
# a buffer has at most 64 tokens too many (1 MiB per layer in float16).
BLOCK = 64


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, [batch, heads, kv_len, head_dim]; behaves as its parent, DynamicLayer.

    dtype  what float32 keys and values are stored in, rounded; None = as they come. The call that fills an empty layer
           returns the exact ones, later calls return what is stored.

    With gradients enabled nothing is written in place. What was returned or assigned is never overwritten: only
    `update` knows of room behind `keys` and `values`, and setting them (beams, cropping, offloading) forgets it.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        self.stored_dtype = dtype
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """Stored keys, None before the first update."""
        return self._keys

    @keys.setter
    def keys(self, tensor: torch.Tensor | None):
        self._keys, self._key_buffer = tensor, None

    @property
    def values(self) -> torch.Tensor | None:
        """Stored values, None before the first update."""
        return self._values

    @values.setter
    def values(self, tensor: torch.Tensor | None):
        self._values, self._value_buffer = tensor, None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes device and dtype of the first keys, except for float32 if another dtype was given."""
        super().lazy_initialization(key_states, value_states)
        self.dtype = key_states.dtype
        if self.stored_dtype is not None and self.dtype == torch.float32:
            self.dtype = self.stored_dtype
            self.keys, self.values = self.keys.to(self.dtype), self.values.to(self.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, heads, new, head_dim] and return all keys and values, [batch, heads, kv_len, head_dim].

        Raises ValueError if batch, heads or head_dim are not those of the stored ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rounded = self.dtype != key_states.dtype and self.get_seq_length() == 0
        if torch.is_grad_enabled():
            super().update(key_states.to(self.dtype), value_states.to(self.dtype))
        else:
            self._keys, self._key_buffer = _append(self._keys, self._key_buffer, key_states)
            self._values, self._value_buffer = _append(self._values, self._value_buffer, value_states)
        return (key_states, value_states) if rounded else (self._keys, self._values)

    def extend(self, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `GrowingCache.extend`."""
        past = self.get_seq_length()
        if not past or len(self._keys) != batch:
            return None
        shape = (*self._keys.shape[:2], count, self._keys.shape[3])
        self._keys, self._key_buffer = _extend(self._keys, self._key_buffer, past, shape)
        self._values, self._value_buffer = _extend(self._values, self._value_buffer, past, shape)
        return self._keys, self._values


def _append(
    stored: torch.Tensor, buffer: torch.Tensor | None, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """stored and states behind each other, and the buffer whose front that is: the given one if there is room in it."""
    past = stored.shape[-2] if stored.numel() else 0
    if past and (stored.shape[:-2], stored.shape[-1]) != (states.shape[:-2], states.shape[-1]):
        raise ValueError(
            f"the cache holds keys or values of shape {list(stored.shape)}, got {list(states.shape)} to append: "
            "all but the third number must be the same"
        )
    longer, buffer = _extend(stored, buffer, past, states.shape)
    longer[..., past:, :] = states
    return longer, buffer


def _extend(stored, buffer, past: int, added) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_append`, with room for states of that shape, which is not filled yet."""
    length = past + added[-2]
    # A buffer made in inference mode cannot be written to outside of it.
    frozen = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
    if buffer is None or frozen or buffer.shape[-2] < length:
        capacity = (length // BLOCK + 1) * BLOCK
        shape = (*added[:-2], capacity, added[-1])
        buffer = torch.empty(shape, dtype=stored.dtype, device=stored.device)
        if past:
            buffer[..., :past, :] = stored
    return buffer.narrow(-2, 0, length), buffer


class GrowingCache(Cache):
    """A GrowingLayer for each layer of the model, on the device of its keys; dtype as there."""

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__(layer_class_to_replicate=partial(GrowingLayer, dtype=dtype))

    def extend(self, batch: int, count: int, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All keys and values of a layer with `count` positions more, which the caller has to fill; see `update`.

        None, and nothing changed, if the layer is empty or holds another batch: `update` knows what to make of that.
        Not for use with gradients.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return layer and layer.extend(batch, count)
