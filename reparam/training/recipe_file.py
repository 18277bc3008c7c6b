"""Recipes from YAML files and options, and back. Imports no torch."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError

from reparam.errors import ReparamError, first_line
from reparam.training.recipe import NETWORK, Recipe


def load_recipe(file: Path | None = None, overrides: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from a YAML file and options that go before it.

    Args:
        file: a mapping of fields; a run folder's config.yaml too, whose ``network`` section is not read.
        overrides: by field name; strings are read as the field's type.

    Raises:
        ReparamError: the file cannot be read, a field is unknown or has a value it cannot have; one line that names
            file or option.
    """
    read = {} if file is None else _read(file)
    given = dict(overrides or {})
    for key in (*read, *given):
        if key not in Recipe.model_fields:
            near = difflib.get_close_matches(str(key), Recipe.model_fields, n=2)
            hint = f"; did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
            place = f"{file}: " if key in read else ""
            raise ReparamError(
                f"{place}`{_short(key)}` is no field of a recipe{hint or ' (reparam finetune --help)'}"
            )
    try:
        return Recipe.model_validate({**read, **given})
    except ValidationError as error:
        raise ReparamError(_told(error, file, given)) from None


def to_yaml(recipe: Recipe) -> str:
    """Every field, with its description as a comment; ``load_recipe`` reads it back."""
    lines = []
    for name, value in recipe.model_dump(mode="json").items():
        lines.append(f"# {Recipe.model_fields[name].description}\n{_as_yaml(name, value)}")
    return "".join(lines)


def _as_yaml(name: str, value: object) -> str:
    text: str = yaml.safe_dump({name: value}, allow_unicode=True)
    return text


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a field given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a field is given twice", node.start_mark)
        return found


def _read(file: Path) -> dict[str, object]:
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ReparamError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        why = problem or first_line(error)
        raise ReparamError(f"{file}: not YAML{line} ({why})") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ReparamError(
            f"{file}: a recipe is a mapping of fields to values, `lr: 0.01`, not a {type(found).__name__}"
        )
    found.pop(NETWORK, None)
    return found


def _told(error: ValidationError, file: Path | None, given: Mapping[str, object]) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    why = str(first.get("ctx", {}).get("error", first["msg"]))
    why = why.replace("Input should be", "must be").replace("Field required", "a value is missing")
    if not first["loc"]:
        return f"{file}: {why}" if file is not None else why
    name, *within = [part for part in first["loc"] if isinstance(part, str)]
    place = f"--{name.replace('_', '-')}" if name in given else f"{file}: {name}"
    if within[1:] == ["[key]"]:
        return f"{place}: `{_short(first['input'])}` {why}"
    return f"{place} {''.join(f'{part}=' for part in within)}{_short(first['input'])}: {why}"


def _short(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 60 else reprlib.repr(value)
