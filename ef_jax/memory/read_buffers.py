"""Page-aligned memory that blocks are read into, and that comes back when nobody holds the block any more."""

import threading

import numpy as np
from jaxtyping import UInt8

_PAGE = 4096


class ReadBuffers:
    """`count` buffers of `nbytes` each, made at once.

    An array that JAX takes over without a copy, as on a CPU, keeps its buffer until the last program that reads it is
    done; JAX tells so at one of its next calls. So nobody waits for a buffer: where none is free, one more is made, and
    goes away after its use. `made` counts these.

    Args:
      count: buffers that are kept.
      nbytes: of one, a multiple of the page size.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, nbytes
        self.made = 0
        self._lock = threading.Lock()
        self._memory = np.empty(count * nbytes + _PAGE, np.uint8)
        self._first = self._memory.ctypes.data + -self._memory.ctypes.data % _PAGE
        self._free = list(range(count))

    def take(self) -> UInt8[np.ndarray, " n"]:
        """A buffer; it is free again when the array, and every view of it, is gone."""
        try:
            place = self._free.pop()
        except IndexError:
            with self._lock:
                self.made += 1
            raw = np.empty(self.nbytes + _PAGE, np.uint8)
            start = -raw.ctypes.data % _PAGE
            return raw[start : start + self.nbytes]
        return np.asarray(_Lease(self._memory, self._free, place, self._first + place * self.nbytes, self.nbytes))


class _Lease:
    """What the arrays over one buffer hold on to."""

    def __init__(self, memory: np.ndarray, free: list[int], place: int, address: int, nbytes: int) -> None:
        self._memory, self._free, self._place = memory, free, place
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self._free.append(self._place)
