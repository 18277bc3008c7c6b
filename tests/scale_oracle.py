"""What a network computes whose scales stand after activations, from its layers' tensors and plain torch alone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from graph_cases import randomized
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reparam.graph.exchange import replace_modules
from reparam.graph.outcome import Outcome
from reparam.graph.rewritten import Rewritten
from reparam.graph.rules.scale import place_scales
from reparam.layers import Reparameterized, layer_class

MODELS = Path(__file__).parent.parent / "examples" / "models"


def sequential(**layers: nn.Module) -> nn.Sequential:
    """Named layers in a row, with values nothing is blind to."""
    model = randomized(nn.Sequential(OrderedDict(layers)))
    assert isinstance(model, nn.Sequential)
    return model


def to_gmp(model: nn.Module, chosen: Callable[[nn.Module], bool] = lambda module: True) -> nn.Module:
    """A copy, every layer that can be in GmP, its scale inside."""

    def converted(module: nn.Module) -> nn.Module | None:
        cls = layer_class("gmp", type(module))
        return cls.from_plain(module) if cls is not None and chosen(module) else None

    return replace_modules(model, converted)


def applied(outcomes: list[Outcome]) -> set[str]:
    return {outcome.layer for outcome in outcomes if outcome.applied}


def why(outcomes: list[Outcome], layer: str) -> str:
    found = [outcome.why for outcome in outcomes if outcome.layer == layer]
    assert len(found) == 1
    return found[0]


@torch.no_grad()
def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """The same model, every parameter changed in place as training might: r of both signs in every GmP layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    for layer in model.modules():
        if isinstance(layer, Reparameterized):
            layer.r[::2] *= -1
            assert 0 < int((layer.r < 0).sum()) < len(layer.r) or len(layer.r) == 1
    return model


@torch.no_grad()
def oracle(plain: nn.Module, model: nn.Module, places: Mapping[str, str]) -> nn.Module:
    """``plain`` with the values of ``model``, r multiplied in behind the modules named.

    Args:
        plain: the network before it was converted; not changed.
        model: of the same module names.
        places: layer -> module after which its r stands, or with a ">" before which; in other layers it stands inside.
    """
    result = copy.deepcopy(plain)
    for name, parameter in model.named_parameters():
        if name in dict(result.named_parameters()):
            result.get_parameter(name).copy_(parameter)
    for name, layer in model.named_modules():
        if not isinstance(layer, Reparameterized):
            continue
        target, r, weight = result.get_submodule(name), layer.r.detach(), unit_weight(layer)
        bias = layer.lambda_.detach().clone() if "lambda_" in layer.held["weight"].roles else None
        if name not in places:
            axis = 1 if isinstance(target, (Conv1D, nn.modules.conv._ConvTransposeNd)) else 0
            groups = target.groups if isinstance(target, nn.modules.conv._ConvTransposeNd) else 1
            if groups == 1:
                shape = [1] * weight.dim()
                shape[axis] = -1
                weight = weight * r.reshape(shape)
            else:
                blocks = zip(weight.chunk(groups), r.chunk(groups), strict=True)
                weight = torch.cat([w * s.reshape(1, -1, *(1,) * (w.dim() - 2)) for w, s in blocks])
            bias = None if bias is None else r * bias
        else:
            spatial = weight.dim() - 2 if isinstance(target, nn.modules.conv._ConvNd) else 0
            factor = r.reshape(-1, *(1,) * spatial)
            place = result.get_submodule(places[name].removeprefix(">"))
            if places[name].startswith(">"):
                place.register_forward_pre_hook(lambda m, args, f=factor: args[0] * f)
            else:
                place.register_forward_hook(lambda m, args, out, f=factor: out * f)
        if layer.mean is not None:
            assert isinstance(target, (nn.Conv2d, nn.Linear))
            mean = layer.running_input_mean
            groups = getattr(target, "groups", 1)
            each = weight.shape[0] // groups
            parts = mean.reshape(groups, -1).repeat_interleave(each, 0)
            bias = bias - (weight.flatten(2).sum(2) if weight.dim() > 2 else weight).mul(parts).sum(1)
        target.weight.copy_(weight)
        if bias is not None:
            target.bias = nn.Parameter(bias)
    return result


def unit_weight(layer: Reparameterized) -> Tensor:
    """The plain weight whose every unit is u(theta): u_i = sin t_i prod cos t_j, the last the product alone."""
    theta, shape = layer.theta.detach(), layer.held["weight"].spec.shape
    one = torch.ones(len(theta), 1, dtype=theta.dtype)
    prefix = torch.cat([one, theta.cos().cumprod(1)], 1)
    rows = prefix * torch.cat([theta.sin(), one], 1)
    if layer.plain_class is Conv1D:
        return rows.T.contiguous()
    if issubclass(layer.plain_class, nn.modules.conv._ConvTransposeNd):
        groups, inputs = layer.groups, shape[0] // layer.groups
        blocks = [b.reshape(-1, inputs, *shape[2:]).transpose(0, 1) for b in rows.chunk(groups)]
        return torch.cat(blocks)
    return rows.reshape(shape)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Keys and copies of what the state_dict holds, to compare later."""
    return {key: value.clone() for key, value in model.state_dict().items()}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(self.relu(self.fc(x))))


def a_net() -> nn.Sequential:
    return sequential(
        conv1=nn.Conv2d(2, 4, 3),
        relu1=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(4, 3, 2),
        act=nn.ReLU(),
    )


def placed(model: nn.Module) -> Rewritten:
    result, _ = place_scales(model)
    assert isinstance(result, Rewritten)
    return result
