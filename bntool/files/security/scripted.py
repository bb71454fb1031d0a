"""Reading and writing TorchScript archives.

TorchScript has no Python in it, yet `torch.jit.load` runs what a file calls `__setstate__`, and one of the
operators it may call writes any file. So the code is searched before it is loaded.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path

import torch

from bntool.errors import LoadError
from bntool.files.limits import Limit
from bntool.files.security.archives import Unsafe, check_archive
from bntool.files.security.pickled_calls import shown

DEPRECATED = "TorchScript is deprecated by PyTorch; torch.export.save the nn.Module that it was made from"
_REACHES_OUT = re.compile(rb"\b(save|from_file|load_tensor|rpc_async|rpc_sync|rpc_remote|RRef|owner)\b")
_NAMESPACE = re.compile(rb"\bops\s*\.\s*(\w+)")
_ANY_OPS = re.compile(rb"\bops\b")
_PLAIN_NAMESPACES = frozenset({b"aten", b"prim", b"prims", b"torchvision"})
_CUSTOM_CLASS = re.compile(rb"\btorch\s*\.\s*classes\b")


def read_script(
    path: Path, *, trust_pickle: bool = False, limit: Limit | None = None
) -> torch.jit.ScriptModule:
    """The module in a TorchScript archive, on the CPU. `LoadError` for a damaged or hostile one."""
    limit = limit or Limit()
    try:
        check_archive(path, packed=limit.structure)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            code = sum(m.file_size for m in members if m.filename.endswith((".py", ".pkl")))
            limit.require(path.name, data=sum(m.file_size for m in members), structure=code, where=str(path))
            if not trust_pickle:
                _search(archive)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said by whoever loads it
            loaded: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")
            return loaded
    except LoadError:
        raise
    except Unsafe as error:
        raise LoadError(
            f"{path.name} was refused unread: it {error}",
            where=str(path),
            next_step="torch.save the nn.Module it was made from; only for a file you made yourself: "
            "--trust-pickle (runs code from the file)",
        ) from error
    except Exception as error:  # any error can come out of a damaged file
        raise LoadError(
            f"{path.name} is damaged: {shown(str(error).strip().split(chr(10))[0])}",
            where=str(path),
            next_step="download or copy it again",
        ) from error


def script_bytes(module: torch.jit.ScriptModule) -> bytes:
    """What `torch.jit.save` writes, made in memory: its writer aborts the process when a disk is full."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, content)
    return content.getvalue()


def why_unsafe(path: Path) -> str | None:
    """What in the archive's code reaches beyond the model, in words that follow `it`; None for nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            _search(archive)
    except Unsafe as error:
        return str(error)
    return None


def _search(archive: zipfile.ZipFile) -> None:
    """By words, not by syntax: an operator can only be called by its name."""
    for member in archive.infolist():
        if not member.filename.endswith(".py"):
            continue
        code = archive.read(member)
        place = shown(member.filename)
        if found := _REACHES_OUT.search(code):
            raise Unsafe(f"names {found[1].decode()} in {place}, which reaches files or other machines")
        if _CUSTOM_CLASS.search(code):
            raise Unsafe(f"makes objects of C++ classes in {place}")
        spaces = _NAMESPACE.findall(code)
        odd = [space.decode("ascii", "replace") for space in spaces if space not in _PLAIN_NAMESPACES]
        if odd or len(spaces) != len(_ANY_OPS.findall(code)):
            raise Unsafe(
                f"calls operators that are not PyTorch's own in {place}: {', '.join(odd[:3]) or 'ops'}"
            )
