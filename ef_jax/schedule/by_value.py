"""Candidates by value: the stall that a copy is expected to save, against what its link time and its slot are worth."""

import operator
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from ef_jax.memory.policies import Key
from ef_jax.memory.residency import Residency
from ef_jax.schedule.pace import LinkPace

_ABSENT = np.float32(1e9)  # more than any resident key costs
_LEAST = 2e-4  # value of a copy, in blocks of stall: the work of handing over 5000 blocks is worth a stall of one
_MOST = 64  # blocks a plan
_PRICED_OUT = 0.25  # of the price: blocks of less value are not looked at, unless there is room for all others
_SORTED = 24  # more candidates than can matter that are cheaper to sort than to leave out
_BATCH = 32  # victims that are looked for at a time, at most
_AGE = 8  # slots taken, or layers without any, after which they are looked for anew
_MEMORY = 16  # layers of steps, or plans, that the measures reach back
_LATE = 0.5  # of a block's time that a late one is waited for
_RATE = 1 / 32  # at which frequencies of use follow the steps
_LATER = 0.4  # worth of a use one visit of its layer later


_Candidate = tuple[float, int, int]  # value, distance, expert
_Chosen = tuple[list[_Candidate], float]


class ByValue:
    """Fetches the blocks that save most, into slots of those that cost least; of any layer, whatever its floor.

    Values are in blocks of stall. A block for the next layer saves its probability of use: nothing else can. One for a
    layer further on saves less, since it can be fetched later, at a price. It saves its probability times

        share^2 + (1 - share^2) x price.

    `price` is what the best block was worth that found no room on the link in the window before that layer, `share` the
    part of the experts that the layer used and that had to be fetched which it had to wait for; both are measured as
    steps go by. With a link that is idle for the most part both are near 0; with a saturated one `price` is near 1,
    since every block that is fetched takes the place of another. The same makes the cost of giving up a slot, of the
    probability that its block is used at the next visit of its layer, or else at a later one, for it would have to be
    fetched again; but it is never more than the price of that.

    The link can begin so many blocks before each of the coming layers asks. Blocks of the greatest value come first,
    and each takes the last place that is early enough for it; those that land in the window that begins now are
    fetched, and if that leaves room, the nearest of the others. (Unit tasks with deadlines: the greedy choice is best.)
    So a good block for a layer further on goes before a doubtful one for the next layer only if it would not find a
    place later.

    The last block of a full window is still under way when the next layer asks. Unless it is used, a demand copy waits
    for it: it goes only if it is worth that.

    What a later use is worth goes by the decayed frequency of use, whatever the predictor says. Chosen by measurement,
    on routes of DeepSeek-V2-Lite with predictions from history alone and with such of which 90 % come true one layer
    ahead, over links of 0.25 to 8 times the bandwidth that balances computing: the square of the share (the share
    itself stalls up to 17 % longer with the one, the price alone as much with the other). A use one visit later counts
    0.4; any figure from 0.2 to 0.8 does, and 0 stalls a quarter longer where half of the experts are cached.

    Args:
      residency: which block is where.
      longest: no horizon is longer.

    Attributes:
      prices: see above, by layer.
      full: the last plan had no room left for a block of any value.
      waste_price: what a copy that is never used costs besides, in blocks of stall; see `WasteBound`.
    """

    def __init__(self, residency: Residency, *, longest: int) -> None:
        layers, experts = residency.layers, residency.experts
        self._residency, self._longest = residency, longest
        self.full = False
        self.waste_price = 0.0
        self.prices, self._plans = [0.5] * layers, [0] * layers
        self._cap = [0.5] * layers
        self._own = 0.5
        self._fetched, self._waited, self._missed = [1.0] * layers, [0.5] * layers, [0.5] * layers
        self._factor = [0.5] * layers
        self._frequency = np.zeros((layers, experts), np.float32)
        self._uses: list[int] = []  # of the running step, as places in the table
        self._steps = 0
        self._later = np.zeros((layers, experts), np.float32)  # worth of later uses
        self._not_later = np.ones((layers, experts), np.float32)
        self._cost = np.empty((layers, experts), np.float32)
        self._targets = [(np.arange(longest) + layer + 1) % layers for layer in range(-1, layers)]
        self._orders = [targets.tolist() for targets in self._targets]
        self._victims: list[tuple[float, int]] = []
        self._age = 0
        self._dear = 0.0  # about the cost of the last of a batch

    def begin_step(self) -> None:
        """A step begins."""
        self._steps += 1
        used = np.zeros_like(self._frequency)
        used.reshape(-1)[self._uses] = 1
        self._uses.clear()
        self._frequency += max(_RATE, 1 / self._steps) * (used - self._frequency)
        np.multiply(self._frequency, _LATER, out=self._later)
        np.subtract(1, self._later, out=self._not_later)

    def served(self, layer: int, needed: Sequence[int], foreseen: int, late: int, missing: int) -> None:
        """Of what a layer `needed`, `foreseen` blocks had been fetched in time, `late` ones were under way, others were
        `missing`."""
        first = layer * self._residency.experts
        self._uses += [first + expert for expert in needed]
        fetched, waited, missed = self._fetched, self._waited, self._missed
        fetched[layer] += (foreseen + late + missing - fetched[layer]) / _MEMORY
        waited[layer] += (_LATE * late + missing - waited[layer]) / _MEMORY
        missed[layer] += ((missing > 0) - missed[layer]) / _MEMORY
        self._refactor(layer)

    def share(self, layer: int) -> float:
        """Of the blocks that `layer` used and that had to be fetched, the part that it waited for."""
        return min(1.0, self._waited[layer] / max(self._fetched[layer], 1e-3))

    def choose(
        self,
        layer: int,
        needed: Sequence[int],
        ahead: Float32[np.ndarray, "L E"],
        reach: Sequence[int],
        room: int,
        pace: LinkPace,
        trust: Sequence[float],
    ) -> tuple[list[Key], list[int]]:
        """Take slots for blocks that are worth fetching now.

        Args:
          layer: MoE layer that runs; -1 before layer 0.
          needed: its experts, which keep their slots.
          ahead: probability of use by the layers after it, the nearest first.
          reach: the horizon of each layer.
          room: blocks that the link can begin before the next layer asks, at least 1.
          pace: of the link.
          trust: part of the probabilities that holds, by distance.

        Returns:
          Keys in the order in which they should be copied, and their slots.
        """
        near = self._orders[layer + 1][0]
        self._own = self._factor[near]
        self._factor[near], self._cap[near] = 1.0, 1.0
        room = min(room, _MOST)
        candidates = self._candidates(layer, ahead, reach, trust, room)
        if len(candidates) > room:
            chosen, rejected = self._for_this_window(candidates, room, pace)
        else:
            chosen, rejected = candidates, 0.0
        self._priced(near, rejected)
        keys: list[Key] = []
        slots: list[int] = []
        if chosen:
            chosen.sort(key=_urgency)
            if len(chosen) == room and not self._last_is_worth_it(chosen[-1], room, near, pace):
                chosen.pop()
            keys, slots = self._place(layer, needed, ahead, chosen)
        self._refactor(near)
        return keys, slots

    def _refactor(self, layer: int) -> None:
        share, price = self.share(layer), self.prices[layer]
        self._factor[layer] = share * share + (1 - share * share) * price
        self._cap[layer] = price + _LEAST

    def _priced(self, layer: int, rejected: float) -> None:
        """The window before `layer` had no room for a block of the value `rejected`."""
        self.full = rejected > 0
        plans = self._plans[layer] = min(self._plans[layer] + 1, _MEMORY)
        self.prices[layer] += (rejected - self.prices[layer]) / plans

    def _candidates(
        self, layer: int, ahead: Float32[np.ndarray, "L E"], reach: Sequence[int], trust: Sequence[float], room: int
    ) -> list[_Candidate]:
        """Absent blocks by falling value, as many as can matter."""
        order, factor = self._orders[layer + 1], self._factor
        count = self._longest
        while count and reach[order[count - 1]] < count:
            count -= 1
        if not count:
            return []
        weights = [
            factor[target] * trust[place] if reach[target] > place else 0.0
            for place, target in enumerate(order[:count])
        ]
        values = ahead[:count] * np.array(weights, np.float32)[:, None]
        if layer + count < len(factor):
            slots = self._residency.slot_of[layer + 1 : layer + 1 + count]
        else:
            slots = self._residency.slot_of.take(order[:count], axis=0)
        values *= slots < 0
        for target, expert in self._residency.in_flight:
            if target in order[:count]:
                values[order.index(target), expert] = 0
        flat = values.reshape(-1)
        places = (flat > max(_LEAST, _PRICED_OUT * self.prices[order[0]])).nonzero()[0]
        if len(places) <= room:
            places = (flat > _LEAST).nonzero()[0]
        worth = flat[places]
        most = (room + 1) * (count + 1)
        if len(places) > most + _SORTED:
            best = worth.argpartition(-most)[-most:]
            places, worth = places[best], worth[best]
        falling = sorted(zip((-worth).tolist(), places.tolist(), strict=True))  # of equals, the nearest first
        experts = self._residency.experts
        return [(-value, place // experts + 1, place % experts) for value, place in falling[:most]]

    def _for_this_window(
        self, candidates: list[_Candidate], room: int, pace: LinkPace
    ) -> tuple[list[_Candidate], float]:
        """Those to fetch now, and the value of the best that finds no room at all."""
        window = min(pace.layer_seconds / pace.block_seconds, 2.0 * _MOST) if pace.block_seconds else 2.0 * _MOST
        begun = [int(window * windows) for windows in range(1, self._longest + 1)]
        left = [0, room, *map(operator.sub, begun[1:], begun)]  # by distance
        now: list[_Candidate] = []
        later: list[_Candidate] = []
        rejected = 0.0
        for candidate in candidates:
            place = candidate[1]
            while place and not left[place]:
                place -= 1
            if not place:
                rejected = candidate[0]
                break
            left[place] -= 1
            (now if place == 1 else later).append(candidate)
        if later and len(now) < room:
            later.sort(key=_urgency)
            now += later[: room - len(now)]
        return now, rejected

    def _last_is_worth_it(self, last: _Candidate, room: int, near: int, pace: LinkPace) -> bool:
        """Whether a block that is still under way when the next layer asks saves more than it costs then."""
        overrun = room * pace.block_seconds - pace.layer_seconds
        if overrun <= 0:
            return True
        value, distance, _ = last
        hurts = self._missed[near] * overrun
        if distance > 1:
            return value * pace.block_seconds > hurts
        return value * (pace.block_seconds - overrun) > (1 - value) * hurts

    def _place(
        self, layer: int, needed: Sequence[int], ahead: Float32[np.ndarray, "L E"], chosen: list[_Candidate]
    ) -> tuple[list[Key], list[int]]:
        """Slots for the chosen, the most valuable first, as long as they are worth more than what leaves for them."""
        residency, order = self._residency, self._orders[layer + 1]
        keys = [(order[distance - 1], expert) for _, distance, expert in chosen]
        slots = [-1] * len(keys)
        free = residency.free
        victims = self._cheapest(layer, needed, ahead, len(chosen) - free)
        held: tuple[float, Key] | None = None
        for place in sorted(range(len(chosen)), key=lambda place: -chosen[place][0]):
            cost, leaves = 0.0, None
            if not free:
                held = held or next(victims, None)
                if held is None:
                    break
                cost, leaves = held
            if (not free or self.waste_price) and self._gain(keys[place], chosen[place]) - cost <= _LEAST:
                if self.waste_price:
                    continue  # one of less value may be surer
                break
            free, held = max(0, free - 1), None
            slots[place] = residency.displace(*keys[place], leaves)
        if -1 in slots:
            keys = [key for key, slot in zip(keys, slots, strict=True) if slot >= 0]
            slots = [slot for slot in slots if slot >= 0]
        return keys, slots

    def _gain(self, key: Key, candidate: _Candidate) -> float:
        """What a block is worth in a slot, of its next use and of later ones, less the price of its being wasted."""
        value, distance, _ = candidate
        later, factor = float(self._later[key]), self._factor[key[0]]
        gain = value + (1 - value) * later * (self._own if distance == 1 else factor)
        if self.waste_price:
            gain -= self.waste_price * (1 - min(value / factor, 1.0)) * (1 - later)
        return gain

    def _cheapest(
        self, layer: int, needed: Sequence[int], ahead: Float32[np.ndarray, "L E"], wanted: int
    ) -> Iterator[tuple[float, Key]]:
        """Resident keys that may leave, and what that costs, the cheapest first or nearly so."""
        slot_of, experts = self._residency.slot_of, self._residency.experts
        if not self._residency.policy.gives_way:
            return
        later, factor, layers = self._later, self._factor, len(self._factor)
        self._age += max(1, wanted)
        for _ in range(2):
            if self._age > _AGE or len(self._victims) < wanted:
                self._look_for_victims(layer, ahead, wanted + len(needed))
            while self._victims:
                before, place = self._victims.pop()
                key = owner, expert = divmod(place, experts)
                if slot_of[key] < 0 or (owner == layer and expert in needed):
                    continue
                likely, again = float(ahead[(owner - layer - 1) % layers, expert]), float(later[key])
                cost = min((likely + (1 - likely) * again) * factor[owner], self._cap[owner])
                if cost <= 1.5 * before + _LEAST:
                    yield cost, key

    def _look_for_victims(self, layer: int, ahead: Float32[np.ndarray, "L E"], wanted: int) -> None:
        """The resident keys of least cost, the dearest of them first."""
        self._age = 0
        cost, behind = self._cost, len(self._factor) - 1 - layer
        np.multiply(ahead[:behind], self._not_later[layer + 1 :], out=cost[layer + 1 :])
        np.multiply(ahead[behind:], self._not_later[: layer + 1], out=cost[: layer + 1])
        cost += self._later
        cost *= np.array(self._factor, np.float32)[:, None]
        np.minimum(cost, np.array(self._cap, np.float32)[:, None], out=cost)
        cost += (self._residency.slot_of < 0) * _ABSENT  # several times faster than a choice by a mask
        flat = cost.reshape(-1)
        count = min(max(_BATCH, 2 * wanted), self._residency.cache_slots // 12 + wanted, len(flat))
        places = (flat < self._dear).nonzero()[0]
        if not count <= len(places) <= 4 * count:
            places = flat.argpartition(count - 1)[:count]
            self._dear = 1.5 * float(flat[places[-1]])
        costs = flat[places]
        falling = costs.argsort()[count - 1 :: -1]
        self._victims = list(zip(costs[falling].tolist(), places[falling].tolist(), strict=True))


def _urgency(candidate: _Candidate) -> tuple[int, float]:
    return candidate[1], -candidate[0]
