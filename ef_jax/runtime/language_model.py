"""`LanguageModel`: what `ef_jax.load` returns."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ef_jax.errors import InputError
from ef_jax.generation import FinishReason, Generation, Score
from ef_jax.memory.plan import MemoryPlan
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.pregate_probe import PregateProbe
from ef_jax.runtime.recorder import Listener, Recorder
from ef_jax.runtime.residual_means import ResidualMeans, logit_shifts
from ef_jax.runtime.sampling import SamplingOptions, sampling_arrays
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.text import StopMatcher, StreamDecoder, Tokenizer, require_tokenizer
from ef_jax.timeline import Timeline

Prompt = str | Sequence[int] | np.ndarray


class LanguageModel:
    """A loaded MoE language model whose experts are served from host memory.

    Attributes:
      path: the checkpoint.
      spec: the model.
      tokenizer: None where the checkpoint has none; prompts are then token ids.
    """

    def __init__(self, path: Path, spec: ModelSpec, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.path, self.spec, self.tokenizer = path, spec, tokenizer
        self._engine = engine
        self._runs = 0

    @property
    def plan(self) -> MemoryPlan:
        """Device bytes by item."""
        return self._engine.plan

    @property
    def stats(self) -> Stats:
        """Counters since loading or `stats.reset()`."""
        return self._engine.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: SamplingOptions | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        **changes: Any,
    ) -> list[Generation]:
        """Continue prompts; batches of `plan.batch` at a time, results in the order given.

        Args:
          prompts: text or token ids, or a list of them. Text is encoded as its tokenizer does.
          options: sampling options; greedy where None.
          on_text: called with a prompt's index and each new piece of its text.
          **changes: single fields of `SamplingOptions`, for example `max_new_tokens=64, temperature=0.8`.

        Returns:
          One `Generation` a prompt.

        Raises:
          InputError: no prompts, an empty prompt, one as long as the context, or ids outside the vocabulary.
        """
        options = _with_changes(options, changes)
        ids = [self.encode(prompt) for prompt in _as_list(prompts)]
        if not ids:
            raise InputError("there are no prompts: give at least one")
        if options.stop:
            require_tokenizer(self.tokenizer)
        results = []
        for first in range(0, len(ids), self.plan.batch):
            part = ids[first : first + self.plan.batch]
            outputs = [_Output(self.tokenizer, options) for _ in part]
            for sequence, piece in self._run(part, options, outputs, first):
                if on_text is not None and piece:
                    on_text(first + sequence, piece)
            results += [output.generation() for output in outputs]
        return results

    def stream(self, prompt: Prompt, options: SamplingOptions | None = None, **changes: Any) -> Iterator[str]:
        """Continue one prompt, yielding text as it comes; joined, the pieces are `generate`'s text.

        Raises:
          InputError: as `generate`, and where the checkpoint has no tokenizer.
        """
        options = _with_changes(options, changes)
        require_tokenizer(self.tokenizer)
        ids = [self.encode(prompt)]
        return (piece for _, piece in self._run(ids, options, [_Output(self.tokenizer, options)], 0) if piece)

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Next-token logits after every token.

        Args:
          token_ids: `[T]` ids, at least one, not longer than the context.

        Returns:
          f32 `[T, V]`.

        Raises:
          InputError: no ids, too many, or some outside the vocabulary.
        """
        ids = self._check_ids(token_ids, room=0)
        self._begin()
        self._engine.prepare([len(ids)], len(ids))
        return np.concatenate(list(self._engine.logits(ids)))

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[Score]:
        """How likely each text (or list of token ids) is, given its first token.

        Raises:
          InputError: as `logits`; a text longer than the context must be cut by the caller.
        """
        scores = []
        for text in _as_list(texts):
            ids = self.encode(text, room=0)
            self._begin()
            self._engine.prepare([len(ids)], len(ids))
            total, done = 0.0, 0
            for logits in self._engine.logits(ids):
                targets = ids[done + 1 : done + 1 + len(logits)]
                rows = logits[: len(targets)].astype(np.float64)
                top = rows.max(axis=1, initial=-np.inf)
                norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
                total += float((rows[np.arange(len(targets)), targets] - norm).sum())
                done += len(logits)
            scores.append(Score(logprob=total, tokens=len(ids) - 1))
        return scores

    @contextlib.contextmanager
    def timeline(self) -> Iterator[Timeline]:
        """Note what runs when inside the block: compute, copies and stalls, for Perfetto (ui.perfetto.dev).

            with lm.timeline() as timeline:
                lm.generate(prompts)
            timeline.save("timeline.json")

        Where a device copies by itself every copy is then waited for, which is how its span is measured, so that steps
        are slower than without.

        Raises:
          InputError: a timeline is being noted already.
        """
        engine = self._engine
        if engine.timeline is not None:
            raise InputError("a timeline is being noted already: leave its `with` block before the next")
        timeline = Timeline()
        engine.show(timeline)
        try:
            yield timeline
        finally:
            engine.show(None)

    @contextlib.contextmanager
    def trace(self, *, weights: bool = False, pregate: int = 0) -> Iterator[Recorder]:
        """Record which experts every token uses, for `ef-jax replay`; the text does not change.

        Whatever the model does inside the block is recorded: `generate`, `stream`, `logits`, `score`.

            with lm.trace() as recording:
                lm.generate(prompts)
            recording.trace().save("routing.npz")

        Args:
          weights: record the router's weights too, as float16.
          pregate: record what the routers of so many layers ahead say of each residual stream, too, as float16: two
            bytes a token, layer, distance and expert. 0: do not.

        Raises:
          InputError: a trace is being recorded already, or `pregate` is more than the model's MoE layers.
        """
        recorder = Recorder(
            self.spec,
            block_bytes=self.plan.block_bytes,
            model=self.path.resolve().name,
            fingerprint=model_fingerprint(self.spec, self._engine.dense.routers(self.spec)),
            weights=weights,
            probe=PregateProbe(self.spec, self._engine.dense, pregate) if pregate else None,
        )
        with self._listening(recorder):
            yield recorder

    def residual_means(self, texts: Prompt | Sequence[Prompt]) -> np.ndarray:
        """Mean normed residual streams over texts (or lists of token ids), for `residual_means.logit_shifts`.

        Returns:
          f32 `[L + 1, D]`, by source, as `ResidualMeans` says.

        Raises:
          InputError: as `score`; a trace is being recorded; or all texts have one token.
        """
        means = ResidualMeans(self.spec, self._engine.dense)
        with self._listening(means):
            self.score(texts)
        return means.means()

    def calibrate_pregate(self, texts: Prompt | Sequence[Prompt]) -> None:
        """Add the mean way of the residual stream between layers, measured on texts, to what the pre-gate sees.

        A few hundred tokens like those that will be generated are enough. Recall of the bundled model rises by one
        point at distances 1 to 3 and by up to four at 6; a trained predictor knows the same and needs none of it.

        Args:
          texts: texts, or lists of token ids.

        Raises:
          InputError: as `residual_means`; nothing looks ahead; or a trained predictor does.
        """
        engine = self._engine
        if engine.look_ahead is None or engine.look_ahead.spec.correction is not None:
            raise InputError("there is no pre-gate of its own to calibrate: load with prefetching and no trained one")
        stack, distances = engine.look_ahead.looks[0].stack, engine.look_ahead.spec.distances
        engine.shift_pregate(logit_shifts(self.spec, stack, self.residual_means(texts), distances))

    @contextlib.contextmanager
    def _listening(self, listener: Listener) -> Iterator[None]:
        engine = self._engine
        if engine.recorder is not None:
            raise InputError("a trace is being recorded already: leave its `with` block before the next")
        engine.recorder = listener
        try:
            yield
        finally:
            engine.recorder = None

    def chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Token ids of a conversation by the tokenizer's chat template, to be given to `generate` or `stream`.

        Raises:
          InputError: no tokenizer, no chat template, or messages that it refuses.
        """
        return np.asarray(require_tokenizer(self.tokenizer).chat(messages), np.int32)

    def encode(self, prompt: Prompt, *, room: int = 1) -> np.ndarray:
        """int32 ids of a prompt, checked: not empty, inside the vocabulary, `room` tokens short of the context.

        Raises:
          InputError: they are not.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise InputError("the prompt is empty: give at least one character, or token ids")
            prompt = require_tokenizer(self.tokenizer).encode(prompt)
        return self._check_ids(prompt, room=room)

    def _check_ids(self, token_ids: Sequence[int] | np.ndarray, *, room: int) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError("the prompt is empty: give at least one token id")
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"token ids must be whole numbers, got {ids.dtype}")
        outside = ids[(ids < 0) | (ids >= self.spec.vocab)]
        if outside.size:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {self.spec.vocab}")
        if ids.size > self.plan.context - room:
            raise InputError(
                f"the prompt has {ids.size} tokens and the context holds {self.plan.context}, with {room} left for "
                "output: shorten it, or load with a larger context"
            )
        return ids.astype(np.int32)

    def _run(
        self, ids: list[np.ndarray], options: SamplingOptions, outputs: list["_Output"], first: int
    ) -> Iterator[tuple[int, str]]:
        """Generate for one batch; yields `(sequence, piece of text)` as it comes."""
        engine, run = self._engine, self._begin()
        eos = () if options.ignore_eos else self.spec.eos_ids
        lengths = [len(prompt) for prompt in ids]
        limits = [min(options.max_new_tokens, self.plan.context - length) for length in lengths]
        engine.prepare(lengths, max(length + limit for length, limit in zip(lengths, limits, strict=True)) - 1)
        running = set(range(len(ids)))
        try:
            tokens, logprobs = engine.start(ids, sampling_arrays(options, self.plan.batch, first))
            while True:
                for sequence in sorted(running):
                    output = outputs[sequence]
                    piece = output.push(int(tokens[sequence]), float(logprobs[sequence]), eos, limits[sequence])
                    if output.finish_reason is not None:
                        running.discard(sequence)
                        engine.stop(sequence)
                    yield sequence, piece
                    if run != self._runs:
                        raise InputError(
                            "another call has used the model since this stream began: read a stream to its end, or "
                            "close it, before the next call"
                        )
                if not running:
                    return
                tokens, logprobs = engine.step()
        finally:
            if run == self._runs:
                engine.finish()

    def _begin(self) -> int:
        """The number of a new run; the engine holds one run's state, so an older stream cannot go on."""
        self._runs += 1
        return self._runs


