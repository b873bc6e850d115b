"""Models as they are before and after folding, for the tests of fold_norm."""

from typing import Any

import torch
from torch import Tensor, nn

from bnlight.norm import Norm
from bnlight.surgery.parameters import TORCH_NORMS


def trained(model: nn.Module) -> nn.Module:
    """The model in evaluation, with statistics and affine parameters that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (Norm, *TORCH_NORMS)):
                for name, tensor in module.state_dict().items():
                    if tensor.is_floating_point():
                        noise = torch.randn(tensor.shape, generator=generator)
                        tensor.copy_(0.3 * noise.abs() + 0.7 if "var" in name or "weight" in name else noise)
    return model.eval()


def error(model: nn.Module, folded: nn.Module, *inputs: Tensor, **options: Any) -> float:
    with torch.no_grad():
        expected = model.eval()(*inputs, **options)
        return float((folded(*inputs, **options) - expected).norm() / expected.norm())


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (Norm, *TORCH_NORMS))]
