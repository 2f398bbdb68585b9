"""Placements as files: what is read is what was written, and what is no placement is refused in one line."""

from pathlib import Path

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.placement import Placement, load_placement, place, read_placement, save_placement
from tests.replay.traces import made_up
from tests.schedule.tiny_store import EXPERTS, LAYERS, SPEC


def placement_of(*, layers: int = LAYERS, experts: int = EXPERTS, devices: int = 4) -> Placement:
    return Placement.contiguous(layers=layers, experts=experts, devices=devices)


def same(one: Placement, other: Placement) -> bool:
    return np.array_equal(one.holds, other.holds) and np.array_equal(one.serves, other.serves)


def test_a_placement_with_replicas_is_read_as_it_was_written(tmp_path: Path) -> None:
    placement = place("affine", made_up(sequences=9, length=12), 4, replicas=2)
    save_placement(placement, tmp_path / "a.npz", model="made up")
    found = read_placement(tmp_path / "a.npz")
    assert same(found, placement)
    assert found.holds.sum() > found.holds.shape[0] * found.holds.shape[1]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as plain:
        assert str(plain["model"]) == "made up"
    with pytest.raises(InputError, match="exists"):
        save_placement(placement, tmp_path / "a.npz")


def test_the_option(tmp_path: Path) -> None:
    contiguous = placement_of()
    assert same(load_placement("contiguous", SPEC, 4), contiguous)
    assert load_placement(contiguous, SPEC, 4) is contiguous
    turned = Placement.of(contiguous.holds[:, ::-1].copy())
    save_placement(turned, tmp_path / "turned.npz")
    assert same(load_placement(str(tmp_path / "turned.npz"), SPEC, 4), turned)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 2}, "for a model of 2 MoE layers, this one has 3: make one for this model"),
        ({"experts": 8}, "for a model of 8 experts a layer, this one has 16"),
        ({"devices": 8}, "for 8 devices and the mesh shares experts among 4: give expert=8, or make one for 4"),
    ],
)
def test_placements_of_another_model_or_mesh_are_refused(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    save_placement(placement_of(**sizes), tmp_path / "p.npz")
    for option in (tmp_path / "p.npz", placement_of(**sizes)):
        with pytest.raises(InputError, match=message) as error:
            load_placement(option, SPEC, 4)
        assert "\n" not in str(error.value)


def test_a_name_that_needs_a_trace_is_refused() -> None:
    with pytest.raises(InputError, match=r"'affine' is made from recorded routing: .* --mesh expert=4 --placement"):
        load_placement("affine", SPEC, 4)
    with pytest.raises(InputError, match="'best' is not a usable placement: it cannot be read: No such file"):
        load_placement("best", SPEC, 4)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    save_placement(placement_of(), path)
    whole = path.read_bytes()
    holds, serves = placement_of().holds, placement_of().serves
    good = {"format": "ef_jax placement", "version": 1, "holds": holds, "serves": serves}
    cases = [
        ({**good, "format": "x"}, "its format is 'x'"),
        ({**good, "version": 2}, "its version is '2', and only version 1 is known"),
        ({**good, "holds": holds.astype(np.int64)}, "holds must be bool"),
        ({**good, "serves": serves[0]}, "serves must be int16"),
        ({**good, "serves": serves[:1]}, "different shapes"),
        ({**good, "serves": np.full_like(serves, 4)}, "serves names a device that is not below 4"),
        ({**good, "serves": np.full_like(serves, -1)}, "serves names a device that is not below 4"),
        ({**good, "serves": np.roll(serves, 1, axis=1)}, "served by a device that does not hold it"),
        ({**good, "holds": np.zeros_like(holds)}, "no device holds expert 0 of MoE layer 0"),
        ({**good, "holds": np.array([None])}, "truncated or damaged"),
        ({"experts": serves}, "it has no array 'format'"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=message) as error:
            read_placement(path)
        assert "\n" not in str(error.value)
    for cut in (10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_placement(path)
    path.write_bytes(b"contiguous")
    with pytest.raises(InputError, match="not an npz file"):
        read_placement(path)
