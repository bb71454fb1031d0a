"""What --allow lets in, what it refuses and why, and that a hostile file gains nothing by what it lets in."""

from __future__ import annotations

import contextlib
import gc
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bntool.api import load
from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.files.security.allowed import user_allowance
from bntool.files.security.pickles import standing
from tests.files import torch_files as tf
from tests.files.security import tempting
from tests.files.security.allowed_pickles import ATTACKS, HERE

X = torch.zeros(1, 2, 8)


@pytest.fixture(autouse=True)
def _only_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Packages made in the folder of a test are forgotten after it."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def _names_in(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    found = (arg for opcode, arg, _ in pickletools.genops(content) if opcode.name == "GLOBAL")
    return sorted({str(arg).replace(" ", ".") for arg in found})


def _accepted(entry: str) -> bool:
    try:
        user_allowance([entry])
    except BntoolError:
        return False
    return True


def test_there_are_attacks_of_every_kind() -> None:
    assert len(ATTACKS) >= 30
    kinds = {title.partition("/")[0] for title in ATTACKS}
    assert kinds >= {"partial", "kept", "attribute", "setstate", "enum", "re-export", "del", "graph"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_runs_when_its_file_is_trusted(attack: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    ATTACKS[attack](path, marker)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        model = torch.load(path, weights_only=False)
        model(X)
    model = None
    gc.collect()
    assert marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_whatever_is_allowed(attack: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    ATTACKS[attack](path, marker)
    # Every name in it by itself as far as it is taken, and the whole package.
    flags = [n for n in _names_in(path) if _accepted(n)]
    for allow in ([], [f"{HERE}.*"], flags, [*flags, f"{HERE}.*"]):
        with pytest.raises(LoadError) as caught:
            load(path, allow=allow)
        assert caught.value.exit_code == 3
        assert "damaged" not in caught.value.what
    gc.collect()
    assert not marker.exists()


REFUSED = {
    "numpy.load": "a function",
    "sympy.sympify": "a function",
    "click.edit": "a function",
    "PIL.ImageMath.unsafe_eval": "a function",
    "timm.models._helpers.load_state_dict": "a function",
    "torchvision.io.write_file": "a function",
    "torch.nn.functional.linear": "a function",
    "torch.nn.init.normal_": "a function",
    f"{HERE}.load_engine": "a function",
    f"{HERE}.compute": "a function",
    "numpy.memmap": "neither a layer",
    f"{HERE}.Config": "neither a layer",
    f"{HERE}.F": "neither a layer",
    "os.*": "standard library",
    "builtins.*": "standard library",
    "http.HTTPStatus": "standard library",
    "bntool.files.security.pickles._load_trusting": "bntool itself",
    "bntool.cli.run": "bntool itself",
    "bntool.*": "bntool itself",
    "torch.*": "none of its layers",
    "torch.optim.SGD": "none of its layers",
    "torch.fx.GraphModule": "changes code",
    "torch.jit._script.RecursiveScriptModule": "changes code",
    "torch.package.PackageImporter": "changes code",
    f"{HERE}.Traced": "a kind of torch.fx",
    "torch.nn.LazyLinear": "a kind of torch.nn.modules.lazy",
    "torch.nn.parallel.DistributedDataParallel": "__setstate__ of its own",
    f"{HERE}.Restores": "__setstate__ of its own",
    f"{HERE}.RestoresByItsBase": "__setstate__ of its own",
    f"{HERE}.RestoresByAMixin": "__setstate__ of its own",
    f"{HERE}.Made": "__new__ of its own",
    f"{HERE}.Dropped": "__del__ of its own",
    f"{HERE}.Watched": "__getattribute__ of its own",
    f"{HERE}.Guesses": "_missing_ of its own",
    f"{HERE}.Grows": "an enum that makes members",
    f"{HERE}.Prompt": "an enum that makes members",
    f"{HERE}.nn": "neither a layer",
    f"{HERE}.Tensor": "neither a layer",
    f"{HERE}.Outer.Inner": "inside the class",
    f"{HERE}.Outer.start": "inside the class",
    f"{HERE}.Plain.forward": "inside the class",
    "*": "names no class",
    "*.*": "names no class",
    "pkg.*.Net": "names no class",
    "pkg.Net*": "names no class",
    "pkg.mod.*.*": "names no class",
    "nets.py:*": "names no class",
    "pkg.m\x1b[2Jod.Net": "names no class",
    "pkg.mód.Net": "names no class",
    "pkg.Net()": "names no class",
    "": "names no class",
}


@pytest.mark.parametrize("entry", REFUSED)
def test_what_is_refused_says_why(entry: str) -> None:
    if entry.partition(".")[0] in ("timm", "torchvision", "PIL", "click"):
        pytest.importorskip(entry.partition(".")[0])
    with pytest.raises(UsageError) as caught:
        user_allowance([entry])
    assert caught.value.exit_code == 2
    assert REFUSED[entry] in caught.value.what
    assert caught.value.next_step
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_script_lets_in_its_own_layers_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "net_of_a_test.py").write_text(
        "from os import system\nfrom subprocess import Popen\nfrom torch import nn\n"
        f"from {HERE} import Plain\n"
        "class Net(nn.Module): pass\ndef act(x): return x\n"
    )
    allowed = user_allowance(["net_of_a_test.py:Net"]).classes
    assert set(allowed) == {"net_of_a_test.Net", "__main__.Net"}
    for attribute, why in {"act": "a function", "system": "a function", "Popen": "neither"}.items():
        with pytest.raises(UsageError, match=why):
            user_allowance([f"net_of_a_test.py:{attribute}"])
    with pytest.raises(UsageError, match="defined elsewhere") as caught:
        user_allowance(["net_of_a_test.py:Plain"])
    proposed = caught.value.next_step.removeprefix("--allow ")
    assert user_allowance([proposed]).classes == {f"{HERE}.Plain": tempting.Plain}


def test_what_is_known_may_be_named_and_is_judged_all_the_same() -> None:
    for entry in (
        "torch.nn.functional.relu",
        "argparse.Namespace",
        "bntool.layers.ConvBN2d",
        "torch.nn.ReLU",
    ):
        assert user_allowance([entry]).classes


def test_honest_layers_keep_activations_norms_and_enums(tmp_path: Path) -> None:
    transformer = nn.TransformerEncoderLayer(8, 2, 16, activation=partial(F.leaky_relu, negative_slope=0.2))
    model = nn.Sequential(tempting.Calls(F.gelu), tempting.Calls(nn.ReLU, False), transformer)
    model.norm = partial(nn.LayerNorm, eps=1e-6)
    model.mode, model.kind = tempting.Mode.MEAN, tempting.Mode
    torch.save(model, tmp_path / "model.pt")
    back = load(tmp_path / "model.pt", allow=[f"{HERE}.Calls", f"{HERE}.Mode"]).module
    assert torch.equal(back[0](X), F.gelu(X))
    assert type(back[1](X)) is nn.ReLU
    assert torch.equal(back[2].activation(X - 1), F.leaky_relu(X - 1, 0.2))
    assert (back.norm(4).eps, back.mode, back.kind) == (1e-6, tempting.Mode.MEAN, tempting.Mode)


def test_an_attribute_between_two_underlines_is_refused(tmp_path: Path) -> None:
    body = tf.module(f"{HERE}.Plain", ("__class__", tf.name("torch.nn.modules.activation.ReLU")))
    tf.write_zip(tmp_path / "model.pt", tf.pickled(body))
    with pytest.raises(LoadError, match="sets __class__ of a"):
        load(tmp_path / "model.pt", allow=[f"{HERE}.Plain"])


def test_tuples_that_hold_one_another_do_not_take_for_ever(tmp_path: Path) -> None:
    twice = tf.NONE + b"q\x00" + b"".join(b"0h\x00h\x00\x86q\x00" for _ in range(60))
    tf.write_zip(tmp_path / "model.pt", tf.pickled(tf.call(f"{HERE}.Mode", twice)))
    with pytest.raises(LoadError):
        load(tmp_path / "model.pt", allow=[f"{HERE}.Plain"])


PACKAGE = {
    "__init__.py": "",
    "__main__.py": "raise SystemExit('a program was run')\n",
    "blocks/__init__.py": "from .conv import Block\n",
    "blocks/conv.py": "from torch import nn\nfrom ..kinds import Kind\n"
    "class Base(nn.Module): pass\nclass Block(Base):\n    def forward(self, x): return x\n"
    "class double_conv(Block): pass\ndef autopad(x): return x\n",
    "net.py": "from torch import nn\nfrom .blocks import Block\nclass Net(nn.Sequential): pass\n",
    "kinds.py": "import enum\nclass Kind(enum.Enum):\n    A = 1\n"
    "class Config: pass\nclass Engine(Config):\n    def __setstate__(self, s): pass\n",
}


def _package(folder: Path, name: str) -> Path:
    for file, source in PACKAGE.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / name


def _refers_to(path: Path, *names: str) -> Path:
    held = tf.EMPTY_LIST + b"(" + b"".join(map(tf.name, names)) + b"e"
    layer = tf.module("torch.nn.modules.activation.ReLU", ("held", held))
    return tf.write_zip(path, tf.pickled(layer))


def _save_net(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(folder))
    conv = __import__(f"{name}.blocks.conv", fromlist=["conv"])
    net = __import__(f"{name}.net", fromlist=["net"])
    model = net.Net(conv.Block(), conv.double_conv(), nn.ReLU())
    model.kind = conv.Kind.A
    torch.save(model, folder / "net.pt")
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]
    monkeypatch.undo()
    return folder / "net.pt"


def test_the_package_that_an_error_proposes_lets_the_file_in_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "pkg_proposed")
    path = _save_net(tmp_path, "pkg_proposed", monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError) as caught:
        load(path)
    (flag,) = re.findall(r"--allow (\S+)", caught.value.next_step)
    assert flag == "pkg_proposed.*"
    loaded = load(path, allow=[flag])
    assert type(loaded.module).__name__ == "Net"
    (note,) = [n for n in loaded.notes if "let in" in n]
    names = ("blocks.conv.Block", "blocks.conv.double_conv", "kinds.Kind", "net.Net")
    assert note.endswith(": " + ", ".join(f"pkg_proposed.{n}" for n in names))
    assert torch.equal(loaded.module(X), X)


