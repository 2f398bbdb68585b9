"""Typed, accountable reading of a `config.json`: a wrong type, a clash or an unread field raises one clear line."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import NoReturn, TypeVar

from ef_jax.errors import UnsupportedError

_T = TypeVar("_T")

_LIMIT = 2**31 - 1

_SHOWN = 80


def show(value: object) -> str:
    """A value for an error message: short, on one line."""
    text = reprlib.repr(value).replace("\n", " ")
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class ConfigFields:
    """A mapping whose fields are read by type and ticked off; `close` raises on what nobody asked for.

    Each reader takes one or more spellings of a field. Spellings that are present and not null must agree. A null
    value is returned as None where `optional`, else refused. Absent in every spelling: `defaults` has the value.
    """

    def __init__(self, values: Mapping[str, object], defaults: Mapping[str, object], *, prefix: str = ""):
        self._values = values
        self._defaults = defaults
        self._prefix = prefix
        self._read: set[str] = set()

    def integer(self, *names: str, minimum: int = 1) -> int:
        """An int in `[minimum, 2**31)`."""
        value = self.optional_integer(*names, minimum=minimum)
        return value if value is not None else self._refuse(names, None, f"an integer of at least {minimum}")

    def optional_integer(self, *names: str, minimum: int = 1) -> int | None:
        """An int in `[minimum, 2**31)`, or None."""
        value = self.raw(*names)
        if value is None or (type(value) is int and minimum <= value <= _LIMIT):
            return value
        return self._refuse(names, value, f"an integer between {minimum} and {_LIMIT}")

    def number(self, *names: str) -> float:
        """A positive, finite number."""
        value = self.optional_number(*names)
        return value if value is not None else self._refuse(names, None, "a positive number")

    def optional_number(self, *names: str) -> float | None:
        """A positive, finite number that float32 can hold, or None."""
        value = self.raw(*names)
        if value is None:
            return None
        if isinstance(value, int | float) and _is_positive(value):
            return float(value)
        return self._refuse(names, value, "a positive number")

    def flag(self, *names: str) -> bool:
        """True or false."""
        value = self.raw(*names)
        return value if isinstance(value, bool) else self._refuse(names, value, "true or false")

    def integers(self, *names: str, below: int) -> tuple[int, ...]:
        """A list of ints in `[0, below)`, or one alone; null is the empty list."""
        value = self.raw(*names)
        items = [] if value is None else value if isinstance(value, list | tuple) else [value]
        for item in items:
            if type(item) is not int or not 0 <= item < below:
                self._refuse(names, value, f"integers from 0 to {below - 1}")
        return tuple(items)

    def numbers(self, *names: str) -> tuple[float, ...]:
        """A list of positive, finite numbers that float32 can hold."""
        value = self.raw(*names)
        if not isinstance(value, list | tuple) or not all(map(_is_positive, value)):
            return self._refuse(names, value, "a list of positive numbers")
        return tuple(map(float, value))

    def choice(self, *names: str, choices: Mapping[str | None, _T]) -> _T:
        """What `choices` gives for the string, or for null where it has that."""
        value = self.raw(*names)
        if (value is None or isinstance(value, str)) and value in choices:
            return choices[value]
        return self._refuse(names, value, f"one of {', '.join(filter(None, choices))}")

    def mapping(self, *names: str) -> Mapping[str, object] | None:
        """An object with string keys, or None."""
        value = self.raw(*names)
        if value is None or (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            return value
        return self._refuse(names, value, "an object")

    def raw(self, *names: str) -> object:
        """The value as it is, from whichever spelling has one."""
        self._read.update(names)
        present = [name for name in names if name in self._values]
        given = [name for name in present if self._values[name] is not None]
        for name in given[1:]:
            if not _same(self._values[given[0]], self._values[name]):
                raise UnsupportedError(
                    f"{self._prefix}{given[0]} is {show(self._values[given[0]])} but {self._prefix}{name} is "
                    f"{show(self._values[name])}: the two spellings of one field must agree"
                )
        if given:
            return self._values[given[0]]
        return None if present else self._defaults.get(names[0])

    def given(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self._values.get(name) is not None

    def has_read(self, name: str) -> bool:
        """Whether somebody has asked for the field."""
        return name in self._read

    def must_be(self, name: str, allowed: Iterable[object], why: str) -> None:
        """Refuse any value but those allowed; an absent field passes."""
        if name in self._values and not any(_same(self._values[name], value) for value in allowed):
            raise UnsupportedError(f"{self._prefix}{name} is {show(self._values[name])}: {why}")
        self._read.add(name)

    def close(self, ignored: Iterable[str]) -> None:
        """Raise on the first field that was neither read nor listed as ignored."""
        for name in self._values:
            if name not in self._read and name not in ignored:
                raise UnsupportedError(
                    f"field {self._prefix}{show(name)} with value {show(self._values[name])} is not supported"
                )

    def _refuse(self, names: tuple[str, ...], value: object, expected: str) -> NoReturn:
        name = next((name for name in names if name in self._values), names[0])
        raise UnsupportedError(f"{self._prefix}{name} must be {expected}, got {show(value)}")


def _same(left: object, right: object) -> bool:
    """Equal as JSON values: unlike Python's `==`, true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 <= value <= 1e30
