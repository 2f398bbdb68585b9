"""The fewest blocks that must be fetched for stretches of a run, whatever was in the slots when each began."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from ef_jax.errors import InputError
from ef_jax.replay.belady import DemandRun
from ef_jax.replay.layer_steps import LayerSteps


class Window(NamedTuple):
    """Loads after layer-step `first - 1`, the last of a stretch that starts at layer-step `begin`.

    Attributes:
      begin: see above.
      first, last: layer-steps `first` to `last` are counted one by one.
      cumulative: float64 `[last - first]`, the fewest loads that serve layer-steps `first` to `first + k`.
      least: what serves layer-steps `first` to j, j being `last` or later, takes at least so many loads, more those
        that `WindowLoads.cumulative` counts from `last` to j.
    """

    begin: int
    first: int
    last: int
    cumulative: Float64[np.ndarray, "_"]
    least: int


class WindowLoads(NamedTuple):
    """Fewest loads of a whole run, and of windows of it.

    Attributes:
      slots: C.
      count_from: the layer-step at which the run starts.
      cumulative: float64 `[n+1]`, the fewest loads that serve the first k layer-steps of the run.
      windows: one after each stride.
    """

    slots: int
    count_from: int
    cumulative: Float64[np.ndarray, "_"]
    windows: list[Window]


def window_loads(
    steps: LayerSteps, slots: int, *, count_from: int = 0, window: int | None = None, stride: int | None = None
) -> WindowLoads:
    """Fewest loads of layer-steps `count_from` to the end, and of windows of about `window` layer-steps.

    A window opens when a layer-step ends: then at most C blocks are in slots, and among them all that the layer-step
    needed. What Belady's rule without bypass fetches from the best such contents is the least. It is so for any end
    of the window alike, since the rule prefers what is needed before the end to what is needed after it. With prefetch
    the loads are no fewer: each can be put off until it is needed.

    Where a window's run ends, it and the whole run hold different blocks, d of them only the window's. The whole run
    could fetch these d and go on as the window's does, and it is the best there is: so from there on the window's run
    loads at least as many as the whole run, less d. Once the two hold the same, nothing is left to count.

    Time O(n + n * window / stride).

    Args:
      steps: what is needed, in order.
      slots: slots C, at least `steps.widest`.
      count_from: where the run starts: 0 with empty slots, later with the best contents.
      window: layer-steps that a window is counted for, at most about; None: 32 token cycles (of L layer-steps).
        Longer ones make bounds tighter, and take longer.
      stride: layer-steps from one window to the next; None: 4 token cycles. Shorter ones make bounds tighter, and
        take longer.

    Raises:
      InputError: negative slots or window, or a stride below 1.
    """
    window = 32 * steps.num_layers if window is None else window
    stride = 4 * steps.num_layers if stride is None else stride
    if window < 0 or stride < 1:
        raise InputError(f"window {window}, stride {stride}: give at least 0 and 1 layer-steps")
    whole = DemandRun(steps, slots, free_start=count_from or None)
    marks = [*range(count_from, len(steps), stride), len(steps)]
    counts, held = [0], {}
    for begin, end in itertools.pairwise(marks):
        counts += whole.run(begin, end)
        held[end] = np.frombuffer(whole.contents, np.uint8)
    windows = []
    for begin, first in itertools.pairwise(marks):
        run = DemandRun(steps, slots, free_start=first - 1)
        run.run(first - 1, first)
        loads: list[int] = []
        last = first
        while True:
            only = int(np.count_nonzero(np.frombuffer(run.contents, np.uint8) > held[last]))
            if not only or last >= min(first + window, len(steps)):
                break
            following = min(last + stride, len(steps))
            loads += run.run(last, following)
            last = following
        cumulative = np.cumsum(loads, dtype=np.float64)
        windows.append(Window(begin, first, last, cumulative, sum(loads) - only))
    return WindowLoads(slots, count_from, np.cumsum(counts, dtype=np.float64), windows)
