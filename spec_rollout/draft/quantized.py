"""A copy of the policy whose matrices are in 8 bit: what does not learn, and guesses nearly what the policy draws.

torch's own dynamic quantization, of a CPU: weights by output channel, inputs by the tensor, products in integers.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from spec_rollout.engine.lean.recognition import base_model

LARGEST = 127
"""Of the integers that hold a weight; as many below 0."""
SMALLEST = 1e-12
"""Of the largest weights of a channel: one of zeros alone has no scale."""


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with W in 8 bit; `weight` and `bias` are still the policy's own."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: object = None

    def renew(self) -> None:
        """Read the weights as they are now."""
        weight = self.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=SMALLEST) / LARGEST
        whole = (weight / scale[:, None]).round_().to(torch.int8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions", UserWarning)
            rounded = torch._make_per_channel_quantized_tensor(
                whole, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0
            )
        bias = None if self.bias is None else self.bias.detach().float()
        self._packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.quantized.linear_dynamic(x.float(), self._packed, reduce_range=not _sums_exactly())
        return y.to(x.dtype)


def quantized_copy(model: nn.Module) -> nn.Module:
    """`model` with `QuantizedLinear` layers, to be renewed, in place of its plain ones. Every weight is the same
    tensor as the policy's, so that embeddings, norms and adapters are never stale and take no memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    for module in list(other.modules()):
        module.__dict__.pop("forward", None)  # what a trainer laid around it calls the policy's own
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, QuantizedLinear(child))
    return other.eval()


def renew(model: nn.Module) -> None:
    """Have every `QuantizedLinear` of `model` read the policy's weights as they are now."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.renew()


def refuse_unquantizable(model: nn.Module) -> None:
    """Whether `model` can guess for itself in 8 bit.

    Raises:
        ValueError: its matrices are not on a CPU, torch has no such product there, or few of them are plain ones.
    """
    device = model.get_input_embeddings().weight.device
    if device.type != "cpu":
        raise ValueError(
            f"draft_quantized=True needs a policy on a CPU, and this one is on {device}, where no product of 8 bits "
            "has been measured here: leave it at False."
        )
    engines = torch.backends.quantized.supported_engines
    if not {"x86", "fbgemm", "onednn"} & set(engines) or not hasattr(torch.ops.quantized, "linear_dynamic"):
        raise ValueError(
            f"draft_quantized=True needs a torch that multiplies in 8 bit on x86; this one, {torch.__version__}, has "
            f"{', '.join(engines)}: leave it at False."
        )
    total = sum(p.numel() for p in base_model(model).parameters())
    plain = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    if plain < total / 2:
        raise ValueError(
            f"draft_quantized=True would leave {1 - plain / total:.0%} of the policy as it is, and half is the most: "
            "only plain linear layers are put in 8 bit, which experts are not. Leave it at False."
        )


def _sums_exactly() -> bool:
    """Whether products of 8 bits are summed in 32; otherwise in 16, which inputs of 8 bits can overflow."""
    return torch.cpu._is_vnni_supported()
