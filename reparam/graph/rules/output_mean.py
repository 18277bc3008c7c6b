"""Mean normalization behind activations, where the authors' code has it, and its way back into the next layers.

    y = φ(z)   →   y − μ                   Chen & Ge, eq. 11; conv → ReLU → MN → max-pool → pad → conv
    W (y − μ) + b  =  W y + (b − W μ)      the next layers' bias takes a running mean up, where W sees it everywhere
    max(y − μ)     =  max(y) − μ           so past pools too; with the scale outside of the layer μ is scaled with y

A convolution that pads with zeros sees μ subtracted inside but not on its border: no bias computes that. Such a mean
stays, and the network cannot be folded; the normalization of a layer's own input, after padding, always can.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from reparam.errors import ReparamError
from reparam.graph.capture import Capture, capture
from reparam.graph.columns import linear_kind
from reparam.graph.exchange import replace_modules
from reparam.graph.inplace import become, named_layers
from reparam.graph.outcome import Outcome
from reparam.graph.rewritten import Rewritten, obstacle
from reparam.graph.rules.scale import activation_after
from reparam.graph.walk import Consumer, describe, linear_consumers
from reparam.layers import Reparameterized
from reparam.layers.geometric import scale_units
from reparam.layers.mean_norm import gain_bias, project
from reparam.layers.output_mean import OUTPUT_MEAN, OutputMean

RULE = "authors' mean normalization"


def insert_output_means(
    model: nn.Module, names: Collection[str], momentum: float = 0.01
) -> tuple[nn.Module, list[Outcome]]:
    """Normalize the means of what the activations after some layers give.

    The running means start at zero: evaluation stays as it is until training moves them.

    Args:
        model: changed in place; if a mean was inserted, its contents live on in the result alone. Scales are placed
            before.
        names: of reparameterized layers, as in ``named_modules``.
        momentum: torch's convention; 0.01 is the paper's.

    Returns:
        The model, :class:`~reparam.graph.rewritten.Rewritten` if a mean was inserted; and one outcome a layer, which says
        whether it can be folded.

    Raises:
        ReparamError: the model has no module of a name.
    """
    captured = capture(model)
    whole = obstacle(captured)
    outcomes, inserted = [], []
    for layer, name in named_layers(model, names).items():
        after = whole or _place(captured, layer)
        if isinstance(after, str):
            outcomes.append(Outcome(RULE, name, False, after))
            continue
        assert isinstance(layer, Reparameterized)
        like = next(iter(layer.tensors().values()))
        mean = OutputMean(layer.held["weight"].spec.units, layer.kind.channel, momentum, like)
        layer.add_module(OUTPUT_MEAN, mean.train(layer.training))
        inserted.append((layer, name, describe(captured, after), _insert(captured, after, name)))
    if captured.graph is None or not inserted:
        return model, outcomes
    for layer, name, what, node in inserted:
        found = _takers(captured, node, layer)
        if isinstance(found, str):
            told = f"cannot be folded: {found}"
        else:
            told = "folds into " + ", ".join(f"`{taker.node.target}`" for taker in found)
            layer.batched_only |= bool(layer.kind.spatial) and any(taker.of_batch for taker in found)
        outcomes.append(
            Outcome(RULE, name, True, f"behind {what}, the running mean is zero until trained; {told}")
        )
    return Rewritten.of(model, captured.graph), outcomes


def fold_output_means(model: nn.Module) -> nn.Module:
    """A copy whose next layers' biases hold the running means; ``model`` itself where there are none.

    Raises:
        ReparamError: a mean that no bias can take up; the message names its layer and says why.
    """
    if not any(isinstance(module, OutputMean) for module in model.modules()):
        return model
    copy = replace_modules(model, lambda module: None)
    for name, part in list(copy.named_modules()):
        if isinstance(part, Rewritten):
            done = _folded(part, f"{name}." if name else "")
            if name:
                become(part, done)
            else:
                copy = done
    return copy


def _place(captured: Capture, layer: nn.Module) -> fx.Node | str:
    """The activation behind which a layer's mean is taken, or why there is none."""
    if not isinstance(layer, Reparameterized):
        return f"{type(layer).__name__} is not reparameterized: convert it first"
    if layer.mean is not None or OUTPUT_MEAN in layer._modules:
        return "its mean is normalized already"
    calls = captured.calls(layer)
    if list(layer.held) != ["weight"]:
        return f"{type(layer).__name__} holds several weights"
    if len(calls) != 1:
        return f"{type(layer).__name__} is called {len(calls)} times"
    return activation_after(captured, calls[0])


