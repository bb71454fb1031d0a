"""Hostile and damaged files of torch.save. Every payload only makes a marker file, which must not appear."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.api import load
from bntool.core.errors import LoadError, UsageError
from bntool.files.detect import detect
from bntool.files.security.allowed import user_allowance
from bntool.files.security.pickles import unknown_globals
from tests.files.torch_files import (
    BUILD,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    NEWOBJ,
    NONE,
    REDUCE,
    call,
    mapping,
    module,
    name,
    number,
    pickled,
    storage,
    tensor,
    text,
    tup,
    write_legacy,
    write_members,
    write_zip,
)

RELU = "torch.nn.modules.activation.ReLU"
LINEAR = "torch.nn.modules.linear.Linear"
PLAIN = name("torch.nn.functional.relu")


def _exec(marker: Path) -> bytes:
    return call("builtins.exec", text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()"))


def _system(marker: Path) -> bytes:
    return call("posix.system", text(f"touch {marker}"))


def _zip(*parts: bytes, **options: object) -> Callable[[Path, Path], Path]:
    return lambda path, marker: write_zip(path, pickled(*parts), **options)  # type: ignore[arg-type]


def _packed(path: Path, marker: Path) -> Path:
    members = [("data.pkl", pickled(mapping((text("w"), tensor(storage()))))), ("data/0", b"\0" * 16)]
    return write_members(path, members, zipfile.ZIP_DEFLATED)


def _doubled(*names: str) -> Callable[[Path, Path], Path]:
    def make(path: Path, marker: Path) -> Path:
        clean, bad = pickled(b"}"), pickled(_system(marker))
        return write_members(path, [(names[0], bad), ("version", b"3\n"), (names[1], clean)])

    return make


def _flipped(path: Path, marker: Path) -> Path:
    torch.save({"w": torch.ones(64)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(torch.ones(64).numpy().tobytes())
    data[at + 2] ^= 0x40
    path.write_bytes(data)
    return path


def _cut(path: Path, marker: Path) -> Path:
    torch.save(nn.Linear(3, 3), path)
    path.write_bytes(path.read_bytes()[:700])
    return path


def _protocol_4(path: Path, marker: Path) -> Path:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (f"open({str(marker)!r}, 'w')",)

    return write_zip(path, pickle.dumps(Payload(), protocol=4))


def _tar(path: Path, marker: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in ("storages", "tensors", "pickle"):
            content = pickled(_exec(marker))
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _nested_lists(path: Path, marker: Path) -> Path:
    # Each list holds the one before ten times: 10^31 leaves in a few hundred bytes.
    body = EMPTY_LIST + b"q\x00"
    for level in range(31):
        body += EMPTY_LIST + b"(" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"e"
        body += b"q" + bytes([level + 1])
    return write_zip(path, pickled(body))


PARTIAL_EVAL = name("functools.partial") + tup(name("builtins.eval")) + REDUCE
NORM = name("torch.nn.modules.normalization.LayerNorm")
CASES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "exec": (lambda p, m: write_zip(p, pickled(_exec(m))), "builtins.exec"),
    "exec-python-2-name": (
        lambda p, m: write_zip(p, pickled(_exec(m).replace(b"cbuiltins", b"c__builtin__"))),
        "builtins.exec",
    ),
    "system": (lambda p, m: write_zip(p, pickled(_system(m))), "posix.system"),
    "os-system-beside-weights": (
        lambda p, m: write_zip(p, pickled(mapping((text("a"), _system(m)), (text("w"), tensor(storage()))))),
        "posix.system",
    ),
    "protocol-4": (_protocol_4, "protocol 4"),
    "legacy-object": (lambda p, m: write_legacy(p, pickled(_exec(m))), "builtins.exec"),
    "legacy-machine": (
        lambda p, m: write_legacy(p, pickled(b"}"), machine=pickled(_exec(m))), "builtins.exec"),
    "legacy-storage-keys": (
        lambda p, m: write_legacy(p, pickled(b"}"), keys=pickled(_exec(m))), "builtins.exec"),
    "tar": (_tar, "tar archive"),
    "constructor-arguments": (_zip(call(LINEAR, number(40000), number(40000))), "calls " + LINEAR),
    "new-with-arguments": (
        _zip(name(LINEAR) + tup(number(4), number(4)) + NEWOBJ), "instantiates " + LINEAR),
    "partial-of-eval": (_zip(PARTIAL_EVAL), "builtins.eval"),
    "partial-of-tensor-maker": (
        _zip(call("functools.partial", name("torch._utils._rebuild_tensor_v2"))), "functools.partial of"),
    "partial-changed-later": (
        _zip(name("functools.partial") + tup(NORM) + REDUCE
             + tup(name("functools.partial"), EMPTY_TUPLE, NONE, NONE) + BUILD), "functools.partial of"),
    "getattr-gadget": (
        _zip(call("builtins.getattr", name(RELU), text("forward"))), "builtins.getattr"),
    "fx-source": (
        _zip(call("torch.fx.graph_module.reduce_graph_module", mapping(), mapping())), "torch.fx"),
    "torch-load": (_zip(call("torch.serialization.load", text("x.pt"))), "torch.serialization.load"),
    "hub": (_zip(call("torch.hub.load", text("a/b"), text("c"))), "torch.hub.load"),
    "import": (_zip(call("importlib.import_module", text("antigravity"))), "importlib"),
    "hidden-forward": (_zip(module(RELU, ("forward", PLAIN))), "hides the method ReLU.forward"),
    "hidden-call-impl": (_zip(module(RELU, ("_call_impl", PLAIN))), "hides the method ReLU._call_impl"),
    "hidden-deep": (
        _zip(module(RELU, ("extra", EMPTY_LIST + module(RELU, ("forward", PLAIN)) + b"a"))),
        "hides the method"),
    "forward-hook": (
        _zip(module(RELU, ("_forward_hooks", mapping((number(0), PLAIN))))), "brings hooks for a ReLU"),
    "pre-hook": (
        _zip(module(RELU, ("_forward_pre_hooks", mapping((number(0), PLAIN))))), "brings hooks for a ReLU"),
    "compiled-call": (_zip(module(RELU, ("_compiled_call_impl", PLAIN))), "brings a compiled call"),
    "odd-child": (
        _zip(module(RELU, ("_modules", mapping((text("a"), PLAIN))))), "among the _modules of a ReLU"),
    "hidden-items": (
        _zip(call("collections.OrderedDict") + mapping((text("items"), PLAIN)) + BUILD),
        "hides the method OrderedDict.items"),
    "tensor-hooks": (
        _zip(mapping((text("w"), call(
            "torch._utils._rebuild_parameter", tensor(storage()), FALSE,
            call("collections.OrderedDict") + b"(" + number(0) + PLAIN + b"u")))), "hooks for a tensor"),
    "type-with-function": (
        _zip(call("torch._tensor._rebuild_from_type_v2", name(LINEAR), name("torch.Tensor"),
                  tup(number(9), number(9)), mapping())), "through a function"),
    "past-the-end": (_zip(mapping((text("w"), tensor(storage(), (9,))))), "past the end"),
    "past-by-offset": (_zip(mapping((text("w"), tensor(storage(), offset=1)))), "past the end"),
    "negative-stride": (_zip(mapping((text("w"), tensor(storage(), stride=(-1,))))), "non-negative"),
    "expansion": (
        _zip(mapping((text("w"), tensor(storage(), (1 << 40,), (0,))))), "4398046511104 bytes from 16"),
    "no-data": (_zip(mapping((text("w"), tensor(storage()))), data=None), "missing or cut short"),
    "short-data": (_zip(mapping((text("w"), tensor(storage()))), data=b"\0"), "missing or cut short"),
    "two-sizes": (
        _zip(mapping((text("a"), tensor(storage())), (text("b"), tensor(storage(numel=2), (2,))))),
        "in two ways"),
    "legacy-no-data": (
        lambda p, m: write_legacy(p, pickled(
            mapping((text("w"), tensor(tup(text("storage"), name("torch.FloatStorage"), text("0"),
                                           text("cpu"), number(4), NONE) + b"Q"))))),
        "data of some tensors is missing"),
    "bytearray": (_zip(call("builtins.bytearray", number(1 << 40))), "byte array"),
    "codec": (_zip(call("_codecs.encode", text("x"), text("idna"))), "codec"),
    "sparse": (_zip(call("torch._utils._rebuild_sparse_tensor", EMPTY_LIST)), "a sparse tensor"),
    "quantized": (_zip(call("torch._utils._rebuild_qtensor", EMPTY_LIST)), "a quantized tensor"),
    "opcode-inst": (
        lambda p, m: write_zip(p, pickled(b"(" + text(f"touch {m}") + b"iposix\nsystem\n")), "opcode b'i'"),
    "opcode-obj": (
        lambda p, m: write_zip(p, pickled(b"(" + name("posix.system") + text(f"touch {m}") + b"o")),
        "posix.system"),
    "opcode-extension": (_zip(b"\x82\x01"), "opcode"),
    "call-of-no-name": (_zip(EMPTY_LIST + EMPTY_TUPLE + REDUCE), "not a named function"),
    "name-with-escapes": (_zip(b"c\x1b[31mred\nx\n"), r"\x1b[31mred"),
    "lazy": (_zip(module("torch.nn.modules.linear.LazyLinear")), "LazyLinear"),
    "hidden-class": (_zip(module("torch.nn.modules.module.Module", ("eval", PLAIN))), "hides the method"),
    "doubled-member": (_doubled("data.pkl", "data.pkl"), "same name"),
    "doubled-but-for-case": (_doubled("DATA.PKL", "data.pkl"), "does not write"),
    "packed-member": (_packed, "packs 'data.pkl', which torch.save never does"),
    "flipped-bit": (_flipped, "checksum"),
    "cut-short": (_cut, "cut short or damaged"),
    "pickle-cut-short": (lambda p, m: write_zip(p, pickled(mapping())[:-1]), "ends early"),
    "empty-stack": (_zip(REDUCE), "damaged"),
    "unknown-memo": (_zip(b"h\x07"), "damaged"),
    "no-pickle": (lambda p, m: write_members(p, [("other", b"")]), "no PyTorch model"),
    "nested-lists": (_nested_lists, "no model or weights found"),
    "just-a-tensor": (_zip(tensor(storage())), "holds a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hostile_or_damaged_file_is_refused_and_runs_nothing(case: str, tmp_path: Path) -> None:
    make, expected = CASES[case]
    marker = tmp_path / "marker"
    path = make(tmp_path / "model.pt", marker)
    before = torch.serialization.get_safe_globals()
    started = time.monotonic()
    with pytest.raises(LoadError) as caught:
        load(path)
    # The bombs among them would take minutes or all memory; a shared machine gets ample room.
    assert time.monotonic() - started < 20
    assert expected in caught.value.what
    assert caught.value.next_step
    assert caught.value.where == str(path)
    assert "\x1b" not in str(caught.value)
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_payload_does_run_when_the_user_trusts_the_file(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = write_zip(tmp_path / "model.pt", pickled(_exec(marker)))
    with pytest.raises(LoadError, match="no model or weights"):
        load(path, trust_pickle=True)
    assert marker.exists()


def test_all_unknown_classes_are_named_at_once(tmp_path: Path) -> None:
    body = mapping(
        (text("a"), module("mypkg.models.Net")), (text("b"), module("__main__.Main")),
        (text("c"), module("other.Layer")),
    )  # fmt: skip
    path = write_zip(tmp_path / "model.pt", pickled(body))
    with pytest.raises(LoadError) as caught:
        load(path)
    assert "3 classes bntool does not know: __main__.Main, mypkg.models.Net, other.Layer" in caught.value.what
    for flag in ("--allow mypkg.models.Net", "--allow SCRIPT.py:Main", "--trust-pickle", "--arch"):
        assert flag in caught.value.next_step
    assert unknown_globals(path, detect(path)) == ("__main__.Main", "mypkg.models.Net", "other.Layer")


def test_a_thousand_unknown_names_are_all_listed_and_one_flag_is_proposed(tmp_path: Path) -> None:
    names = [f"pkg.part{i % 7}.C{i}" for i in range(1000)]
    path = write_zip(tmp_path / "model.pt", pickled(*map(name, names)))
    with pytest.raises(LoadError) as caught:
        load(path)
    assert caught.value.what.rpartition(": ")[2].split(", ") == sorted(names)
    assert "--allow pkg.* (" in caught.value.next_step


@pytest.mark.parametrize(
    "entry",
    ["builtins.eval", "os.system", "posix.system", "subprocess.Popen", "importlib.import_module",
     "operator.attrgetter",
     "torch.load", "torch.hub.load", "torch.fx.graph_module.reduce_graph_module", "torch._dynamo.disable",
     "functools.reduce", "torch.jit.load", "pickle.loads", "torch.storage._load_from_bytes",
     "nonsense", "a..", ":x"],
)  # fmt: skip
def test_allow_never_opens_a_way_to_run_code(entry: str) -> None:
    with pytest.raises(UsageError):
        user_allowance([entry])


def test_allow_of_a_script_without_a_class_says_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("class Net: pass")
    with pytest.raises(UsageError, match="names no class"):
        user_allowance([str(tmp_path / "net.py")])


def test_allow_looks_at_what_a_name_really_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disguised = types.ModuleType("disguised_pkg")
    disguised.run = __import__("os").system  # type: ignore[attr-defined]
    disguised.start = __import__("subprocess").Popen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "disguised_pkg", disguised)
    for attribute in ("run", "start"):
        with pytest.raises(UsageError, match="refused"):
            user_allowance([f"disguised_pkg.{attribute}"])


SCRIPT = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.conv(x)
print("imported")
"""