def test_each_flag_that_an_error_proposes_is_taken(tmp_path: Path) -> None:
    _package(tmp_path, "pkg_single")
    wanted = ("pkg_single.blocks.conv.double_conv", "pkg_single.kinds.Kind")
    path = _refers_to(tmp_path / "model.pt", *wanted)
    with pytest.raises(LoadError) as caught:
        load(path)
    flags = re.findall(r"--allow (\S+)", caught.value.next_step)
    assert flags == list(wanted)
    assert set(user_allowance(flags).classes) == set(wanted)


def test_no_name_that_would_be_refused_is_proposed(tmp_path: Path) -> None:
    _package(tmp_path, "pkg_refusing")
    closed = {
        "pkg_refusing.blocks.conv.autopad": "a function",
        "pkg_refusing.kinds.Config": "neither a layer (nn.Module) nor an enum",
        "pkg_refusing.kinds.Engine": "neither a layer (nn.Module) nor an enum",
        "numpy.load": "a function",
        "os.system": "standard library",
    }
    for name, why in closed.items():
        path = _refers_to(tmp_path / "model.pt", name, "pkg_refusing.net.Net")
        with pytest.raises(LoadError) as caught:
            load(path)
        assert name in caught.value.what
        assert why in caught.value.what
        assert "--allow" not in caught.value.next_step
    assert "pkg_refusing" not in sys.modules


