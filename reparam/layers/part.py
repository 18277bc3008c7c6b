"""The angles of a parameter that is not named ``weight``: a submodule at its place, which torch takes for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reparam.layers.caching import CachesWeights
from reparam.layers.form import Held
from reparam.layers.geometric import GeometricForm, GeometricMixin

if TYPE_CHECKING:
    from typing_extensions import Self


class GeometricPart(CachesWeights, GeometricMixin):
    """``weight_ih_l0.r``, ``.theta`` and ``.lambda_`` of one weight of a layer that has several.

    Module paths have to lead here (``functional_call``, ``get_submodule``, distributed checkpoints), while code that
    reads the parameter (``MultiheadAttention``, ``LSTMCell``) hands it to torch functions: they get the composed
    weight. torch's fast paths for encoder layers see that it is no plain tensor and step aside.
    """

    held: Held

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held

    def tensor(self) -> Tensor:
        """The composed weight, differentiable once."""
        tensors = {role: p for role, p in self._parameters.items() if p is not None}
        return self._once(
            [*tensors.values()],
            None,
            self.held.dtype,
            lambda dtype: GeometricForm().weight(tensors, self.held.spec, dtype, False),
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.held.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        return self.theta.device

    @property
    def requires_grad(self) -> bool:
        return self.r.requires_grad or self.theta.requires_grad

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.tensor() if isinstance(value, GeometricPart) else value

        return func(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.itemsize < 4 else moved

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call,no-any-return]
