"""Text <-> ids, exactly as the published `ice_text.model` is used.

Unusual here: newlines, tabs and runs of spaces become pieces of their own (`<n>`, `<|tab|>`, `<|blank_2|>` to
`<|blank_80|>`); special tokens go *behind* the text (`text [gMASK] <sop>`); padding is on the left and brings the 4-D
mask (True = hidden) and the two-row position ids that the model expects.
"""

import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer
from transformers.utils import PaddingStrategy

VOCAB_FILE_NAME = "ice_text.model"
LONGEST_BLANK = 80  # spaces in the longest <|blank_n|> piece

IMAGE_TOKEN = re.compile(r"<image_(\d+)>")
BLANK_RUN = re.compile(f" {{2,{LONGEST_BLANK}}}")
SPECIAL_BLANK = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")


def encode_whitespace(text: str) -> str:
    """Text with newlines, tabs and runs of 2 to 80 spaces written as pieces; longer runs take the longest first."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return BLANK_RUN.sub(lambda run: f"<|blank_{len(run[0])}|>", text)


def decode_whitespace(text: str) -> str:
    """The inverse of `encode_whitespace`."""

    def plain(match: re.Match) -> str:
        if match[1] is None:
            return "\n" if match[0] == "<n>" else "\t"
        count = int(match[1])
        return " " * count if 2 <= count <= LONGEST_BLANK else match[0]

    return SPECIAL_BLANK.sub(plain, text)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """SentencePiece tokenizer of ChatGLM-6B.

    vocab_file        path of `ice_text.model`
    num_image_tokens  ids in front of the text ids (20000 in the first release, 0 since v1.1.0)
    do_lower_case     lower the text before encoding
    remove_space      collapse whitespace before encoding

    `tokenizer(text)` gives input_ids of `text [gMASK] <sop>`, of a pair `text [gMASK] <sop> second <eop>`. With padding
    it also gives attention_mask [batch, 1, seq_len, seq_len] (True = hidden) and position_ids [batch, 2, seq_len].
    Raises ValueError if vocab_file is not a SentencePiece model with ChatGLM's special pieces.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCAB_FILE_NAME}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file,
        do_lower_case=False,
        remove_space=False,
        bos_token="<sop>",
        eos_token="<eop>",
        end_token="</s>",
        mask_token="[MASK]",
        gmask_token="[gMASK]",
        pad_token="<pad>",
        unk_token="<unk>",
        num_image_tokens=0,
        clean_up_tokenization_spaces=True,
        **kwargs,
    ):
        if vocab_file is None:
            raise ValueError(f"no {VOCAB_FILE_NAME} in {kwargs.get('name_or_path')}: copy it there from the checkpoint")
        # [gMASK] and </s> are ordinary text when a user types them, so transformers must not split text at them.
        named_tokens = kwargs.pop("model_specific_special_tokens", None) or {}
        self.gmask_token = str(named_tokens.get("gmask_token", gmask_token))
        self.end_token = str(named_tokens.get("end_token", end_token))
        self.vocab_file = str(vocab_file)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.num_image_tokens = num_image_tokens

        # Loaded before super().__init__, which already asks for the vocabulary.
        self.sp_model = sentencepiece.SentencePieceProcessor()
        try:
            self.sp_model.Load(self.vocab_file)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{self.vocab_file} is not a SentencePiece model ({error}): "
                f"download the {VOCAB_FILE_NAME} of the checkpoint again"
            ) from error
        self._vocab = {f"<image_{i}>": i for i in range(num_image_tokens)}
        self._vocab.update(
            (self.sp_model.id_to_piece(i), i + num_image_tokens) for i in range(self.sp_model.get_piece_size())
        )
        needed = [str(bos_token), str(eos_token), str(mask_token), self.gmask_token, "<n>", "<|tab|>"]
        missing = [piece for piece in needed if piece not in self._vocab]
        if missing:
            raise ValueError(
                f"{self.vocab_file} has no piece {', '.join(missing)}: it is not the vocabulary of a ChatGLM-6B model; "
                f"use the {VOCAB_FILE_NAME} that belongs to the checkpoint"
            )

        def control(token):  # spaces beside a control token belong to it
            return AddedToken(str(token), lstrip=True, rstrip=True, normalized=False, special=True)

        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=control(bos_token),
            eos_token=control(eos_token),
            mask_token=control(mask_token),
            pad_token=control(pad_token),
            unk_token=control(unk_token),
            num_image_tokens=num_image_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self.init_kwargs.update(gmask_token=self.gmask_token, end_token=self.end_token)

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`."""
        return self._vocab[self.gmask_token]

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`."""
        return self._vocab[self.end_token]

    @property
    def config_ids(self) -> dict[str, int]:
        """The special ids that a ChatGLMConfig of this vocabulary needs, by the names of its fields."""
        names = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
        return {name: getattr(self, name) for name in names}

    @property
    def vocab_size(self) -> int:
        """Image tokens plus pieces; the model's embedding may have more rows."""
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id, a new dictionary."""
        return dict(self._vocab)

    def _prepare(self, text: str) -> str:
        if self.remove_space:
            text = " ".join(text.strip().split())
        if self.do_lower_case:
            text = text.lower()
        return encode_whitespace(text)

    def encode_pieces(self, text: str, add_dummy_prefix: bool = True) -> list[str]:
        """Pieces of text, control tokens not recognised; without a dummy `▁` in front if not add_dummy_prefix."""
        if add_dummy_prefix:
            return self.sp_model.encode(self._prepare(text), out_type=str)
        return self.sp_model.encode("<n>" + self._prepare(text), out_type=str)[2:]

    def _tokenize(self, text, **kwargs):
        return self.encode_pieces(text)

    def _convert_token_to_id(self, token):
        index = self._vocab.get(token)
        if index is not None:
            return index
        image = IMAGE_TOKEN.fullmatch(token)
        return int(image[1]) if image else self._vocab[str(self.unk_token)]

    def _convert_id_to_token(self, index):
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        piece_id = index - self.num_image_tokens
        return self.sp_model.id_to_piece(piece_id) if piece_id < self.sp_model.get_piece_size() else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the given pieces."""
        return self._decode(self.convert_tokens_to_ids(tokens), clean_up_tokenization_spaces=False)

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        dropped = set(self.all_special_ids) if skip_special_tokens else {self.pad_token_id}
        # Ids beyond the vocabulary exist only in the model's embedding: they stand for nothing.
        pieces = [
            i - self.num_image_tokens for i in ids if self.num_image_tokens <= i < len(self._vocab) and i not in dropped
        ]
        text = decode_whitespace(self.sp_model.decode(pieces)) if pieces else ""
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`a [gMASK] <sop>`, or `a [gMASK] <sop> b <eop>` for a pair."""
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the vocabulary, byte for byte, into save_directory; returns its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + VOCAB_FILE_NAME)
        if not target.exists() or not target.samefile(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def _mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Hidden pairs [1, n, n] and position ids [2, n] of one unpadded row (GLM, "2D Positional Encoding")."""
        length = len(ids)
        context_length = ids.index(self.bos_token_id) if self.bos_token_id in ids else length
        # The tokenizer prefers [MASK] where the model prefers [gMASK]; published training data relies on both.
        mask_token = self.mask_token_id if self.mask_token_id in ids else self.gmask_token_id

        places = np.arange(length, dtype=np.int64)
        prompt_positions = places.copy()
        if mask_token in ids:
            prompt_positions[context_length:] = ids.index(mask_token)
        answer_positions = np.maximum(places - context_length + 1, 0)
        answer_positions[:context_length] = 0

        hidden = places[None, :] > places[:, None]
        hidden[:, :context_length] = False
        return hidden[None], np.stack([prompt_positions, answer_positions])

    def _pad(
        self,
        encoded_inputs,
        max_length=None,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of=None,
        padding_side=None,
        return_attention_mask=None,
    ):
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return encoded_inputs
        side = padding_side or self.padding_side
        if side != "left":
            raise ValueError(f"ChatGLM pads on the left, got padding_side {side!r}: answers grow at the right end")
        ids = encoded_inputs["input_ids"]
        target = len(ids) if padding_strategy == PaddingStrategy.LONGEST or max_length is None else max_length
        if pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        pads = max(target - len(ids), 0)

        hidden, positions = self._mask_and_positions(ids)
        if return_attention_mask is not False:
            encoded_inputs["attention_mask"] = np.pad(hidden, [(0, 0), (pads, 0), (pads, 0)], constant_values=True)
        encoded_inputs["position_ids"] = np.pad(positions, [(0, 0), (pads, 0)])
        encoded_inputs["input_ids"] = [self.pad_token_id] * pads + ids
        return encoded_inputs
