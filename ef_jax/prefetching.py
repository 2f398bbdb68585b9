"""What `load`'s options on prefetching come to, for one model on one link."""

import dataclasses
from pathlib import Path

from ef_jax.errors import InputError
from ef_jax.schedule.scheduler import Prefetch
from ef_jax.spec import ModelSpec

PREDICTORS = ("pregate", "history", "none")

# Distances that the programs score, unless a trained predictor has others. At 48 layers of 128 experts each costs
# 0.46 % of the bytes that a layer reads anyhow (`bench.horizon`, part "device").
DISTANCES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prefetching:
    """Settled options.

    Attributes:
      prefetch: "auto", "off" or a fixed horizon in layers.
      predictor: a name of `PREDICTORS`.
      trained: directory of a trained correction of the pre-gate, if one was given.
      routing_path: directory of a trained routing-path predictor, if one was given.
      off_because: where prefetching was left to be decided and is off, why.
    """

    prefetch: Prefetch
    predictor: str
    trained: Path | None = None
    routing_path: Path | None = None
    off_because: str | None = None

    def distances(self, spec: ModelSpec) -> int:
        """Distances that the programs have to score; 0: they need not look ahead."""
        return min(DISTANCES, len(spec.step_moe_layers)) if self.predictor == "pregate" else 0


NO_PREFETCHING = Prefetching(prefetch="off", predictor="none")
ALL_RESIDENT = Prefetching(prefetch="off", predictor="none", off_because="every expert is on the device")


def settle(
    spec: ModelSpec,
    *,
    prefetch: int | str = "auto",
    predictor: str | Path | None = None,
    routing_path: str | Path | None = None,
    overlaps: bool,
    policy_listens: bool = False,
    regroups: bool = False,
    pages: bool = False,
) -> Prefetching:
    """Check options and fill in defaults.

    Args:
      spec: the model.
      prefetch: "auto", "off" or a horizon of 0 (off) to the number of MoE layers.
      predictor: a name of `PREDICTORS`, the directory of a trained predictor, or None: the pre-gate where there is
        prefetching, else none.
      routing_path: the directory of a trained routing-path predictor, or None.
      overlaps: copies can run while the device computes.
      policy_listens: the cache's policy has a use for predictions.
      pages: part of the experts is on disk, and is read ahead unless `prefetch` is off: reads take no core.
      regroups: there are more sequences than a step runs, so that the token scheduler has a use for predicted paths.

    Raises:
      InputError: no such option, or one that cannot take effect.
    """
    horizon = _horizon(prefetch, len(spec.moe_layers))
    ahead = horizon != "off" and pages
    off_because = None
    if not overlaps and horizon == "auto":
        horizon, off_because = "off", "copies run on the cores that compute, so there is nothing to hide them behind"
    elif not overlaps and horizon != "off":
        raise InputError(
            f'prefetch {prefetch} cannot take effect: copy mode "in_program" copies on the cores that compute; give '
            'copy_mode="async", an emulated link, or prefetch="off"'
        )
    if predictor is None:
        predictor = "pregate" if ahead or horizon != "off" else "history" if routing_path and policy_listens else "none"
    path = None if routing_path is None else Path(routing_path)
    if path is not None:
        if not path.is_dir():
            raise InputError(f"routing_path {str(path)!r:.200} is no directory of a trained predictor")
        if predictor == "none" and not regroups:
            raise InputError(
                f"routing_path {str(path)!r:.200} cannot take effect: nothing is prefetched, the policy hears of no "
                'predictions and no batches are formed; give a prefetch, policy="plec" or more sequences than batch'
            )
    if predictor == "none" and horizon != "off":
        raise InputError(f'prefetch {prefetch} needs a predictor: give "pregate", "history" or a trained one')
    if spec.encodes and (path is not None or predictor not in PREDICTORS):
        raise InputError(
            f"trained predictors are of models without an encoder, and {spec.family} has one: give pregate, history or "
            "none"
        )
    if predictor in PREDICTORS:
        return Prefetching(prefetch=horizon, predictor=str(predictor), routing_path=path, off_because=off_because)
    if not Path(predictor).is_dir():
        raise InputError(
            f"predictor {str(predictor)!r:.200} is not one of {', '.join(PREDICTORS)} and no directory of a trained one"
        )
    return Prefetching(
        prefetch=horizon, predictor="pregate", trained=Path(predictor), routing_path=path, off_because=off_because
    )


def _horizon(prefetch: int | str, layers: int) -> Prefetch:
    if isinstance(prefetch, str) and prefetch.isdecimal():
        prefetch = int(prefetch)
    if prefetch == "auto":
        return "auto"
    if prefetch in ("off", 0):
        return "off"
    if isinstance(prefetch, str) or not 0 <= prefetch <= layers:
        raise InputError(
            f'prefetch {prefetch!r:.60}: give "auto", "off" or a horizon of 0 to {layers}, the number of MoE layers'
        )
    return prefetch
