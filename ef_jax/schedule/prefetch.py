"""Which blocks to fetch on predictions, and when to give up on them: ids only."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from ef_jax.errors import InputError
from ef_jax.memory.policies import Key
from ef_jax.memory.residency import Admission, Residency
from ef_jax.predict.predictor import Predictor
from ef_jax.schedule.arrivals import Arrivals
from ef_jax.schedule.by_value import ByValue
from ef_jax.schedule.horizon import LONGEST, Horizons
from ef_jax.schedule.link import Blocks, PrefetchLink
from ef_jax.schedule.nearest_first import RULES, NearestFirst
from ef_jax.schedule.need import make_need
from ef_jax.schedule.trust import Trust
from ef_jax.schedule.waste import WasteBound

CANDIDATES = ("value", *RULES)


class PredictorError(Exception):
    """A predictor has raised, or what it says is no number."""


class Prefetcher(Arrivals[Blocks]):
    """Fills what demand copies leave of a link with the blocks that coming layers are likely to use.

    The plan is made anew at every layer. What the link has not begun by then is withdrawn, and its slots are the first
    to be given out again, to the layer's misses if it has any. So a stale prefetch costs no copy, and a plan is never
    longer than what the link can begin before the next one.

    Args:
      residency: which block is where.
      link: copies blocks.
      predictor: how likely each expert is to be used.
      horizon: layers ahead that are planned for, 1 to L; past the last layer comes the first, of the next token.
        None: as measurements say, see `Horizons`.
      candidates: how blocks are chosen: "value" (`ByValue`), or a name of `nearest_first.RULES`.
      need: a name of `need.NEEDS`.
      most_wasted: the share of the blocks moved that candidates by value may waste, see `WasteBound`.
      longest: no horizon is longer, where none is given.
      among: gives bool `[L, E]`, the keys that can be fetched or are worth it; the others count as not used. None: all.

    Raises:
      InputError: no such rule or estimate, or no share.
    """

    def __init__(
        self,
        residency: Residency,
        link: PrefetchLink[Blocks],
        predictor: Predictor,
        *,
        horizon: int | None,
        candidates: str = "value",
        need: str = "batch",
        most_wasted: float = 1.0,
        longest: int = LONGEST,
        among: Callable[[], Bool[np.ndarray, "L E"]] | None = None,
    ) -> None:
        check_candidates(candidates)
        layers = residency.layers
        super().__init__(residency, link)
        self._predictor = predictor
        self._candidates = candidates
        self._among = among
        self.horizons = Horizons(layers=layers, need=make_need(need, layers=layers), fixed=horizon, longest=longest)
        self._trust = Trust(layers=layers, distances=self.horizons.longest)
        self._value = ByValue(residency, longest=self.horizons.longest)
        self._simple = NearestFirst(residency, RULES[candidates]) if candidates in RULES else None
        self._waste = WasteBound(most_wasted)
        self._wasted = [0] * layers
        self._demanded = self._moved_before = self._wasted_before = 0

    def begin_step(self, batch: int, diversity: float | None) -> None:
        """A step of `batch` tokens begins; see `Need.begin_step`."""
        moved, wasted = self._demanded + self._link.prefetches_begun, sum(self._residency.wasted)
        self._waste.end_step(moved - self._moved_before, wasted - self._wasted_before)
        self._moved_before, self._wasted_before = moved, wasted
        self._value.waste_price = self._waste.price
        self._value.begin_step()
        self.horizons.begin_step(batch, diversity, self._link.pace, self._trust)

    def served(self, layer: int, needed: Sequence[int], admission: Admission) -> None:
        """A layer uses the distinct experts `needed`: learn from what was there of them."""
        late, missing, foreseen = len(admission.late), len(admission.missing), admission.foreseen
        self._demanded += missing
        missing += len(admission.left)  # to have them in time would have been as good
        wasted = self._residency.wasted[layer]
        self.horizons.need.fetched(layer, foreseen + late + missing)
        self.horizons.served(layer, late + missing, self._value.full, wasted - self._wasted[layer])
        self._wasted[layer] = wasted
        self._value.served(layer, needed, foreseen, late, missing)
        self._trust.used(layer, needed)

    def plan(self, layer: int, needed: Sequence[int]) -> None:
        """Queue prefetches for the layers after `layer`, whose experts `needed` have their slots and keep them.

        Raises:
          PredictorError: the predictor's scores are no numbers.
        """
        link, horizons = self._link, self.horizons
        keys: list[Key] = []
        slots: list[int] = []
        room = link.window()
        if room > 0 and (any(horizons.of) or horizons.fixed is None):
            ahead = self._ahead(layer)
            if self._simple is None:
                self._trust.told(layer, ahead[: horizons.longest])  # also while it is too low to prefetch
                keys, slots = self._value.choose(layer, needed, ahead, horizons.of, room, link.pace, self._trust.of)
            else:
                keys, slots = self._simple.choose(layer, needed, ahead, horizons.of, room)
        link.prefetch(keys, slots)
        self._queued = len(keys)

    def skip(self) -> None:
        """Plan nothing after this layer; the link still hears that it has all that it asked for."""
        self._link.prefetch([], [])

    def _ahead(self, layer: int) -> Float32[np.ndarray, "L E"]:
        """Probabilities for the layers after `layer`, the nearest first; whatever goes wrong is the predictor's."""
        layers, experts = self._residency.layers, self._residency.experts
        try:
            ahead = self._predictor.ahead(layer, layers)
        except Exception as error:
            raise PredictorError(f"{type(error).__name__}: {error}") from error
        if ahead.shape != (layers, experts):
            raise PredictorError(f"its probabilities are of shape {ahead.shape}, not {(layers, experts)}")
        if not math.isfinite(ahead[0].dot(ahead[0])):  # every row is the nearest one some time
            raise PredictorError("its probabilities are not numbers")
        return ahead if self._among is None else ahead * np.roll(self._among(), -1 - layer, axis=0)

    def report(self) -> dict[str, Any]:
        """What is done and why, as plain JSON types; see `Horizons.report`."""
        value = self._value
        return {
            "candidates": self._candidates,
            "price": [round(price, 4) for price in value.prices],
            "trust": list(self._trust.of),
            "waste": self._waste.report(),
            "waited_share": [value.share(layer) for layer in range(self._residency.layers)],
            "prefetches_failed": self._link.prefetches_failed,
            **self.horizons.report(),
        }


def check_candidates(name: str) -> None:
    """Refuse a rule that there is not.

    Raises:
      InputError: no rule for candidates has that name.
    """
    if name not in CANDIDATES:
        raise InputError(f"candidates {name!r:.60} is not one of {', '.join(CANDIDATES)}")


def distinct(rows: Sequence[Sequence[int]]) -> Sequence[int]:
    """The experts of some rows, each once."""
    return rows[0] if len(rows) == 1 else list(dict.fromkeys(itertools.chain.from_iterable(rows)))
