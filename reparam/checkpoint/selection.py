"""Which layers a conversion takes.

The paper reparameterizes every layer but the output layer. Tensors do not say which layer that is, so by default all
layers are taken but those on a short list of names; the report prints which and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reparam.checkpoint.layers import Layer
from reparam.checkpoint.units import matches
from reparam.errors import SelectionError

#: Usual names of output layers.
HEADS = (
    "lm_head", "*.lm_head", "head", "*.head", "classifier", "*.classifier", "score", "*.score", "embed_out",
    "*.embed_out",
)  # fmt: skip
#: And of embedding tables. Norms need no entry: their weights are one-dimensional.
SKIPPED_BY_NAME = (
    *HEADS, "*embed*", "wte", "*.wte", "wpe", "*.wpe", "shared", "*relative_attention_bias*",
)  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """Globs over layer names ("conv1") or keys ("conv1.weight").

    Attributes:
        include: take only layers that match one of these, listed names among them; empty takes the default.
        exclude: never take layers that match one of these.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def reason_against(self, layer: Layer) -> str | None:
        """Why a layer is not taken; None if it is."""
        if pattern := _match(layer, self.exclude):
            return f"--exclude {pattern}"
        if self.include:
            return None if _match(layer, self.include) else "no --include matches"
        if pattern := _match(layer, SKIPPED_BY_NAME):
            return f"name is on the default list ({pattern}); --include {layer.name} would take it alone"
        return None

    def check(self, layers: Sequence[Layer], axes: Sequence[str] = ()) -> None:
        """Raise SelectionError for a glob that matches no layer: most likely a typing error."""
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude), ("--axis", axes)):
            for pattern in patterns:
                if not any(_match(layer, (pattern,)) for layer in layers):
                    some = ", ".join(layer.name for layer in layers[:3])
                    mend = f"; repeat {option} for each glob" if "," in pattern else ""
                    raise SelectionError(f"{option} {pattern}: matches no layer (there are {some}, …){mend}")


def without_effect(
    axes: Mapping[str, int], layers: Sequence[Layer], unaided: Sequence[Layer]
) -> dict[str, str]:
    """What to tell of each ``--axis`` that changes nothing, by its glob.

    Args:
        axes: unit axes by glob.
        layers: those that matter, as these axes have them read.
        unaided: these and more, as they are read without.
    """
    plain = {layer.key: layer for layer in unaided}
    named: dict[str, list[Layer]] = {pattern: [] for pattern in axes}
    for layer in layers:
        if (pattern := _match(layer, tuple(axes))) is not None:
            named[pattern].append(layer)
    return {
        pattern: f"without effect: --axis {pattern}={axes[pattern]} ({_as_they_are(found)})"
        for pattern, found in named.items()
        if all(layer == plain[layer.key] for layer in found)
    }


def _as_they_are(layers: Sequence[Layer]) -> str:
    if not layers:
        return "it decides no layer that is converted or compared"
    read = " or ".join(map(str, sorted({layer.spec.unit.axis for layer in layers})))
    more = f" and {len(layers) - 1} more" * (len(layers) > 1)
    return f"units of {layers[0].name}{more} are on axis {read} in any case"


def _match(layer: Layer, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if matches(layer.key, pattern)), None)
