"""What a routing path would have predicted in a recorded run, for replays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, UInt8

from ef_jax.errors import InputError
from ef_jax.nn.routing_path import PathState, RoutingPath, RoutingPathSpec, decode, empty_state, encode
from ef_jax.predict.log_odds import to_bins
from ef_jax.predict.path_loss import Leaves
from ef_jax.replay.trace import PROMPT, RoutingTrace

_ROWS = 32
_STEPS = 64


class _Stream(NamedTuple):
    """Rows `first` to `last` of a trace, decoded one after another; those from `told` on are its prompt."""

    told: int
    first: int
    last: int


def offline_path_bins(
    path: RoutingPath, trace: RoutingTrace, *, prompt: int | None = None
) -> UInt8[np.ndarray, "N L E"]:
    """Bins of each token's own path, as an engine knows them once the token is known.

    Args:
      path: a trained predictor.
      trace: recorded routing.
      prompt: tokens at the start of each sequence that the encoder reads, all but the last of a shorter one; 0: none;
        None: those that were recorded as a prompt. What comes after them is decoded. They themselves are predicted
        from what is before them, as if there had been no prompt.

    Raises:
      InputError: `prompt` is negative, or the trace is not of the predictor's sizes.
    """
    spec = path.spec
    found, wanted = (trace.layers, trace.num_experts, trace.top_k), (spec.layers, spec.experts, spec.top_k)
    if found != wanted:
        raise InputError(f"a routing path of layers, experts and top-k {wanted} is not for a trace of {found}")
    if prompt is not None and prompt < 0:
        raise InputError(f"a prompt of {prompt} tokens: give 0 or more, or None for what was recorded as one")
    begin, follow = _programs(spec)
    leaves = jax.tree.leaves(nnx.state(path))
    bins = np.zeros((trace.count, spec.layers, spec.experts), np.uint8)
    streams = sorted(_streams(trace, spec, prompt), key=lambda stream: stream.last - stream.first)
    for start in range(0, len(streams), _ROWS):
        part = streams[start : start + _ROWS]
        prompts, lengths = np.zeros((_ROWS, spec.most_prompt), np.int32), np.zeros(_ROWS, np.int32)
        for row, (told, first, _) in enumerate(part):
            prompts[row, : first - told], lengths[row] = trace.tokens[told:first], first - told
        state = begin(leaves, prompts, lengths)
        for done in range(0, max(stream.last - stream.first for stream in part), _STEPS):
            tokens = np.zeros((_STEPS, _ROWS), np.int32)
            places = [slice(first + done, min(first + done + _STEPS, last)) for _, first, last in part]
            for row, place in enumerate(places):
                taken = trace.tokens[place]
                tokens[: len(taken), row] = taken
            state, out = follow(leaves, state, tokens)
            told_bins = np.asarray(out)
            for row, place in enumerate(places):
                bins[place] = told_bins[: len(bins[place]), row]
    return bins


@functools.lru_cache(maxsize=4)  # other traces compile nothing
def _programs(spec: RoutingPathSpec) -> tuple[Callable[..., PathState], Callable[..., Any]]:
    """The state after prompts, and state and bins after some steps; both take the predictor's leaves first."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: RoutingPath(spec, rngs=nnx.Rngs(0))))
    structure = jax.tree.structure(shapes)

    @jax.jit
    def begin(leaves: Leaves, prompts: Int32[Array, "R P"], lengths: Int32[Array, " R"]) -> PathState:
        path = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        empty = empty_state(spec, rows=_ROWS, context=spec.window)
        return empty._replace(prompts=encode(path, prompts, lengths), lengths=lengths)

    @jax.jit
    def follow(
        leaves: Leaves, state: PathState, tokens: Int32[Array, "S R"]
    ) -> tuple[PathState, UInt8[Array, "S R L E"]]:
        path = nnx.merge(graph, jax.tree.unflatten(structure, leaves))

        def one(state: PathState, tokens: Int32[Array, " R"]) -> tuple[PathState, UInt8[Array, "R L E"]]:
            odds, state = decode(path, state, jnp.arange(_ROWS), tokens)
            return state, to_bins(odds, jnp)

        return jax.lax.scan(one, state, tokens)

    return begin, follow


def _streams(trace: RoutingTrace, spec: RoutingPathSpec, prompt: int | None) -> list[_Stream]:
    streams = []
    for first, last in zip(trace.offsets[:-1].tolist(), trace.offsets[1:].tolist(), strict=True):
        decoded = np.flatnonzero(trace.phases[first:last] != PROMPT) if prompt is None else [prompt]
        cut = first + min(int(decoded[0]) if len(decoded) else last - first, last - first - 1)
        if cut > first:
            streams.append(_Stream(first, first, cut))
        streams.append(_Stream(max(first, cut - spec.most_prompt), cut, last))
    return streams
