"""Insert mean normalizations into a trained network, and give them their means.

    wᵀx + b  =  wᵀ(x − μ) + (b + wᵀμ)        MN: μ the mean of each input channel (Chen & Ge, eq. 11)
             =  (wᵀx − m) + (b + m)          MBN: m the mean of each wᵀx (Salimans & Kingma §2.3)

So the network computes the same in evaluation mode, whatever the means; a calibration pass over data chooses them such
that training starts from normalized inputs. In training mode the mean of the mini-batch takes their place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.graph.capture import Capture, capture
from reparam.graph.inplace import named_layers, sharers
from reparam.graph.outcome import Outcome
from reparam.layers import Reparameterized, calibrate

RULE = "mean normalization"
CALIBRATE = "calibrate"


def insert_means(
    model: nn.Module,
    kind: Literal["mn", "mbn"],
    names: Collection[str],
    momentum: float = 0.01,
    calibrated: bool = False,
) -> list[Outcome]:
    """Normalize the means of some reparameterized layers, in place.

    The running means start at zero: evaluation stays as it is, and :func:`calibrate_means` keeps it so. A layer called
    several times subtracts one and the same mean from all its inputs: that too changes nothing in evaluation.

    Args:
        model: changed in place; it need not trace.
        kind: "mn" for the mean of every input channel, "mbn" for that of every unit's pre-activation.
        names: of the layers, as in ``named_modules``; one under two names is normalized once.
        momentum: torch's convention; 0.01 is the paper's.
        calibrated: the caller goes on to :func:`calibrate_means`: no outcome says that means are zero.

    Returns:
        One outcome a layer, in the order of ``named_modules``.

    Raises:
        ReparamError: the model has no module of a name.
    """
    captured = capture(model)
    chosen = named_layers(model, names)
    return [
        Outcome(RULE, name, *_insert(captured, module, kind, momentum, calibrated))
        for module, name in chosen.items()
    ]


def calibrate_means(model: nn.Module, batches: Iterable[Any]) -> list[Outcome]:
    """Set every running mean to what the layer sees over all batches, in place; evaluation stays as it is.

    The passes run in evaluation mode without gradient; every module's own mode is restored.

    Args:
        model: with mean normalizations; where it has none, nothing is run.
        batches: each what the model takes, without labels: a tensor, a tuple or list of positional inputs, or a dict of
            named ones; a tensor in their place is one batch.

    Returns:
        One outcome a normalized layer; a layer that no batch reached keeps its mean, and is not ``applied``.

    Raises:
        ReparamError: there are no batches, one is none of these, or a mean is not finite. All means stay as they were.
    """
    if isinstance(batches, Tensor):
        batches = [batches]
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, Reparameterized) and module.mean is not None
    }
    if not layers:
        return []
    modes = {module: module.training for module in model.modules()}
    reached: set[nn.Module] = set()
    handles = [layer.register_forward_hook(lambda m, args, out: reached.add(m)) for layer in layers]
    count = 0
    try:
        model.eval()
        with calibrate(model), torch.no_grad():
            for count, batch in enumerate(batches, start=1):  # noqa: B007
                _feed(model, batch)
            if count == 0:
                raise ReparamError("calibration has no data: give it at least one batch")
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    total = f"{count} batch{'es' * (count > 1)}"
    return [
        Outcome(CALIBRATE, name, True, f"mean set from {total}")
        if layer in reached
        else Outcome(CALIBRATE, name, False, f"none of {total} reached it: its mean stays")
        for layer, name in layers.items()
    ]


def _insert(
    captured: Capture, module: nn.Module, kind: str, momentum: float, calibrated: bool
) -> tuple[bool, str]:
    if not isinstance(module, Reparameterized):
        return False, f"{type(module).__name__} is not reparameterized: convert it first"
    biases = [module.tensors(name)[h.bias_role] for name, h in module.held.items() if h.bias_role is not None]
    others = sharers(captured.model, module, biases)
    if others:
        return False, f"its bias, which would take up the mean, is shared with {others}"
    gained = module.gained_bias
    try:
        module.normalize_mean(kind, momentum)
    except ReparamError as error:
        return False, str(error)
    done = (
        "the running mean is set by calibration"
        if calibrated
        else "the running mean is zero until calibrated"
    )
    if module.gained_bias and not gained:
        done += ", gained a bias"
    calls = len(captured.calls(module))
    if calls > 1:
        done += f", one mean for its {calls} calls"
    return True, done


def _feed(model: nn.Module, batch: Any) -> None:
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise ReparamError(
            f"calibration: a batch is a {type(batch).__name__}: give a tensor, a tuple or list of inputs, "
            "or a dict of named inputs"
        )
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*([batch] if isinstance(batch, Tensor) else batch))
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, ReparamError):
            raise
        lines = str(error).splitlines() or [""]
        raise ReparamError(
            f"calibration: {type(model).__name__} does not take such a batch, which is what its forward pass takes, "
            f"without labels ({type(error).__name__}: {lines[0]})"
        ) from error
