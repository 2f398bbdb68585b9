"""How many micro-batches a prompt's pass is cut into, so that rows are exchanged while others' experts are computed.

FinDEP's idea (arXiv 2512.21487): from linear costs, measured, the time of every cut is worked out and the best taken.
Of one device, a micro-batch m of layer l goes through

    attend(l, m) -> send(l, m) -> experts(l, m) -> collect(l, m) -> attend(l + 1, m)

Attention and experts share the device, the two exchanges share its network; each does one thing at a time. At most two
micro-batches are between `send` and `experts`, for which there are two buffers, so a layer of four computes

    attend 0, attend 1, experts 0, attend 2, experts 1, attend 3, experts 2, experts 3

and every exchange is queued right after what it needs. Each micro-batch reads the weights again: the fixed costs.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from ef_jax.errors import InputError

_TIE = 0.01  # of a time: measured costs are not known better


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearCost:
    """Seconds of so many rows: `fixed + per_row * rows`, and nothing for no rows.

    Raises:
      InputError: a negative or infinite number.
    """

    fixed: float
    per_row: float

    def __post_init__(self) -> None:
        for name in ("fixed", "per_row"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)} s: give 0 or more seconds")

    def seconds(self, rows: int) -> float:
        """What so many rows take."""
        return self.fixed + self.per_row * rows if rows else 0.0

    @classmethod
    def fit(cls, measured: Mapping[int, float]) -> "LinearCost":
        """The cost, neither part negative, whose relative errors have the least squares.

        Args:
          measured: seconds by rows, of two sizes or more.

        Raises:
          InputError: fewer sizes, or a size or a time that is not above 0.
        """
        if len(measured) < 2:
            raise InputError(f"costs measured at {len(measured)} sizes: give two or more")
        for rows, seconds in measured.items():
            if rows < 1 or not 0 < seconds < math.inf:
                raise InputError(f"{rows} rows in {seconds} s: give 1 row or more and a time above 0")
        shares = [(1 / seconds, rows / seconds) for rows, seconds in measured.items()]
        fixed, per_row = nnls(np.array(shares), np.ones(len(shares)))[0].tolist()
        return cls(fixed=fixed, per_row=per_row)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerCosts:
    """What the parts of a layer cost one device, by the tokens of its own that a micro-batch has.

    Attributes:
      attend: everything of a layer but its experts, the router included.
      send: exchange of tokens' rows to where their experts are.
      experts: of the rows that come; `fixed` is mostly the reading, or the copying, of weights.
      collect: exchange of outputs back.
    """

    attend: LinearCost
    send: LinearCost
    experts: LinearCost
    collect: LinearCost

    def alone(self, rows: int) -> float:
        """Seconds of a layer that is not cut."""
        return sum(getattr(self, part.name).seconds(rows) for part in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A cut into micro-batches, and why.

    Attributes:
      micro_batches: how many.
      rows: of a device, all micro-batches together.
      layers: of the pass.
      seconds: of the pass by number of micro-batches, predicted.
    """

    micro_batches: int
    rows: int
    layers: int
    seconds: Mapping[int, float]

    @property
    def gain(self) -> float:
        """How many times as fast as an uncut pass."""
        return self.seconds[1] / self.seconds[self.micro_batches]

    def __str__(self) -> str:
        times = ", ".join(f"{count}: {1e3 * seconds:.4g} ms" for count, seconds in self.seconds.items())
        return f"{self.rows} rows in {self.micro_batches} micro-batches (predicted for {self.layers} layers, {times})"


def choose_split(costs: LayerCosts, rows: int, *, layers: int = 1, counts: Sequence[int] = (1, 2, 4, 8)) -> Split:
    """The number of micro-batches with the shortest pass; of those within 1 % of it, the least.

    Args:
      costs: of a layer.
      rows: tokens that a device has in the pass.
      layers: in a row; one's last exchange is hidden by the next one's attention.
      counts: to choose from, 1 always among them; those above `rows` are left out.

    Raises:
      InputError: no rows, no layers, or a count below 1.
    """
    if rows < 1 or layers < 1 or min(counts, default=1) < 1:
        raise InputError(f"{rows} rows in {layers} layers, cut into {tuple(counts)}: give 1 or more of each")
    fitting = sorted({1, *(count for count in counts if count <= rows)})
    seconds = {count: pass_seconds(costs, rows, count, layers=layers) for count in fitting}
    most = min(seconds.values()) * (1 + _TIE)
    chosen = next(count for count in fitting if seconds[count] <= most)
    return Split(micro_batches=chosen, rows=rows, layers=layers, seconds=seconds)


def pass_seconds(costs: LayerCosts, rows: int, micro_batches: int, *, layers: int = 1) -> float:
    """From the first attention to the last row's return, of micro-batches as even as whole rows can be."""
    sizes = [(rows + place) // micro_batches for place in range(micro_batches)]
    computed = exchanged = 0.0  # when the device, and its network, are free
    there, back = [0.0] * micro_batches, [0.0] * micro_batches
    for _, (part, place) in itertools.product(range(layers), tuple(_order(micro_batches))):
        size = sizes[place]
        if part == "attend":
            computed = max(computed, back[place]) + costs.attend.seconds(size)
            exchanged = there[place] = max(exchanged, computed) + costs.send.seconds(size)
        else:
            computed = max(computed, there[place]) + costs.experts.seconds(size)
            exchanged = back[place] = max(exchanged, computed) + costs.collect.seconds(size)
    return exchanged


def _order(micro_batches: int) -> Iterator[tuple[str, int]]:
    """What a device computes in a layer."""
    yield "attend", 0
    for place in range(1, micro_batches):
        yield "attend", place
        yield "experts", place - 1
    yield "experts", micro_batches - 1
