"""Which programs an engine runs, those that look ahead or the same without, and what they said of coming layers."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ef_jax.errors import InputError
from ef_jax.runtime.look_ahead import Look, LookAhead, Report, read_report, read_token_report
from ef_jax.runtime.programs import Programs
from ef_jax.spec import ModelSpec

Ahead = tuple[jax.Array, jax.Array | None]
"""What a program that looks ahead leaves: its report, and the new state of a correction. One that only weighs what it
routes leaves a report too."""


class Lookout:
    """Looks ahead while somebody listens. Without a `LookAhead` it never does, and its programs are the only ones.

    Args:
      spec: the model.
      programs: those that look ahead, where there is a look ahead.
      look_ahead: the device arrays to look ahead by; None: nothing looks ahead.

    Attributes:
      programs: as given, or what a bench has put in their place.
      look_ahead: as given.
    """

    def __init__(self, spec: ModelSpec, programs: Programs, look_ahead: LookAhead | None) -> None:
        self.programs, self.look_ahead = programs, look_ahead
        self._spec, self._weighed = spec, programs.weighed
        self._drops = programs.lossy.adaptive_experts is not None
        self._looking = look_ahead
        self._blind: Programs | None = None
        self._report: jax.Array | None = None  # of the last decode program that ended with a router
        self._token_report: tuple[list[int], Report] | None = None  # and the rows of the tokens
        self._arrange()

    @property
    def running(self) -> Any:
        """The programs to run now: `Programs`, or what a bench has put in their place."""
        return self.programs if self._blind is None or self._looking is self.look_ahead else self._blind

    @property
    def may_stop(self) -> bool:
        """Whether the programs look ahead, and others that do not are there to take over."""
        return self._looking is not None and self._blind is not None

    def look(self, wanted: bool) -> None:
        """From the next program on look ahead, or do not."""
        looking = self.look_ahead if wanted else None
        if looking is not self._looking:
            self._looking, self._token_report = looking, None
            self._blind = self._blind or self.programs.without_look_ahead()
            self._arrange()

    def compile_for(self, length: int, until: int, *, may_stop: bool) -> None:
        """Compile what a prompt of `length` tokens needs, decoded until `until` positions are taken; if it `may_stop`
        looking ahead in the middle, also what it needs then."""
        self.running.compile_for(length, until)
        if self._looking is not None and may_stop:
            self._blind = self._blind or self.programs.without_look_ahead()
            self._blind.compile_for(length, until)

    def shift(self, shifts: np.ndarray) -> None:
        """Add `shifts`, f32 `[L + 1, H, E]`, to pre-gate logits from now on; see `residual_means`.

        Raises:
          InputError: nothing looks ahead, or a trained predictor does.
        """
        if self.look_ahead is None:
            raise InputError('nothing looks ahead here: load the model with prefetch="auto" and a link that overlaps')
        self.look_ahead.shift(shifts)
        self._arrange()

    def reset(self) -> None:
        """Forget every report and all sequences."""
        self._report = self._token_report = None
        if self.look_ahead is not None:
            self.look_ahead.reset()

    # Arguments of programs, and what they leave.

    @property
    def state(self) -> jax.Array | None:
        """Argument "state" of the running programs, which donate it; None where they have none."""
        return None if self._looking is None else self._looking.state

    @state.setter
    def state(self, state: jax.Array | None) -> None:
        if self._looking is not None:
            self._looking.state = state

    def from_token(self) -> tuple[Look | None, jax.Array | None]:
        """Arguments "look" and "state" of the head."""
        return self._first_look, self.state

    def from_layer(self, layer: int, width: int) -> tuple[Look | None, jax.Array | None]:
        """Arguments "look" and "state" of the program that ends in decoder layer `layer`, in a pass of that width."""
        look = self._looks[layer] if width == 1 else None
        return look, None if look is None else self.state

    def hear(self, ahead: Ahead | None) -> None:
        """Keep what a layer's program said; None: nothing, and what the last one said is of no use any more."""
        if ahead is None:
            self._report = None
            return
        self._report, state = ahead
        if self._looking is not None:
            self._looking.state = state

    def hear_tokens(self, rows: list[int], ahead: Ahead | None) -> None:
        """Keep what the head said of the tokens that it chose for some rows; waits for it."""
        self._token_report = None
        if ahead is not None and self._looking is not None:
            report, self._looking.state = ahead
            self._token_report = rows, read_token_report(self._spec, report)

    def report(self, batch: int) -> Report | None:
        """What the last layer's program said of a step of `batch` places; waits for it. None: nothing."""
        return None if self._report is None else self.read(self._report, batch)

    @property
    def last(self) -> Any:
        """What `report` reads, for `read`; None: nothing."""
        return self._report

    def read(self, report: jax.Array, batch: int) -> Report:
        """A report that `last` has given, of a step of `batch` places; waits for it."""
        read = read_report(self._spec, report, batch, weighed=self._weighed)
        return read.without_dropped(self._spec.experts.count) if self._drops else read

    def token_report(self, rows: list[int]) -> Report | None:
        """What the head said of the latest tokens of exactly these rows, in this order."""
        return self._token_report[1] if self._token_report is not None and self._token_report[0] == rows else None

    def absorber(self, width: int, rows: np.ndarray) -> Callable[[int, jax.Array], None] | None:
        """Has a trained predictor hear of the routes `[B, T, K]` of an MoE layer in a chunk of some rows; None where
        there is none."""
        if self.state is None:
            return None
        absorb = self.running.absorb(width)

        def hear(layer: int, ids: jax.Array) -> None:
            if (looking := self._looking) is not None:
                looking.state = absorb(looking.looks[1 + layer], looking.state, ids, rows)

        return hear

    def _arrange(self) -> None:
        """The look of the head's program and of each decoder layer's; None where there is none."""
        moe_layers = self._spec.step_moe_layers
        looks = [None] * (1 + len(moe_layers)) if self._looking is None else self._looking.looks
        self._first_look: Look | None = looks[0]
        self._looks: list[Look | None] = [None] * len(self._spec.layers)
        for index, layer in enumerate(moe_layers):
            self._looks[layer] = looks[1 + index]
