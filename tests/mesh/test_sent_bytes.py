"""Counted bytes of the exchange, against what compiled programs move and against routes followed one by one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax.mesh.sent_bytes import RowBytes, sent_bytes
from tests.mesh import test_exchange as exchanged
from tests.mesh.test_exchange import CASES, DECODE, EXPERTS, HIDDEN, TENSOR, Case, ids_of_cases, tables

GROUPS = r"replica_groups=(\{\{[\d,]+\}|\[\d+,\d+\]|mesh\[.*?\] \{.*?\})"
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all)\(.*" + GROUPS)
ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]+)\]")


def size(case: Case) -> RowBytes:
    item = jnp.dtype(case.dtype).itemsize
    return RowBytes(row=HIDDEN * item, weight=item)


def moved_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a device sends in the program's collectives: of what each gives it, all but its own part."""
    total = 0
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            group = devices_of_a_group(match[3])
            given = sum(
                int(bits) // 8 * math.prod(map(int, shape.split(","))) for _, bits, shape in ARRAY.findall(match[1])
            )
            total += given * (group - 1) // group
        else:
            assert not re.search(r"(all-reduce|collective-permute|reduce-scatter)\S*\(%", line), line
    return total


def devices_of_a_group(groups: str) -> int:
    """From `{{0,1,2,3}`, `[2,4]` groups of devices, or since jax 0.12 `mesh['data'=2,'expert'=4] {'expert'}`."""
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'(?!=)", groups))
    numbers = re.findall(r"\d+", groups)
    return len(numbers) if groups.startswith("{") else int(numbers[1])


@pytest.mark.parametrize("case", CASES, ids=ids_of_cases)
def test_padded_programs_move_what_is_counted(case: Case) -> None:
    counted = sent_bytes(
        of_a_group(case, case.ids(0)), tables(case, 0)["in order"], size(case), tensor=case.tensor, transport="padded"
    )
    assert (counted == moved_bytes(exchanged.program(case, "padded"))).all()


def of_a_group(case: Case, ids: np.ndarray) -> np.ndarray:
    return ids[: case.expert * case.batch].reshape(case.expert, -1, ids.shape[-1])


@pytest.mark.parametrize("case", CASES, ids=ids_of_cases)
@pytest.mark.parametrize("table", ["in order", "replicas", "anywhere", "all on one"])
def test_ragged_bytes_are_those_of_routes_followed_one_by_one(case: Case, table: str) -> None:
    serves, ids, sizes = tables(case, 2)[table], of_a_group(case, case.ids(1)), size(case)
    rows = np.zeros(case.expert * case.tensor, np.int64)
    for source, tokens in enumerate(ids):
        for token in tokens:
            asked = set()
            for expert in token[token >= 0]:
                server = int(serves[source, expert])
                if server // case.tensor != source:
                    rows[server] += 1  # the output
                    asked.add(server)
            for server in asked:
                rows[source * case.tensor + server % case.tensor] += 1
    routes = (case.expert - 1) * ids[0].size * (4 + 4 + sizes.weight)
    shared = (case.tensor - 1) * ids[0].size * sizes.row
    counted = sent_bytes(ids, serves, sizes, tensor=case.tensor, transport="ragged")
    np.testing.assert_array_equal(counted, rows * sizes.row + routes + shared)


def test_rows_for_one_device_cost_a_source_one_row_and_the_server_one_an_expert() -> None:
    ids = np.full((8, 1, 3), -1, np.int32)
    ids[0, 0] = [14, 15, -1]
    sizes = RowBytes(row=1000, weight=2)
    counted = sent_bytes(ids, tables(DECODE, 0)["in order"], sizes, transport="ragged")
    routes = 7 * 3 * (4 + 4 + 2)
    assert counted.tolist() == [1000 + routes, *[routes] * 6, 2000 + routes]


def test_ragged_sends_less_where_tokens_need_few_devices() -> None:
    sizes = RowBytes(row=4096, weight=4)
    ids, serves = of_a_group(TENSOR, TENSOR.ids(0)), tables(TENSOR, 0)["in order"]
    counted = [
        sent_bytes(ids, serves, sizes, tensor=2, transport=transport).sum() for transport in ("padded", "ragged")
    ]
    assert counted[1] < counted[0] / 2


def test_one_device_sends_nothing() -> None:
    for transport in ("padded", "ragged"):
        ids = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
        assert sent_bytes(ids, np.zeros((1, EXPERTS), np.int32), size(DECODE), transport=transport).tolist() == [0]
