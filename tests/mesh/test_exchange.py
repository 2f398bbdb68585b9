"""The exchange of routed tokens between devices: both transports give what plain numpy makes of the routes.

An "expert" here is the exclusive or of a row's bits with the expert, the server and the token's weight: rows are any
bits at all, and no mistake can cancel.
"""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as st_numpy
from jax.sharding import PartitionSpec

from ef_jax.errors import InputError
from ef_jax.mesh import exchange
from ef_jax.mesh.exchange import Transport, choose_transport
from ef_jax.mesh.layout import AXES, ROW_AXES, MeshLayout
from ef_jax.mesh.routes import owner
from ef_jax.placement import Placement
from ef_jax.runtime.steps import Routed
from tests.mesh import emulated_ragged

EXPERTS, K, HIDDEN = 16, 3, 6
TRANSPORTS: tuple[Transport, ...] = ("padded", "ragged")


@pytest.fixture(autouse=True)
def cpus_exchange_ragged_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged.ragged_all_to_all)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, and tokens on each of its row shards."""

    data: int
    expert: int
    tensor: int
    batch: int
    tokens: int
    dtype: str = "bfloat16"

    @property
    def layout(self) -> MeshLayout:
        return MeshLayout.of(
            jax.devices()[: self.data * self.expert * self.tensor],
            data=self.data,
            expert=self.expert,
            tensor=self.tensor,
        )

    @property
    def bits(self) -> np.dtype:
        return np.dtype(f"uint{8 * jnp.dtype(self.dtype).itemsize}")

    @property
    def sequences(self) -> int:
        return self.batch * self.data * self.expert

    def routed(self, ids: np.ndarray, seed: int) -> Routed:
        rng = np.random.default_rng(seed)
        limit = int(np.iinfo(self.bits).max)
        h = rng.integers(0, limit, (*ids.shape[:2], HIDDEN), self.bits, endpoint=True).view(jnp.dtype(self.dtype))
        return Routed(h, h, ids, rng.normal(size=ids.shape).astype(jnp.dtype(self.dtype)))

    def ids(self, seed: int) -> np.ndarray:
        """Routes of distinct experts, some of them -1."""
        rng = np.random.default_rng(seed)
        chosen = rng.permuted(np.tile(np.arange(EXPERTS), (self.sequences, self.tokens, 1)), axis=-1)[..., :K]
        return np.where(rng.random(chosen.shape) < 0.2, -1, chosen).astype(np.int32)


DECODE = Case(data=1, expert=8, tensor=1, batch=2, tokens=1)
GROUPS = Case(data=2, expert=4, tensor=1, batch=1, tokens=5, dtype="float32")
TENSOR = Case(data=1, expert=4, tensor=2, batch=2, tokens=3)
CASES = [DECODE, GROUPS, TENSOR]
ids_of_cases = ["expert=8", "data=2,expert=4", "expert=4,tensor=2"]


@functools.cache
def program(case: Case, transport: Transport) -> jax.stages.Compiled:
    """`(routed, serves) -> collected rows, what each device served`."""

    def step(routed: Routed, serves: jax.Array) -> tuple[jax.Array, Routed]:
        served = exchange.send(routed, serves, transport=transport)
        outputs = jax.vmap(answer, (0, 0, 0, None))(
            jnp.repeat(served.h.reshape(-1, HIDDEN), K, axis=0),
            served.ids.reshape(-1),
            served.weights.reshape(-1),
            owner(),
        )
        mine = exchange.collect(outputs, routed, serves, transport=transport)
        return mine.reshape(*routed.ids.shape, -1), served

    layout = case.layout
    rows, each = PartitionSpec(ROW_AXES), PartitionSpec(AXES)
    mapped = jax.shard_map(
        step, mesh=layout.mesh, in_specs=(rows, PartitionSpec()), out_specs=(rows, each), check_vma=False
    )
    shapes = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=layout.rows),
        case.routed(case.ids(0), 0),
    )
    serves = jax.ShapeDtypeStruct((case.expert, EXPERTS), np.int32, sharding=layout.everywhere)
    return jax.jit(mapped).lower(shapes, serves).compile()


def answer(row: Any, expert: Any, weight: Any, server: Any) -> jax.Array:
    """What a server makes of a row for an expert; of an expert that it does not serve, a pattern like no other."""
    bits = jnp.dtype(f"uint{8 * row.dtype.itemsize}")
    weighed = jax.lax.bitcast_convert_type(row, bits) ^ jax.lax.bitcast_convert_type(weight, bits)
    marked = weighed ^ (expert * 64 + server).astype(bits)
    return jax.lax.bitcast_convert_type(jnp.where(expert < 0, jnp.asarray(0xDEAD, bits), marked), row.dtype)


def run(case: Case, transport: Transport, routed: Routed, serves: np.ndarray) -> tuple[np.ndarray, Routed]:
    layout = case.layout
    on_mesh = jax.tree.map(lambda part: jax.device_put(part, layout.rows), routed)
    return jax.tree.map(np.asarray, program(case, transport)(on_mesh, jax.device_put(serves, layout.everywhere)))


def expected(case: Case, routed: Routed, serves: np.ndarray) -> np.ndarray:
    """Bits of every id's row."""
    bits = case.bits
    source = (np.arange(case.sequences) // case.batch) % case.expert
    server = serves[source[:, None, None], np.maximum(routed.ids, 0)]
    marked = routed.h.view(bits)[:, :, None] ^ routed.weights.view(bits)[..., None]
    return np.where(routed.ids[..., None] < 0, 0, marked ^ (routed.ids * 64 + server).astype(bits)[..., None])


def tables(case: Case, seed: int) -> dict[str, np.ndarray]:
    """`serves [X, E]` of several placements: in order, with replicas, and any device for any expert."""
    owners = case.expert * case.tensor
    rng = np.random.default_rng(seed)
    contiguous = Placement.contiguous(layers=1, experts=EXPERTS, devices=owners)
    replicas = Placement.of(contiguous.holds | (rng.random(contiguous.holds.shape) < 0.3))
    # Of the sources of a placement, which are owners, those of tensor index 0 speak for the others.
    by_source = {
        name: placement.serves[0].T[:: case.tensor].astype(np.int32)
        for name, placement in {"in order": contiguous, "replicas": replicas}.items()
    }
    anywhere = rng.integers(0, owners, (case.expert, EXPERTS)).astype(np.int32)
    return {**by_source, "anywhere": anywhere, "all on one": np.full_like(anywhere, owners - 1)}


def check(case: Case, transport: Transport, routed: Routed, serves: np.ndarray) -> None:
    collected, served = run(case, transport, routed, serves)
    np.testing.assert_array_equal(collected.view(case.bits), expected(case, routed, serves))
    assert_each_served_once(case, routed, serves, served)


def assert_each_served_once(case: Case, routed: Routed, serves: np.ndarray, served: Routed) -> None:
    """By device, block of a source and token in order: the same ids, weights and rows as in the routes."""
    shape = (case.data, case.expert, case.tensor, case.expert, case.batch * case.tokens)
    by_device = Routed(*(np.asarray(part).reshape(*shape, -1) for part in served))
    sources = Routed(*(np.asarray(part).reshape(case.data, case.expert, shape[-1], -1) for part in routed))
    for data, expert, tensor, source in np.ndindex(*shape[:4]):
        ids = sources.ids[data, source]
        here = (ids >= 0) & (serves[source][np.maximum(ids, 0)] == expert * case.tensor + tensor)
        got = Routed(*(part[data, expert, tensor, source] for part in by_device))
        wanted, found = here.any(axis=-1), (got.ids >= 0).any(axis=-1)
        np.testing.assert_array_equal(got.ids[found], np.where(here, ids, -1)[wanted])
        for field in ("h", "weights"):
            had, has = getattr(sources, field)[data, source][wanted], getattr(got, field)[found]
            if field == "weights":
                had, has = had[here[wanted]], has[here[wanted]]
            np.testing.assert_array_equal(has.view(case.bits), had.view(case.bits))
        assert np.array_equal(got.x.view(case.bits), got.h.view(case.bits))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", CASES, ids=ids_of_cases)
def test_every_row_is_served_where_it_should_be_and_comes_back(case: Case, transport: Transport) -> None:
    for seed, serves in enumerate(tables(case, 1).values()):
        check(case, transport, case.routed(case.ids(seed), seed), serves)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tokens_without_experts_and_all_tokens_to_one(transport: Transport) -> None:
    serves = tables(TENSOR, 0)["in order"]
    none = np.full_like(TENSOR.ids(0), -1)
    some = none.copy()
    some[1, 2, 1] = 15  # one expert of one token
    one = np.broadcast_to(np.array([4, 5, -1], np.int32), none.shape)  # several experts of a token on one device
    assert serves[0, 4] == serves[0, 5]
    for ids in (none, some, one):
        check(TENSOR, transport, TENSOR.routed(ids, 0), serves)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bits_of_rows_survive(transport: Transport) -> None:
    """Not-numbers keep their payloads, zeros their signs."""
    serves = tables(DECODE, 0)["in order"]
    routed = DECODE.routed(DECODE.ids(2), 0)
    odd = np.array([0x7FC0, 0x7F81, 0xFFBF, 0x8000, 0x7F80, 0x0001], np.uint16)  # quiet, signalling, -0, inf, tiny
    h = np.broadcast_to(odd, routed.h.shape).copy().view(routed.h.dtype)
    check(DECODE, transport, routed._replace(h=h), serves)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    ids=st_numpy.arrays(np.int32, (TENSOR.sequences, TENSOR.tokens, K), elements=st.integers(-1, EXPERTS - 1)),
    serves=st_numpy.arrays(np.int32, (TENSOR.expert, EXPERTS), elements=st.integers(0, 7)),
    seed=st.integers(0, 3),
)
def test_transports_agree_on_any_routes(ids: np.ndarray, serves: np.ndarray, seed: int) -> None:
    routed = TENSOR.routed(ids, seed)
    for transport in TRANSPORTS:
        check(TENSOR, transport, routed, serves)


