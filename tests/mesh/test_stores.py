"""A device's store: its own experts' blocks, and nothing else read or kept."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints_tools.cli
from ef_jax.errors import LinkError
from ef_jax.memory.host_store import HostStore, Store
from ef_jax.weights import open_checkpoint
from ef_jax.weights.converted import block_name, layer_dir
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["qwen3_moe"] | {"num_hidden_layers": 3}  # a dense layer, and two of 4 experts
HELD = [(1, 3), (0, 0), (0, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as `shards`, as `fused` (a layer's experts in one tensor) and as `converted`."""
    base = tmp_path_factory.mktemp("models")
    write_checkpoint(base / "shards", CONFIG, random_tensors(CONFIG), shards=3)
    write_checkpoint(base / "fused", CONFIG, random_tensors(CONFIG, fused=True))
    assert checkpoints_tools.cli.main([str(base / "shards"), str(base / "converted")]) == 0
    return base


@pytest.mark.parametrize("name", ["shards", "fused", "converted"])
def test_only_the_blocks_of_the_keys_are_read(models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[1]
    read, advanced = [], []
    preadv = os.preadv

    def counted(*arguments):  # type: ignore[no-untyped-def]
        read.append(preadv(*arguments))
        return read[-1]

    with open_checkpoint(models / name) as checkpoint:
        every = HostStore.load(checkpoint, device)
        monkeypatch.setattr(os, "preadv", counted)
        store = HostStore.load(checkpoint, device, keys=HELD, advance=advanced.append)
        monkeypatch.undo()
        nbytes = checkpoint.spec.block_bytes
    assert isinstance(store, Store)
    assert store.nbytes == sum(advanced) == len(HELD) * nbytes
    assert len(HELD) * nbytes <= sum(read) <= len(HELD) * (nbytes + 64)  # a zarr file's index is read too
    assert every.nbytes == 8 * nbytes
    for key in HELD:
        block = store.block(*key)
        assert block.devices() == {device}
        assert block.sharding.memory_kind == "pinned_host"
        np.testing.assert_array_equal(np.asarray(block), np.asarray(every.block(*key)))


def test_blocks_of_other_devices_need_not_be_there(models: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(models / "converted", part)
    for layer in range(2):
        for expert in range(4):
            if (layer, expert) not in HELD:
                shutil.rmtree(layer_dir(part, 1 + layer) / "state" / block_name(expert))
    with open_checkpoint(part) as checkpoint:
        store = HostStore.load(checkpoint, jax.devices()[0], keys=HELD)
    assert store.request(HELD)


def test_a_block_that_is_not_held_is_refused(models: Path) -> None:
    with open_checkpoint(models / "converted") as checkpoint:
        store = HostStore.load(checkpoint, jax.devices()[0], keys=HELD)
        with pytest.raises(LinkError, match="expert 1 of MoE layer 0 is not held here"):
            store.block(0, 1)
        with pytest.raises(ValueError, match="beyond 2 MoE layers of 4 experts"):
            HostStore.load(checkpoint, jax.devices()[0], keys=[(2, 0)])
        assert HostStore.load(checkpoint, jax.devices()[0], keys=[]).nbytes == 0
