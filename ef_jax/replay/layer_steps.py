"""`LayerSteps`: the keys that each layer of each step needs, as flat arrays, for the bounds that look ahead."""

import array
import dataclasses
import functools

import numpy as np
from jaxtyping import Int32, Int64

from ef_jax.errors import InputError
from ef_jax.replay.trace import RoutingTrace

PROMPT = -1  # the layer of a prompt pass

_BLOCK_STEPS = 1 << 14  # layer-steps that are turned into Python lists at a time


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerSteps:
    """What n layer-steps need, in the order in which they run.

    Layer-step i needs the distinct keys `keys[starts[i] : starts[i + 1]]` of layer `layers[i]`. Prompt passes that
    follow one another are one entry of layer `PROMPT`, with every key that they use: a prompt reads its experts
    whatever the cache holds, so for a bound these keys are within reach at no cost at that moment.

    Attributes:
      keys: int32 `[A]`, flat keys `layer * num_experts + expert`.
      layers: int32 `[n]`, the MoE layer, or `PROMPT`.
      starts: int64 `[n+1]`.
      num_layers: L.
      num_experts: E, experts a layer.
    """

    keys: Int32[np.ndarray, "A"]
    layers: Int32[np.ndarray, "n"]
    starts: Int64[np.ndarray, "n+1"]
    num_layers: int
    num_experts: int

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_keys(self) -> int:
        """L * E."""
        return self.num_layers * self.num_experts

    @functools.cached_property
    def widest(self) -> int:
        """Most keys that a layer-step needs at once, prompts left out."""
        return int(np.diff(self.starts)[self.layers != PROMPT].max(initial=0))

    @functools.cached_property
    def next_use(self) -> Int64[np.ndarray, "A"]:
        """The place at which each access's key is needed again; A where never, or where a prompt brings it.

        Places number the accesses from 0 to A-1, layer-step after layer-step, so that layer-step i holds the places
        `starts[i]` to `starts[i + 1]`. Within one, the key that is needed again first comes first, and of two that
        are needed again together, the one that comes first there.
        """
        return self._next_place(self._places)

    def upcoming(self, step: int) -> Int64[np.ndarray, "LE"]:
        """The first place of each key from layer-step `step` on; A where never, or where a prompt brings it."""
        order, key_starts = self._by_key
        at = np.searchsorted(self._codes, np.arange(self.num_keys) * (len(self) + 1) + step)
        found = at < key_starts[1:]
        place = np.full(self.num_keys, len(self.keys), np.int64)
        place[found] = self._unless_prompt(order[at[found]], self._places)
        return place

    def entries(self, next_use: Int64[np.ndarray, "_"], keys: Int32[np.ndarray, "_"]) -> Int64[np.ndarray, "_"]:
        """Numbers that sort keys by next use, furthest first; the key is the remainder by `num_keys`."""
        return (len(self.keys) - next_use) * self.num_keys + keys

    def limits(self, first: int, last: int) -> Int64[np.ndarray, "_"]:
        """For each of the layer-steps `first` to `last`, what the entries of keys next needed after it lie below."""
        return (len(self.keys) - self.starts[first + 1 : last + 1] + 1) * self.num_keys

    def followed_by(self, other: "LayerSteps") -> "LayerSteps":
        """These steps and then the others, as one run over a cache that goes on.

        Raises:
          InputError: the two are of models of different shapes.
        """
        mine, theirs = (self.num_layers, self.num_experts), (other.num_layers, other.num_experts)
        if mine != theirs:
            raise InputError(f"steps of {mine[0]} x {mine[1]} experts followed by {theirs[0]} x {theirs[1]}")
        return LayerSteps(
            keys=np.concatenate([self.keys, other.keys]),
            starts=np.concatenate([self.starts, self.starts[-1] + other.starts[1:]]),
            layers=np.concatenate([self.layers, other.layers]),
            num_layers=self.num_layers,
            num_experts=self.num_experts,
        )

    @functools.cached_property
    def _step_of(self) -> Int32[np.ndarray, "A"]:
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))

    @functools.cached_property
    def _by_key(self) -> tuple[Int64[np.ndarray, "A"], Int64[np.ndarray, "_"]]:
        """Accesses key by key, each key's in time order, and where each key's begin."""
        narrow = np.uint16 if self.num_keys <= 1 << 16 else np.int32
        order = np.argsort(self.keys.astype(narrow), kind="stable")  # 16 bits: a radix sort
        return order, np.concatenate([[0], np.cumsum(np.bincount(self.keys, minlength=self.num_keys))])

    @functools.cached_property
    def _codes(self) -> Int64[np.ndarray, "A"]:
        """Key and layer-step of each access, in one rising number."""
        order, _ = self._by_key
        return self.keys[order] * np.int64(len(self) + 1) + self._step_of[order]

    @functools.cached_property
    def _places(self) -> Int64[np.ndarray, "A"]:
        count = len(self.keys)
        after = self._next_place(np.arange(count))
        step_after = np.append(self._step_of, len(self))[after]
        order = np.lexsort((step_after, self._step_of))
        places = np.empty(count, np.int64)
        places[order] = np.arange(count)
        sorted_after = step_after[order]
        tied = (np.diff(self._step_of) == 0) & (np.diff(sorted_after) == 0) & (sorted_after[1:] < len(self))
        self._settle(places, after, np.unique(self._step_of[1:][tied]))
        return places

    def _settle(self, places: np.ndarray, after: np.ndarray, tied: np.ndarray) -> None:
        """Order the keys of the layer-steps `tied`, from the last to the first, by the places of their next uses."""
        settled = array.array("q", places.tobytes() + np.int64(len(places)).tobytes())
        for first in range(len(tied), 0, -_BLOCK_STEPS):
            block = tied[max(0, first - _BLOCK_STEPS) : first]
            begin, end = int(self.starts[block[0]]), int(self.starts[block[-1] + 1])
            next_access = after[begin:end].tolist()
            bounds = zip((self.starts[block] - begin).tolist(), (self.starts[block + 1] - begin).tolist(), strict=True)
            for low, high in reversed(list(bounds)):
                again = [settled[access] for access in next_access[low:high]]
                for place, at in enumerate(sorted(range(high - low), key=again.__getitem__), begin + low):
                    settled[begin + low + at] = place
        places[:] = np.frombuffer(settled, np.int64)[:-1]

    def _next_place(self, places: Int64[np.ndarray, "A"]) -> Int64[np.ndarray, "A"]:
        """`places` of the next access of each access's key."""
        order, key_starts = self._by_key
        following = np.full(len(places), len(places), np.int64)
        following[:-1] = self._unless_prompt(order[1:], places)
        following[key_starts[1:][np.diff(key_starts) > 0] - 1] = len(places)
        after = np.empty_like(following)
        after[order] = following
        return after

    def _unless_prompt(self, accesses: np.ndarray, places: np.ndarray) -> Int64[np.ndarray, "..."]:
        """Places of accesses; a prompt's costs nothing, so it is as good as none."""
        return np.where(self.layers[self._step_of[accesses]] == PROMPT, len(places), places[accesses])


