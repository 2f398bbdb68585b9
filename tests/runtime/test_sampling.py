import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.runtime.sampling import mark_seen, sample, sampling_arrays
from ef_jax.sampling_options import SamplingOptions

_sample = jax.jit(sample)


def _logits(seed: int, rows: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(rows, vocab)).astype(np.float32)


def _draws(logits: np.ndarray, options: SamplingOptions, count: int, seen: np.ndarray | None = None) -> np.ndarray:
    """`count` draws from one row of logits [V]: the sequences of one call at step 0."""
    many = jnp.broadcast_to(jnp.asarray(logits), (count, logits.shape[0]))
    seen = np.zeros(logits.shape, bool) if seen is None else seen
    tokens, _ = _sample(
        many,
        jnp.broadcast_to(jnp.asarray(seen), many.shape),
        jnp.zeros(count, jnp.int32),
        sampling_arrays([(options, number) for number in range(count)]),
    )
    return np.asarray(tokens)


def _reference(logits: np.ndarray, options: SamplingOptions, seen: np.ndarray) -> np.ndarray:
    """Probabilities f64 [V] by sorting, as transformers' processors define them."""
    scores = logits.astype(np.float64)
    penalty = options.repetition_penalty
    scores = np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)
    scores /= options.temperature
    if options.top_k:
        scores[scores < np.sort(scores)[-min(options.top_k, scores.size)]] = -np.inf
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        ascending = np.argsort(probabilities)
        drop = np.cumsum(probabilities[ascending]) <= 1 - options.top_p
        drop[-1] = False
        probabilities[ascending[drop]] = 0
        probabilities /= probabilities.sum()
    return probabilities


_OPTIONS = [
    SamplingOptions(temperature=1.0, seed=1),
    SamplingOptions(temperature=0.7, top_k=5, seed=2),
    SamplingOptions(temperature=1.3, top_p=0.8, seed=3),
    SamplingOptions(temperature=2.0, top_k=12, top_p=0.6, repetition_penalty=1.3, seed=4),
    SamplingOptions(temperature=0.9, top_k=1000, top_p=0.999, repetition_penalty=0.7, seed=5),
]


@pytest.mark.parametrize("options", _OPTIONS, ids=range(len(_OPTIONS)))
def test_draws_follow_the_distribution(options: SamplingOptions) -> None:
    vocab, count = 300, 4000  # 300: more than one block, the last one padded
    logits = _logits(options.seed, 1, vocab)[0]
    seen = np.random.default_rng(9).random(vocab) < 0.3
    expected = _reference(logits, options, seen) * count
    observed = np.bincount(_draws(logits, options, count, seen), minlength=vocab)
    assert observed[expected == 0].sum() == 0
    frequent = expected >= 5
    cells = np.append(expected[frequent], expected[~frequent].sum())
    counts = np.append(observed[frequent], observed[~frequent].sum())
    chi_square = np.sum((counts - cells) ** 2 / np.maximum(cells, 1e-9), where=cells > 0)
    freedom = np.count_nonzero(cells) - 1
    # Four standard deviations; the seeds are fixed, so that this passes always or never.
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parity
@pytest.mark.parametrize("options", _OPTIONS[1:], ids=range(1, len(_OPTIONS)))
def test_kept_tokens_are_those_of_transformers(options: SamplingOptions) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    torch.set_num_threads(1)
    logits = _logits(options.seed + 50, 1, 40)
    prompt = np.array([[3, 3, 17, 30, 39]])
    scores, ids = torch.from_numpy(logits), torch.from_numpy(prompt)
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)),
        processors.TemperatureLogitsWarper(float(options.temperature)),
    ]
    if options.top_k:
        chain.append(processors.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(processors.TopPLogitsWarper(options.top_p))
    for processor in chain:
        scores = processor(ids, scores)
    theirs = torch.softmax(scores.double(), dim=-1)[0].numpy()
    seen = np.isin(np.arange(40), prompt)
    np.testing.assert_allclose(_reference(logits[0], options, seen), theirs, atol=1e-6)
    assert set(_draws(logits[0], options, 3000, seen)) <= set(np.flatnonzero(theirs))


@settings(max_examples=60)
@given(
    logits=st.lists(st.integers(-4, 4), min_size=8, max_size=8),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([1e-6, 0.3, 0.5, 0.77, 1.0]),
)
def test_only_kept_tokens_are_drawn_and_ties_are_kept_together(logits: list[int], top_k: int, top_p: float) -> None:
    values = np.asarray(logits, np.float32)
    options = SamplingOptions(temperature=1.5, top_k=top_k, top_p=top_p, seed=top_k)
    kept = {i for i, p in enumerate(_reference(values, options, np.zeros(8, bool))) if p > 0}
    tied = {i for i in range(8) if logits[i] in {logits[k] for k in kept}}
    assert set(_draws(values, options, 64)) <= tied


def test_greedy_takes_the_first_largest_and_its_logprob() -> None:
    logits = np.array([[0.0, 2.0, 2.0, -1.0], [5.0, 1.0, 1.0, 1.0]], np.float32)
    tokens, logprobs = _sample(
        jnp.asarray(logits),
        jnp.zeros((2, 4), bool),
        jnp.zeros(2, jnp.int32),
        sampling_arrays([(SamplingOptions(), 0)] * 2),
    )
    assert tokens.tolist() == [1, 0]
    assert tokens.dtype == jnp.int32
    expected = [row[i] - np.log(np.exp(row).sum()) for row, i in zip(logits.astype(np.float64), [1, 0], strict=True)]
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)