def _insert(captured: Capture, after: fx.Node, name: str) -> fx.Node:
    graph = captured.graph
    assert graph is not None
    with graph.inserting_after(after):
        node = graph.call_module(f"{name}.{OUTPUT_MEAN}", (after,))
    after.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def _takers(captured: Capture, node: fx.Node, layer: Reparameterized) -> list[Consumer] | str:
    """The layers whose bias can take the mean up, or why there are others."""
    units = layer.held["weight"].spec.units
    found = linear_consumers(captured, node, units, layer.kind.channel, "shifts")
    if isinstance(found, str):
        return found
    for taker in found:
        what = describe(captured, taker.node)
        if getattr(taker.module, "transposed", False):
            return f"under {what} a shift of the input depends on the position"
        padding = getattr(taker.module, "_reversed_padding_repeated_twice", ())
        if any(padding) and getattr(taker.module, "padding_mode", None) == "zeros":
            return f"{what} pads with zeros, from which no mean was subtracted"
    return found


def _folded(part: Rewritten, prefix: str) -> nn.Module:
    captured = capture(part)
    graph = captured.graph
    if graph is None:
        raise ReparamError(f"its rewritten forward pass cannot be looked at: {captured.untraceable}")
    moves: list[tuple[fx.Node, Reparameterized, list[Consumer]]] = []
    for node in captured.nodes():
        if isinstance(captured.module(node), OutputMean):
            name = str(node.target).rpartition(".")[0]
            layer = part.get_submodule(name)
            assert isinstance(layer, Reparameterized)
            found = _takers(captured, node, layer)
            if isinstance(found, str):
                raise ReparamError(
                    f"`{prefix}{name}`: the mean behind its activation cannot be folded: {found}; normalize the means of "
                    "the layers' inputs instead (mean_position='input')"
                )
            moves.append((node, layer, found))
    for node, layer, found in moves:
        shift = _mean(layer)
        for taker in found:
            _take_up(taker.module, shift.repeat_interleave(taker.repeat))
        data = node.args[0]
        assert isinstance(data, fx.Node)
        node.replace_all_uses_with(data)
        graph.erase_node(node)
        del layer._modules[OUTPUT_MEAN]
    remains = any(node.target is scale_units for node in graph.nodes)
    return Rewritten.of(part, graph) if remains else part.restore()


def _mean(layer: Reparameterized) -> Tensor:
    """The running mean of what the next layers take, in float64."""
    of = layer._modules[OUTPUT_MEAN]
    assert isinstance(of, OutputMean)
    mean = of.running_mean.double()
    return mean * layer.tensors()["r"].detach().double() if layer.scale_outside else mean


@torch.no_grad()
def _take_up(taker: nn.Module, mean: Tensor) -> None:
    """Subtract W μ from a layer's bias; one without gains one."""
    kind = linear_kind(taker)
    assert kind is not None
    groups, axis = int(getattr(taker, "groups", 1)), kind.unit(taker).axis
    if isinstance(taker, Reparameterized):
        held = taker.held["weight"]
        if held.bias_role is None:
            gain_bias(taker, "weight")
        assert held.bias_role is not None
        # λ is the bias of unit rows.
        of_rows = held.bias_role == "lambda_" or taker.scale_outside
        tensors = taker.tensors()
        weight, bias = taker.form.weight(tensors, held.spec, torch.float64, of_rows), tensors[held.bias_role]
    else:
        plain = taker._parameters["weight"]
        assert plain is not None
        weight = plain.double()
        if taker._parameters.get("bias") is None:
            units = kind.unit(taker).units(tuple(plain.shape))
            taker._parameters["bias"] = nn.Parameter(plain.new_zeros(units), plain.requires_grad)
            taker.gained_bias = True  # type: ignore[assignment]
        held_bias = taker._parameters["bias"]
        assert held_bias is not None
        bias = held_bias
    bias.copy_(bias.double() - project(weight, mean, groups, axis))