class _Output:
    """One sequence's output as it grows."""

    def __init__(self, tokenizer: Tokenizer | None, options: SamplingOptions) -> None:
        self._decoder: StreamDecoder | None = tokenizer.stream() if tokenizer is not None else None
        self._stop = StopMatcher(options.stop)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: int, logprob: float, eos: Sequence[int], limit: int) -> str:
        """Take a token; returns the text that it settles."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        piece = ""
        if token in eos:
            self.finish_reason = "eos"
        elif self._decoder is not None:
            piece = self._stop.push(self._decoder.push(token))
        if self._stop.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is None and len(self._tokens) >= limit:
            self.finish_reason = "length"
        if self.finish_reason in ("eos", "length") and self._decoder is not None:
            piece += self._stop.push(self._decoder.flush())
            piece += self._stop.flush()
            if self._stop.stopped:
                self.finish_reason = "stop"
        self._pieces.append(piece)
        return piece

    def generation(self) -> Generation:
        """The finished output."""
        assert self.finish_reason is not None
        return Generation(
            text="".join(self._pieces) if self._decoder is not None else None,
            tokens=self._tokens,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int | np.integer) for item in items):
        return [items]
    return items


def _with_changes(options: SamplingOptions | None, changes: dict[str, Any]) -> SamplingOptions:
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a sampling option; the options are {', '.join(names)}")
    return dataclasses.replace(options or SamplingOptions(), **changes)
