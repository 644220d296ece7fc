"""Matrix products with weights on CPU: oneDNN's where it is faster than MKL, which is on AMD's processors.

MKL has AVX-512 kernels for Intel's processors only, and adds the bias in a pass of its own. On an AMD EPYC with AVX-512
oneDNN took 9 to 17 % less time for the forward products of albert-base with 1,200 tokens or more; with few tokens, and
for gradients, MKL was as fast or faster. PyTorch reaches oneDNN through convolutions: one of width 1 is this product.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROWS, WEIGHTS = 1024, 512 * 512  # from so many tokens, and so large a weight, on


class Linear(nn.Linear):
    """nn.Linear, the same function with the same parameters, as this processor computes it fastest."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]"""
        if self._large(states) and onednn_is_faster():
            return _Product.apply(states, self.weight, self.bias)
        return super().forward(states)

    def _large(self, states: torch.Tensor) -> bool:
        where = states.device.type == self.weight.device.type == "cpu" and self.bias is not None
        alike = where and states.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        # the number of tokens comes last: torch.compile would compile anew for what is asked of it on other devices
        return alike and self.weight.numel() >= WEIGHTS and states.numel() >= ROWS * self.in_features


def use_in(model: nn.Module) -> None:
    """Turn every nn.Linear of a model into `Linear`; its parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's; never where PyTorch has no oneDNN."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux: nobody has measured
        return False
    return not intel and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        pixels = states.reshape(1, 1, -1, states.shape[-1]).permute(0, 3, 1, 2)  # [1, in, 1, T], laid out as [T, in]
        product = F.conv2d(pixels, weight[:, :, None, None], bias)  # [1, out, 1, T], laid out alike
        return product.permute(0, 2, 3, 1).reshape(*states.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states, weight = ctx.saved_tensors
        rows, gradient_rows = states.flatten(0, -2), gradient.flatten(0, -2)
        return gradient @ weight, gradient_rows.T @ rows, gradient_rows.sum(0)
