"""How many layers ahead blocks are fetched, layer by layer, from what is measured while serving."""

import math
from collections import deque
from typing import Any

from ef_jax.schedule.need import Need
from ef_jax.schedule.pace import LinkPace
from ef_jax.schedule.trust import Trust

LONGEST = 8
_WAITS = 2.0  # blocks waited for behind a full window, less what was fetched too early, until a horizon grows by one
_OVERFETCHES = 16.0  # blocks fetched too early, less what was waited for, until it shrinks by one
_REACH = 2  # layers by which the counters move a horizon from the formula at most
_SLACK = 0.1  # layers by which the formula must leave the whole number that it was rounded to
_LEAST_IDLE = 0.01  # of the time, or of a block's time in a layer
_LEAST_TRUST = 0.05
_CHANGES, _STEPS = 256, 1024  # that a report goes back


class Horizons:
    """The horizon of every layer: from how many layers ahead of it its blocks may be fetched.

    It begins at S = N x block seconds / layer seconds, rounded up, the layers that computing must go on for to hide
    the copies that one needs (ExpertFlow-S, arXiv:2510.26730), where N are the blocks that the layer is expected to
    fetch and the seconds are measured on the way. Two counters correct it. Blocks that were waited for although they
    were predicted, because the window before was full, lengthen it by one; blocks that were fetched and left unused
    shorten it by one; either counter begins anew when it has had its effect, and they count against each other.
    They move it by two layers at most, and begin anew when the formula moves: behind a link that is always full stalls
    would lengthen every horizon to the end, and keep it there after the link has recovered (`bench.horizon`, part
    "adaptation": a horizon that takes 40 to 90 steps to follow the link then mostly takes 3 to 18; steps take as long).

    No horizon reaches further than predictions can be trusted (`Trust` of at least 0.05), and all are 0 while no copy
    can hide behind computing: less than 1 % of the time is left by demand copies, or a layer computes for less than
    1 % of a block's time. On routes of DeepSeek-V2-Lite, with predictions of which 90 % come true one layer ahead, the
    choice of S moves step times by 2 % at most while candidates are chosen by value, since a full window then holds
    much the same blocks; it bounds what is looked at.

    Args:
      layers: MoE layers, L.
      need: the estimate of N.
      fixed: the horizon of all layers for ever; None: as above.
      longest: no horizon is longer.

    Attributes:
      of: the horizon of each layer.
    """

    def __init__(self, *, layers: int, need: Need, fixed: int | None = None, longest: int = LONGEST) -> None:
        self.need, self.fixed = need, fixed
        self.longest = min(layers, longest if fixed is None else fixed)
        self.of = [self.longest if fixed is not None else 1] * layers
        self._base, self._shift = [1] * layers, [0] * layers
        self._count = [0.0] * layers
        self._limit, self._why = self.longest, ""
        self._pace = LinkPace(0.0, 0.0, 1.0)
        self._step = 0
        self._changes: deque[dict[str, Any]] = deque(maxlen=_CHANGES)
        self._means: deque[float] = deque(maxlen=_STEPS)

    @property
    def mean(self) -> float:
        """Over the layers."""
        return sum(self.of) / len(self.of)

    def begin_step(self, batch: int, diversity: float | None, pace: LinkPace, trust: Trust) -> None:
        """A step begins: work out the horizons from what is measured by now."""
        self.need.begin_step(batch, diversity)
        self._step += 1
        if self.fixed is None:
            self._pace = pace
            limit, self._limit = self._limit, self._bound(pace, trust)
            ratios = (self.need.blocks * (pace.block_seconds / max(pace.layer_seconds, 1e-9))).tolist()
            for layer, (base, ratio) in enumerate(zip(self._base, ratios, strict=True)):
                if not base - 1 - _SLACK <= ratio <= base + _SLACK:
                    self._base[layer] = min(max(1, math.ceil(ratio)), self.longest)
                    self._shift[layer], self._count[layer] = 0, 0.0
                    self._set(layer, "the formula")
            if self._limit != limit:
                for layer in range(len(self.of)):
                    self._set(layer, self._why)
        self._means.append(self.mean)

    def served(self, layer: int, waited: int, full: bool, wasted: int) -> None:
        """A layer has been asked for.

        Args:
          layer: MoE layer.
          waited: blocks that it must wait for.
          full: the window before it had no room left for blocks that were worth fetching.
          wasted: blocks of it that have left unused since it was last asked for.
        """
        if self.fixed is not None:
            return
        count = self._count[layer] + (waited if full else 0) - wasted * (_WAITS / _OVERFETCHES)
        if count >= _WAITS:
            count = 0.0
            self._move(layer, 1, "stalls behind a full window")
        elif count <= -_WAITS:
            count = 0.0
            self._move(layer, -1, "over-fetched blocks")
        self._count[layer] = count

    def report(self) -> dict[str, Any]:
        """Inputs, choices and reasons as plain JSON types.

        Returns:
          `block_seconds`, `layer_seconds`, `idle_share`: the measured pace. `limit` and `limit_because`: of every
          horizon. `mean`: horizon over the layers. `layers`: of each, its horizon, what it was worked out from, and the
          reason in words. `changes`: the last changes, `mean_by_step`: the means of the last steps, oldest first.
        """
        layers = []
        for layer, (horizon, need) in enumerate(zip(self.of, self.need.blocks.tolist(), strict=True)):
            entry = {"layer": layer, "horizon": horizon, "need": round(need, 3)}
            if self.fixed is None:
                entry |= {
                    "formula": self._base[layer],
                    "shift": self._shift[layer],
                    "reason": self._reason(layer, need),
                }
            layers.append(entry)
        return {
            "fixed": self.fixed,
            **self._pace._asdict(),
            "limit": self._limit,
            "limit_because": self._why,
            "mean": self.mean,
            "layers": layers,
            "changes": list(self._changes),
            "mean_by_step": list(self._means),
        }

    def _bound(self, pace: LinkPace, trust: Trust) -> int:
        """The longest horizon that makes sense now."""
        if pace.idle_share < _LEAST_IDLE:
            self._why = f"demand copies leave {100 * pace.idle_share:.1f} % of the time"
            return 0
        if pace.layer_seconds < _LEAST_IDLE * pace.block_seconds:
            self._why = (
                f"a layer computes for {1e3 * pace.layer_seconds:.3g} ms and a block takes "
                f"{1e3 * pace.block_seconds:.3g} ms"
            )
            return 0
        for distance, share in enumerate(trust.of[: self.longest]):
            if share < _LEAST_TRUST:
                self._why = f"{100 * share:.0f} % of what is predicted for distance {distance + 1} comes true"
                return distance
        self._why = "no horizon is longer"
        return self.longest

    def _move(self, layer: int, by: int, reason: str) -> None:
        base = self._base[layer]
        least, most = max(1 - base, -_REACH), min(self.longest - base, _REACH)
        self._shift[layer] = min(max(self._shift[layer] + by, least), most)
        self._set(layer, reason)

    def _set(self, layer: int, reason: str) -> None:
        before, now = self.of[layer], min(max(1, self._base[layer] + self._shift[layer]), self._limit)
        if now != before:
            self.of[layer] = now
            self._changes.append({"step": self._step, "layer": layer, "from": before, "to": now, "reason": reason})

    def _reason(self, layer: int, need: float) -> str:
        if self.of[layer] == self._limit < self._base[layer] + self._shift[layer]:
            return self._why
        pace, shift = self._pace, self._shift[layer]
        moved = f", {shift:+d} by stalls and over-fetches" if shift else ""
        return (
            f"{need:.2f} blocks of {1e3 * pace.block_seconds:.3g} ms to hide behind layers of "
            f"{1e3 * pace.layer_seconds:.3g} ms{moved}"
        )
