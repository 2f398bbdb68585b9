"""Models whose experts are on disk for the most part: the same tokens, within the host's budget, whatever happens."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from bench._synthetic_converted import write_converted
from bench.make_synthetic import Synthetic
from ef_jax.memory import host_plan
from ef_jax.memory.host_plan import make_host_plan
from ef_jax.memory.host_store import HostStore
from ef_jax.memory.read_buffers import ReadBuffers
from ef_jax.weights import open_checkpoint
from ef_jax.weights.block_reader import BlockReader
from ef_jax.weights.converted import block_name, layer_dir

SHAPE = Synthetic(layers=3, experts=32, hidden=64, width=64, top_k=2, vocab=96)
SMALL = {"expert_fraction": 0.25, "context": 32, "chunk": 16, "progress": False}
HOST = 70 * 28672
PROMPT = [list(range(5, 17))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "model"
    write_converted(path, SHAPE)
    return path


def generate(lm: ef_jax.LanguageModel) -> list[Any]:
    output = lm.generate(PROMPT, max_new_tokens=8, ignore_eos=True)[0]
    return [output.tokens, np.float32(output.logprobs).view(np.uint32).tolist()]


def in_memory(model: Path) -> HostStore:
    with open_checkpoint(model) as checkpoint:
        return HostStore.load(checkpoint, jax.devices()[0])


def block_file(model: Path, layer: int, expert: int) -> Path:
    return layer_dir(model, layer) / "state" / block_name(expert) / "c" / "0" / "0" / "0"


def test_tokens_are_those_of_a_run_with_every_expert_in_memory(model: Path) -> None:
    lm = ef_jax.load(model, host_memory=HOST, **SMALL)
    link, scheduler = lm._engine.link, lm._engine.scheduler
    tier, link._store, scheduler._below = link._store, in_memory(model), None
    expected = generate(lm)
    assert tier.stats.misses == 0
    scheduler.forget()
    link._store = scheduler._below = tier
    assert generate(lm) == expected
    plan, disk = lm.plan, lm.stats.disk
    assert disk is not None
    assert plan.host is not None
    assert disk.places == plan.host.places < plan.experts - plan.slots
    assert plan.host_bytes <= HOST
    assert f"{disk.places} of 96 expert blocks" in str(plan)
    assert disk.misses > 0
    assert disk.bytes_read >= disk.misses * plan.block_bytes
    assert disk.horizon is not None
    assert lm.stats.as_dict()["disk"]["places"] == disk.places
    assert "of them ahead" in lm.stats.table()

    lost = [block_file(model, 1, expert) for expert in range(SHAPE.experts)]
    for file in lost:
        file.rename(file.with_name("elsewhere"))
    try:
        with pytest.raises(ef_jax.LinkError, match=r"^expert \d+ of MoE layer 1 cannot be read: .* No such file"):
            [generate(lm) for _ in range(4)]
    finally:
        for file in lost:
            file.with_name("elsewhere").rename(file)
    assert generate(lm) == expected
    lm.stats.reset()
    assert disk.misses == 0
    assert disk.places > 0


def test_an_original_is_paged_too(small_moe: Path) -> None:
    """Read as it is loaded, block by block: what of it is direct says `BlockReader`."""
    with open_checkpoint(small_moe) as checkpoint:
        reader = BlockReader(checkpoint)
        form = checkpoint.spec.block_format
        got = reader.read(3, 5, ReadBuffers(1, reader.buffer_bytes).take())
        expected = np.empty(form.shape, form.dtype)
        checkpoint.read_block(3, 5, expected)
        assert not reader.direct
        assert got.tobytes() == expected.tobytes()


def test_a_file_that_changes_is_noticed(model: Path) -> None:
    file = block_file(model, 0, 7)
    whole = file.read_bytes()
    with open_checkpoint(model) as checkpoint:
        first, never = BlockReader(checkpoint), BlockReader(checkpoint, checksums="never")
        assert first.direct
        buffer = ReadBuffers(1, first.buffer_bytes).take()
        try:
            block = first.read(0, 7, buffer)
            assert bytes(block) == whole[: len(block)]
            os.utime(file)
            first.read(0, 7, buffer)  # touched, and the same
            file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
            with pytest.raises(ef_jax.CheckpointError, match="has changed since it was read last: its checksum is not"):
                first.read(0, 7, buffer)
            with pytest.raises(ef_jax.CheckpointError, match="is damaged: its checksum is not the manifest's"):
                BlockReader(checkpoint, checksums="always").read(0, 7, buffer)
            never.read(0, 7, buffer)
            file.write_bytes(whole[:-5])
            with pytest.raises(ef_jax.CheckpointError, match=f"has {len(whole) - 5} bytes, expected {len(whole)}"):
                never.read(0, 7, buffer)
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(ef_jax.CheckpointError, match="is damaged: its chunk index"):
                never.read(0, 7, buffer)
        finally:
            file.write_bytes(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "100kB"}, r"host_memory 100 kB is too small: this model needs at least \d+ bytes"),
        ({"host_memory": "much"}, "'much' is not a size in bytes"),
        ({"host_memory": HOST, "disk_checksums": "often"}, "disk_checksums 'often' is not one of first, always, never"),
        ({"host_memory": "800kB", "lossy_quantize": "int8"}, "convert the checkpoint with ef-convert --quantize"),
        ({"host_memory": HOST, "lossy_low_precision_miss": 0.1}, "give one of the two"),
    ],
)
def test_what_cannot_be_paged_is_refused(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ef_jax.InputError, match=message):
        ef_jax.load(model, **SMALL, **options)


def test_a_pool_that_holds_everything_is_none(model: Path) -> None:
    spec = SHAPE.spec
    assert make_host_plan(spec, spec.total_experts * spec.block_bytes, step=2, staging_slots=16) is None


def test_too_little_memory_is_said_before_anything_is_allocated(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:    800 kB\n")
    monkeypatch.setattr(host_plan, "_MEMINFO", meminfo)
    plans: list[Any] = []
    with pytest.raises(ef_jax.BudgetError, match="and 819 kB are available; host_memory bounds it: give it, for exam"):
        ef_jax.load(model, **SMALL, on_plan=plans.append)
    assert not plans
