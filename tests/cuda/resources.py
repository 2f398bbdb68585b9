"""What a compiled program's kernels take of an H100: registers, spills and threads, as its assembler reports them."""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tests.cuda import aot

REGISTERS_A_BLOCK = 65536


class KernelResources(NamedTuple):
    """One kernel: registers a thread, threads a block, and bytes a thread that do not fit into registers."""

    name: str
    registers: int
    threads: int
    spilled: int

    def check(self) -> None:
        """Nothing is spilled, and a block's threads fit into the registers of a multiprocessor."""
        assert self.spilled == 0, self
        assert self.registers * self.threads <= REGISTERS_A_BLOCK, self


def compile_and_look(
    function: Callable[..., Any], *args: Any, **jit_options: Any
) -> tuple[jax.stages.Compiled, list[KernelResources]]:
    """`function` compiled as by `aot.compile_for_h100`, and every kernel in it, XLA's own included."""
    with tempfile.TemporaryDirectory() as folder, _environment("MOSAIC_GPU_DUMP_TO", folder):
        _keep_what_is_assembled(Path(folder))
        options = {"xla_gpu_cuda_data_dir": folder}
        compiled = aot.compile_for_h100(function, *args, compiler_options=options, **jit_options)
        kernels = [kernel for path in sorted(Path(folder).glob("*.ptx")) for kernel in _assemble(path)]
    return compiled, kernels


def _assemble(ptx: Path) -> Iterator[KernelResources]:
    """The kernels of one module, assembled once more for the report."""
    command = [aot.ptxas(), "-v", "--gpu-name", "sm_90a", str(ptx), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = ptx.read_text()
    for part in re.split(r"Compiling entry function '", done.stderr + done.stdout)[1:]:
        name = part.split("'", 1)[0]
        entry = text[re.search(rf"\.entry\s+{re.escape(name)}\b", text).start() :].split("{", 1)[0]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", entry)
        dimensions = [int(value) for value in threads[1].split(",")] if threads else [1024]
        count = 1
        for dimension in dimensions:
            count *= dimension
        spills = sum(int(value) for value in re.findall(r"(\d+) bytes spill", part))
        yield KernelResources(name, int(re.search(r"Used (\d+) registers", part)[1]), count, spills)


def _keep_what_is_assembled(folder: Path) -> None:
    """Puts an assembler into `folder/bin` that keeps a copy of what it is given: jax 0.12 cannot dump it."""
    script = folder / "bin" / "ptxas"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\n[ -f "$1" ] && cp "$1" "{folder}/$$.ptx"\nexec "{aot.ptxas()}" "$@"\n')
    script.chmod(0o755)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
