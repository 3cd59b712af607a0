"""Quantising inside `from_pretrained`: a quantiser registered with transformers.

    AutoModel.from_pretrained(folder, quantization_config=ChatGLMQuantizationConfig(bits=4))

What is unusual: the quantiser leaves no trace on the model. `config.quantization_bit` (and `quantization_embeddings`)
says everything, as in the published checkpoints, so that a saved folder needs neither this file nor a
`quantization_config` to load again, and that trainers treat the model as any other: what is quantised takes no
gradients, what is on top of it does.
"""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import bits_to_load
from .modeling_chatglm import ChatGLMForConditionalGeneration
from .quantization import QuantizedModule, check_bits, quantize_model, quantize_weight, tie_scales


@register_quantization_config("chatglm")
class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """What `from_pretrained` quantises while it loads.

    bits            4 or 8 bits per weight of the linear layers
    embedding_bits  the same for embedding and head; 0 leaves them as the checkpoint has them

    A checkpoint that is quantised already loads as it is if its bits are these. Another is quantised from its values in
    the dtype that is loaded: in float16 arithmetic for float16, else in float32.
    Raises ValueError for other bits.
    """

    def __init__(self, bits: int = 4, embedding_bits: int = 0, quant_method: str = "chatglm"):
        check_bits(bits)
        if embedding_bits:
            check_bits(embedding_bits)
        self.bits, self.embedding_bits, self.quant_method = bits, embedding_bits, quant_method


@register_quantizer("chatglm")
class ChatGLMQuantizer(HfQuantizer):
    """Puts empty quantised modules into the model and quantises each matrix when it has been read.

    Raises ValueError if the model is no ChatGLMForConditionalGeneration, has other bits already, or would be quantised
    onto the disk.
    """

    def __init__(self, quantization_config: ChatGLMQuantizationConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.quantised_here: set[str] = set()  # names of matrices that the files hold in floats

    def validate_environment(self, device_map=None, **kwargs):
        """Called again when the device map is known."""
        if self.quantised_here and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "a model that is quantised while it loads cannot be offloaded to disk: save it quantised with "
                "save_pretrained, then load that folder with this device_map"
            )

    def _process_model_before_weight_loading(self, model, dtype=None, device_map=None, **kwargs):
        if not isinstance(model, ChatGLMForConditionalGeneration):
            raise ValueError(f"only a ChatGLMForConditionalGeneration can be quantised, got {type(model).__name__}")
        config, asked = model.config, self.quantization_config
        bits, embedding_bits = bits_to_load(config, asked.bits, asked.embedding_bits or None)
        stored = _quantised_weights(model)
        quantize_model(model, 0 if config.quantization_bit else bits, 0 if config.embedding_bits else embedding_bits)
        if config.embedding_bits:
            tie_scales(model)  # while from_pretrained builds a model, head and embedding are not tied yet
        self.quantised_here = _quantised_weights(model) - stored
        for name in self.quantised_here:
            # transformers reads a tensor in the dtype of its place, and here the files hold floats.
            module = model.get_submodule(name.removesuffix(".weight"))
            shape = module.weight.shape
            module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.validate_environment(device_map=device_map)

    def param_element_size(self, model, param_name: str, param) -> float:
        """Bytes per entry once the model is loaded; by this a device map is made."""
        return 1 if param_name in self.quantised_here else super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        """Whether a tensor of the files has to be quantised."""
        return param_name in self.quantised_here

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a matrix into stored bytes and scales."""
        return _Quantize()

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """Always: save_pretrained writes the published layout."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters and prefixes get gradients through quantised layers."""
        return True


class _Quantize(ConversionOps):
    def convert(self, input_dict, full_layer_name, model, **kwargs) -> dict[str, nn.Parameter]:
        """The stored form of one matrix, in the arithmetic of the dtype that it was loaded in."""
        ((weight,),) = input_dict.values()
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        packed, scale = quantize_weight(weight, module.bits)
        return {
            full_layer_name: nn.Parameter(packed, requires_grad=False),
            f"{full_layer_name}_scale": nn.Parameter(scale, requires_grad=False),
        }


def _quantised_weights(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
