"""The layer classes: one for each parameterization and plain class, made from the tables of both."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from reparam.layers.base import Reparameterized
from reparam.layers.form import Form
from reparam.layers.geometric import GeometricForm, GeometricMixin
from reparam.layers.kinds import HF_CONV1D, HF_CONV1D_CLASS, KINDS, Kind
from reparam.layers.recurrent import RECURRENT, RecurrentMixin
from reparam.layers.unit_norm import UnitNormForm
from reparam.layers.weight_norm import WeightNormForm

FORMS: dict[str, Form] = {form.name: form for form in (GeometricForm(), WeightNormForm(), UnitNormForm())}

_SEVERAL = (*RECURRENT, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention)


def _make(form: Form, plain: type[nn.Module], kind: Kind) -> type[Reparameterized]:
    name = form.prefix + plain.__name__
    bases: tuple[type, ...] = (RecurrentMixin if plain in RECURRENT else Reparameterized, plain)
    if form.name == "gmp" and plain not in _SEVERAL:
        bases = (GeometricMixin, *bases)
    body = {
        "__module__": __name__,
        "__doc__": f"{plain.__name__} in the {form.name} parameterization; see :class:`Reparameterized`.",
        "plain_class": plain,
        "form": form,
        "kind": kind,
    }
    made: type[Reparameterized] = type(name, bases, body)
    return made


#: (parameterization, plain class) -> the layer that takes its place. The class is matched exactly: a subclass
#: may compute something else.
LAYERS: dict[tuple[str, type[nn.Module]], type[Reparameterized]] = {
    (form.name, plain): _make(form, plain, kind) for form in FORMS.values() for plain, kind in KINDS.items()
}

# Pickles find a class by its name in its module.
globals().update({cls.__name__: cls for cls in LAYERS.values()})


def layer_class(form: str, plain: type[nn.Module]) -> type[Reparameterized] | None:
    """The layer that takes the place of a plain one in the parameterization ``form``; None where there is none.

    transformers' ``Conv1D`` is known by its name: transformers itself is not imported.
    """
    if (
        (plain.__module__, plain.__name__) == HF_CONV1D_CLASS
        and (form, plain) not in LAYERS
        and form in FORMS
    ):
        made = _make(FORMS[form], plain, HF_CONV1D)
        LAYERS[form, plain] = made
        setattr(sys.modules[__name__], made.__name__, made)
    return LAYERS.get((form, plain))


def __getattr__(name: str) -> Any:
    """The layer of transformers' ``Conv1D``, where a pickle asks for it before any was made."""
    for form in FORMS.values():
        if name == form.prefix + HF_CONV1D_CLASS[1]:
            from importlib import import_module

            return layer_class(form.name, getattr(import_module(HF_CONV1D_CLASS[0]), HF_CONV1D_CLASS[1]))
    raise AttributeError(f"module {__name__} has no attribute {name}")