def test_groups_of_one_device_exchange_nothing() -> None:
    case = Case(data=2, expert=1, tensor=1, batch=2, tokens=1)
    for transport in TRANSPORTS:
        compiled = program(case, transport).as_text()
        assert "all-to-all" not in compiled
        assert "all-gather" not in compiled
        check(case, transport, case.routed(case.ids(0), 0), np.zeros((1, EXPERTS), np.int32))


def test_transports_are_chosen_by_platform() -> None:
    devices = jax.devices()
    assert choose_transport(devices) == "padded"
    assert choose_transport(devices, "padded") == "padded"
    with pytest.raises(InputError, match="'ragged' does not run on cpu: give exchange='padded' or none"):
        choose_transport(devices, "ragged")
    with pytest.raises(InputError, match="'all' is not one of padded, ragged"):
        choose_transport(devices, "all")


def test_the_emulation_gives_the_documented_example() -> None:
    """Of `jax.lax.ragged_all_to_all`, whose sizes to receive there are the transpose of those sent."""
    operand = np.array([1, 2, 2, 3, 4, 0], np.int32)
    output = np.zeros(8, np.int32)
    starts, sent = np.array([0, 1, 0, 1], np.int32), np.array([1, 2, 1, 1], np.int32)
    places, received = np.array([0, 0, 1, 2], np.int32), np.array([1, 1, 2, 1], np.int32)
    result = emulated(2, operand, output, starts, sent, places, received)
    assert result.tolist() == [1, 3, 0, 0, 2, 2, 4, 0]
    disagreeing = emulated(2, operand, output, starts, sent, places, np.array([1, 1, 1, 1], np.int32))
    assert disagreeing.tolist() == [1, 3, 0, 0, *[emulated_ragged.WRONG] * 4]