def _save_as_main(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python train.py` would save: a Net whose class is `__main__.Net`."""
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(SCRIPT, scope)
    monkeypatch.setattr(sys.modules["__main__"], "Net", scope["Net"], raising=False)
    torch.save(scope["Net"](), path)  # type: ignore[operator]
    monkeypatch.undo()


@pytest.mark.parametrize("form", ["bnt_train:Net", "bnt_train.py:Net"])
def test_a_class_of_main_comes_from_the_script_named(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _save_as_main(tmp_path / "net.pt", monkeypatch)
    (tmp_path / "bnt_train.py").write_text(SCRIPT)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    with pytest.raises(LoadError, match=r"__main__\.Net"):
        load("net.pt")
    try:
        for trust in (False, True):
            model = load("net.pt", allow=[form], trust_pickle=trust).model
            assert type(model).__module__ == "bnt_train"
            assert model(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 3, 3)
    finally:
        sys.modules.pop("bnt_train", None)
    assert sys.path == path_before
    assert capsys.readouterr().out == ""


def test_bntools_own_layers_need_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = types.ModuleType("bntool.layers")
    scope: dict[str, object] = {"__name__": "bntool.layers"}
    exec("from torch import nn\nclass Own(nn.Conv2d):\n    pass\ndef helper(): ...", scope)
    vars(layers).update(scope)
    monkeypatch.setitem(sys.modules, "bntool.layers", layers)
    torch.save(nn.Sequential(layers.Own(3, 4, 3)), tmp_path / "own.pt")
    assert type(load(tmp_path / "own.pt").model[0]) is layers.Own  # type: ignore[index]
    path = write_zip(tmp_path / "function.pt", pickled(name("bntool.layers.helper")))
    with pytest.raises(LoadError, match=r"bntool\.layers\.helper"):
        load(path)


def test_the_callers_own_safe_globals_survive(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.pt")
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([nn.Linear])
        load(tmp_path / "m.pt")
        assert nn.Linear in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_a_word_of_a_detectors_under_the_name_of_a_method_that_nobody_calls_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU())
    model[0].type = "torch.nn.modules.activation.ReLU"  # type: ignore[assignment]
    torch.save(model, tmp_path / "m.pt")
    assert load(tmp_path / "m.pt").model[0].type == "torch.nn.modules.activation.ReLU"
    model[0].type = nn.functional.relu  # type: ignore[assignment]
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"hides the method ReLU\.type"):
        load(tmp_path / "m.pt")


def test_honest_oddities_load(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    net.register_buffer("wide", torch.zeros(1).expand(1000))
    net[0].weight.tag = "a"  # type: ignore[union-attr]
    net[0].half()
    net.bias_bf16 = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    torch.save(net, tmp_path / "net.pt")
    back = load(tmp_path / "net.pt").model
    assert back.state_dict().keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
        assert back.state_dict()[key].dtype == value.dtype


def test_the_old_format_holds_weights_safely_and_a_module_only_in_trust(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    torch.save(net, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(LoadError, match="only weights"):
        load(tmp_path / "w.pth")
    with pytest.raises(LoadError, match="source code"):
        load(tmp_path / "m.pth")
    back = load(tmp_path / "m.pth", trust_pickle=True).model
    assert torch.equal(back.weight, net.weight)  # type: ignore[arg-type]


def test_optimizer_and_scheduler_state_are_no_obstacle(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    held = {
        "epoch": 3,
        "model": net,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    torch.save(held, tmp_path / "ckpt.pt")
    loaded = load(tmp_path / "ckpt.pt")
    assert loaded.kind == "checkpoint"
    assert any("optimizer state" in note for note in loaded.notes)
