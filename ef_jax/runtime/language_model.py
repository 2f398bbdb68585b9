"""`LanguageModel`: what `ef_jax.load` returns."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ef_jax.errors import InputError, UnsupportedError
from ef_jax.generation import Generation, Score
from ef_jax.memory.plan import MemoryPlan
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.runtime.pregate_probe import PregateProbe
from ef_jax.runtime.recorder import Listener, Recorder
from ef_jax.runtime.residual_means import ResidualMeans, logit_shifts
from ef_jax.runtime.sequence_engine import SequenceEngine
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.token_scheduler import regroup
from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.driver import Driver
from ef_jax.serving.output import Output
from ef_jax.serving.request import Request
from ef_jax.serving.submission import Submission
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats, lossy_text
from ef_jax.text import Tokenizer, require_tokenizer
from ef_jax.timeline import Timeline

Prompt = str | Sequence[int] | np.ndarray


class LanguageModel:
    """A loaded MoE language model whose experts are served from host memory.

    Attributes:
      path: the checkpoint.
      spec: the model.
      tokenizer: None where the checkpoint has none; prompts are then token ids.
    """

    def __init__(self, path: Path, spec: ModelSpec, engine: SequenceEngine, tokenizer: Tokenizer | None) -> None:
        self.path, self.spec, self.tokenizer = path, spec, tokenizer
        self._engine = engine
        self._batch = BatchEngine(engine, regroup=regroup)
        self._driver = Driver(self._batch)

    @property
    def plan(self) -> MemoryPlan:
        """Device bytes by item."""
        return self._engine.plan

    @property
    def stats(self) -> Stats:
        """Counters since loading or `stats.reset()`."""
        return self._engine.stats

    @property
    def kernels(self) -> dict[str, str]:
        """The backend of `pallas_kernels` that computes the experts, of "decode" steps and of "prompt"s, and of decode
        steps those in "low_precision" where there are any."""
        programs = self._engine.programs
        low = {} if programs.low_precision is None else {"low_precision": programs.low_precision.kernels.decode}
        return {**programs.kernels.as_dict(), **low}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: SamplingOptions | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        **changes: Any,
    ) -> list[Generation]:
        """Continue prompts, as many at a time as `load` was told `sequences`; results in the order given.

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
        requests = [self._request(prompt, options, draw=index) for index, prompt in enumerate(ids)]
        for index, piece in self._serve(requests):
            if on_text is not None:
                on_text(index, piece)
        return [request.result() for request in requests]

    def stream(self, prompt: Prompt, options: SamplingOptions | None = None, **changes: Any) -> Iterator[str]:
        """Continue one prompt, yielding text as it comes; joined, the pieces are `generate`'s text.

        Other calls may be made while a stream is open, other streams too; it then moves on beside them. Closing it
        frees what it holds.

        Raises:
          InputError: as `generate`, and where the checkpoint has no tokenizer.
        """
        options = _with_changes(options, changes)
        require_tokenizer(self.tokenizer)
        request = self._request(self.encode(prompt), options)
        return (piece for _, piece in self._serve([request]))

    def submit(
        self, prompt: Prompt, options: SamplingOptions | None = None, *, timeout: float | None = None, **changes: Any
    ) -> Submission:
        """Continue one prompt in the background, beside whatever else runs; returns at once.

            submission = lm.submit("Once upon a time", max_new_tokens=64)
            async for piece in submission: ...
            generation = await submission  # or, without asyncio: submission.result()

        Args:
          prompt: text or token ids.
          options: sampling options; greedy where None.
          timeout: seconds from now after which it ends with what it has, looked at between steps. None: none.
          **changes: single fields of `SamplingOptions`.

        Raises:
          InputError: as `generate`; or prompt and `max_new_tokens` do not fit the context together.
          UnsupportedError: several processes run the model: each would begin at a time of its own.
        """
        if not self._engine.repeats:
            raise UnsupportedError("submit is of runs in one process: use generate or stream in every one of them")
        options = _with_changes(options, changes)
        deadline = None if timeout is None else self._batch.clock() + _seconds(timeout)
        if options.stop:
            require_tokenizer(self.tokenizer)
        ids = self.encode(prompt)
        if options.max_new_tokens > self.plan.context - len(ids):
            raise InputError(
                f"a prompt of {len(ids)} tokens and {options.max_new_tokens} new ones do not fit the context of "
                f"{self.plan.context}: ask for max_new_tokens={self.plan.context - len(ids)} at most"
            )
        request = self._request(ids, options, deadline=deadline)
        self._driver.drive(request)
        return Submission(self._batch, request)

    def logits(
        self, token_ids: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """Next-token logits after every token; of a model with an encoder, after every token of the decoder.

        Args:
          token_ids: `[T]` ids, at least one, not longer than the context.
          continuation: with an encoder, which reads `token_ids`: the `[C]` ids, perhaps none, that the decoder is given
            after the token that it begins with, one by one, as it would have generated them. None where there is no
            encoder.

        Returns:
          f32 `[T, V]`, or `[1 + C, V]`.

        Raises:
          InputError: no ids, too many, or some outside the vocabulary; a continuation without an encoder, or none with.
        """
        if self.spec.encodes != (continuation is not None):
            raise InputError(
                "the model has an encoder: give logits what it reads, and the continuation that the decoder is given"
                if self.spec.encodes
                else "the model has no encoder: give logits one sequence, and no continuation"
            )
        ids = self._check_ids(token_ids, room=0 if continuation is None else 1 + len(continuation))
        if continuation is not None:
            following = self._check_ids(continuation, room=0) if len(continuation) else np.zeros(0, np.int32)
            with self._batch.visit() as row:
                self._engine.prepare(len(ids), len(ids) + 1 + len(following))
                return np.concatenate(list(self._engine.logits_after(ids, following, row)))
        with self._batch.visit() as row:
            self._engine.prepare(len(ids), len(ids))
            return np.concatenate(list(self._engine.logits(ids, row)))

    def score(self, texts: Prompt | Sequence[Prompt], *, by_steps: bool = False) -> list[Score]:
        """How likely each text (or list of token ids) is, given its first token.

        Args:
          texts: one, or a list of them.
          by_steps: run each token but the first in a decode step of its own, as if it had been generated, not the text
            as a prompt. It takes longer; some lossy options act on decode steps alone. `stats.decode` counts the
            steps; the time for logits is not in it.

        Raises:
          InputError: as `logits`; a text longer than the context must be cut by the caller. The model has an encoder.
        """
        if self.spec.encodes:
            raise InputError(
                "the model has an encoder, so a text has no score of its own: take logits(prompt, continuation)"
            )
        scores = []
        for text in _as_list(texts):
            ids = self.encode(text, room=0)
            total, done = 0.0, 0
            with self._batch.visit() as row:
                self._engine.prepare(1 if by_steps else len(ids), len(ids))
                for logits in (self._engine.logits_by_steps if by_steps else self._engine.logits)(ids, row):
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
        with self._batch.alone():
            engine.show(timeline)
        try:
            yield timeline
        finally:
            with self._batch.alone():
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
          UnsupportedError: tokens have fewer experts than the model's top-k, by `lossy_adaptive_experts`.
        """
        lossy = self.stats.lossy or {}
        if "lossy_adaptive_experts" in lossy:
            raise UnsupportedError(
                "a trace has top-k experts of every token: load without lossy_adaptive_experts to record one"
            )
        recorder = Recorder(
            self.spec,
            block_bytes=self.plan.block_bytes,
            model=self.path.resolve().name,
            fingerprint=model_fingerprint(self.spec, self._engine.dense.routers(self.spec)),
            lossy=lossy_text(lossy),
            weights=weights,
            probe=PregateProbe(self.spec, self._engine.dense, pregate) if pregate else None,
            gather=self._engine.gather,
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
        if engine.lookout.look_ahead is None or engine.lookout.look_ahead.spec.correction is not None:
            raise InputError("there is no pre-gate of its own to calibrate: load with prefetching and no trained one")
        stack, distances = engine.lookout.look_ahead.looks[0].stack, engine.lookout.look_ahead.spec.distances
        shifts = logit_shifts(self.spec, stack, self.residual_means(texts), distances)
        with self._batch.alone():
            engine.lookout.shift(shifts)

    @contextlib.contextmanager
    def _listening(self, listener: Listener) -> Iterator[None]:
        engine = self._engine
        if engine.recorder is not None:
            raise InputError("a trace is being recorded already: leave its `with` block before the next")
        with self._batch.alone():
            engine.recorder = listener
        try:
            yield
        finally:
            with self._batch.alone():
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

    def _request(self, prompt: np.ndarray, options: SamplingOptions, **place: Any) -> Request:
        """A request for ids that `encode` has checked; its output is cut where the context ends."""
        limit = min(options.max_new_tokens, self.plan.context - len(prompt))
        return Request(prompt, options, Output(self.tokenizer, options, eos=self.spec.eos_ids, limit=limit), **place)

    def _serve(self, requests: list[Request]) -> Iterator[tuple[int, str]]:
        """Take turns until requests have ended; yields `(index, piece of text)` as pieces come.

        Leaving early cancels what has not ended.
        """
        given = dict.fromkeys(range(len(requests)), 0)  # pieces, of those that have not ended

        def news() -> bool:
            return any(requests[i].ended or given[i] < len(requests[i].output.pieces) for i in given)

        try:
            self._batch.submit(requests)
            while given:
                for index in list(given):
                    request = requests[index]
                    ended = request.ended  # before its pieces are read: another thread may drive
                    for piece in request.output.pieces[given[index] :]:
                        given[index] += 1
                        yield index, piece
                    if ended:
                        del given[index]
                        request.result()
                if given:
                    self._batch.turn(unless=news)
        finally:
            self._batch.cancel(requests)


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


def _seconds(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InputError(f"timeout must be seconds above 0, or None for no limit; got {timeout!r}")
    return timeout


def _with_changes(options: SamplingOptions | None, changes: dict[str, Any]) -> SamplingOptions:
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a sampling option; the options are {', '.join(names)}")
    return dataclasses.replace(options or SamplingOptions(), **changes)
