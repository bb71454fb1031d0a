"""ONNX files: what is refused and why, and what is where after saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bntool.core.errors import LoadError, UsageError
from bntool.files import onnx_files
from bntool.files.onnx_files import open_onnx, save_onnx
from bntool.pipeline.onnx_folding import fold_onnx
from tests.onnx_zoo import ONNX_ZOO

ZOO = {net.name: net for net in ONNX_ZOO}


def model(name: str = "conv_bias") -> onnx.ModelProto:
    return ZOO[name].model()


def saved(tmp_path: Path, name: str = "conv_bias", *, external: bool = False) -> Path:
    path = tmp_path / "model.onnx"
    if external:
        onnx.save(model(name), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    else:
        onnx.save(model(name), path)
    return path


def places(path: Path) -> dict[str, str]:
    """The file each initializer is in; empty for the model file itself."""
    proto = onnx.load(path, load_external_data=False)
    return {
        t.name: next((e.value for e in t.external_data if e.key == "location"), "")
        for t in proto.graph.initializer
    }


def assert_nothing_left(folder: Path, *expected: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"hello, this is a text", "text file"),
        (b"\x80\x04}q\x00.", "pickle"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_what_is_not_onnx_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=words) as caught:
        open_onnx(path)
    assert caught.value.exit_code == 3


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        open_onnx(tmp_path / "none.onnx")


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LoadError):
        open_onnx(path)


def _proto(nodes: list[onnx.NodeProto], opset: int = 17) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info("x", 1, [2])], [info("y", 1, [2])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    "nodes",
    [
        [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Relu", ["b"], ["y"]),
        ],
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Relu", ["a"], ["y"]),
        ],
        [helper.make_node("Relu", ["nowhere"], ["y"])],
        [helper.make_node("NoSuchOp", ["x"], ["y"])],
        [helper.make_node("Relu", ["x", "x"], ["y"])],
    ],
    ids=["cyclic", "twice the same name", "reads what is not there", "unknown op", "wrong number of inputs"],
)
def test_an_invalid_graph_is_refused_and_nothing_written(tmp_path: Path, nodes: list[onnx.NodeProto]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_proto(nodes).SerializeToString())
    with pytest.raises(LoadError, match="not valid ONNX") as caught:
        fold_onnx(path, tmp_path / "out.onnx")
    assert caught.value.where == str(path)
    assert_nothing_left(tmp_path, "model.onnx")


def test_outputs_without_a_shape_are_taken_and_left_so(tmp_path: Path) -> None:
    proto = model()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    assert fold_onnx(path, tmp_path / "out.onnx").modified
    assert not onnx.load(tmp_path / "out.onnx").graph.output[0].type.tensor_type.HasField("shape")


def test_a_cycle_is_seen_where_outputs_have_no_shape(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["y"]), helper.make_node("Relu", ["y"], ["b"])]
    proto = _proto(nodes)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="not valid ONNX"):
        open_onnx(tmp_path / "model.onnx")


# -- external data --------------------------------------------------------------------------------------


def test_missing_external_data(tmp_path: Path) -> None:
    path = saved(tmp_path, external=True)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(LoadError, match=r"a file that is not there: weights") as caught:
        fold_onnx(path, tmp_path / "out.onnx")
    assert caught.value.exit_code == 3
    assert_nothing_left(tmp_path, "model.onnx")


def test_external_data_cut_short(tmp_path: Path) -> None:
    path = saved(tmp_path, external=True)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(LoadError, match="ends at"):
        open_onnx(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../b", "C:\\weights.bin", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    path = saved(tmp_path, external=True)
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="outside its folder"):
        open_onnx(path)


def test_external_data_stays_external_and_the_rest_inside(tmp_path: Path) -> None:
    path = saved(tmp_path, external=True)
    data = (tmp_path / "weights.bin").read_bytes()
    result = fold_onnx(path, tmp_path / "out.onnx")
    assert result.data_path == tmp_path / "out.onnx.data"
    assert places(path) == {
        "w": "weights.bin",
        "b": "",
        "y.weight": "",
        "y.bias": "",
        "y.mean": "",
        "y.var": "",
    }
    assert places(result.path or path) == {"w": "out.onnx.data", "b": ""}
    assert (tmp_path / "weights.bin").read_bytes() == data
    inside = fold_onnx(saved(tmp_path), tmp_path / "inside.onnx")
    assert inside.data_path is None
    numbers = [_numbers(p) for p in (tmp_path / "out.onnx", tmp_path / "inside.onnx")]
    assert all(np.array_equal(numbers[0][name], numbers[1][name]) for name in ("w", "b"))
    assert_nothing_left(tmp_path, "model.onnx", "weights.bin", "out.onnx", "out.onnx.data", "inside.onnx")


def test_old_data_goes_also_after_ctrl_c_between_the_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, external=True)
    fold_onnx(path, tmp_path / "out.onnx")

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("bntool.files.drafting.remove_unnamed", pressed)
        with pytest.raises(KeyboardInterrupt):
            fold_onnx(path, tmp_path / "out.onnx", force=True)
    assert places(tmp_path / "out.onnx")["w"] == "out.onnx.data.1"
    assert_nothing_left(tmp_path, "model.onnx", "weights.bin", "out.onnx", "out.onnx.data.1")


def _numbers(path: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_external_tensors_of_nodes_and_bodies_move_along(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    n (float[2,4,8,8] x, bool f) => (float[6] z, float[2,6,8,8] y) {
        c = Conv(x, w)
        y = BatchNormalization(c, g, h, m, v)
        z = If(f) <then_branch = t () => (float[6] p) { p = Constant<value = float[6] {1,2,3,4,5,6}>() },
                   else_branch = e () => (float[6] q) { q = Constant<value = float[6] {6,5,4,3,2,1}>() }>
    }"""
    proto = onnx.parser.parse_model(text)
    for branch in proto.graph.node[2].attribute:
        tensor = branch.g.node[0].attribute[0].t
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)))  # only raw bytes can move out
    stored = model()
    arrays = [numpy_helper.from_array(np.ones((6, 4, 1, 1), np.float32), "w")]
    arrays += [t for t in stored.graph.initializer if t.name.startswith("y.")]
    for tensor, name in zip(arrays, ("w", "g", "h", "m", "v"), strict=True):
        tensor.name = name
        proto.graph.initializer.append(tensor)
    path = tmp_path / "model.onnx"
    onnx.save(
        proto, path, save_as_external_data=True, location="all.bin", size_threshold=0, convert_attribute=True
    )
    expected = onnx.load(path).graph.node[2].attribute[0].g.node[0].attribute[0].t
    result = fold_onnx(path, tmp_path / "out.onnx")
    assert result.modified
    after = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    tensor = after.graph.node[1].attribute[0].g.node[0].attribute[0].t
    assert tensor.data_location == onnx.TensorProto.EXTERNAL
    loaded = onnx.load(tmp_path / "out.onnx").graph.node[1].attribute[0].g.node[0].attribute[0].t
    assert np.array_equal(numpy_helper.to_array(loaded), numpy_helper.to_array(expected))


