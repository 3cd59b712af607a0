"""A layer of the network as CPU kernels compute it in one call, for as long as nothing of the layer changes.

What is unusual: the kernels take addresses. Those of a layer are gathered once and kept, and before each use everything
that may have changed them is looked at: modules, hooks, and where each tensor lies. That happens for every layer of
every token, when the weights have just swept the processor's caches, so it is written to touch little.
"""

import torch
from torch import nn

from .quantization import LAYERS, QuantizedLinear, stored_together


class FusedLayer:
    """The kernels' form of one ChatGLMBlock: `get` makes it when it is first wanted, and again after changes."""

    def __init__(self, alpha: float, attention: type, mlp: type):
        """alpha is the factor of the residuals, attention and mlp the classes that the kernels can stand for."""
        self._arguments = alpha, attention, mlp
        self._parts = None

    def __reduce__(self):  # addresses cannot be copied
        return FusedLayer, self._arguments

    def get(self, block, hidden_states: torch.Tensor):
        """A `kernels.cpu.CpuLayer` for that input of the block, and the weights, which must outlive its use.

        (None, None) where modules have to be called one by one: for gradients, hooks and adapters, in other formats
        than float32 with quantised weights, and without such kernels.
        """
        if hidden_states.dtype is not torch.float32 or torch.is_grad_enabled() or not hidden_states.is_cpu:
            return None, None
        parts = self._parts
        if parts is None or not parts.are_still_there():
            self._parts = parts = _Parts(block, *self._arguments)
        return parts.layer() if parts.can_be_fused() else (None, None)


class _Parts:
    """The modules of a block as they were found, and the layer made of their tensors."""

    def __init__(self, block, alpha, attention_class, mlp_class):
        self.alpha, self.attention, mlp = alpha, block.attention, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        inner = [(block, "attention"), (block, "mlp"), (block, "input_layernorm"), (block, "post_attention_layernorm")]
        self.plain = type(self.attention) is attention_class and type(mlp) is mlp_class
        self.linears = ()
        if self.plain:
            paths = [path.rpartition(".") for path in LAYERS]
            inner += [(block.get_submodule(parent), name) for parent, _, name in paths]
            self.linears = tuple(block.get_submodule(path) for path in LAYERS)
        self.places = [(parent._modules, name) for parent, name in inner]
        self.modules = [modules[name] for modules, name in self.places]
        self.plain &= all(type(linear) is QuantizedLinear for linear in self.linears)
        self.plain &= all(type(norm) is nn.LayerNorm for norm in self.norms)
        self.hooks = [hook for module in self.modules for hook in (module._forward_hooks, module._forward_pre_hooks)]
        self.attributes = [vars(module) for module in self.modules]  # accelerate puts another `forward` there
        self.floats = [(norm._parameters, name) for norm in self.norms for name in ("weight", "bias")]
        self.floats += [(linear._parameters, name) for linear in self.linears for name in ("weight_scale", "bias")]
        self.made = None, None  # what a layer was made from, and the layer

    def are_still_there(self) -> bool:
        return [modules[name] for modules, name in self.places] == self.modules

    def can_be_fused(self) -> bool:
        """Whether nobody looks at the modules or has replaced what they do."""
        return (
            self.plain
            and not any(self.hooks)
            and not any("forward" in attributes for attributes in self.attributes)
            and not nn.modules.module._has_any_global_hook()
        )

    def layer(self):
        """The layer (None if there can be none) and the weights it reads."""
        weights = stored_together(self.linears)
        source = self.describe(weights)
        made_from, layer = self.made
        if source != made_from:
            weights = [linear.pack() for linear in self.linears]
            source = self.describe(weights)
            layer = self.make(weights)
            self.made = source, layer
        return layer, weights

    def describe(self, weights) -> list:
        """What a layer depends on."""
        floats = [parameters.get(name) for parameters, name in self.floats]
        return [
            [(weight.data_ptr(), kernels) for weight, kernels in weights],
            [tensor is not None and (tensor.data_ptr(), tensor.dtype) for tensor in floats],
            [linear.activations for linear in self.linears],
            [norm.eps for norm in self.norms],
            self.attention.scaling,
        ]

    def make(self, weights):
        kernels = weights[0][1]
        if any(other is not kernels for _, other in weights) or getattr(kernels, "layer", None) is None:
            return None
        for parameters, name in self.floats:
            tensor = parameters.get(name)
            if tensor is None and not (name == "bias" and "weight_scale" in parameters):  # only a matrix may have none
                return None
            allowed = (torch.float32, torch.float16) if name == "weight_scale" else (torch.float32,)
            if tensor is not None and (tensor.dtype not in allowed or not tensor.is_contiguous()):
                return None
        if any(linear.activations == "float32" for linear in self.linears):
            return None
        matrices = [
            (weight, linear.weight_scale, linear.bias, linear.bits, linear.activations)
            for (weight, _), linear in zip(weights, self.linears, strict=True)
        ]
        norms = [(norm.weight, norm.bias, norm.eps) for norm in self.norms]
        return kernels.layer(norms, matrices, self.attention.num_heads, self.alpha, self.attention.scaling)
