"""The most memory that a piece of work holds at once, and how much is left."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_BOUNDS = (
    ("", "", ("memory.max", "memory.current", "inactive_file")),
    ("memory", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
)
"""Control groups of version 2 and of version 1: the controller, its folder, and its files: the bound, what is
taken, and the field of `memory.stat` that says how much of that is cached files (the kernel's documentation).
"""


class PeakMemory:
    """Watches from its creation on; `grown` is the peak beyond what was held then, in bytes.

    On the CPU it is the resident set of the process, as Linux counts it; on CUDA the memory of the device
    that torch allocated, or with `whole_device` all that is taken there. None where nobody counts.
    """

    def __init__(self, device: str, *, whole_device: bool = False) -> None:
        self._cuda = torch.device(device) if device.startswith("cuda") else None
        self._whole = whole_device
        gc.collect()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            _give_back_freed()
            self._resets = _reset_peak()
        self._before = self._held()

    def grown(self) -> int | None:
        """The peak since creation, less what was held at creation."""
        now = self._held(peak=True)
        return None if now is None or self._before is None else max(now - self._before, 0)

    def _held(self, *, peak: bool = False) -> int | None:
        if self._cuda is None:
            return _resident("VmHWM" if peak else "VmRSS") if self._resets else None
        if self._whole:
            free, total = torch.cuda.mem_get_info(self._cuda)
            return int(total - free)
        count = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return int(count(self._cuda))


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Main memory that may still be taken without swapping; None where the system does not tell.

    A container or a batch system may leave a process less than the machine has.
    """
    counted = [_field(Path("/proc/meminfo"), "MemAvailable")]
    for controller, folder, names in _BOUNDS:
        counted += [_left_in(group, names) for group in _groups(controller, _GROUPS / folder)]
    return min((count for count in counted if count is not None), default=None)


def _groups(controller: str, root: Path) -> list[Path]:
    """The control group of this process and those around it."""
    with contextlib.suppress(OSError):
        own = re.search(rf"^\d+:{controller}:/(.*)$", _OWN_GROUP.read_text(), re.MULTILINE)
        if own:
            inner = root / own[1]
            return [group for group in (inner, *inner.parents) if group.is_relative_to(root)]
    return []


def _left_in(group: Path, names: tuple[str, str, str]) -> int | None:
    """What a control group may still take; None where it has no bound. Cached files are given back first."""
    bound, taken, cached = names
    with contextlib.suppress(OSError, ValueError):
        left = int((group / bound).read_text()) - int((group / taken).read_text())
        files = re.search(rf"^{cached} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        return max(left + (int(files[1]) if files else 0), 0)
    return None


def _resident(field: str) -> int | None:
    return _field(_STATUS, field)


def _field(file: Path, name: str) -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _give_back_freed() -> None:
    """What the allocator keeps of freed memory would hide what is taken next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
