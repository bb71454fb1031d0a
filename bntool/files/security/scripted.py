"""Reading and writing TorchScript archives.

TorchScript has no Python in it, yet `torch.jit.load` runs what a file calls `__setstate__`, and one of the
operators it may call writes any file. So the code is searched before it is loaded.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from pathlib import Path

import torch

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.security.archives import Unsafe, quoted
from bntool.files.security.containers import SCRIPT, Container, within
from bntool.files.security.nesting import DEEPEST, is_nested_deeply
from bntool.files.security.pickled_calls import shown

DEPRECATED = "TorchScript is deprecated by PyTorch; torch.export.save the nn.Module that it was made from"
_REACHES_OUT = re.compile(rb"\b(save|from_file|load_tensor|rpc_async|rpc_sync|rpc_remote|RRef|owner)\b")
_RUN_WHILE_READ = re.compile(rb"\b__setstate__\b")
_NAMESPACE = re.compile(rb"\bops\s*\.\s*(\w+)")
_OWN = re.compile(rb"\b__torch__(?:\.\w+)+")
_ANY_OPS = re.compile(rb"\bops\b")
_PLAIN_NAMESPACES = frozenset({b"aten", b"prim", b"prims", b"torchvision"})
_LONG_PREFIX = re.compile(rb"(?:\bnot\s+|[-+~]\s*){500}|^[ \t]{2000}", re.MULTILINE)
_GETATTR = re.compile(rb"\bgetattr\b")
_PLAIN_GETATTR = re.compile(rb'\bgetattr\(((?:(?!getattr)[\w.()\[\]])+), "[^"\\\n]*"\)')
_DEEPEST = 64
# A name of a class in the file, or in torch's own modules, but none on the way to torch.classes.
_CLASSES = re.compile(rb"\b__torch__\.(?!torch\b(?!\.(?!classes\b)\w))\w")
_CUSTOM_CLASS = re.compile(rb"\btorch\s*\.\s*classes\b")
_PICKLED_CLASS = re.compile(rb"__torch__[.\n]torch[.\n]classes")


def read_script(
    path: Path, *, trust_pickle: bool = False, limit: Limit | None = None
) -> torch.jit.ScriptModule:
    """The module in a TorchScript archive, on the CPU. `LoadError` for a damaged or hostile one."""
    try:
        with path.open("rb") as opened:
            container = Container(opened, SCRIPT, within(limit or Limit(), path))
            if not trust_pickle:
                check_script(container)
            return _load(container)
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


def check_script(container: Container) -> None:
    """Raises `Unsafe` where loading or running the module would reach beyond it.

    Every part that is parsed is read here, so that torch parses the same bytes. Code is judged by words and
    not by syntax: an operator can only be called by its name, as the lexer takes no escapes in names.
    """
    for name in container.sizes:
        if name.startswith("code/") and name.endswith(".py"):
            _check_code(container.read(name), quoted(name))
        elif name.endswith("pkl"):
            _check_pickle(container.read(name), quoted(name))


def _check_pickle(pickle: bytes, place: str) -> None:
    if _PICKLED_CLASS.search(pickle):
        raise Unsafe(f"holds objects of C++ classes in {place}")
    if is_nested_deeply(pickle):
        raise Unsafe(f"nests its objects in {place} deeper than any program, which ends torch's reader")


def _check_code(code: bytes, place: str) -> None:
    if found := _REACHES_OUT.search(code):
        raise Unsafe(f"names {found[1].decode()} in {place}, which reaches files or other machines")
    if _RUN_WHILE_READ.search(code):
        raise Unsafe(f"has a __setstate__ in {place}, which torch runs while it reads the file")
    if _is_code_nested_deeply(code):
        raise Unsafe(f"nests its code in {place} deeper than any program, which ends torch's parser")
    # A text may be put together of parts and escapes, so attributes are named by plain ones alone.
    plain = code
    for _ in range(_DEEPEST):
        plain, count = _PLAIN_GETATTR.subn(rb"(\1)", plain)
        if not count:
            break
    if _GETATTR.search(plain):
        raise Unsafe(f"names an attribute in {place} by something else than a plain text")
    if _CUSTOM_CLASS.search(code) or len(_CLASSES.findall(code)) != code.count(b"__torch__"):
        raise Unsafe(f"makes objects of C++ classes in {place}")
    # What lies under __torch__ is code of this archive, also where it is called ops.
    code = _OWN.sub(b"__torch__", code)
    spaces = _NAMESPACE.findall(code)
    odd = [space.decode("ascii", "replace") for space in spaces if space not in _PLAIN_NAMESPACES]
    if odd or len(spaces) != len(_ANY_OPS.findall(code)):
        raise Unsafe(f"calls operators that are not PyTorch's own in {place}: {', '.join(odd[:3]) or 'ops'}")


def _is_code_nested_deeply(code: bytes) -> bool:
    """Torch's parser calls itself for each bracket, prefix and block, and has no bound."""
    steps = ({40: 1, 91: 1, 123: 1, 41: -1, 93: -1, 125: -1}.get(byte, 0) for byte in code)
    deepest = max(itertools.accumulate(steps), default=0)
    return deepest > DEEPEST or _LONG_PREFIX.search(code) is not None


def _load(container: Container) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said by whoever loads it
        container.file.seek(0)
        loaded: torch.jit.ScriptModule = torch.jit.load(container.file, map_location="cpu")
        return loaded
