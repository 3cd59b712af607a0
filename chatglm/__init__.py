"""ChatGLM-6B on current transformers. Importing this package teaches the Auto classes the model type `chatglm`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from .quantizer import ChatGLMQuantizationConfig
from .tokenization_chatglm import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMQuantizationConfig",
    "ChatGLMTokenizer",
]

# First so that `from_pretrained` needs no code from the checkpoint; second so that `save_pretrained` writes these
# source files and an auto_map beside the weights, and the folder loads elsewhere with trust_remote_code=True.
AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)

ChatGLMConfig.register_for_auto_class()
ChatGLMTokenizer.register_for_auto_class()
ChatGLMForConditionalGeneration.register_for_auto_class("AutoModel")
