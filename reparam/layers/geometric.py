"""Layers that hold their weight in the geometric parameterization and train there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reparam.checkpoint.metadata import LayerRecord
from reparam.dtypes import code_of, torch_dtype
from reparam.errors import ArchitectureError
from reparam.kernels.hyperspherical import decode, decode_backward
from reparam.parameterizations import PARAMETERIZATIONS, UnitAxis, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_Layer = TypeVar("_Layer", bound=nn.Module)


class _Compose(torch.autograd.Function):
    """Rows r·u(theta), in float64 and rounded once; the backward pass decodes again instead of storing u.

    r is (units,), theta (units, max(n − 1, 1)), the result and its gradient (units, n).
    """

    @staticmethod
    def forward(r: Tensor, theta: Tensor, n: int, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
        return decode(theta, n, stored, r).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        r, theta, ctx.n, ctx.stored, _ = inputs
        ctx.save_for_backward(r, theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        r, theta = ctx.saved_tensors
        grad = grad_rows.double()
        d_r = d_theta = None
        if ctx.needs_input_grad[0]:
            d_r = (decode(theta, ctx.n, ctx.stored) * grad).sum(1).to(r.dtype)
        if ctx.needs_input_grad[1]:
            scaled = grad * r.double()[:, None]
            d_theta = decode_backward(theta, ctx.n, ctx.stored, scaled).to(theta.dtype)
        return d_r, d_theta, None, None, None


class GeometricMixin(nn.Module):
    """A layer whose unit computes r·(u(theta)ᵀx + lambda) instead of wᵀx + b (Chen & Ge, eq. 5-10).

    r = ‖w‖, lambda = b/‖w‖ and u(theta) is the direction of w in hyperspherical coordinates from the equator:

        u_i = sin t_i · ∏_{j<i} cos t_j  (i < n),    u_n = ∏_{j<n} cos t_j

    Parameters (and state_dict keys): ``r`` (units,), ``theta`` (units, max(n − 1, 1)) in radians, n the
    fan-in, and ``lambda_`` (units,), or ``bias`` (units,) where lambda would not be usable. They are never
    held below float32. ``weight`` and ``bias`` are composed on reading, in ``weight_dtype``, so the plain
    class's forward runs unchanged. For n = 1 the direction is a sign and theta is not trained.

    Attributes:
        spec: the plain weight and bias this layer stands for; ``spec.stored`` decides the exact zeros,
            whatever dtype theta is cast to later.
        weight_dtype: dtype of the composed weight and bias; follows ``.half()``, ``.double()`` and the like.
    """

    plain_class: ClassVar[type[nn.Module]]
    spec: WeightSpec
    weight_dtype: torch.dtype
    r: nn.Parameter
    theta: nn.Parameter
    lambda_: nn.Parameter | None

    @classmethod
    def from_plain(cls, module: nn.Module) -> Self:
        """The layer that computes what ``module`` computes.

        Args:
            module: an instance of ``plain_class``; it is not changed, and no storage is shared with it.

        Raises:
            NonFiniteError: a weight is NaN or Inf.
        """
        weight, bias = _weight_and_bias(module)
        stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
        spec = WeightSpec(
            shape=tuple(weight.shape),
            dtype=code_of(weight.dtype),
            bias_shape=None if bias is None else tuple(bias.shape),
            bias_dtype=None if bias is None else code_of(bias.dtype),
            stored=code_of(stored),
        )
        with torch.no_grad():
            tensors = PARAMETERIZATIONS["gmp"].decompose(
                weight.detach(), None if bias is None else bias.detach().clone(), spec
            )
        return cls._build(module, spec, tensors)

    @classmethod
    def from_record(cls, module: nn.Module, record: LayerRecord) -> Self:
        """The layer a file's record describes in place of ``module``: zeros until its tensors are loaded.

        Raises:
            ArchitectureError: the record does not fit ``module``; the message does not name the layer.
        """
        weight, bias = _weight_and_bias(module)
        spec = record.spec
        if spec.shape != tuple(weight.shape):
            raise ArchitectureError(
                f"the file's weight is {list(spec.shape)}, the architecture's {list(weight.shape)}"
            )
        if (record.bias is None) != (bias is None):
            raise ArchitectureError(
                "the file's layer has no bias, the architecture's has"
                if record.bias is None
                else "the file's layer has a bias, the architecture's has none"
            )
        if spec.unit != UnitAxis() or spec.theta_origin != "equator":
            raise ArchitectureError(
                f"units on axis {spec.unit.axis} and theta from the {spec.theta_origin} are not supported in "
                f"{cls.plain_class.__name__}: `reparam convert` the file to sp and back"
            )
        specs = PARAMETERIZATIONS["gmp"].tensors(spec, record.bias)
        tensors = {
            role: torch.zeros(shape, dtype=torch_dtype(code), device=weight.device)
            for role, (code, shape) in specs.items()
        }
        return cls._build(module, spec, tensors)

    @classmethod
    def _build(cls, module: nn.Module, spec: WeightSpec, tensors: dict[str, Tensor]) -> Self:
        weight, bias = _weight_and_bias(module)
        layer = _sibling(cls, module)
        layer.spec = spec
        layer.weight_dtype = weight.dtype
        for role, tensor in tensors.items():
            source = bias if role in ("lambda_", "bias") else weight
            assert source is not None
            trained = source.requires_grad and not (role == "theta" and spec.fan_in == 1)
            wide = torch.promote_types(tensor.dtype, torch.promote_types(weight.dtype, torch.float32))
            # Not register_parameter: it refuses `bias`, which the class has as a property.
            layer._parameters[role] = nn.Parameter(tensor.to(wide), requires_grad=trained)
        layer._parameters.setdefault("lambda_", None)
        return layer

    @property
    def weight(self) -> Tensor:
        """The composed weight, of ``spec.shape`` and ``weight_dtype``; differentiable once in r and theta."""
        rows: Tensor = _Compose.apply(  # type: ignore[no-untyped-call]
            self.r, self.theta, self.spec.fan_in, torch_dtype(self.spec.stored), self.weight_dtype
        )
        return rows.reshape(self.spec.shape)

    @property
    def bias(self) -> Tensor | None:
        """r·lambda, or the bias where the layer keeps it; (units,) of ``weight_dtype``, None without."""
        if self.lambda_ is not None:
            return (self.r.double() * self.lambda_.double()).to(self.weight_dtype)
        kept = self._parameters.get("bias")
        return None if kept is None else kept.to(self.weight_dtype)

    def record(self) -> LayerRecord:
        """What a file says about this layer."""
        role = "lambda_" if self.lambda_ is not None else "bias" if "bias" in self._parameters else None
        return LayerRecord(kind="gmp", spec=self.spec, bias=role)

    def fold(self) -> nn.Module:
        """The plain layer of the original class, composed in float64, rounded once to ``weight_dtype``."""
        plain = _sibling(self.plain_class, self, drop=("spec", "weight_dtype"))
        with torch.no_grad():
            weight, bias = self.weight, self.bias
        bias_source = self.lambda_ if self.lambda_ is not None else self._parameters.get("bias")
        trained = self.r.requires_grad or self.theta.requires_grad
        plain.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
        if bias is None or bias_source is None:
            plain.register_parameter("bias", None)
        else:
            plain.register_parameter(
                "bias", nn.Parameter(bias.detach().clone(), requires_grad=bias_source.requires_grad)
            )
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.half()`` and the like change ``weight_dtype``; the parameters stay at float32 or above."""
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.theta.device)
        self.weight_dtype = fn(probe).dtype

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.itemsize < 4
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(wide, recurse)  # type: ignore[no-untyped-call,no-any-return]


# The ignores: where the plain class has weight and bias as attributes, these have properties.
class GmPLinear(GeometricMixin, nn.Linear):  # type: ignore[override,misc]
    """nn.Linear in the geometric parameterization; see :class:`GeometricMixin`."""

    plain_class = nn.Linear


class GmPConv2d(GeometricMixin, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d in the geometric parameterization; see :class:`GeometricMixin`."""

    plain_class = nn.Conv2d


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    assert weight is not None
    return weight, bias


def _sibling(cls: type[_Layer], module: nn.Module, drop: tuple[str, ...] = ()) -> _Layer:
    """A layer of another class with this one's hyperparameters, mode and hooks, and without parameters.

    The constructor is passed over: it would draw random weights, and assign them to what may be properties.
    """
    layer = cls.__new__(cls)
    state = {
        key: value.copy() if isinstance(value, dict) else value
        for key, value in module.__dict__.items()
        if key not in drop
    }
    layer.__dict__.update(state, _parameters={})
    return layer
