"""Which device serves what of a step, and which lanes prompts take: ids only."""

from typing import Any

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from ef_jax.loading import bundled_model
from ef_jax.mesh.fleet import Fleet, servers_of
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.rows import MeshRows
from ef_jax.placement import Placement
from ef_jax.weights import open_checkpoint

LAYERS, EXPERTS, TOP_K = 2, 8, 3
_ORDERS = st.lists(st.permutations(range(EXPERTS)), min_size=1, max_size=6)


@st.composite
def _steps(draw: Any) -> tuple[tuple[int, int, int], np.ndarray, list[list[int]], list[int]]:
    """Sizes of a mesh, who holds what, with replicas, and the experts of some sequences with their parts."""
    data, expert, tensor = draw(st.sampled_from([(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2), (1, 1, 1)]))
    holds = np.zeros((LAYERS, EXPERTS, expert * tensor), bool)
    for layer, expert_id in np.ndindex(LAYERS, EXPERTS):
        holds[layer, expert_id, draw(st.lists(st.integers(0, expert * tensor - 1), min_size=1, max_size=2))] = True
    rows = [list(row[: draw(st.integers(0, TOP_K))]) for row in draw(_ORDERS)]  # some experts may be dropped
    parts = [draw(st.integers(0, data * expert - 1)) for _ in rows]
    return (data, expert, tensor), holds, rows, parts


@hypothesis.given(_steps())
def test_every_expert_of_every_sequence_is_served_once_in_its_group(step: Any) -> None:
    (data, expert, tensor), holds, rows, parts = step
    layout = MeshLayout.of(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)
    placement = Placement.of(holds)
    fleet = Fleet(layout, placement, [], predicts=False)
    for layer in range(LAYERS):
        of_part = servers_of(layout, placement, layer)
        shares = fleet.shares(layer, rows, parts, range(layout.count))
        expected: list[list[list[int]]] = [[] for _ in range(layout.count)]
        for row, part in zip(rows, parts, strict=True):
            owners = [int(of_part[part % expert, one]) for one in row]
            for one, owner in zip(row, owners, strict=True):
                assert holds[layer, one, owner]
                home = part % expert * tensor
                assert owner == home or not holds[layer, one, home]
            for owner in range(layout.owners):
                if mine := [one for one, its in zip(row, owners, strict=True) if its == owner]:
                    expected[part // expert * layout.owners + owner].append(mine)  # in its own group
        assert shares == expected


@hypothesis.given(st.data())
def test_prompts_take_lanes_of_the_device_that_has_their_row(data: Any) -> None:
    with open_checkpoint(bundled_model()) as checkpoint:
        spec = checkpoint.spec
    layout = MeshLayout.of(jax.devices()[:4], data=2, expert=2)
    rows = MeshRows(spec, layout, rows=8, context=16)
    chosen = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
    lanes, width = 4 * data.draw(st.integers(1, 2)), 4
    for row in chosen:
        rows.prompts[row] = np.full(3, row + 1, np.int32)
    parts = [(row, 0) for row in chosen]
    turns = rows.turns(parts, lanes)
    assert sorted(part for turn in turns for part in turn) == sorted(parts)
    for turn in turns:
        chunk = rows.chunk(width, lanes, turn, {row: row for row, _ in turn})
        each = lanes // 4
        for lane in range(lanes):
            row = int(chunk.rows[lane])
            if row == rows.here:
                assert (chunk.positions[lane] == -1).all()
                assert chunk.ends[lane, 1] == rows.here
            else:
                whole = lane // each * rows.here + row
                assert (chunk.tokens[lane, :3] == whole + 1).all()
                assert chunk.ends[lane].tolist() == [2, row]
        assert sum(int(row) < rows.here for row in chunk.rows) == len(turn)
