"""How specs refuse values, and how they are read back from JSON."""

import dataclasses
import types
import typing
from typing import Any

from ef_jax.errors import UnsupportedError


def require(condition: bool, message: str) -> None:
    """Raises `UnsupportedError` with the message unless the condition holds."""
    if not condition:
        raise UnsupportedError(message)


def from_plain(kind: Any, value: Any) -> Any:
    """A value of the annotated `kind` from plain JSON types: nested dataclasses, tuples of them, unions with None.

    Where a union has several dataclasses, it is the one whose fields the value has.

    Raises:
      TypeError: the value does not fit.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__} must be an object, got {value!r:.80}")
        kinds = typing.get_type_hints(kind)
        if unknown := value.keys() - kinds.keys():
            raise TypeError(f"{kind.__name__} has no field {min(unknown)!r}")
        return kind(**{name: from_plain(kinds[name], item) for name, item in value.items()})
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(from_plain(choices[0], item) for item in value)
    if origin in (typing.Union, types.UnionType) and value is not None:
        return from_plain(_fitting(choices, value), value)
    return value


def _fitting(choices: tuple[Any, ...], value: Any) -> Any:
    left = [choice for choice in choices if choice is not types.NoneType]
    if isinstance(value, dict):
        left = [
            choice for choice in left if value.keys() == {field.name for field in dataclasses.fields(choice)}
        ] or left
    return left[0]