def test_a_package_gives_no_function_and_no_class_of_another(tmp_path: Path) -> None:
    folder = _package(tmp_path, "pkg_strict")
    (folder / "odd.py").write_text(
        f"from {HERE} import Plain\nfrom torch import nn\nmake = len\n"
        "class Bad(nn.Module):\n    def __setstate__(self, s): pass\n"
    )
    names = [
        f"pkg_strict.{n}" for n in ("blocks.conv.autopad", "odd.Plain", "odd.make", "odd.Bad", "odd.Gone")
    ]
    granted = user_allowance(["pkg_strict.*"], names)
    assert granted.classes == {}
    assert granted.absent == {"pkg_strict.odd.Gone"}
    reasons = {name.rpartition(".")[2]: why for name, why in granted.refused.items()}
    assert reasons.keys() == {"autopad", "Plain", "make", "Bad"}
    assert reasons["Plain"] == f"defined elsewhere: {HERE}.Plain"
    path = _refers_to(tmp_path / "model.pt", "pkg_strict.odd.Bad")
    with pytest.raises(LoadError, match=r"pkg_strict\.odd\.Bad \(restored by a __setstate__"):
        load(path, allow=["pkg_strict.*"])


def test_what_a_package_does_not_have_is_named_and_not_proposed_again(tmp_path: Path) -> None:
    _package(tmp_path, "pkg_older")
    names = ["pkg_older.blocks.New", "pkg_older.heads.Head", "pkg_older.net.Net", "pkg_older.net.Neck"]
    path = _refers_to(tmp_path / "model.pt", *names)
    with pytest.raises(LoadError) as caught:
        load(path, allow=["pkg_older.*"])
    assert caught.value.what.endswith("here: pkg_older.blocks.New, pkg_older.heads.Head, pkg_older.net.Neck")
    assert "--allow" not in caught.value.next_step
    assert "pkg_older" in caught.value.next_step


