"""A plain layer whose weights are held in a parameterization, the one mechanism behind every such class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from reparam.checkpoint.metadata import LayerRecord
from reparam.errors import ReparamError
from reparam.layers.building import build_from_plain, build_from_records, fold_layer, records_of
from reparam.layers.caching import CachesWeights
from reparam.layers.form import Form, Held
from reparam.layers.kinds import Kind
from reparam.layers.mean_norm import (
    BUFFERS,
    MeanNorm,
    evaluation_bias,
    input_first,
    insert_mean,
    normalized_forward,
    set_mean,
)
from reparam.layers.wide import WideModule

if TYPE_CHECKING:
    from typing_extensions import Self


class Reparameterized(CachesWeights, WideModule):
    """A layer of ``plain_class`` whose weights are held in the parameterization ``form``.

    It has the plain class's hyperparameters and runs its forward pass: attributes that plain code reads (``weight``
    and ``bias``; ``_flat_weights`` of an LSTM) are composed on reading, in the layer's dtype. Parameters are named as
    in a file: ``r``, ``theta``, ``lambda_``; ``weight_g``, ``weight_v``; for a parameter not named ``weight``,
    ``weight_ih_l0.r`` or ``weight_ih_l0_g``. They are made by :meth:`from_plain`, never by the constructor.

    Attributes:
        held: what the layer holds, by the name of the plain weight.
        plain_names: the plain class's parameters, in its order.
        scale_outside: the weight is that of unit rows and the bias λ: whoever placed the scale multiplies by ``r``
            after the activation.
        mean: its mean normalization, None without.
        gained_bias: mean normalization gave it a bias the user's plain layer did not have; folded, the plain layer has
            this attribute too.
        batched_only: one sample without a batch is refused: its scale is moved on through a flattening that takes axis 0
            for samples.
    """

    plain_class: ClassVar[type[nn.Module]]
    form: ClassVar[Form]
    kind: ClassVar[Kind]
    held: dict[str, Held]
    plain_names: tuple[str, ...]
    scale_outside: bool
    mean: MeanNorm | None
    gained_bias: bool
    batched_only: bool = False

    @classmethod
    def from_plain(cls, module: nn.Module, *, scale_outside: bool = False) -> Self:
        """The layer that computes what ``module`` computes (``unit``: divided by each unit's ‖w‖ + ε).

        Args:
            module: an instance of ``plain_class``; it is not changed, and no storage is shared with it.
            scale_outside: leave the scale r out, for the caller to place after the activation.

        Raises:
            NonFiniteError: a weight is NaN or Inf.
            ReparamError: the scale cannot stand outside.
        """
        layer = build_from_plain(cls, module)
        if scale_outside:
            layer.leave_scale_out()
        return layer

    @classmethod
    def from_records(cls, module: nn.Module, records: Mapping[str, LayerRecord]) -> Self:
        """The layer a file's records, by parameter, describe in place of ``module``: zeros until loaded.

        Its scale stands inside and its mean is not normalized, whatever they say: that takes the network.

        Raises:
            ArchitectureError: a record does not fit ``module``; the message does not name the layer.
        """
        return build_from_records(cls, module, records)

    @classmethod
    def from_record(cls, module: nn.Module, record: LayerRecord) -> Self:
        """:meth:`from_records` for a layer whose only weight is ``weight``."""
        return cls.from_records(module, {"weight": record})

    def records(self) -> dict[str, LayerRecord]:
        """What a file says about this layer, by parameter."""
        return records_of(self)

    def record(self, name: str = "weight") -> LayerRecord:
        """What a file says about one weight."""
        return self.records()[name]

    def tensors(self, name: str = "weight") -> dict[str, nn.Parameter]:
        """The parameters one weight is held in, by role."""
        held = self.held[name]
        found = {}
        for role in held.roles:
            part, key = (None, held.bias_name) if role == "bias" else self.form.place(name, role)
            owner = self if part is None else self._modules[part]
            assert owner is not None
            parameter = owner._parameters[key]
            assert parameter is not None
            found[role] = parameter
        return found

    def composed(self, name: str = "weight") -> Tensor:
        """The weight as plain code sees it, differentiable once; in autocast's type where that would be cast."""
        held, tensors = self.held[name], self.tensors(name)
        device = next(iter(tensors.values())).device.type
        dtype = held.dtype
        if self.kind.autocasts and dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return self._once(
            [*tensors.values()],
            (name, self.scale_outside),
            dtype,
            lambda dtype: self.form.weight(tensors, held.spec, dtype, self.scale_outside),
        )

    def composed_bias(self, name: str = "weight") -> Tensor | None:
        """The bias, in evaluation mode with mean normalization folded in."""
        bias = self.own_bias(name)
        if self.mean is not None and not self.training and bias is not None:
            return evaluation_bias(self, name, bias)
        return bias

    def own_bias(self, name: str = "weight") -> Tensor | None:
        """The bias, whatever mean is normalized."""
        held = self.held[name]
        return self.form.bias(self.tensors(name), held.dtype, self.scale_outside)

    def __getattr__(self, name: str) -> Any:
        # Where this is called before the state is there (copying, unpickling) it must not recurse.
        held: dict[str, Held] = self.__dict__.get("held", {})
        if name in held and name not in self.__dict__["_modules"]:
            return self.composed(name)
        for weight, one in held.items():
            if one.bias_name == name:
                return self.composed_bias(weight)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain class's, with the mean normalization if there is one.

        Raises:
            ReparamError: one sample without a batch, and the layer is ``batched_only``.
        """
        if self.batched_only:
            self._require_batch(*args, **kwargs)
        if self.mean is None:
            return super().forward(*args, **kwargs)
        return normalized_forward(self, super().forward, *args, **kwargs)

    def _require_batch(self, *args: Any, **kwargs: Any) -> None:
        x: Tensor = input_first(self, args, kwargs)[0][0]
        if x.dim() < 2 + self.kind.spatial:
            raise ReparamError(
                f"{self.plain_class.__name__} was given one sample {list(x.shape)}: its scale is moved on through a "
                "flattening that takes axis 0 for samples: give it a batch, x[None]"
            )

    def leave_scale_out(self) -> None:
        """Take the scale out of weight and bias: see ``scale_outside``.

        Raises:
            ReparamError: this layer's scale has to stand inside; the message says why.
        """
        if self.form.name != "gmp":
            raise ReparamError(
                f"only GmP has a scale that can stand after the activation, not {self.form.name}"
            )
        if list(self.held) != ["weight"]:
            raise ReparamError(f"the scale of {self.plain_class.__name__} has to stand inside")
        if self.held["weight"].bias_role == "bias":
            raise ReparamError("a layer without usable lambda keeps its bias, and its scale stands inside")
        if self.mean is not None:
            raise ReparamError("place the scale before normalizing the mean")
        self.scale_outside = True

    def normalize_mean(self, kind: str = "mn", momentum: float = 0.01) -> Self:
        """Subtract a mean, in place: see :class:`MeanNorm`. In evaluation mode nothing changes yet.

        Raises:
            ReparamError: not possible for this layer; the message says why.
        """
        insert_mean(self, MeanNorm(kind, momentum))
        return self

    def set_mean(self, mean: Tensor) -> None:
        """Set the running mean, and change the bias such that evaluation stays as it is (λ += uᵀμ)."""
        set_mean(self, mean)

    def assign(self, weight: Tensor, bias: Tensor | None, name: str = "weight") -> None:
        """Give the layer the values of a plain weight and bias, as :meth:`from_plain` would."""
        held = self.held[name]
        assert (bias is None) == (held.bias_role is None)
        with torch.no_grad():
            values = self.form.decompose(weight, bias, held.spec, held.bias_role)
            for role, parameter in self.tensors(name).items():
                parameter.copy_(values[role])

    def reset_parameters(self) -> None:
        """As the plain class does."""
        plain = fold_layer(self, None)
        plain.reset_parameters()  # type: ignore[operator]
        for name, held in self.held.items():
            weight, bias = plain._parameters[name], plain._parameters.get(held.bias_name)
            assert weight is not None
            self.assign(weight.detach(), None if bias is None else bias.detach(), name)

    def fold(self, scale: Tensor | None = None) -> nn.Module:
        """The plain layer of the original class, composed in float64, rounded once, the mean in its bias.

        Args:
            scale: of each unit, shape (units,), to multiply in, where the layer's own stands outside.
        """
        assert scale is None or self.scale_outside
        return fold_layer(self, scale)

    def _wide(self) -> list[Tensor]:
        names = {
            self.form.place(name, role)
            for name, h in self.held.items()
            for role in h.roles
            if role in self.form.wide
        }
        own = [self._parameters[key] for part, key in names if part is None]
        means = [self._buffers.get(key) for key in BUFFERS.values()]
        return [tensor for tensor in (*own, *means) if tensor is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.half()`` and the like change the dtype of what is composed; angles and scales stay wide."""
        for name, held in self.held.items():
            device = next(iter(self.tensors(name).values())).device
            held.dtype = fn(torch.empty(0, dtype=held.dtype, device=device)).dtype
        return super()._apply(fn, recurse)
