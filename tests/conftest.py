"""Settings of the whole suite: CPU unless a GPU run is asked for, no network, types and shapes checked at run time."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Before the first import of jax and transformers. EF_JAX_TEST_GPU=1 leaves the platform to jax.
if os.environ.get("EF_JAX_TEST_GPU") != "1":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA takes most of a run's time, so every program is compiled once for all processes of a run: the first of them
    # makes the directory and removes it. One that JAX_COMPILATION_CACHE_DIR names is kept, and later runs gain too.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ef_jax_compiled.")
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import hypothesis
import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jaxtyping import install_import_hook

from tests.cuda import aot

# Every annotation of these packages is checked; an int passes for a float, as type checkers have it. (jaxtyping's
# pytest option cannot take several packages together with a configured checker.)
install_import_hook(
    ["ef_jax", "pallas_kernels", "checkpoints_tools"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first

# The first example of a property compiles; no examples are kept, so that a run leaves no files behind.
hypothesis.settings.register_profile("suite", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("suite")

_ROOT = Path(__file__).parent.parent
_MOST_WORKERS = 4  # of up to 5 GB each


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of a run that names no number: none beside the first for one file, and on a GPU, which the first takes
    for itself."""
    one_file = len(config.args) == 1 and ".py" in config.args[0]
    if one_file or os.environ.get("EF_JAX_TEST_GPU") == "1":
        return 0
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: run with EF_JAX_TEST_GPU=1 where jax sees one")
    if item.get_closest_marker("slow") and os.environ.get("EF_JAX_TEST_SLOW") != "1":
        pytest.skip("run with EF_JAX_TEST_SLOW=1")
    if item.get_closest_marker("cuda_compile") and (reason := aot.missing()):
        pytest.skip(reason)


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Within it, no program comes from the cache of compiled ones."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What is compiled for an H100 is looked at: by its assembler's report, and as text."""
    with compiled_anew() if item.get_closest_marker("cuda_compile") else contextlib.nullcontext():
        return (yield)


@pytest.fixture(autouse=True, scope="module")
def no_garbage_of_other_files() -> None:
    """Engines of files before this one are in cycles, and their arrays would count among those of its own."""
    gc.collect()


@pytest.fixture(scope="session")
def small_moe() -> Path:
    """Directory of the bundled model."""
    return _ROOT / "ef_jax" / "models" / "small_moe"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Directory of optional data outside the repository: EF_JAX_SHARED, or `shared` beside the checkout."""
    directory = Path(os.environ.get("EF_JAX_SHARED", _ROOT.parent / "shared"))
    if not directory.is_dir():
        pytest.skip(f"optional data is not there: {directory} is not a directory (set EF_JAX_SHARED)")
    return directory