def test_a_package_imports_only_its_own_modules_and_runs_no_program(tmp_path: Path) -> None:
    folder = _package(tmp_path, "pkg_inside")
    outside = tmp_path / "elsewhere" / "extra.py"
    outside.parent.mkdir()
    outside.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    (folder / "extra.py").symlink_to(outside)
    (folder / "folder").symlink_to(outside.parent)
    for entry in ("pkg_inside.*", "pkg_inside.blocks.*"):
        names = ("extra.Net", "folder.extra.Net", "__main__.Net", "blocks.conv.Block", "blocks.Block")
        found = user_allowance([entry], [f"pkg_inside.{n}" for n in names])
        assert set(found.classes) == {"pkg_inside.blocks.conv.Block", "pkg_inside.blocks.Block"}
    assert user_allowance(["pkg_inside.net.*"], ["pkg_inside.network.Net", "pkg_inside.Net"]).classes == {}
    assert not (tmp_path / "marker").exists()


def test_what_is_no_layer_is_told_apart_from_what_may_be_allowed(tmp_path: Path) -> None:
    _package(tmp_path, "pkg_told")
    told = standing({"pkg_told.net.Net", "pkg_told.kinds.Config", "os.system", "gone.Net"})
    assert told == {
        "gone.Net": "unknown", "os.system": "refused", "pkg_told.kinds.Config": "other",
        "pkg_told.net.Net": "unknown",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [(tf.text("sum"), tf.text("A B")), (), (tf.EMPTY_LIST,), (tf.module(f"{HERE}.Plain"),)],
    ids=["two", "none", "a list", "a layer"],
)
def test_an_enum_is_called_with_one_plain_value_or_not_at_all(
    arguments: tuple[bytes, ...], tmp_path: Path
) -> None:
    body = tf.module(f"{HERE}.Plain", ("mode", tf.call(f"{HERE}.Mode", *arguments)))
    tf.write_zip(tmp_path / "model.pt", tf.pickled(body))
    with pytest.raises(LoadError, match=r"calls \S+Mode with arguments of its own"):
        load(tmp_path / "model.pt", allow=[f"{HERE}.*"])


def test_a_partial_of_an_allowed_layer_is_refused_before_it_is_made(tmp_path: Path) -> None:
    ATTACKS["partial/a-layer"](tmp_path / "model.pt", tmp_path / "marker")
    with pytest.raises(LoadError, match=r"makes a functools\.partial of \S+Opens"):
        load(tmp_path / "model.pt", allow=[f"{HERE}.Opens"])
