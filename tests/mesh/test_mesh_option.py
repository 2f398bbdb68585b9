"""The option `mesh`: what it may be, and meshes that are proposed where one does not divide the model."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from ef_jax.errors import InputError
from ef_jax.mesh.mesh_option import layout_for, mesh_spec
from ef_jax.mesh.mesh_spec import MeshSpec, check_divides_model, check_divides_rows
from ef_jax.spec import ModelSpec
from tests.schedule.tiny_store import SPEC


def with_experts(count: int) -> ModelSpec:
    return dataclasses.replace(SPEC, experts=dataclasses.replace(SPEC.experts, count=count, top_k=1))


@pytest.mark.parametrize(
    ("option", "sizes"),
    [
        ("expert=4", (1, 4, 1)),
        (" tensor = 2, data=2 ,expert=1", (2, 1, 2)),
        ({"expert": 8}, (1, 8, 1)),
        ({}, (1, 1, 1)),
        (MeshSpec(data=3), (3, 1, 1)),
        (Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("data", "expert")), (2, 3, 1)),
    ],
)
def test_options_are_read(option: Any, sizes: tuple[int, int, int]) -> None:
    mesh = mesh_spec(option)
    assert (mesh.data, mesh.expert, mesh.tensor) == sizes
    assert MeshSpec.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("", "write axis=N"),
        ("4", "write axis=N"),
        ("expert", "write axis=N"),
        ("expert=", "write axis=N"),
        ("expert=-2", "write axis=N"),
        ("expert=\u0664", "write axis=N"),
        ("expert=99999999999", "write axis=N"),
        ("expert=0", "mesh expert=0: give a whole number from 1"),
        ("expert=5000", "give 4096 at most"),
        ("expert=64,data=65", "4160 devices: give 4096 at most"),
        ("expert=2,expert=4", "gives expert twice"),
        ("experts=2", "'experts' is not one of data, expert, tensor"),
        ({"expert": 2.0}, "mesh expert=2.0: give a whole number"),
        ({"expert": True}, "mesh expert=True: give a whole number"),
        (Mesh(np.array(jax.devices()[:2]), ("x",)), "'x' is not one of data, expert, tensor"),
    ],
)
def test_other_options_are_refused(option: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        mesh_spec(option)


def test_a_layout_takes_the_first_devices() -> None:
    devices = jax.devices()
    layout = layout_for("data=2,tensor=2", SPEC)
    assert layout.devices == devices[:4]
    assert (layout.data, layout.expert, layout.tensor) == (2, 1, 2)
    assert layout_for("expert=2", SPEC, devices[4:]).devices == devices[4:6]


def test_a_mesh_keeps_its_devices_in_the_order_of_its_axes() -> None:
    devices = np.array(jax.devices())
    layout = layout_for(Mesh(devices.reshape(4, 2)[::-1], ("expert", "data")), SPEC)
    assert dict(layout.mesh.shape) == {"data": 2, "expert": 4, "tensor": 1}
    np.testing.assert_array_equal(layout.mesh.devices[:, :, 0], devices.reshape(4, 2)[::-1].T)


@pytest.mark.parametrize(
    ("mesh", "experts", "message"),
    [
        (
            "expert=6",
            32,
            "mesh expert=6: 32 experts a layer cannot be shared by 6 devices: on as many devices give "
            "data=3,expert=2, on others expert=4 or expert=8",
        ),
        ("data=2,expert=3", 8, "on as many devices give data=3,expert=2, on others data=2,expert=2 or data=2,expert=4"),
        ("expert=3,tensor=2", 16, "cannot be shared by 3 x 2 (expert x tensor): on as many devices give"),
        ("expert=64", 8, "on as many devices give data=8,expert=8, on others expert=8"),
        ("expert=16", 16, "mesh expert=16 needs 16 devices and there are 8: give expert=8"),
        ("data=16", 5, "mesh data=16 needs 16 devices and there are 8: give data=8, or set JAX_NUM_CPU_DEVICES=16"),
        ("tensor=4", 16, "tensor=4 does not divide the model"),
    ],
)
def test_a_mesh_that_does_not_fit_proposes_one_that_does(mesh: str, experts: int, message: str) -> None:
    with pytest.raises(InputError) as error:
        layout_for(mesh, with_experts(experts))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(data=st.integers(1, 6), expert=st.integers(1, 70), tensor=st.integers(1, 4), experts=st.integers(1, 130))
def test_every_proposal_divides_the_model(data: int, expert: int, tensor: int, experts: int) -> None:
    spec = with_experts(experts)
    mesh = MeshSpec(data=data, expert=expert, tensor=tensor)
    if experts % mesh.owners == 0:
        check_divides_model(mesh, spec)
        return
    with pytest.raises(InputError) as error:
        check_divides_model(mesh, spec)
    first, *others = re.findall(r"(?:(?:data|expert)=\d+,?)+", str(error.value).split(": on as many")[1])
    assert others
    for text in (first, *others):
        check_divides_model(MeshSpec.parse(text.strip(",")), spec)
    assert MeshSpec.parse(first.strip(",")).count == mesh.count


def test_sequences_have_to_be_shared_evenly() -> None:
    mesh = MeshSpec(data=2, expert=4, tensor=3)
    check_divides_rows(mesh, 16)
    with pytest.raises(InputError, match=r"^batch 3 cannot be shared by data=2 x expert=4 evenly: give batch 8$"):
        check_divides_rows(mesh, 3)
    with pytest.raises(InputError, match=r"sequences 17 .* give sequences 16 or 24$"):
        check_divides_rows(mesh, 17, "sequences")


def test_a_process_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(process_index=number // 4) for number in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(InputError, match=r"expert=4 has no device of process 1.* give expert=8, or start fewer"):
        layout_for("expert=4", SPEC)
