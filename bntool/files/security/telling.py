"""What is said of the names in a file that bntool does not know, and what is proposed."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from bntool.core.errors import LoadError
from bntool.files.security.pickled_calls import shown
from bntool.files.security.rules import why_never
from bntool.files.security.sources import Sources

_MOST_NAMES = 10_000
_MANY = 3


def why_closed(names: Iterable[str]) -> dict[str, str]:
    """Name -> why --allow never lets it in, as far as this can be told without importing it."""
    sources = Sources()
    reasons = {name: why_never(name) or sources.why_not(name) for name in sorted(names)}
    return {name: why for name, why in reasons.items() if why}


def closed_names(path: Path, reasons: Mapping[str, str]) -> LoadError:
    """The error for a file that refers to names --allow never lets in, those of one reason together."""
    grouped = defaultdict(list)
    for name, why in reasons.items():
        grouped[why].append(name)
    told = "; ".join(f"{listed(names)} ({why})" for why, names in grouped.items())
    return _uncut(refused(path, f"refers to {told}, through which a file can run code"))


def absent_names(path: Path, names: list[str]) -> LoadError:
    """The error for a file that names what the packages of --allow do not have."""
    package = names[0].partition(".")[0]
    return _uncut(
        LoadError(
            f"{path.name} needs what is not in the code that is found here: {listed(names)}",
            where=str(path),
            next_step=f"run bntool with the version of {shown(package)} that the file was made with",
        )
    )


def refused(path: Path, why: str) -> LoadError:
    """The error for a file that does what no honest file does; `why` follows "it"."""
    return LoadError(
        f"{path.name} was refused unread: it {why}",
        where=str(path),
        next_step="get the weights as a state_dict or safetensors and pass --arch; only for a file you made "
        "yourself: --trust-pickle (runs code from the file)",
    )


def listed(names: list[str]) -> str:
    """All of the names; no honest file has more than 10,000."""
    rest = len(names) - _MOST_NAMES
    return ", ".join(map(shown, names[:_MOST_NAMES])) + (f" and {rest} more" if rest > 0 else "")


def unknown_classes(path: Path, names: list[str]) -> LoadError:
    """The error for a file that needs classes bntool does not know, with the flags that let them in."""
    for package in ("torchvision", "timm"):
        if any(n.startswith(package + ".") for n in names) and importlib.util.find_spec(package) is None:
            return LoadError(
                f"{path.name} needs {package}, which is not installed",
                where=str(path),
                next_step=f"pip install {package}",
            )
    classes = "1 class" if len(names) == 1 else f"{len(names)} classes"
    pronoun, its = ("it", "its") if len(names) == 1 else ("them", "their")
    flags = " ".join(f"--allow {entry}" for entry in _proposed(names))
    step = f"if you trust {pronoun}: {flags} ({its} code must be importable from here); " if flags else ""
    return _uncut(
        LoadError(
            f"{path.name} holds pickled objects, and needs {classes} bntool does not know: {listed(names)}",
            where=str(path),
            next_step=f"{step}if you trust the file: --trust-pickle (runs code from the file); safer: "
            "torch.save(model.state_dict(), ...) and pass --arch",
        )
    )


def _uncut(error: LoadError) -> LoadError:
    error.uncut = True
    return error


def _proposed(names: list[str]) -> list[str]:
    """Entries of --allow that let these names in: a package where it has many of them."""
    sources = Sources()
    packages = defaultdict(list)
    for name in names[:_MOST_NAMES]:
        packages[name.partition(".")[0]].append(name)
    entries: list[str] = []
    for top, members in packages.items():
        if top == "__main__":
            entries += (f"SCRIPT.py:{shown(name.removeprefix('__main__.'))}" for name in members)
            continue
        base = _common([name.split(".")[:-1] for name in members])
        if len(members) >= _MANY and why_never(f"{base}.*") is None:
            entries.append(f"{shown(base)}.*")
        else:
            entries += (shown(name) for name in members if _may_be_class(name, sources))
    return entries


def _common(modules: list[list[str]]) -> str:
    """The innermost package around all of the modules."""
    parts = []
    for level in zip(*modules, strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return ".".join(parts)


def _may_be_class(name: str, sources: Sources) -> bool:
    """Whether a name of unknown code is written as classes are; what is known is no matter of spelling."""
    return name.rpartition(".")[2].lstrip("_")[:1].isupper() or sources.why_not(name) == ""
