"""A small program for several processes: joins them, computes something together, and then does as it is told.

    python together.py BEHAVIOUR PROCESS

`PROCESS` behaves so, while the others go on computing together, or wait.
"""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from ef_jax.errors import InputError
from ef_jax.mesh.processes import join_processes, same_everywhere


def main() -> None:
    behaviour, process = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    join_processes(timeout=40, silence=3)
    me = jax.process_index()
    print(process_allgather(np.array([me])).ravel().tolist(), len(jax.devices()))
    if behaviour == "end":
        same_everywhere({"model": "a", "context": "64"})
        try:
            same_everywhere({"model": "a", "context": f"{64 + me}"})
        except InputError as error:
            print(error)
        time.sleep(1.0 * (me == process))
    elif me == process:
        time.sleep(0.5)
        print("at", time.monotonic())
        if behaviour == "raise":
            raise ValueError("not here")
        os.kill(os.getpid(), signal.Signals[behaviour])
        time.sleep(60)
    elif behaviour == "SIGINT":
        time.sleep(60)
    else:
        while True:
            process_allgather(np.array([me]))


if __name__ == "__main__":
    try:
        main()
    finally:
        print("left at", time.monotonic())
