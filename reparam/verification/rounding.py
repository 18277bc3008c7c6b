"""How far two right models may be apart: as far as numbers that are held in a narrow type leave it open.

    |f'(x) − f(x)|  ≤  16 · |f(perturbed weights, x) − f(x)|        all in float64, at least 1e-12 of the output's scale
    |w' − w|        ≤  4 ε · the largest weight of its row          ε of the type in which an ONNX file holds w'

Perturbed is every parameter, off by a rounding of its own dtype, seeded: what any other way to hold them may cost. A
factor at the wrong layer, a bias lost, a sign on the wrong side of a max-pool costs far more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reparam.onnxfile import transforms
from reparam.onnxfile.weight_map import Source
from reparam.verification.exact import now_in_float64

#: of the output's scale: float64's own, over a whole network
TOLERANCE = 1e-12
#: times what a rounding of every parameter changes
_MARGIN = 16.0
#: units in the last place of a row's largest weight; composed of angles, rows of 2 to 25,088 were off by at most 1.7
_ULPS = 4.0


def explained(noise: float, tolerance: float = TOLERANCE) -> float:
    """The largest difference of outputs that rounding explains.

    Args:
        noise: what the output of :func:`perturbed` differs by, as a share of its scale.
        tolerance: the least, such a share too.
    """
    return max(_MARGIN * noise, tolerance)


@torch.no_grad()
def perturbed(original: nn.Module, other: nn.Module | None = None) -> nn.Module:
    """A copy in float64 and evaluation mode, every parameter off by half a unit in the last place of its dtype.

    Args:
        original: in any parameterization.
        other: where it holds a parameter of the same name in a coarser dtype, that one counts.
    """
    model, generator = now_in_float64(copy.deepcopy(original)), torch.Generator().manual_seed(0)
    held = dict(original.named_parameters())
    others = {} if other is None else dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
            dtypes = [held[name].dtype, others.get(name, held[name]).dtype]
            eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
            parameter.mul_(1 + eps / 2 * signs)
    return model


def by_rounding(got: Tensor, wanted: Tensor, source: Source, state: Mapping[str, Tensor]) -> bool:
    """Whether a float initializer is what it should be but for rounding.

    Args:
        got, wanted: the initializer and what it should be, of one shape and dtype.
        source: how it is made of ``state``, the plain state_dict.
    """
    if not wanted.is_floating_point():
        return False
    if wanted.dim() > 1:
        # Of a batch norm that the exporter folded, the layer's weight alone.
        norm = "roles" in source.settings
        rows = {k: state[k] if norm and state[k].dim() == 1 else _largest(state[k]) for k in source.keys}
        largest = transforms.apply(source, rows).double().abs()
    else:
        largest = _largest(wanted).double()
    bound = _ULPS * torch.finfo(wanted.dtype).eps * largest
    return bool(((got.double() - wanted.double()).abs() <= bound).all())


def _largest(weight: Tensor) -> Tensor:
    """The largest of its row in place of every weight; a bias is one row."""
    if not weight.numel() or not weight.dim():
        return weight.abs()
    axes = tuple(range(1, weight.dim())) or 0
    return weight.abs().amax(axes, keepdim=True).expand_as(weight)