def layer_steps(trace: RoutingTrace, batch: int | None = None) -> LayerSteps:
    """The layer-steps of a trace, in the order in which an engine runs them.

    Args:
      trace: recorded routing.
      batch: as `RoutingTrace.order` takes it: None as recorded, or B interleaved sequences.

    Raises:
      InputError: `batch` is below 1.
    """
    rows, bounds, prompt = trace.order(batch)
    layers, experts, passes = trace.layers, trace.num_experts, len(prompt)
    begins = np.ones(passes, bool)
    begins[1:] = ~(prompt[1:] & prompt[:-1])
    entries = np.where(prompt, begins, layers)
    ends = np.cumsum(entries)
    first = np.where(prompt, ends - 1, ends - entries)
    count = int(ends[-1])

    pass_of_row = np.repeat(np.arange(passes), np.diff(bounds))
    layer = np.arange(layers)
    step = first[pass_of_row][:, None] + np.where(prompt[pass_of_row][:, None], 0, layer)
    codes = (step * (layers * experts) + layer * experts)[:, :, None] + trace.experts[rows]
    codes = np.sort(codes, axis=None)  # np.unique hashes, which takes 20 times as long here
    step_of_key, keys = np.divmod(codes[np.diff(codes, prepend=-1) > 0], layers * experts)
    of_step = np.full(count, PROMPT, np.int32)
    of_step[(first[~prompt][:, None] + layer).ravel()] = np.tile(layer, int((~prompt).sum()))
    return LayerSteps(
        keys=keys.astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(np.bincount(step_of_key, minlength=count))]),
        layers=of_step,
        num_layers=layers,
        num_experts=experts,
    )
