import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ef_jax

_ROOT = Path(__file__).parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_PACKAGES = _PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


@pytest.mark.parametrize("package", _PACKAGES)
def test_every_module_imports(package: str) -> None:
    root = importlib.import_module(package)
    names = [module.name for module in pkgutil.walk_packages(root.__path__, f"{package}.")]
    assert names
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize("target", _PROJECT["project"]["scripts"].values())
def test_commands_exist(target: str) -> None:
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_public_name_resolves_and_is_listed() -> None:
    assert set(ef_jax.__all__) <= set(dir(ef_jax))
    assert {"load", "LanguageModel", "SamplingOptions", "InputError"} <= set(ef_jax.__all__)
    for name in ef_jax.__all__:
        assert getattr(ef_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="'ef_jax' has no attribute 'lode'"):
        _ = ef_jax.lode  # type: ignore[attr-defined]


def loaded_by(code: str) -> set[str]:
    """Which of the slow libraries a fresh Python has imported after `code`."""
    show = 'print("\\n", *{"jax", "flax", "orbax", "transformers", "torch", "matplotlib"} & set(sys.modules))'
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{show}"], check=True, cwd=_ROOT, capture_output=True, text=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_importing_waits_for_nothing() -> None:
    assert loaded_by("import ef_jax") == set()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("ef_jax.cli", ["--help"]),
        ("ef_jax.cli", ["generate", "--help"]),
        ("ef_jax.cli", ["train-predictor", "--help"]),
        ("checkpoints_tools.cli", ["--help"]),
        ("checkpoints_tools.cli", ["inspect", "ef_jax/models/small_moe"]),
    ],
)
def test_help_waits_for_nothing(module: str, words: list[str]) -> None:
    code = f"from {module} import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass"
    assert loaded_by(code) == set()


def test_loading_names_leaves_the_devices_alone() -> None:
    code = """
from ef_jax import *
from jax._src import xla_bridge
assert callable(load)
assert not xla_bridge.backends_are_initialized()
"""
    assert loaded_by(code) == {"jax", "flax"}


def test_bundled_model_is_complete(small_moe: Path) -> None:
    names = {path.name for path in small_moe.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (small_moe / "model.safetensors").stat().st_size > 22_000_000


def test_installed_version_is_the_projects() -> None:
    try:
        version = importlib.metadata.version("ef_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ef_jax is not installed here: the source tree is on the path")
    assert version == _PROJECT["project"]["version"]


def test_files_are_free_of_pickles_and_of_one_machines_paths() -> None:
    sources = [path for package in _PACKAGES for path in (_ROOT / package).rglob("*.py")]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path
