"""The bench of throughput: replayed requests on a made-up trace, and plans of models that do not fit here."""

import json
import sys

import numpy as np
import pytest

from bench import _throughput_memory, _throughput_replayed, throughput
from bench._shapes import SHAPES
from ef_jax.errors import InputError
from ef_jax.families import spec_from_config
from ef_jax.memory.plan import FixedBytes, MemoryRequest, kv_cache_bytes, make_plan
from ef_jax.nn import dense_shapes
from ef_jax.schedule.device_link import MAX_INSERT
from tests.replay.traces import made_up


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["throughput", *map(str, words)])
    return throughput.main()


def test_replayed(tmp_path, monkeypatch, capsys):
    trace = made_up(sequences=8, length=24, layers=3, experts=16, top_k=2)
    trace.save(tmp_path / "t.npz")
    words = ("--only", "replayed", "--fit", 4, "--requests", 6, "--batch", 2, "--rows", 4, "--links", "balanced")
    assert run(monkeypatch, tmp_path / "t.npz", *words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["replayed"]
    link = result["balanced"]
    arms = link["arms"]
    assert link["prompt_tokens"] + link["generated_tokens"] == 6 * 24
    fastest = max(arms.values(), key=lambda arm: arm["tokens_per_second"])
    assert fastest is arms["all resident"]
    assert (fastest["hit"], fastest["blocks"], fastest["stall"]) == (1.0, 0.0, 0.0)
    batched = arms["on demand, batched"]
    assert arms["on demand, one by one"]["tokens_per_second"] < batched["tokens_per_second"]
    assert batched["tokens_per_second"] < arms["ours"]["tokens_per_second"] < arms["knowing"]["tokens_per_second"]
    assert batched["hit"] < 0.1 < arms["lru, batched"]["hit"]
    assert arms["on demand, one by one"]["width"] == 1.0
    assert set(link["token_scheduler"]) == {"ours", "lru", "on demand"}


def test_replayed_needs_a_trace(monkeypatch):
    with pytest.raises(InputError, match="needs a routing trace"):
        run(monkeypatch, "--only", "replayed")


@pytest.mark.parametrize("longest", [9, 1000])
def test_requests_are_parts_of_the_sequences(longest):
    trace = made_up(sequences=5, length=30)
    requests = _throughput_replayed._requests(trace, 8, longest)
    assert sorted(sequence for sequence, _, _ in requests) == [0, 0, 1, 1, 2, 2, 3, 4]
    for _, prompt, count in requests:
        assert prompt >= 8
        assert count >= 1
        assert prompt + count == min(longest, 30)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("switch_base_128", 7.4), ("mixtral_8x7b", 46.7), ("deepseek_v2_lite", 15.7), ("qwen3_30b_a3b", 30.5)],
)
def test_shapes_have_the_published_numbers_of_parameters(name, billions):
    shape = SHAPES[name]
    assert (shape.dense_bytes + shape.expert_bytes) / 2e9 == pytest.approx(billions, rel=0.01)


def test_plans_are_those_of_the_library():
    spec = spec_from_config(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
            "norm_topk_prob": True,
            "torch_dtype": "bfloat16",
        }
    )
    dense = sum(shape.size * shape.dtype.itemsize for shape in dense_shapes(spec).values())
    shape = SHAPES["qwen3_30b_a3b"]
    found = _throughput_memory.plan(shape, batch=2, context=512)
    items = found["items"]
    assert items["dense"] == pytest.approx(dense, rel=1e-3)
    assert items["kv_cache"] == kv_cache_bytes(spec, 2, 512)
    assert shape.block_bytes == spec.block_bytes
    fixed = FixedBytes(
        dense=items["dense"],
        kv_cache=items["kv_cache"],
        look_ahead=0,
        state=items["state"],
        workspace=items["workspace"],
        transfer_blocks=MAX_INSERT,
        transfer_rings=2,
    )
    least = found["least_bytes"] + 1
    smallest = make_plan(spec, MemoryRequest(device_memory=least, batch=2, context=512), fixed)
    assert (smallest.slots, smallest.staging_slots) == (0, 16)
    assert smallest.total <= least
    whole = make_plan(spec, MemoryRequest(expert_fraction=1.0, batch=2, context=512), fixed)
    assert whole.total - whole.transfers == pytest.approx(found["all_resident_bytes"], rel=1e-3)


def test_a_machine_is_described_by_what_is_known_of_it():
    costs = _throughput_replayed.h100(SHAPES["deepseek_v2_lite"])
    one, many = (
        costs.layer_seconds(tokens=tokens, positions=0, experts=np.array([experts]))[0]
        for tokens, experts in ((1, 6), (4096, 64))
    )
    assert 5e-5 < one < 2e-4 < many < 5e-3
