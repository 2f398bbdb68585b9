"""What must hold of the arrays of a routing trace."""

import numpy as np

from ef_jax.errors import InputError

MAX_EXPERTS = 1 << 16

_BLOCK_ROWS = 1 << 13


def check_arrays(
    *,
    experts: np.ndarray,
    tokens: np.ndarray,
    offsets: np.ndarray,
    num_experts: int,
    phases: np.ndarray,
    passes: np.ndarray | None,
    weights: np.ndarray | None,
    pregate: np.ndarray | None,
) -> None:
    """Check the arrays of a `RoutingTrace`, whose attributes these are.

    Raises:
      InputError: the first thing that does not hold.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise InputError(f"num_experts is {num_experts}: a trace has 1 to {MAX_EXPERTS} experts a layer")
    _check_dtype("experts", experts, "uint8", "uint16")
    if experts.ndim != 3 or 0 in experts.shape:
        raise InputError(f"experts must be [tokens, layers, top-k] and not empty, got shape {experts.shape}")
    count = len(experts)
    _check_array("tokens", tokens, "int32", (count,))
    _check_array("phases", phases, "uint8", (count,))
    if passes is not None:
        _check_array("passes", passes, "int64", (count,))
    if weights is not None:
        _check_array("weights", weights, "float16", experts.shape)
    if pregate is not None:
        _check_pregate(pregate, experts.shape[:2], num_experts)
    _check_offsets(offsets, count)
    _check_experts(experts, num_experts)
    _check_phases(phases, passes, offsets)


def _check_dtype(name: str, array: np.ndarray, *dtypes: str) -> None:
    if array.dtype not in dtypes:
        raise InputError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")


def _check_array(name: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> None:
    _check_dtype(name, array, dtype)
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, and the experts need {shape}")


def _check_pregate(pregate: np.ndarray, rows: tuple[int, ...], num_experts: int) -> None:
    distances = pregate.shape[2] if pregate.ndim == 4 and pregate.shape[2] else 1
    _check_array("pregate", pregate, "float16", (*rows, distances, num_experts))
    layers = rows[1]
    for source in range(max(0, layers - distances + 1), layers):
        if pregate[:, source, layers - source :].any():
            raise InputError(
                f"pregate has scores of source {source} for layers past the last, {layers - 1}: they must be zeros"
            )


def _check_offsets(offsets: np.ndarray, tokens: int) -> None:
    _check_dtype("offsets", offsets, "int64")
    if offsets.ndim != 1:
        raise InputError(f"offsets must have one dimension, got shape {offsets.shape}")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens:
        ends = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "nothing"
        raise InputError(f"offsets must run from 0 to the {tokens} tokens, got {ends}")
    falls = np.flatnonzero(np.diff(offsets) <= 0)
    if falls.size:
        at = int(falls[0])
        raise InputError(f"offsets must rise, got {offsets[at]} and then {offsets[at + 1]} (sequence {at})")


def _check_experts(experts: np.ndarray, num_experts: int) -> None:
    if int(experts.max()) >= num_experts:
        token, layer, _ = (int(place[0]) for place in np.nonzero(experts >= num_experts))
        raise InputError(
            f"expert id {experts[token, layer].max()} of token {token}, layer {layer}: the trace has {num_experts} "
            "experts a layer"
        )
    for first in range(0, len(experts), _BLOCK_ROWS):
        ids = np.sort(experts[first : first + _BLOCK_ROWS], axis=-1)
        twice = np.nonzero((ids[..., 1:] == ids[..., :-1]).any(axis=-1))
        if twice[0].size:
            token, layer = first + int(twice[0][0]), int(twice[1][0])
            chosen = experts[token, layer].tolist()
            raise InputError(f"token {token} chose an expert of layer {layer} twice: {chosen}")


def _check_phases(phases: np.ndarray, passes: np.ndarray | None, offsets: np.ndarray) -> None:
    if int(phases.max()) > 1:
        raise InputError(f"phases must be 0 (prompt) or 1 (decode), got {phases.max()}")
    if passes is None:
        return
    if int(passes.min()) < 0:
        raise InputError(f"passes must count from 0, got {passes.min()}")
    follows = np.ones(len(passes), bool)
    follows[offsets[:-1]] = False
    falls = np.flatnonzero(follows[1:] & (np.diff(passes) < phases[1:])) + 1
    if falls.size:
        at = int(falls[0])
        raise InputError(f"passes of a sequence must rise, got {passes[at - 1]} and then {passes[at]} (token {at})")
    order = np.argsort(passes, kind="stable")
    mixed = np.flatnonzero((np.diff(passes[order]) == 0) & (np.diff(phases[order].astype(np.int8)) != 0))
    if mixed.size:
        raise InputError(f"pass {passes[order[mixed[0]]]} mixes tokens of prompts with tokens of decoding")
