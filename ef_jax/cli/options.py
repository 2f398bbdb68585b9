"""Options that several commands share, and the types that options are parsed by."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ef_jax.errors import InputError
from ef_jax.lossy import LossyOptions
from ef_jax.memory.sizes import parse_bytes
from ef_jax.mesh.mesh_spec import MeshSpec
from ef_jax.spec import ModelSpec

DTYPES = ("bfloat16", "float16", "float32")
COPY_MODES = ("async", "in_program")
EXCHANGES = ("padded", "ragged")

_LARGEST = 2**31 - 1


def add_memory_options(parser: argparse.ArgumentParser, *, batch: str) -> None:
    """The options that decide the memory plan; `batch` says what the default batch is."""
    group = parser.add_argument_group("device memory")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--device-memory", type=_size, metavar="SIZE", help="budget for everything on the device, for example 8GiB"
    )
    budget.add_argument(
        "--expert-fraction",
        type=_fraction,
        metavar="X",
        help="instead: share of the experts that get a cache slot, 0 to 1; 1 keeps all of them on the device. "
        "Default: 90%% of an accelerator's memory, or 0.5 on CPU",
    )
    group.add_argument(
        "--host-memory",
        type=_size,
        metavar="SIZE",
        help="host memory for experts; those that it does not hold are read from disk as they are needed (default: all "
        "are in host memory)",
    )
    group.add_argument("--batch", type=whole_number(1), metavar="N", help=f"sequences that run together ({batch})")
    group.add_argument(
        "--sequences",
        type=whole_number(1),
        metavar="N",
        help="sequences held at once, each with keys and values of its own; with more than run together, those that "
        "are likely to use the same experts share a step (default: as many as run together)",
    )
    group.add_argument(
        "--context",
        type=whole_number(2),
        metavar="N",
        help="tokens a sequence, prompt and output (default: the model's, 4096 at most)",
    )
    group.add_argument(
        "--chunk", type=whole_number(1), default=256, metavar="N", help="prompt tokens a pass (default: 256)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="convert the weights on load (default: as stored)")
    group.add_argument("--kernel", metavar="NAME", help="what computes the experts (default: the best that runs here)")
    group.add_argument("--copy-mode", choices=COPY_MODES, help="how experts cross the link (default: the device's)")


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """The options of several devices."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--mesh",
        metavar="AXIS=N[,...]",
        help="share the experts among N devices, expert=4; also data=N for further groups with all experts, and "
        "tensor=N to divide the dense weights too. --device-memory is then each device's",
    )
    group.add_argument(
        "--placement",
        metavar="contiguous|FILE",
        help="which device holds which experts: in order, or as ef-jax replay --save-placement wrote (default: in "
        "order)",
    )
    group.add_argument(
        "--exchange",
        choices=EXCHANGES,
        help="how tokens reach the devices that hold their experts: whole blocks to all, or only rows that are needed, "
        "on a GPU (default: the best that runs here)",
    )


