"""Part "overlap" of `bench.forecast`: the share of stalls that prefetching is taken to hide, against replays.

The bundled model's own routing, recorded while it continues its held-out texts, is replayed on a virtual clock over
links of half, twice and eight times the bandwidth at which K blocks cross in a layer's time: by the engine's scheduler
with the pre-gate and an automatic horizon, and without prefetching. The forecast is given the stalls of the latter, and
so is judged on what it takes off them alone: `min(prefetched x stall, layer time)`.
"""

from typing import Any

import ef_jax
from bench import _forecast_rows, _models
from bench._report import rounded, table
from ef_jax.forecast.forecast import PREFETCHED
from ef_jax.prefetching import DISTANCES
from ef_jax.replay.simulator import simulate
from ef_jax.replay.trace import RoutingTrace
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel

BATCHES = (1, 8)
SHARES = (0.125, 0.25, 0.5)
RATIOS = (0.5, 2.0, 8.0)
_LAYER_SECONDS = 1e-3
_LATENCY = 10e-6
_PROMPTS, _PROMPT_TOKENS = 8, 32


def run(tokens: int) -> dict[str, Any]:
    """Rows and their summary.

    Args:
      tokens: to decode after each of eight prompts.
    """
    trace = _trace(tokens)
    rows = [_row(trace, batch, share, ratio) for batch in BATCHES for share in SHARES for ratio in RATIOS]
    head = ["batch", "resident %", "x balance", "stall ms", "prefetching", "forecast", "forecast / replayed"]
    print(table(head, [tuple(row[key] for key in _COLUMNS) for row in rows]))
    ratios = [row["ratio"] for row in rows]
    within = sum(_forecast_rows.AIM[0] <= ratio <= _forecast_rows.AIM[1] for ratio in ratios)
    print(f"step times: {within} of {len(rows)} within the aim, {min(ratios):.2f} to {max(ratios):.2f}\n")
    return {"tokens": trace.count, "layer_seconds": _LAYER_SECONDS, "prefetched": PREFETCHED[1], "rows": rows,
            "within_aim": within, "least": min(ratios), "most": max(ratios)}  # fmt: skip


_COLUMNS = ("batch", "share", "balance", "stall_ms", "prefetching_ms", "forecast_ms", "ratio")


def _trace(tokens: int) -> RoutingTrace:
    lm = ef_jax.load(expert_fraction=1.0, context=_PROMPT_TOKENS + tokens + 1, chunk=_PROMPT_TOKENS, progress=False)
    prompts = _models.prompts(lm, _PROMPTS, _PROMPT_TOKENS)
    sampling = SamplingOptions(max_new_tokens=tokens + 1, temperature=0.8, top_p=0.9, ignore_eos=True)
    with lm.trace(pregate=min(DISTANCES, len(lm.spec.moe_layers))) as recording:
        lm.generate(prompts, sampling)
    return recording.trace()


def _row(trace: RoutingTrace, batch: int, share: float, ratio: float) -> dict[str, Any]:
    block = trace.block_bytes or 1
    link = LinkModel(bandwidth=ratio * trace.top_k * block / _LAYER_SECONDS, latency=_LATENCY)
    settings: dict[str, Any] = {
        "slots": round(share * trace.layers * trace.num_experts),
        "batch": batch,
        "link": link,
        "compute_seconds": _LAYER_SECONDS,
        "block_bytes": block,
    }
    stalls = []
    for how in ({}, {"predictor": "pregate", "prefetch": "auto"}):
        phase = simulate(trace, **settings, **how).decode
        stalls.append(phase.stall_seconds / phase.steps / trace.layers)
    forecast = stalls[0] - min(PREFETCHED[1] * stalls[0], _LAYER_SECONDS)
    return {
        "batch": batch,
        "share": 100 * share,
        "balance": ratio,
        "stall_ms": rounded(1e3 * stalls[0]),
        "prefetching_ms": rounded(1e3 * stalls[1]),
        "forecast_ms": rounded(1e3 * forecast),
        "ratio": rounded((_LAYER_SECONDS + forecast) / (_LAYER_SECONDS + stalls[1])),
    }
