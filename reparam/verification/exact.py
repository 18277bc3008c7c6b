"""A model run in float64, whatever it asks for inside.

    x.float() · W            -->    x · W            in float64: every narrower type an operation is asked for is widened

``model.double()`` reaches parameters and buffers, not the casts that a forward pass writes out, nor tensors it makes or
holds as attributes. Below torch's Python interface every operation passes one place, and there they are widened too.
The same place sees what an operation *decided*: an index or a truth value is as good as another where the numbers it
was decided by are closer than their errors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from reparam.verification.decisions import Decision

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_AXIS = {"argmax": 1, "argmin": 1, "topk": 2, "max": 1, "min": 1, "sort": 1}
_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne")
_PROBABILITIES = ("_softmax", "_log_softmax", "sigmoid")
#: angles, as long as they live -> what weights were composed of them, and with which radius
_COMPOSED: MutableMapping[Tensor, tuple[Any, Any, Any]] = WeakTensorKeyDictionary()
#: models that :func:`in_float64` made
_EXACT: WeakSet[nn.Module] = WeakSet()
_CONVOLUTION = torch.ops.aten.convolution.default
#: arguments that say how numbers are held, no type to compute in: which angle is the right one, and whose bits to read
_HELD = {"reparam::rows": "stored", "reparam::rows_gradient": "stored", "aten::view": "dtype"}
#: a tensor as it is
_SAME = ("_to_copy", "alias", "detach")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations as they are, and remembers.

    Attributes:
        decisions: in the order they were made.
        touched: addresses of the tensors operations took.
        lookups: address of the table, its rows and the indices, of every lookup.
        logits: by the result of a softmax or sigmoid, while that is alive, what it was taken of.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decisions: list[Decision] = []
        self.touched: set[int] = set()
        self.lookups: list[tuple[int, int, Tensor]] = []
        self.logits: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map(self._touch, (args, kwargs))
        if func.namespace == "reparam" and func.overloadpacket.__name__ == "rows":
            out = self._compose(func, args)
        else:
            out = self.run(func, args, kwargs or {})
        self._remember(func, args, kwargs or {}, out)
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _compose(self, func: Any, args: Any) -> Tensor:
        """The weight of a layer, from its angles once as long as they are the same: that costs more than to use it."""
        radius, theta, *how = args
        key = (type(self), theta._version, None if radius is None else radius._version, *how)
        known, taken, rows = _COMPOSED.get(theta, (None, None, None))
        if known != key or taken is not radius or rows is None:
            rows = self.run(func, args, {})
            _COMPOSED[theta] = key, radius, rows
        assert isinstance(rows, Tensor)
        return rows

    def _touch(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel():
            self.touched.add(value.untyped_storage().data_ptr())

    def _remember(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, overload = func.overloadpacket.__name__, func._overloadname
        if name == "embedding":
            self.lookups.append((args[0].data_ptr(), args[0].shape[0], args[1]))
        elif (
            name == "index" and args[1] and isinstance(args[1][0], Tensor) and args[1][0].dtype == torch.int64
        ):
            self.lookups.append((args[0].data_ptr(), args[0].shape[0], args[1][0]))
        elif name == "index_select":
            self.lookups.append((args[0].data_ptr(), args[0].shape[args[1]], args[2]))
        elif name in _COMPARISONS and args[0].is_floating_point():
            self.decisions.append(Decision(out, args[0], args[1]))
        elif name in _AXIS and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            result = out[1] if isinstance(out, tuple | list) else out
            if result.dtype != torch.int64:
                return  # max and min of a whole tensor decide nothing
            at = 2 if name == "sort" and overload == "stable" else _AXIS[name]
            axis = args[at] if len(args) > at else kwargs.get("dim", -1 if name in ("topk", "sort") else None)
            self.decisions.append(Decision(result, args[0], axis=axis))
        elif name in _PROBABILITIES:
            self.logits[out] = args[0]
        elif name in _SAME and isinstance(args[0], Tensor) and args[0] in self.logits:
            self.logits[out] = self.logits[args[0]]
        elif name in _SAME and isinstance(args[0], Tensor):
            for decision in self.decisions:
                if decision.result is args[0] and out.shape == args[0].shape and not out.is_floating_point():
                    self.decisions.append(Decision(out, decision.left, decision.right, decision.axis))
                    break


class Float64(Recorder):  # type: ignore[no-untyped-call]
    """Runs every operation in float64.

    Attributes:
        widened: how often an operation asked for a narrower type.
        narrow: operations whose result is narrower nevertheless.
    """

    def __init__(self, round_scalars: bool = False) -> None:
        """``round_scalars``: numbers that stand in the code are rounded to float32, as an ONNX file holds them."""
        super().__init__()
        self.round_scalars = round_scalars
        self.widened = 0
        self._counts = True
        self.narrow: set[str] = set()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # The layers of this library name the type of the plain weight: nothing the model's author asked for.
        self._counts = func.namespace != "reparam"
        held = _HELD.get(func._schema.name)
        kept = [
            a.name == held or (a.alias_info is not None and a.alias_info.is_write)
            for a in func._schema.arguments
        ]
        args = [
            value if keep else tree_map(self._widen, value)
            for value, keep in zip(args, [*kept, *[False] * len(args)], strict=False)
        ]
        # Numbers that are left out for the operation's own ones are numbers of the code too.
        own = {a.name: a.default_value for a in func._schema.arguments[len(args) :]}
        kwargs = {k: v for k, v in own.items() if self.round_scalars and isinstance(v, float)} | kwargs
        kwargs = {k: v if k in ("out", held) else tree_map(self._widen, v) for k, v in kwargs.items()}
        out = (_convolve if func is _CONVOLUTION else func)(*args, **kwargs)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.dtype in _NARROW:
                self.narrow.add(func.overloadpacket.__name__)
        return out

    def _widen(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _NARROW:
            return value.double()
        if isinstance(value, torch.dtype) and value in _NARROW:
            self.widened += self._counts
            return torch.float64
        if self.round_scalars and isinstance(value, float):
            return float(np.float32(value))
        return value


@dataclass
class Run:
    """What a model gave.

    Attributes:
        outputs: its tensors, in the order ONNX has them.
        recorder: what was remembered.
        names: of the outputs, None for those the model gives no name.
    """

    outputs: list[Tensor]
    recorder: Recorder = field(repr=False)
    names: list[str | None] = field(default_factory=list)

    def decision(self, index: int) -> Decision | None:
        """The decision an output is; None where it is none."""
        for decision in self.recorder.decisions:
            if decision.result is self.outputs[index]:
                return decision
        return None

    def logits(self, index: int) -> Tensor | None:
        """What an output is the softmax or sigmoid of; None where it is none."""
        return self.recorder.logits.get(self.outputs[index])


def _convolve(x: Tensor, *how: Any, **named: Any) -> Tensor:
    """As many images at a time as there are threads: torch unfolds all it is given in memory, one thread an image."""
    pieces = [_CONVOLUTION(piece, *how, **named) for piece in torch.split(x, torch.get_num_threads())]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def reference_copy(reference: nn.Module) -> nn.Module:
    """A copy in evaluation mode."""
    return copy.deepcopy(reference).eval()


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with float64 parameters and buffers, in evaluation mode; one that was made so is it itself."""
    if model in _EXACT:
        return model
    return now_in_float64(copy.deepcopy(model))


def now_in_float64(model: nn.Module) -> nn.Module:
    """The model itself, so changed."""
    _EXACT.add(model.double().eval())
    return model


def run(model: nn.Module, inputs: Sequence[Tensor], recorder: Recorder | None = None) -> Run:
    """Run a model that takes its inputs positionally.

    Args:
        model: in evaluation mode.
        inputs: floating ones become float64 where ``recorder`` is :class:`Float64`.
        recorder: how; as it is by default.
    """
    recorder = recorder or Recorder()
    wide = isinstance(recorder, Float64)
    given = [x.double() if wide and x.is_floating_point() else x for x in inputs]
    with torch.no_grad(), _default(torch.float64 if wide else torch.get_default_dtype()), recorder:
        output = model(*given)
    return Run(flatten(output), recorder, _names(output))


def flatten(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in the order ONNX has them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in flatten(item)]
    return []


def _names(output: Any) -> list[str | None]:
    """The keys of a mapping's tensors; None for tensors deeper inside, and for all of any other output."""
    if not isinstance(output, Mapping):
        return [None] * len(flatten(output))
    return [
        str(key) if tensor is value else None for key, value in output.items() for tensor in flatten(value)
    ]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