def mesh_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_mesh_options` parsed, as `load` takes it; nothing on one device.

    Raises:
      InputError: options of a mesh without one.
    """
    given = {name: value for name in ("placement", "exchange") if (value := getattr(options, name)) is not None}
    if options.mesh is None:
        for name in given:
            raise InputError(f"--{name} is for several devices: give --mesh too")
        return {}
    return {"mesh": MeshSpec.parse(options.mesh), **given}


def add_prefetch_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide what is fetched ahead, and over which link."""
    group = parser.add_argument_group("prefetching")
    group.add_argument(
        "--prefetch",
        default="auto",
        metavar="auto|off|N",
        help="fetch experts before they are asked for: as far ahead as measurements say, not at all, or for the next N "
        "layers (default: auto, which is off where copies cannot overlap with compute, as on CPU)",
    )
    group.add_argument(
        "--predictor",
        metavar="NAME|DIR",
        help="what says which experts come next: pregate, history, none, or the directory of a trained predictor "
        "(default: pregate where experts are prefetched)",
    )
    group.add_argument(
        "--routing-path",
        metavar="DIR",
        help="a trained routing-path predictor: it says what a token uses in all layers once the token is known",
    )
    group.add_argument(
        "--most-wasted",
        type=_fraction,
        default=1.0,
        metavar="X",
        help="share of the bytes moved that prefetches may move for nothing, 0 to 1 (default: 1, whatever saves time)",
    )
    group.add_argument(
        "--order",
        choices=("auto", "resident_first", "together"),
        default="auto",
        help="run the rows of resident experts while others are on their way, or all together (default: auto)",
    )
    add_miss_option(group)
    group.add_argument(
        "--emulate-link",
        metavar="RATE[+LATENCY]",
        help="hold copies back as a link of that bandwidth would, for example 25GB/s or 25GB/s+10us",
    )


def add_miss_option(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """`--miss`."""
    parser.add_argument(
        "--miss",
        choices=("fetch", "compute", "auto"),
        default="fetch",
        help="copy missing experts to the device, have the host compute them where they lie, or split them by what "
        "both are measured to take; beside an accelerator the host rounds otherwise (default: fetch)",
    )


def prefetch_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_prefetch_options` parsed, as `load` takes it."""
    names = ("prefetch", "predictor", "routing_path", "most_wasted", "order", "miss", "emulate_link")
    return {name: getattr(options, name) for name in names}


def add_lossy_options(parser: argparse.ArgumentParser) -> None:
    """The options that change results."""
    group = parser.add_argument_group("lossy", "Faster, and no longer what the model says; each is off unless given.")
    group.add_argument(
        "--lossy-adaptive-experts",
        type=number,
        metavar="X",
        help="drop the experts of a token beyond this share of its router weights, above 0 to 1",
    )
    group.add_argument(
        "--lossy-cache-bias",
        type=number,
        metavar="X",
        help="when decoding, choose experts that have a slot before others whose router logit is higher by less than "
        "this",
    )
    group.add_argument(
        "--lossy-skip",
        type=number,
        metavar="X",
        help="when decoding, leave out missing experts whose router weight is below this, 0 to 1",
    )
    add_planned_lossy_options(group)


def add_planned_lossy_options(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """The lossy options that change a plan."""
    parser.add_argument(
        "--lossy-low-precision-miss",
        type=number,
        metavar="X",
        help="when decoding, fetch missing experts whose router weight is below this in 4 bits, 0 to 1",
    )
    parser.add_argument(
        "--lossy-quantize",
        metavar="FORMAT",
        help="store, move and compute the experts in fewer bits: int8, int4 (a scale for 32 weights) or int4:64",
    )


def lossy_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_lossy_options` parsed, as `load` takes it."""
    names = [field.name for field in dataclasses.fields(LossyOptions)]
    return {f"lossy_{name}": getattr(options, f"lossy_{name}") for name in names}


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print one line of JSON, and nothing else, on stdout")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")


def memory_options(options: argparse.Namespace, *, batch: int) -> dict[str, Any]:
    """What `add_memory_options` parsed, as `make_request` takes it; `batch` where none was given, or as many more as a
    mesh can share out."""
    if (text := getattr(options, "mesh", None)) is not None:
        shards = MeshSpec.parse(text).row_shards
        batch = -(-batch // shards) * shards
    return {
        "device_memory": options.device_memory,
        "expert_fraction": options.expert_fraction,
        "host_memory": options.host_memory,
        "batch": options.batch or batch,
        "sequences": options.sequences,
        "context": options.context,
        "chunk": options.chunk,
    }


def model_path(text: str | None) -> Path:
    """The directory that was named, or the bundled model's.

    Raises:
      InputError: an empty name.
    """
    if text == "":
        raise InputError("the model's path is empty: give a directory, or leave it out for the bundled model")
    if text is not None:
        return Path(text)
    from ef_jax.loading import bundled_model

    return bundled_model()


def read_spec(path: Path, dtype: str | None) -> ModelSpec:
    """What model is in a directory, by its configuration alone: the weights need not be there yet.

    Raises:
      InputError: no model, or one that is not supported.
    """
    from ef_jax.weights import open_checkpoint
    from ef_jax.weights.dtypes import check_dtype_name
    from ef_jax.weights.model_config import read_model_config

    if is_huggingface(path):
        return read_model_config(path, check_dtype_name(dtype) if dtype else None)[0]
    with open_checkpoint(path, dtype) as checkpoint:
        return checkpoint.spec


def is_huggingface(path: Path) -> bool:
    """Whether a directory has a config.json and is not a converted checkpoint."""
    try:
        return (path / "config.json").is_file() and not (path / "manifest.json").is_file()
    except OSError:
        return False


def prefetch(text: str) -> int | str:
    """Parses "auto", "off" or a whole number of layers."""
    return text if text in ("auto", "off") else whole_number(0)(text)


def whole_number(least: int) -> Callable[[str], int]:
    """Parses a whole number from `least` to 2^31 - 1."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= _LARGEST:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {_LARGEST}, got {text!r:.60}")
        return value

    return parse


def number(text: str) -> float:
    """Parses a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r:.60}")
    return value


def _fraction(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r:.60}")
    return value


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
