"""Command-line options for the fields of a recipe: one list, in ``reparam.training.recipe``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from reparam.training.recipe import Recipe


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes every field of a recipe as an option, and gets those that were given as ``recipe``."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "recipe"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in Recipe.model_fields}
        command(recipe={name: value for name, value in chosen.items() if value is not None}, **given)

    parameters = [*own, *_options()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options() -> list[inspect.Parameter]:
    found = []
    for name, field in Recipe.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        flag = field.annotation is bool
        default = "" if flag or field.default in (None, (), {}) else f" [default: {_told(field.default)}]"
        kind = typer.Option(
            f"{option}/--no-{option[2:]}" if flag else option,
            help=f"{field.description}{default}",
            show_default=False,
            metavar=None if flag else _metavar(field.annotation),
        )
        annotation = Annotated[bool | None, kind] if flag else Annotated[str | None, kind]
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return found


def _told(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(annotation: Any) -> str:
    """What stands for a value in --help: its choices, or the kind of number."""
    text = str(annotation)
    if "Literal[" in text and not text.startswith(("tuple", "dict")):
        return "|".join(part.strip(" '\"") for part in text.split("Literal[")[1].split("]")[0].split(","))
    if text.startswith("dict"):
        return "kind=rate,..."
    if text.startswith(("tuple", "typing.Tuple")) or "tuple[" in text:
        return "a,b,..."
    for name in ("int", "float"):
        if name in text:
            return name
    return "text"
