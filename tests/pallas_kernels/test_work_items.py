import functools

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.grouped_ffn.work_items import work_items

GROUPS, ROWS = 8, 100

_items = jax.jit(functools.partial(work_items, total_rows=ROWS), static_argnames="tile_rows")


@given(
    sizes=st.lists(st.integers(0, 12), min_size=GROUPS, max_size=GROUPS),
    slots=st.lists(st.integers(-1, 3), min_size=GROUPS, max_size=GROUPS),
    tile=st.sampled_from([1, 4, 8]),
)
def test_work_items_cover_every_row_once(sizes: list[int], slots: list[int], tile: int) -> None:
    items = jax.tree.map(np.asarray, _items(np.int32(sizes), np.int32(slots), tile_rows=tile))
    assert items.total <= items.group.shape[0]
    covered = []
    for group, row, rows in zip(*(part[: items.total].tolist() for part in items[1:]), strict=True):
        assert (row - sum(sizes[:group])) % tile == 0
        assert 0 < rows <= tile
        assert slots[group] >= 0
        covered += [(group, r) for r in range(row, row + rows)]
    ends = np.cumsum(sizes)
    wanted = [(g, r) for g in range(GROUPS) if slots[g] >= 0 for r in range(ends[g] - sizes[g], ends[g])]
    assert covered == wanted
