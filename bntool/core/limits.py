"""How much a file may ask for. One bound, in bytes, for whatever a file can inflate. No torch here."""

from __future__ import annotations

import dataclasses
import re

from bntool.core.errors import LoadError, UsageError

DEFAULT_MAX_SIZE = 16 << 30
_PER_STRUCTURE_BYTE = 256
"""Python makes up to about a hundred bytes of objects from one byte of a pickle or of JSON."""
_PER_TENSOR = 1 << 16
"""Loading one tensor takes about as long as loading 64 KiB of numbers."""
_UNITS = {"": 1, **{unit: 1 << (10 * power) for power, unit in enumerate("KMGT", start=1)}}


@dataclasses.dataclass(frozen=True)
class Limit:
    """What loading one file may cost, in bytes of memory: `--max-size`."""

    max_size: int = DEFAULT_MAX_SIZE

    @property
    def structure(self) -> int:
        """The most bytes of structure: a pickle, a JSON header, a zip directory."""
        return self.max_size // _PER_STRUCTURE_BYTE

    def require(self, what: str, *, data: int = 0, tensors: int = 0, structure: int = 0, where: str) -> None:
        """Raise `LoadError` where `data` bytes, `tensors` and `structure` bytes cost more than the bound."""
        cost = data + tensors * _PER_TENSOR + structure * _PER_STRUCTURE_BYTE
        if cost <= self.max_size:
            return
        parts = [
            f"{binary(data)} of tensors" if data else "",
            f"{tensors:,} tensors" if tensors else "",
            f"{binary(structure)} of structure" if structure else "",
        ]
        raise LoadError(
            f"{what} is too large: {', '.join(filter(None, parts))}, counted as {binary(cost)}; "
            f"--max-size allows {binary(self.max_size)}",
            where=where,
            next_step=f"if it is meant to be that large: --max-size {-(-cost >> 30) + 1}G",
        )


def parse_size(text: str) -> int:
    """`40G`, `512 MiB`, `1.5TB` or a count of bytes -> bytes, in powers of 1024. `UsageError` for others."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size", next_step="write it like 40G or 512M")
    return size


def binary(count: int) -> str:
    """A number of bytes in binary units: `512 B`, `1.5 GiB`, `4.0 TiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