def test_a_model_too_large_for_one_file_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "SINGLE_FILE_LIMIT", 500)
    monkeypatch.setattr(onnx_files, "_SMALL", 100)
    result = fold_onnx(saved(tmp_path), tmp_path / "out.onnx")
    assert result.path is not None
    assert places(result.path) == {"w": "out.onnx.data", "b": ""}
    onnx.checker.check_model(str(result.path), full_check=True)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, "decomposed_then_batch_norm", external=True)
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        fold_onnx(path, folder / "out.onnx")
    for name in ("out.onnx", "out.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# -- outputs --------------------------------------------------------------------------------------------


def test_the_input_is_never_written_to(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for output in (path, tmp_path / "." / "model.onnx"):
        with pytest.raises(UsageError, match="is the input itself"):
            fold_onnx(path, output, force=True)
    assert path.read_bytes() == content


def test_the_data_of_the_input_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="out.onnx.data", size_threshold=100)
    content = (tmp_path / "out.onnx.data").read_bytes()
    assert fold_onnx(path, tmp_path / "out.onnx").data_path == tmp_path / "out.onnx.data.1"
    assert (tmp_path / "out.onnx.data").read_bytes() == content
    assert_nothing_left(tmp_path, "model.onnx", "out.onnx", "out.onnx.data", "out.onnx.data.1")
    with pytest.raises(UsageError, match="is the input itself"):
        fold_onnx(path, tmp_path / "out.onnx.data", force=True)
    assert (tmp_path / "out.onnx.data").read_bytes() == content


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    path, output = saved(tmp_path), tmp_path / "out.onnx"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        fold_onnx(path, output)
    assert output.read_text() == "mine"
    assert fold_onnx(path, output, force=True).path == output
    assert len(onnx.load(output).graph.node) == 1


def test_saving_leaves_the_model_in_memory_as_it_was(tmp_path: Path) -> None:
    file = open_onnx(saved(tmp_path, external=True))
    first, _ = save_onnx(file, tmp_path / "first.onnx")
    second, data = save_onnx(file, tmp_path / "second.onnx")
    assert data is not None
    assert places(first)["w"] == "first.onnx.data"
    assert all(
        np.array_equal(a, b) for a, b in zip(_numbers(first).values(), _numbers(second).values(), strict=True)
    )
