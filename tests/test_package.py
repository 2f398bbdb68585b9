import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


def test_importing_is_light_and_leaves_the_devices_alone() -> None:
    code = """
import sys
import ef_jax
from jax._src import xla_bridge
heavy = {"torch", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)


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
