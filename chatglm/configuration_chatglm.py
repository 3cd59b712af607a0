"""Sizes and switches of a ChatGLM-6B model. The defaults are those of the first release (150528 entries)."""

from typing import ClassVar

from transformers import PreTrainedConfig

SIZES = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size")


class ChatGLMConfig(PreTrainedConfig):
    """Every size of the network by name.

    vocab_size              rows of the embedding and of the head; may exceed the tokenizer's pieces
    hidden_size             width of the residual stream; a multiple of num_attention_heads
    num_layers              transformer layers
    num_attention_heads     heads per layer; head_dim = hidden_size // num_attention_heads, a multiple of 4
    inner_hidden_size       width inside the MLP
    layernorm_epsilon       added to the variance in every layer norm
    use_cache               keep keys and values between generation steps
    bos_token_id            `<sop>`: ends the prompt, starts the answer
    eos_token_id            `<eop>`: ends the answer
    mask_token_id           `[MASK]`: a short gap to fill
    gmask_token_id          `[gMASK]`: an open-ended answer
    pad_token_id            fills short rows of a batch
    max_sequence_length     length used in training, tokens; not enforced
    position_encoding_2d    two position streams (place in the prompt, place in the answer) or one
    quantization_bit        0, 4 or 8 bits per weight of the linear layers
    quantization_embeddings embedding and head quantised too: True = to as many bits, or 4 or 8
    pre_seq_len             length of the P-Tuning v2 prefix in tokens; None = no prefix encoder
    prefix_projection       the prefix goes through a two-layer MLP
    tie_word_embeddings     head and embedding share one matrix

    Raises ValueError if sizes do not fit together.
    """

    model_type = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "layer_norm_eps": "layernorm_epsilon",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 150528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    use_cache: bool = False
    bos_token_id: int | None = 150004
    eos_token_id: int | list[int] | None = 150005
    mask_token_id: int = 150000
    gmask_token_id: int = 150001
    pad_token_id: int | None = 0
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    quantization_bit: int = 0
    quantization_embeddings: bool | int = False
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rotary_parts = 2 if self.position_encoding_2d else 1
        if self.hidden_size % self.num_attention_heads or self.head_dim % (2 * rotary_parts):
            raise ValueError(
                f"hidden_size must be num_attention_heads times a multiple of {2 * rotary_parts}, "
                f"got hidden_size {self.hidden_size} and num_attention_heads {self.num_attention_heads}"
            )
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"quantization_bit must be 0, 4 or 8, got {self.quantization_bit}")
        if self.quantization_embeddings not in (False, True, 4, 8):
            raise ValueError(f"quantization_embeddings must be false, true, 4 or 8, got {self.quantization_embeddings}")
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ValueError(f"pre_seq_len must be a positive number of tokens or None, got {self.pre_seq_len}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_bits(self) -> int:
        """Bits per weight of embedding and head, 0 if they are not quantised."""
        if self.quantization_embeddings is True:
            return self.quantization_bit
        return int(self.quantization_embeddings)

    def set_quantization(self, bits: int, embedding_bits: int) -> None:
        """Say how many bits the weights have: of the linear layers, and of embedding and head; 0 = not quantised."""
        self.quantization_bit = bits
        self.quantization_embeddings = bool(embedding_bits) if embedding_bits in (0, bits) else embedding_bits
