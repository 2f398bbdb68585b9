"""How a routing path is trained."""

import dataclasses

from ef_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PathTrainingOptions:
    """How a routing path is trained.

    Attributes:
      epochs: how often training goes through the tokens, at most; None: 12 times, and in 400 steps at least.
      steps: the same as a number of steps; None: as `epochs` says.
      rows: stretches a step.
      stretch: tokens of a stretch, at most.
      learning_rate: its peak; it rises in the first steps and falls on a cosine.
      weight_decay: of AdamW, on matrices.
      dropout: share of the residual stream's numbers that are left out.
      word_dropout: share of the tokens that are read as unknown ones.
      compute: dtype of products; weights and their changes are float32. None: bfloat16 on an accelerator, float32 on a
        CPU, where bfloat16 is slower.
      held_out: share of the tokens that are not learned from, whole sequences.
      evaluations: how often held-out tokens are looked at, and a checkpoint is written.
      patience: training ends after as many looks without a smaller loss; what was best is kept.
      seed: of the first weights, the held-out sequences and all that is left to chance.

    Raises:
      InputError: a value that cannot be.
    """

    epochs: float | None = None
    steps: int | None = None
    rows: int = 8
    stretch: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    dropout: float = 0.2
    word_dropout: float = 0.15
    compute: str | None = None
    held_out: float = 0.1
    evaluations: int = 12
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "stretch", "evaluations", "patience", *(("steps",) if self.steps is not None else ())):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.epochs is not None and not self.epochs > 0:
            raise InputError(f"epochs must be above 0, got {self.epochs}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a share above 0 and below 1, got {self.held_out}")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be a share from 0 to below 1, got {getattr(self, name)}")
        if self.compute not in (None, "bfloat16", "float32"):
            raise InputError(f"compute must be bfloat16 or float32, got {self.compute!r}")
