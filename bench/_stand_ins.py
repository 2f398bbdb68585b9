"""Stand-ins for an engine's compiled programs, so that what the host does in a decode step can be timed alone.

`NullPrograms` take and return the arguments of the real ones but compute nothing; `Playback` hands the engine the
routes that a real run took. Residency, bookkeeping, numpy, read-backs and calls are then all real, with nothing for
the device to do.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.runtime.programs import Programs
from ef_jax.runtime.steps import Routed
from ef_jax.schedule.device_link import DeviceLink

Clocks = dict[str, float]


class NullPrograms(Programs):
    """Programs of the real ones' signatures, shapes and donations: a donated argument is passed through, every other
    result is zeros. Arguments are handed over although nothing reads them, since that is part of a call's cost."""

    @classmethod
    def of(cls, programs: Programs) -> "NullPrograms":
        """Stand-ins for `programs`, still to be compiled."""
        null = cls.__new__(cls)
        vars(null).update(vars(programs), _compiled={}, _memory={}, _passes={})
        return null

    def _program(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Any],
        inputs: Callable[[], tuple[Any, ...]],
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        if key not in self._compiled:
            arguments = inputs()
            results = jax.eval_shape(function, *arguments)

            def null(*given: Any) -> Any:
                passed = [leaf for index in donate for leaf in jax.tree.leaves(given[index])]
                return jax.tree.map(lambda shape: _pass_or_zeros(passed, shape), results)

            jitted = jax.jit(null, donate_argnums=donate, out_shardings=self._sharding, keep_unused=True)
            self._compiled[key] = jitted.lower(*arguments).compile()
        return self._compiled[key]


def null_inserts(link: DeviceLink) -> list[Callable[..., jax.Array]]:
    """Stand-ins for the inserts of `link.pool`, which leave the pool as it is."""
    pool = link.pool
    source = link._store.block(0, 0)
    sharding = source.sharding if link.mode == "in_program" else link._sharding
    block = jax.ShapeDtypeStruct(source.shape, source.dtype, sharding=sharding)
    whole = jax.ShapeDtypeStruct(pool.array.shape, pool.array.dtype, sharding=pool.array.sharding)
    insert = jax.jit(lambda pool, blocks, slots: pool, donate_argnums=0, keep_unused=True)
    counts = range(1, len(pool._insert) + 1)
    return [insert.lower(whole, [block] * n, jax.ShapeDtypeStruct((n,), np.int32)).compile() for n in counts]


class Playback:
    """Stands between an engine and its programs in decode steps.

    Args:
      programs: what is called.
      routes: what the routers are to return, int32 `[B, 1, K]` ready on the device, layer by layer and step by step;
        None: what `programs` return, kept in `taken`.
      clocks: has seconds added: "dispatch", in calls; "read_back", in fetching routes and tokens to the host.
    """

    def __init__(
        self, programs: Programs, *, routes: Iterator[jax.Array] | None = None, clocks: Clocks | None = None
    ) -> None:
        self._programs, self._routes, self._clocks = programs, routes, clocks
        self._passes: dict[tuple[int, int], list[Callable[..., Any]]] = {}
        self.taken: list[jax.Array] = []
        self.span = programs.span

    def layers(self, width: int, span: int) -> list[Callable[..., Any]]:
        """See `Programs`."""
        if (width, span) not in self._passes:
            self._passes[width, span] = [self._layer(program) for program in self._programs.layers(width, span)]
        return self._passes[width, span]

    def end_step(self) -> Callable[..., Any]:
        """See `Programs`."""
        program = self._programs.end_step()
        return lambda *arguments: self._call(program, arguments)

    def head(self) -> Callable[..., Any]:
        """See `Programs`."""
        program = self._programs.head()

        def call(*arguments: Any) -> tuple[Any, ...]:
            tokens, *others = self._call(program, arguments)
            return self._timed(tokens), *others

        return call

    def _layer(self, program: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            carried, *others = self._call(program, arguments)
            if isinstance(carried, Routed):
                ids = carried.ids if self._routes is None else next(self._routes)
                if self._routes is None:
                    self.taken.append(ids)
                carried = carried._replace(ids=self._timed(ids))
            return carried, *others

        return call

    def _call(self, program: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._clocks is None:
            return program(*arguments)
        arguments = tuple(_plain(argument) for argument in arguments)
        return timed(program, self._clocks, "dispatch")(*arguments)

    def _timed(self, array: jax.Array) -> Any:
        return array if self._clocks is None else _TimedArray(array, self._clocks)


class _TimedArray:
    """An array that times its way to the host."""

    def __init__(self, array: jax.Array, clocks: Clocks) -> None:
        self.array, self._clocks = array, clocks

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return timed(np.asarray, self._clocks, "read_back")(self.array)


def timed(function: Callable[..., Any], clocks: Clocks, name: str) -> Callable[..., Any]:
    """`function`, adding its seconds to `clocks[name]`."""

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        clocks[name] += time.perf_counter() - began
        return result

    return call


def _plain(argument: Any) -> Any:
    """`argument` with the device array of a `_TimedArray`, wherever a program takes one."""
    if isinstance(argument, _TimedArray):
        return argument.array
    if isinstance(argument, tuple) and argument and isinstance(argument[0], Routed):
        routed, *others = argument
        return (routed._replace(ids=_plain(routed.ids)), *others)
    return argument


def _pass_or_zeros(passed: list[jax.Array], shape: jax.ShapeDtypeStruct) -> jax.Array:
    for index, array in enumerate(passed):
        if array.shape == shape.shape and array.dtype == shape.dtype:
            return passed.pop(index)
    return jnp.zeros(shape.shape, shape.dtype)
