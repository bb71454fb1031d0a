"""Files of torch.export.save turned hostile, one part at a time. Every payload only makes a marker file."""

from __future__ import annotations

import copy
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.files.torch_files import call, pickled, text

PROGRAM = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
IMPORTED = "bntool_hostile_module"
"""A module that makes the marker when it is imported."""

Members = dict[str, bytes]
Attack = Callable[[Members, str], None]


class Small(nn.Module):
    """Convolution, BatchNorm, ReLU, a buffer, a buffer that is not saved, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.register_buffer("gain", torch.full((4, 1, 1), 1.5))
        self.register_buffer("offset", torch.full((1,), 0.25), persistent=False)
        self.constant = torch.arange(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))) * self.gain + self.offset + self.constant.sum()


def small_program(dynamic: bool = True) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    model = Small().eval()
    model.bn.running_mean = torch.randn(4)
    model.bn.running_var = torch.rand(4) + 0.5
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)


def saved(program: torch.export.ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def members_of(content: bytes) -> Members:
    """Every member of an archive, without its root folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: Members, root: str = "archive/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(root + name, content)
    return path


def old_members(program: torch.export.ExportedProgram) -> Members:
    """What PyTorch up to 2.7 wrote: four members and a version, in no folder."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    artifact = serialize(program)
    return {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": artifact.exported_program,
        "serialized_state_dict.pt": artifact.state_dict,
        "serialized_constants.pt": artifact.constants,
        "serialized_example_inputs.pt": artifact.example_inputs,
    }


def touch(marker: str) -> str:
    return f"open('{marker}', 'w').close()"


def torch_zip(marker: str, **extra: bytes) -> bytes:
    """A file of torch.save whose pickle calls exec."""
    content = io.BytesIO()
    structure = pickled(call("builtins.exec", text(touch(marker))))
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in {"data.pkl": structure, "byteorder": b"little", "version": b"3\n", **extra}.items():
            archive.writestr(f"archive/{name}", part)
    return content.getvalue()


def _edit(member: str, change: Callable[[Any, str], None]) -> Attack:
    def attack(members: Members, marker: str) -> None:
        document = json.loads(members[member])
        change(document, marker)
        members[member] = json.dumps(document).encode()

    return attack


def _program(change: Callable[[Any, str], None]) -> Attack:
    return _edit(PROGRAM, change)


def _put(member: str, content: Callable[[str], bytes]) -> Attack:
    def attack(members: Members, marker: str) -> None:
        members[member] = content(marker)

    return attack


def _pickled_entry(table: str, folder: str, path_name: str, content: Callable[[str], bytes]) -> Attack:
    """The first tensor of a table becomes a pickle."""

    def attack(members: Members, marker: str) -> None:
        document = json.loads(members[table])
        entry = next(iter(document["config"].values()))
        entry.update(use_pickle=True, path_name=path_name)
        members[table] = json.dumps(document).encode()
        members[folder + path_name] = content(marker)

    return attack


def _size(expression: Callable[[str], str]) -> Attack:
    def change(document: Any, marker: str) -> None:
        for meta in document["graph_module"]["graph"]["tensor_values"].values():
            meta["sizes"][:1] = [{"as_expr": {"expr_str": expression(marker), "hint": {"as_int": 2}}}]

    return _program(change)


def _first_signature(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def _in_spec(context: Any, kind: str) -> Attack:
    def change(document: Any, marker: str) -> None:
        spec = json.loads(_first_signature(document)["out_spec"])
        spec[1] = {"type": kind, "context": context, "children_spec": [spec[1]]}
        _first_signature(document)["out_spec"] = json.dumps(spec)

    return _program(change)


def _target(target: str) -> Attack:
    def change(document: Any, marker: str) -> None:
        document["graph_module"]["graph"]["nodes"][-1]["target"] = target

    return _program(change)


def _renamed(old: str, new: Callable[[str], str]) -> Attack:
    """One text of the program, wherever it stands, becomes another."""

    def swap(value: Any, marker: str) -> Any:
        if isinstance(value, dict):
            return {swap(k, marker): swap(v, marker) for k, v in value.items()}
        if isinstance(value, list):
            return [swap(v, marker) for v in value]
        return new(marker) if value == old else value

    def attack(members: Members, marker: str) -> None:
        for member in (PROGRAM, WEIGHTS, CONSTANTS):
            members[member] = json.dumps(swap(json.loads(members[member]), marker)).encode()

    return attack


def _guard(code: Callable[[str], str]) -> Attack:
    return _program(lambda document, marker: document.update(guards_code=[code(marker)]))


def _meta(table: str, **changes: Any) -> Attack:
    def change(document: Any, marker: str) -> None:
        next(iter(document["config"].values()))["tensor_meta"].update(copy.deepcopy(changes))

    return _edit(table, change)


def _many_views(document: Any, marker: str) -> None:
    name, entry = next(iter(document["config"].items()))
    sizes = {"sizes": [{"as_int": 1 << 25}], "strides": [{"as_int": 0}]}
    entry["tensor_meta"].update(sizes)
    document["config"].update({f"{name}{i}": copy.deepcopy(entry) for i in range(9)})


def _argument_names(document: Any, marker: str) -> None:
    _first_signature(document)["forward_arg_names"] = [f"x=exec({touch(marker)!r})"]


def _keyword(document: Any, marker: str) -> None:
    signature = _first_signature(document)
    signature["forward_arg_names"] = None
    spec = json.loads(signature["in_spec"])
    positional, keywords = spec[1]["children_spec"]
    keywords.update(context=json.dumps([f"x=exec({touch(marker)!r})"]))
    keywords["children_spec"] = positional["children_spec"]
    positional["children_spec"] = []
    signature["in_spec"] = json.dumps(spec)


def _custom_input(document: Any, marker: str) -> None:
    argument = {"name": "thing", "class_fqn": "__torch__.torch.classes.quantized.Conv2dPackedParamsBase"}
    document["graph_module"]["graph"]["inputs"].append({"as_custom_obj": argument})


def _custom_value(document: Any, marker: str) -> None:
    document["graph_module"]["graph"]["custom_obj_values"] = {"thing": {"name": "thing", "class_fqn": "a.B"}}


def _looked_up(document: Any, marker: str) -> None:
    document["graph_module"]["graph"]["nodes"][0]["metadata"]["source_fn_stack"] = "a,torch.__loader__"


def _quoted_input_key(marker: str) -> bytes:
    content = io.BytesIO()
    torch.save((({"a'\"": torch.randn(2)},), {}), content)
    return content.getvalue()


IMPORT = {"default_factory_module": IMPORTED, "default_factory_name": "make", "dict_context": []}
ENUM = json.dumps([{"__enum__": True, "fqn": f"{IMPORTED}:Kind", "name": "ONE"}])
FIRST_TENSOR = "weight_0"

# Those that work at load, or when the program runs, where nothing stops them.
LIVE: dict[str, Attack] = {
    "weights-pickle": _pickled_entry(WEIGHTS, "data/weights/", "weight_0", torch_zip),
    "constants-pickle": _pickled_entry(CONSTANTS, "data/constants/", "tensor_0", torch_zip),
    "inputs-pickle": _put(INPUTS, torch_zip),
    "inputs-bare-pickle": _put(INPUTS, lambda m: pickled(call("builtins.exec", text(touch(m))))),
    "weights-of-2.7": _put("data/weights/model.pt", torch_zip),
    "constants-of-2.7": _put("data/constants/model.pt", torch_zip),
    "size-exec": _size(lambda m: f"exec({touch(m)!r})"),
    "size-import": _size(lambda m: f"__import__('{IMPORTED}')"),
    "guard-open": _guard(lambda m: f"open('{m}', 'w')"),
    "guard-torch": _guard(lambda m: f"torch.os.open('{m}', 65)"),
    "container-import": _in_spec(IMPORT, "collections.defaultdict"),
    "container-enum": _in_spec(ENUM, "builtins.dict"),
    "weight-name": _renamed("conv.weight", lambda m: f"conv.training\") and open('{m}', 'w') or (\""),
}

DEAD: dict[str, Attack] = {
    "value-name": _renamed("relu", lambda m: f"globals()[open('{m}', 'w') and 'relu']"),
    "argument-name": _program(_argument_names),
    "keyword-name": _program(_keyword),
    "custom-object": _pickled_entry(CONSTANTS, "data/constants/", "custom_obj_0", torch_zip),
    "opaque-object": _pickled_entry(CONSTANTS, "data/constants/", "opaque_obj_0", torch_zip),
    "custom-input": _program(_custom_input),
    "custom-value": _program(_custom_value),
    "torchscript-inside": _put(INPUTS, lambda m: torch_zip(m, **{"constants.pkl": b"\x80\x02)."})),
    "size-attribute": _size(lambda m: "(1).__class__.__mro__"),
    "size-power": _size(lambda m: "9**9**9**9**9"),
    "size-shift": _size(lambda m: "LShift(Integer(1), Integer(100000000000))"),
    "guard-quote": _guard(lambda m: "L['''x'or'y''']"),
    "operator-os": _target("torch.os.system"),
    "operator-hub": _target("torch.hub.load"),
    "operator-getter": _target("_operator.attrgetter"),
    "operator-extension": _target("#executorch:make"),
    "operator-file": _target("torch.ops.aten.from_file.default"),
    "operator-save": _target("torch.ops.aten.save.default"),
    "operator-library": _target("torch.ops.load_library"),
    "operator-higher-order": _target("torch.ops.higher_order.triton_kernel_wrapper_mutation"),
    "operator-unknown": _target("torch.ops.mylib.thing.default"),
    "metadata-lookup": _program(_looked_up),
    "input-key": _put(INPUTS, _quoted_input_key),
    "member-elsewhere": _edit(
        WEIGHTS, lambda d, m: next(iter(d["config"].values())).update(path_name="../models/model.json")
    ),
    "tensor-past-end": _meta(WEIGHTS, storage_offset={"as_int": 1}),
    "tensor-huge": _meta(
        WEIGHTS, sizes=[{"as_int": 1 << 20}] * 4, strides=[{"as_int": 0}] * 4, storage_offset={"as_int": 0}
    ),
    "tensors-huge-together": _edit(WEIGHTS, _many_views),
    "tensor-negative": _meta(WEIGHTS, strides=[{"as_int": -1}] * 4),
    "tensor-symbolic": _meta(WEIGHTS, sizes=[{"as_expr": {"expr_str": "exec('1')", "hint": None}}] * 4),
    "two-programs": lambda members, marker: members.update({"models/other.json": members[PROGRAM]}),
    "member-upwards": lambda members, marker: members.update({"../../evil": b""}),
    "compiled": lambda members, marker: members.update({"data/aotinductor/model/a.so": b""}),
}


def bombed(path: Path, members: Members) -> None:
    """64 MiB of zeros in 64 KiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, "data/weights/weight_0": bytes(1 << 26)}.items():
            archive.writestr(f"archive/{name}", content)


def doubled(path: Path, members: Members) -> None:
    """Two programs of one name: torch reads the first, Python the last."""
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in [*members.items(), (PROGRAM, members[PROGRAM])]:
            archive.writestr(f"archive/{name}", content)


def flipped(path: Path, members: Members) -> None:
    """One bit of a weight is not what it was."""
    write(path, members)
    content = bytearray(path.read_bytes())
    content[content.index(members["data/weights/weight_0"]) + 5] ^= 1
    path.write_bytes(content)


def cut(path: Path, members: Members) -> None:
    write(path, members)
    path.write_bytes(path.read_bytes()[:-200])


def folderless(path: Path, members: Members) -> None:
    """Today's format with one member outside: torch fails on it and tries the older format."""
    write(path, members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("version", "8.20")


ARCHIVES = {f.__name__: f for f in (bombed, doubled, flipped, cut, folderless)}
OLD = ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
