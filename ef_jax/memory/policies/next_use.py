"""Our own policy: the key whose next use is worth least leaves."""

import itertools
import math
from collections.abc import Collection, Sequence

import numpy as np

from ef_jax.memory.policies.base import Key, Policy
from ef_jax.memory.policies.ranked import views
from ef_jax.memory.policies.use_value import UseValue

_LIFE = (1.0, 64.0)


class NextUse(Policy):
    """Evicts the key whose next use is worth least, over all layers; a miss that is worth less still is not cached.

    A use is worth exp(-t / life), t steps away. `life` is how long a key can expect to stay, cache slots over misses
    a step, as measured: uses beyond it are no reason to keep a key. t has two parts. The way to the layer's next visit
    is known exactly: layers just passed wait a whole step, those just ahead hardly at all. The visits from then to the
    next use are uncertain, and `UseValue` learns what to expect of them from the routing of all layers as it goes on.
    """

    floor_share = 0.25

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self._value = UseValue(layers=layers, experts=experts)
        self._life = 4.0
        self._misses, self._missed = 0.0, 0
        self._steps = 0
        self._routed = False
        self._top_k = 0
        # Worth at the start of the step, comparable among layers; and the same with infinity for who cannot leave.
        self._worth = np.zeros((layers, experts), np.float32)
        self._worth_rows, self._worth_cells = list(self._worth), views(self._worth)
        self._closed = np.full((layers, experts), np.inf, np.float32)
        self._closed_rows, self._closed_cells = list(self._closed), views(self._closed)
        self._leaving = np.full((layers, experts), np.inf, np.float32)
        self._leaving_rows, self._leaving_cells = list(self._leaving), views(self._leaving)
        self._flat = self._leaving.reshape(-1)
        self._begin_step()

    def on_step(self, tokens: Sequence[int]) -> None:
        if self._routed:
            self._steps += 1
            self._misses += max(1 / self._steps, 0.02) * (self._missed - self._misses)
            self._missed, self._routed = 0, False
            shortest, longest = _LIFE
            self._life = min(max(self.cache_slots / max(self._misses, 1e-3), shortest), longest)
            self._value.end_step(self._life)
        self._begin_step()

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._routed = True
        self._top_k = len(rows[0])
        experts = rows[0] if len(rows) == 1 else list(itertools.chain.from_iterable(rows))
        worth = np.multiply(self._value.route(layer, experts), self._after[layer], out=self._worth_rows[layer])
        np.add(worth, self._closed_rows[layer], out=self._leaving_rows[layer])

    def on_prompt(self, layer: int, counts: np.ndarray) -> None:
        # Every token uses top-k experts of a layer. Where no step has shown that number, or tokens differ in it, there
        # are at least as many as use the same expert.
        rows = max(int(counts.sum()) // self._top_k if self._top_k else 0, int(counts.max()))
        if rows:
            self._value.prompt(layer, counts, rows)

    def on_enter(self, layer: int, expert: int) -> None:
        self._closed_cells[layer][expert] = 0.0
        self._leaving_cells[layer][expert] = self._worth_cells[layer][expert]

    def on_evict(self, layer: int, expert: int) -> None:
        self._closed_cells[layer][expert] = math.inf
        self._leaving_cells[layer][expert] = math.inf

    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        flat, rows, cells = self._flat, self._leaving_rows, self._leaving_cells
        self._missed += len(missing)
        kept = {layer: rows[layer].copy()}
        own, own_worth = cells[layer], self._worth_cells[layer]
        for expert in needed:
            own[expert] = math.inf
        chosen: dict[int, Key] = {}
        left = list(spare)
        for worth, expert in sorted([(own_worth[expert], expert) for expert in missing], reverse=True):
            while expert not in chosen:
                place = int(flat.argmin())
                loser, other = divmod(place, self.experts)
                if cells[loser][other] >= worth:
                    break
                if loser not in kept:
                    kept[loser] = rows[loser].copy()
                if left[loser] > 0:
                    left[loser] -= 1
                    chosen[expert] = loser, other
                    cells[loser][other] = math.inf
                else:
                    rows[loser][:] = math.inf  # no more of this layer
            else:
                continue
            break  # what is worth less finds nobody either
        for loser, row in kept.items():
            rows[loser][:] = row
        return [chosen.get(expert) for expert in missing]

    def _begin_step(self) -> None:
        """Worth of every key by its value and by the way to its layer's next visit."""
        layers = self.layers
        way = np.exp(np.arange(layers) / (-layers * self._life)).astype(np.float32)
        self._after = [np.array(each) for each in way * np.float32(math.exp(-1 / self._life))]
        np.multiply(self._value.values, way[:, None], out=self._worth)
        np.add(self._worth, self._closed, out=self._leaving)
