"""Options that are one of a few words."""

from typing import Any, get_args

from ef_jax.errors import InputError


def chosen(name: str, value: str, choices: Any) -> Any:
    """`value`, if it is one of the words of the `Literal` type `choices`; `name` is the option's.

    Raises:
      InputError: it is none of them.
    """
    if value in get_args(choices):
        return value
    raise InputError(f"{name} {value!r:.60} is not one of {', '.join(get_args(choices))}")