def test_greedy_obeys_the_repetition_penalty_but_logprobs_are_of_raw_logits() -> None:
    logits = np.array([[4.0, 3.0, -1.0]], np.float32)
    seen = mark_seen(jnp.zeros((1, 3), bool), jnp.array([[0, 2]]), jnp.array([[True, False]]))
    assert seen.tolist() == [[True, False, False]]
    tokens, logprobs = _sample(
        jnp.asarray(logits),
        seen,
        jnp.zeros(1, jnp.int32),
        sampling_arrays([(SamplingOptions(repetition_penalty=2.0), 0)]),
    )
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, logits[0, 1] - np.log(np.exp(logits).sum()), rtol=1e-6)


def test_draws_do_not_depend_on_company_batching_or_order() -> None:
    logits = jnp.asarray(_logits(0, 6, 500))
    seen = jnp.zeros((6, 500), bool)
    options = SamplingOptions(temperature=1.0, top_p=0.95, seed=11)
    step = jnp.arange(6, dtype=jnp.int32)
    arrays = sampling_arrays([(options, number) for number in range(6)])
    together, _ = _sample(logits, seen, step, arrays)
    for first in (0, 2, 5):
        rows = slice(first, first + 1)
        alone, _ = _sample(logits[rows], seen[rows], step[rows], sampling_arrays([(options, first)]))
        assert alone.tolist() == together[rows].tolist()
    mixed = arrays._replace(temperature=arrays.temperature.at[::2].set(0))
    half, _ = _sample(logits, seen, step, mixed)
    assert half[1::2].tolist() == together[1::2].tolist()
    assert half[::2].tolist() == jnp.argmax(logits, axis=1)[::2].tolist()


def test_seed_sequence_and_step_each_change_the_draws() -> None:
    logits = np.zeros(4096, np.float32)
    draws = _draws(logits, SamplingOptions(temperature=1.0, seed=1), 50)
    assert len(set(draws)) > 45
    assert list(draws) == list(_draws(logits, SamplingOptions(temperature=1.0, seed=1), 50))
    assert list(draws) != list(_draws(logits, SamplingOptions(temperature=1.0, seed=2), 50))
    steps, _ = _sample(
        jnp.zeros((50, 4096)),
        jnp.zeros((50, 4096), bool),
        jnp.arange(50, dtype=jnp.int32),
        sampling_arrays([(SamplingOptions(temperature=1.0, seed=1), 0)] * 50),
    )
    assert len(set(steps.tolist())) > 45


def test_other_options_do_not_recompile() -> None:
    traces = 0

    def counted(*args: object) -> object:
        nonlocal traces
        traces += 1
        return sample(*args)

    step = jax.jit(counted)
    for options in (SamplingOptions(), *_OPTIONS):
        step(jnp.zeros((2, 16)), jnp.zeros((2, 16), bool), jnp.zeros(2, jnp.int32), sampling_arrays([(options, 0)] * 2))
    assert traces == 1


def test_extreme_logits_and_temperatures_stay_in_range() -> None:
    logits = np.array([1e30, -1e30, 1e30, -np.inf, 0], np.float32)
    for temperature in (1e-5, 1e4):
        options = SamplingOptions(temperature=temperature, top_k=4, top_p=0.99)
        assert set(_draws(logits, options, 200)) == {0, 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**31),
        ("max_new_tokens", True),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-30),
        ("top_k", -1),
        ("top_k", 2**40),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{field} must be .* got {value!r}".replace("+", r"\+")) as error:
        SamplingOptions(**{field: value})
    assert "\n" not in str(error.value)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="a stop string is empty"):
        SamplingOptions(stop=("a", ""))
