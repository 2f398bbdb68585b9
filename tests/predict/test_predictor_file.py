"""A correction comes back from disk as it was, for its own model only; damage is one line."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from ef_jax.errors import InputError
from ef_jax.nn.correction import Correction, CorrectionSpec
from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.predict.predictor_file import load_predictor, load_routing_path, read_predictor_kind, save_predictor
from ef_jax.weights.model_config import read_model_config

WHAT: dict[str, Any] = {"fingerprint": "f" * 32, "model": "some", "training": {"steps": 3}}


@pytest.fixture(scope="module")
def model(small_moe: Path) -> Any:
    return read_model_config(small_moe)[0]


@pytest.fixture(scope="module")
def correction() -> Correction:
    spec = CorrectionSpec(layers=8, experts=32, top_k=4, distances=2, vocab=4096, width=4)
    return Correction(spec, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def saved(correction: Correction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictors") / "P"
    save_predictor(path, correction, **WHAT)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "P"))


def test_what_is_saved_comes_back(correction: Correction, saved: Path, model: Any) -> None:
    loaded, manifest = load_predictor(saved, model, WHAT["fingerprint"])
    assert loaded.spec == correction.spec
    assert (manifest.model, manifest.training) == ("some", {"steps": 3})
    jax.tree.map(np.testing.assert_array_equal, loaded.common, correction.common)
    jax.tree.map(np.testing.assert_array_equal, loaded.sources, correction.sources)
    assert [path.name for path in saved.parent.iterdir()] == ["P"]


def test_a_routing_path_comes_back(model: Any, saved: Path, tmp_path: Path) -> None:
    spec = RoutingPathSpec(layers=8, experts=32, top_k=4, vocab=4096, d_model=4, heads=2, encoder_layers=2)
    path = RoutingPath(spec, rngs=nnx.Rngs(3))
    save_predictor(tmp_path / "R", path, **WHAT)
    loaded, manifest = load_routing_path(tmp_path / "R", model, WHAT["fingerprint"])
    assert loaded.spec == manifest.spec == spec
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(path))
    assert [read_predictor_kind(place) for place in (saved, tmp_path / "R")] == ["correction", "routing_path"]
    with pytest.raises(InputError, match="is a routing path, and here a correction of pre-gate scores is asked for"):
        load_predictor(tmp_path / "R", model, WHAT["fingerprint"])
    with pytest.raises(InputError, match="is a correction of pre-gate scores, and here a routing path is asked for"):
        load_routing_path(saved, model, WHAT["fingerprint"])


def test_another_model_is_refused(saved: Path, model: Any) -> None:
    for change, message in (
        ({"vocab": 5}, r"is for a model of 4096 tokens in its vocabulary \('some'\), this one has 5"),
        ({"layers": model.layers[:7]}, "is for a model of 8 MoE layers .* this one has 7"),
        ({"experts": dataclasses.replace(model.experts, top_k=2)}, "of 4 experts a token .* this one has 2"),
    ):
        with pytest.raises(InputError, match=message):
            load_predictor(saved, dataclasses.replace(model, **change), WHAT["fingerprint"])
    with pytest.raises(InputError, match="was trained for a model with other routers"):
        load_predictor(saved, model, "e" * 32)


def test_damage_is_told(copied: Path, model: Any) -> None:
    manifest = copied / "manifest.json"
    contents = json.loads(manifest.read_text())

    def error() -> str:
        with pytest.raises(InputError) as caught:
            load_predictor(copied, model, WHAT["fingerprint"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for change, message in (
        ({"format": "else"}, "is of something else"),
        ({"kind": "else"}, "is of kind 'else', and known are correction, routing_path"),
        ({"version": 2}, "has version 2, and only 1 is known"),
        ({"spec": {}}, "manifest.json is damaged"),
        ({"spec": contents["spec"] | {"width": "4"}}, "width is no whole number"),
        ({"spec": contents["spec"] | {"width": 5}}, "its weights"),
        ({"checksums": contents["checksums"] | {"enter": 1}}, "its weights 'enter' are damaged"),
    ):
        manifest.write_text(json.dumps(contents | change))
        assert message in error()
    manifest.write_text(json.dumps(contents))
    shutil.rmtree(copied / "weights")
    assert "its weights cannot be read" in error()
    manifest.write_text("{")
    assert "is not valid JSON" in error()
    manifest.unlink()
    assert "is no predictor: it has no manifest.json" in error()


def test_where_it_may_be_written(correction: Correction, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path, overwrite, message in (
        (copied, False, "exists: choose another name, or overwrite it with --overwrite"),
        (other, True, "exists and is no predictor: choose another name"),
        (tmp_path / "no" / "P", False, "there is no directory"),
        (Path("/"), False, "is no name for a predictor"),
    ):
        with pytest.raises(InputError, match=message):
            save_predictor(path, correction, overwrite=overwrite, **WHAT)
    save_predictor(copied, correction, overwrite=True, **(WHAT | {"model": "new"}))
    assert json.loads((copied / "manifest.json").read_text())["model"] == "new"


def test_a_fingerprint_is_of_the_routers_in_any_dtype(model: Any) -> None:
    random = np.random.default_rng(0)
    routers = {
        f"layers.{layer}.router.weight": np.asarray(jax.numpy.asarray(random.random((32, 192)), "bfloat16"))
        for layer in range(8)
    }
    first = model_fingerprint(model, routers.items())
    wide = {name: array.astype(np.float32) for name, array in reversed(routers.items())}
    assert model_fingerprint(model, [*wide.items(), ("embed.weight", np.zeros(2))]) == first
    wide["layers.7.router.weight"][0, 0] += 1
    assert model_fingerprint(model, wide.items()) != first
    assert model_fingerprint(dataclasses.replace(model, vocab=5), routers.items()) != first
