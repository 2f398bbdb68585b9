"""What holds of every family alike, on one random model each, in torch, offloaded and all-resident."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file

from ef_jax.errors import CheckpointError, UnsupportedError
from ef_jax.families import spec_from_config
from ef_jax.generation import Generation
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.weights import open_checkpoint
from tests.checkpoints_tools.test_round_trip import assert_same_files, assert_same_weights, convert, convert_back
from tests.parity import engine, grades
from tests.parity.families import FAMILIES, FamilyCases

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SEED = 9


class Subject:
    """A family's random model: `model` in torch, `path` on disk, `offloaded` with fewer slots than experts and
    `resident` with a slot for each."""

    def __init__(self, family: FamilyCases, path: Path) -> None:
        self.family, self.path = family, path
        self.model = engine.save_model(path, family.model_type, SEED, {})
        self.prompts = engine.two_prompts(self.model.config.vocab_size, SEED)

    @functools.cached_property
    def offloaded(self) -> LanguageModel:
        return engine.load(self.path, expert_fraction=0.5, batch=2, prefetch=2, emulate_link="1GB/s")

    @functools.cached_property
    def resident(self) -> LanguageModel:
        return engine.load(self.path, expert_fraction=1.0, batch=2)

    def continued(self, lm: LanguageModel) -> list[Generation]:
        """Both prompts continued together."""
        return lm.generate(self.prompts, max_new_tokens=engine.NEW_TOKENS, ignore_eos=True)

    @property
    def config(self) -> dict[str, Any]:
        """The saved configuration."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return config


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


def test_greedy_continuation_is_transformers(subject: Subject, grade: grades.Grade) -> None:
    """Two prompts of different lengths together, against one at a time in torch."""
    outputs = subject.continued(subject.offloaded)
    expected = engine.greedy(subject.model, subject.prompts)
    assert [output.tokens for output in outputs] == expected
    grade(subject.family.model_type, "greedy", sum(map(len, expected)))


def test_bits_are_those_of_the_all_resident_run(subject: Subject, grade: grades.Grade) -> None:
    offloaded, resident = subject.offloaded, subject.resident
    ours, theirs = (lm.logits(subject.prompts[0]) for lm in (offloaded, resident))
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    for one, other in zip(subject.continued(offloaded), subject.continued(resident), strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
    stats, all_resident = offloaded.stats.as_dict(), resident.stats.as_dict()
    assert stats["slots"] < stats["experts"] == all_resident["slots"]
    assert stats["decode"]["bytes_demand"] + stats["decode"]["bytes_prefetch"] > 0
    assert stats["bytes_demand"] > 0 == all_resident["bytes_demand"] + all_resident["bytes_prefetch"]
    grade(subject.family.model_type, "bits", True)


def test_a_layers_own_pregate_is_always_right(subject: Subject, grade: grades.Grade) -> None:
    """Distance 0 is the control: nothing lies between what is scored and what the layer reads."""
    subject.continued(subject.offloaded)
    assert subject.offloaded.stats.recall["recall"][0] == 1.0
    assert subject.offloaded.stats.decode.bytes_prefetch > 0
    grade(subject.family.model_type, "pregate", True)


def test_conversion_there_and_back(subject: Subject, tmp_path: Path, grade: grades.Grade) -> None:
    converted = convert(subject.path, tmp_path / "converted")
    assert_same_weights(subject.path, converted)
    assert_same_files(subject.path, convert_back(converted, tmp_path / "back"))
    grade(subject.family.model_type, "round_trip", True)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_names_of_tensors_that_do_not_fit_are_listed(subject: Subject, change: str, tmp_path: Path) -> None:
    tensors = load_file(subject.path / "model.safetensors")
    if change == "missing":
        named = sorted(tensors)[-12:]
        tensors = {name: array for name, array in tensors.items() if name not in named}
    else:
        named = [f"model.layers.0.surprise.{letter}.weight" for letter in "abcdefghijkl"]
        tensors |= dict.fromkeys(named, np.zeros(3, np.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(subject.config), encoding="utf-8")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    listed = ", ".join(map(repr, named[:10]))
    assert f"12 tensors: {listed} and 2 more" in str(refused.value)


def test_config_fields_that_are_not_implemented_are_named(subject: Subject) -> None:
    for changes, field in ((({"a_field_of_next_year": 1}), "a_field_of_next_year"), *subject.family.refused):
        with pytest.raises(UnsupportedError) as refused:
            spec_from_config(subject.config | dict(changes))
        assert field in str(refused.value)
