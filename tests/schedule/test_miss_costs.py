"""Which of a layer's missing experts are computed instead of copied, by what both have been measured to take."""

import pytest

from ef_jax.schedule.miss_costs import MissCosts


def costs(compute: float, *, around: float = 0.0, take_over: float | None = None) -> MissCosts:
    made = MissCosts(tile_rows=8, take_over=take_over)
    made.computed(1, compute)
    made.around(1e3)  # which is not like the others
    if around:
        made.around(around)
    return made


@pytest.mark.parametrize(
    ("compute", "copy", "around", "misses", "computed"),
    [
        (1.0, 2.0, 0.0, 1, 1),
        (2.0, 1.0, 0.0, 1, 0),
        (1.0, 2.0, 1.5, 1, 0),  # getting inputs there and outputs back costs more than is gained
        (1.0, 2.0, 0.0, 3, 2),  # both end after 2
        (1.0, 1.0, 0.0, 8, 4),
        (2.0, 1.0, 0.0, 6, 2),  # both end after 4
        (9.0, 1.0, 0.0, 8, 0),
        (0.1, 9.0, 0.0, 8, 8),
    ],
)
def test_copying_and_computing_end_together(
    compute: float, copy: float, around: float, misses: int, computed: int
) -> None:
    assert costs(compute, around=around).split([1] * misses, copy) == computed


def test_where_the_host_is_the_device_what_is_copied_is_computed_there_too() -> None:
    assert costs(3.0, take_over=0.5).split([1, 1], 1.0) == 2
    assert costs(3.0, take_over=0.5).split([1, 1], 0.0) == 2  # to copy is the same processor's work
    assert costs(3.0, around=2.0, take_over=0.5).split([1, 1], 0.0) == 0


def test_a_link_that_is_busy_is_waited_for() -> None:
    assert costs(2.0).split([1], 1.5) == 0
    assert costs(2.0).split([1], 1.5, busy=1.0) == 1


def test_more_rows_take_more_tiles() -> None:
    made = costs(1.0)
    assert made.seconds(8) == 1.0
    assert made.seconds(16) == 2.0
    made.computed(16, 1.5)
    assert made.seconds(9) == 1.5
    assert made.seconds(32) == 3.0
    assert made.split([1, 40], 2.0) == 1  # the one of few rows
    assert set(made.report()["compute_seconds"]) == {"8", "16"}


def test_a_hiccup_is_not_taken_for_the_rule_and_what_was_given_up_is_tried_again() -> None:
    made = costs(1.0)
    made.computed(1, 1000.0)
    assert made.seconds(1) == 1.0 + 3.0 / 8
    slow = costs(4.0)
    tried = [at for at in range(600) if slow.split([1, 1], 1.0)]
    assert len(tried) == 3  # less often than every 64 layers, because each costs 4 copies
    slow.computed(1, 0.0)
    for _ in range(30):
        slow.computed(1, 0.5)
    assert slow.split([1, 1], 1.0) == 1
