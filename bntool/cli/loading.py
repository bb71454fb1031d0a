"""Load a model with what the user granted for that file, and with the surgery that its side file tells of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from bntool.cli.session import Voice
    from bntool.files.loading import Loaded
    from bntool.files.memory import Record
    from bntool.plan import Plan


def load_granted(
    name: str,
    record: Record | None,
    *,
    arch: str | None,
    allow: tuple[str, ...],
    trust_pickle: bool,
    voice: Voice,
    **options: Any,
) -> tuple[Loaded, list[Plan]]:
    """Load a model with what was granted for it, made to fit the surgery that its side file tells of."""
    from bntool.files.loading import load
    from bntool.files.memory import Grant
    from bntool.files.references import is_reference

    is_file = Path(name).exists() or not is_reference(name)
    grant = record.granted(name) if record is not None and is_file else Grant()
    if is_file and arch is None:
        arch = recorded_architecture(name)
        if arch:
            voice.note(f"--arch {arch}, as its side file says")
    plans, prepare = _replay_of(name) if is_file and arch else ([], None)
    with voice.progress(f"loading {name}") as tell:
        loaded = load(
            name,
            arch=arch,
            allow=(*allow, *grant.allow),
            trust_pickle=trust_pickle or grant.trust_pickle,
            prepare=prepare,
            tell=tell,
            **options,
        )
    return loaded, plans


def recorded_architecture(path: str) -> str | None:
    """The architecture that the side file names: only a registry's, since a stranger may have written it."""
    from bntool.files.detect import Kind, detect
    from bntool.files.sidecar import describes, read_sidecar

    document = read_sidecar(path) if Path(path).is_file() else None
    reload = document.get("reload") if document and describes(document, path) else None
    arch = reload.get("arch") if isinstance(reload, dict) else None
    if not isinstance(arch, str) or not arch.startswith(("torchvision:", "timm:")):
        return None
    weights = (Kind.TORCH_ZIP, Kind.TORCH_LEGACY, Kind.SAFETENSORS, Kind.SAFETENSORS_INDEX)
    return arch if detect(path).kind in weights else None


def _replay_of(path: str) -> tuple[list[Plan], Any]:
    """The plans that made a file of weights, so that its architecture can be made to fit it."""
    from bntool.files.sidecar import describes, read_sidecar
    from bntool.plan import Plan

    document = read_sidecar(path) if Path(path).exists() else None
    if document is None or not describes(document, path):
        return [], None
    raw = [*document.get("earlier_plans", []), *([document["plan"]] if document.get("plan") else [])]
    plans = [Plan.from_dict(data) for data in raw]

    def prepare(model: nn.Module) -> nn.Module:
        from bntool.api import apply

        for plan in plans:
            model = apply(model, plan, check="none", share=True).model
        return model

    return plans, prepare