def test_the_emulation_follows_the_documented_sends_and_receives() -> None:
    """Two slices to each of four devices, by the pseudocode of the documentation."""
    devices, slices, rng = 4, 2, np.random.default_rng(0)
    sent = rng.integers(0, 3, (devices, devices, slices))
    starts = rng.integers(0, 8, sent.shape)
    # Each receiver's slices lie one after another, a row apart.
    ends = np.cumsum(sent.transpose(1, 0, 2).reshape(devices, -1) + 1, axis=1).reshape(devices, devices, slices)
    places = ends.transpose(1, 0, 2) - sent - 1
    operand = rng.integers(1, 1000, (devices, 10)).astype(np.int32)
    wanted = np.full((devices, 40), -1, np.int32)
    for source, to, index in np.ndindex(*sent.shape):
        length, start, place = (int(part[source, to, index]) for part in (sent, starts, places))
        wanted[to, place : place + length] = operand[source, start : start + length]
    flat = [part.reshape(-1).astype(np.int32) for part in (starts, sent, places, sent.transpose(1, 0, 2))]
    result = emulated(devices, operand.reshape(-1), np.full(wanted.size, -1, np.int32), *flat)
    np.testing.assert_array_equal(result.reshape(wanted.shape), wanted)


def emulated(devices: int, *arguments: np.ndarray) -> np.ndarray:
    """The emulation on that many devices, which share each argument in order."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))
    call = functools.partial(emulated_ragged.ragged_all_to_all, axis_name="x")

    def on_each(operand: jax.Array, output: jax.Array, *where: jax.Array) -> jax.Array:
        return call(operand[:, None], output[:, None], *where)[:, 0]

    each = PartitionSpec("x")
    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=(each,) * 6, out_specs=each, check_vma=False)
    return np.asarray(jax.jit(mapped)(*arguments))
