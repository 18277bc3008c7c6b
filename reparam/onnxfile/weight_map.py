"""Which weight of the model an initializer holds, and how it was changed on its way there.

Exporters transpose, merge and rename weights; the map says which tensor of the plain state_dict an initializer comes
from and by which transform, so that another checkpoint's weights can be put in its place, every initializer can be held
against its source bit for bit, and a difference can be named by its state_dict key. It is embedded in the file's
metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: the name under which the map stands in an ONNX file's ``metadata_props``
KEY = "reparam.weights"


@dataclass(frozen=True)
class Source:
    """Where one initializer's values come from.

    Attributes:
        keys: of the plain state_dict: one, or those a transform joins (a merged LSTM bias, a folded batch norm).
        transform: name of an entry of the table of transforms: "same", "transpose", ...
        settings: what the transform needs, JSON values ({"perm": [1, 0]}).
    """

    keys: tuple[str, ...]
    transform: str = "same"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightMap:
    """Initializer name -> :class:`Source`; initializers that hold no weight (shapes, constants) are not in it."""

    sources: Mapping[str, Source]

    def dump(self) -> str:
        """The JSON text that :meth:`load` reads."""
        return json.dumps({name: asdict(source) for name, source in self.sources.items()}, sort_keys=True)

    @classmethod
    def load(cls, text: str) -> WeightMap:
        """Raise ValueError, KeyError or TypeError for what is no map."""
        return cls(
            {
                name: Source(tuple(value["keys"]), str(value["transform"]), dict(value["settings"]))
                for name, value in json.loads(text).items()
            }
        )
