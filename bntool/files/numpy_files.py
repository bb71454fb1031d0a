"""Arrays that NumPy wrote, `.npy` and `.npz`: no objects, and no more numbers than the file holds."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bntool.core.limits import DEFAULT_MAX_SIZE, binary
from bntool.files.security.archives import Damaged, Unsafe
from bntool.files.security.containers import ARRAYS, Container

_HEADER = 1 << 17
"""More bytes than the header of any array of numbers takes."""


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The array of an `.npy` file, mapped and not read, in this machine's byte order.

    Raises `Unsafe` for objects, `Damaged` or `ValueError` for what is no array.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        shape, order, dtype, begin = _header(file.read(_HEADER), size)
        array = np.memmap(file, dtype, "r", begin, shape, order)
        return _native(array)


def array_in(content: bytes) -> npt.NDArray[Any]:
    """The array of an `.npy` file that was read. Raises as `read_npy` does."""
    return _array(bytearray(content))


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an `.npz` file by name, in this machine's byte order. Raises as `read_npy` does."""
    with path.open("rb") as file:
        container = Container(file, ARRAYS, _require_room)
        return {name.removesuffix(".npy"): _array(container.numbers(name)) for name in container.sizes}


def _array(content: bytearray) -> npt.NDArray[Any]:
    shape, order, dtype, begin = _header(bytes(content[:_HEADER]), len(content))
    return _native(np.ndarray(shape, dtype, content, begin, order=order))


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.isnative:
        return array
    _require(array.nbytes, "to be turned into this machine's byte order")
    return array.astype(array.dtype.newbyteorder("="))


def _header(head: bytes, size: int) -> tuple[tuple[int, ...], Any, np.dtype[Any], int]:
    """Shape, order, type, and where the numbers begin, as far as `size` bytes hold exactly those."""
    file: BinaryIO = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise Unsafe(f"is of version {version[0]} of the format, which arrays of numbers do not need")
    if dtype.hasobject:
        raise Unsafe("holds Python objects, which are pickled")
    if any(length < 0 for length in shape) or dtype.itemsize == 0:
        raise Unsafe("has a size that is none")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        needed = binary(math.prod(shape) * dtype.itemsize)
        raise Damaged(f"it says that it holds {needed}, and holds {binary(size - file.tell())}")
    return shape, "F" if fortran else "C", dtype, file.tell()


def _require_room(container: Container) -> None:
    _require(sum(m.size for m in container.members.values() if m.is_packed), "to be unpacked")


def _require(size: int, why: str) -> None:
    if size > DEFAULT_MAX_SIZE:
        raise Unsafe(f"needs {binary(size)} {why}, and {binary(DEFAULT_MAX_SIZE)} are allowed")
