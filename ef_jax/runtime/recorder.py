"""Recording routing from the engine: which experts every token used, and which tokens ran together."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from ef_jax.errors import InputError
from ef_jax.replay.trace import DECODE, PROMPT, RoutingTrace
from ef_jax.runtime.pregate_probe import PregateProbe
from ef_jax.runtime.steps import Routed
from ef_jax.spec import ModelSpec

Serve = Callable[[int, Any], Any]
Gather = Callable[[list[jax.Array]], list[jax.Array]]

# Steps whose ids are taken together. One by one, right after a step has filled the processor's caches with something
# else, costs half as much again.
_MOST_PENDING = 16


@runtime_checkable
class Listener(Protocol):
    """Hears of every pass of an engine: see `Recorder.listen`."""

    def listen(
        self, serve: Serve, tokens: jax.Array | np.ndarray, positions: np.ndarray, numbers: np.ndarray
    ) -> Serve: ...


def routed_of(carried: Any) -> Routed:
    """The `Routed` of an MoE layer from what its program leaves: that alone, or first among other things."""
    routed: Routed = carried if isinstance(carried, Routed) else carried[0]
    return routed


class _Pass(NamedTuple):
    """A pass whose routes are still on the device: int32 `[B, T]` tokens and positions, `[B, T, K]` by MoE layer."""

    tokens: jax.Array | np.ndarray
    positions: np.ndarray
    numbers: np.ndarray
    ids: list[jax.Array]
    weights: list[jax.Array]
    pregate: list[jax.Array]  # float16 [B, T, H, E] by source


class _Rows(NamedTuple):
    """What one pass did: R rows, sequence by sequence."""

    phase: int
    sequences: np.ndarray  # int64 [R], number of the sequence
    tokens: np.ndarray  # int32 [R]
    experts: np.ndarray  # uint8 or uint16 [R, L, K]
    weights: np.ndarray  # float16 [R, L, K], if recorded
    pregate: np.ndarray  # float16 [R, L, H, E], if recorded


class Recorder:
    """Listens to the passes of an engine and makes a `RoutingTrace` of them.

    Sequences are in the order in which they joined, in passes too; one that was under way when
    recording began starts with its first recorded token. Teacher-forced passes (`logits`, `score`) are prompts. A pass
    that fails before its last layer is left out. Of a model with an encoder the decoder's steps are recorded: a prompt
    runs through other layers.

    Nothing is waited for while a pass runs: what it leaves on the device is taken later, of several steps together.

    Args:
      spec: the model.
      block_bytes: bytes of one expert block.
      model: name of the model.
      fingerprint: of the model, empty if unknown.
      lossy: what changes the run's results, in words.
      weights: record the router's weights too, as float16.
      probe: record the pre-gate scores that it computes, too.
      gather: makes of arrays of one shape, divided as sequences are, others that this process can read whole, without
        waiting for them. Where processes share the sequences, all record, and so all run what it runs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        block_bytes: int,
        model: str,
        fingerprint: str = "",
        lossy: str = "",
        weights: bool = False,
        probe: PregateProbe | None = None,
        gather: Gather = list,
    ) -> None:
        self._layers, self._num_experts = len(spec.step_moe_layers), spec.experts.count
        self._encodes = spec.encodes
        self._dtype = np.uint8 if self._num_experts <= 1 << 8 else np.uint16
        self._block_bytes, self._model, self._fingerprint, self._lossy = block_bytes, model, fingerprint, lossy
        self._weights, self._probe, self._gather = weights, probe, gather
        self._recorded: list[_Rows] = []
        self._pending: list[_Pass] = []

    def listen(self, serve: Serve, tokens: jax.Array | np.ndarray, positions: np.ndarray, numbers: np.ndarray) -> Serve:
        """A pass begins.

        Args:
          serve: the engine's `(MoE layer, carried) -> carried`; `carried` is the layer's `Routed`, or begins with it.
          tokens: int32 `[B, T]`; a step of decoding has one column, a chunk of prompts more.
          positions: int32 `[B, T]`, -1 where there is no token.
          numbers: int64 `[B]`, of each sequence, which are counted as they join; of empty places, anything.

        Returns:
          What the engine calls instead of `serve` in this pass.
        """
        if self._encodes and positions.shape[1] > 1:
            return serve
        if len(self._pending) >= _MOST_PENDING or (self._pending and self._pending[-1].positions.shape[1] > 1):
            self._settle()
        running = _Pass(tokens, positions, numbers, [], [], [])
        keep_ids, keep_weights, keep_scores = running.ids.append, running.weights.append, running.pregate.append
        weights, probe, last = self._weights, self._probe, self._layers - 1
        if probe is not None:
            keep_scores(probe.embedded(tokens))

        def listening(layer: int, carried: Any) -> Any:
            routed = routed_of(carried)
            keep_ids(routed.ids)
            if weights:
                keep_weights(routed.weights)
            if probe is not None and layer < last:
                keep_scores(probe.residual(layer + 1, routed.x))
            served = serve(layer, carried)
            if layer == last:
                self._pending.append(self._gathered(running))
            return served

        return listening

    def trace(self) -> RoutingTrace:
        """What has been recorded so far.

        Raises:
          InputError: nothing has.
        """
        self._settle()
        if not self._recorded:
            raise InputError("nothing was recorded: generate or score something while the trace is on")
        rows = self._recorded
        sequences = np.unique(np.concatenate([part.sequences for part in rows]), return_inverse=True)[1]
        order = np.argsort(sequences, kind="stable")
        sizes = [len(part.tokens) for part in rows]
        places = np.argsort(order)
        return RoutingTrace(
            experts=_joined([part.experts for part in rows], places),
            tokens=_joined([part.tokens for part in rows], places),
            offsets=np.concatenate([[0], np.cumsum(np.bincount(sequences))]),
            num_experts=self._num_experts,
            phases=np.repeat(np.array([part.phase for part in rows], np.uint8), sizes)[order],
            passes=np.repeat(np.arange(len(rows)), sizes)[order],
            model=self._model,
            fingerprint=self._fingerprint,
            block_bytes=self._block_bytes,
            lossy=self._lossy,
            weights=_joined([part.weights for part in rows], places) if self._weights else None,
            pregate=_joined([part.pregate for part in rows], places) if self._probe is not None else None,
        )

    def _gathered(self, ran: _Pass) -> _Pass:
        """A pass that this process can read; a prompt's tokens come from the host."""
        tokens = self._gather([ran.tokens])[0] if isinstance(ran.tokens, jax.Array) else ran.tokens
        ids, weights, pregate = (layers and self._gather(layers) for layers in (ran.ids, ran.weights, ran.pregate))
        return ran._replace(tokens=tokens, ids=ids, weights=weights, pregate=pregate)

    def _settle(self) -> None:
        """Take what the passes that ran have left on the device."""
        self._recorded += map(self._rows, self._pending)
        self._pending.clear()

    def _rows(self, ran: _Pass) -> _Rows:
        positions = ran.positions
        places, columns = np.nonzero(positions >= 0)
        prompt = positions.shape[1] > 1

        def rows(layers: list[jax.Array], dtype: Any) -> np.ndarray:
            joined = np.concatenate([np.asarray(layer) for layer in layers], axis=-1)[places, columns]
            return joined.astype(dtype).reshape(len(places), len(layers), -1)

        def scores(sources: list[jax.Array]) -> np.ndarray:
            return np.stack([np.asarray(source)[places, columns] for source in sources], axis=1)

        nothing = np.empty(0, np.float16)
        return _Rows(
            phase=PROMPT if prompt else DECODE,
            sequences=ran.numbers[places],
            tokens=np.asarray(ran.tokens)[places, columns],
            experts=rows(ran.ids, self._dtype),
            weights=rows(ran.weights, np.float16) if self._weights else nothing,
            pregate=scores(ran.pregate) if self._probe is not None else nothing,
        )


def _joined(parts: list[np.ndarray], places: np.ndarray) -> np.ndarray:
    """The rows of all parts, row i of them at `places[i]`; nothing else of that size is allocated."""
    joined = np.empty((len(places), *parts[0].shape[1:]), parts[0].dtype)
    first = 0
    for part in parts:
        joined[places[first : first + len(part)]] = part
        first += len(part)
    return joined
