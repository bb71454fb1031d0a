"""Rarer ways of writing the same graph: each folds, inserts and verifies like the plain one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from bntool.core.errors import LoadError
from bntool.files.inspecting import inspect_file
from bntool.files.onnx_files import open_onnx
from bntool.pipeline.onnx_folding import fold_onnx, insert_onnx
from tests.subjects.test_onnx_corners import CONV, NORM, RELU, nodes_of, stored

node, info = helper.make_node, helper.make_tensor_value_info
X = info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])
Y = info("y", TensorProto.FLOAT, None)
OPSET = helper.make_opsetid("", 17)


def model(nodes: list[Any], tensors: list[TensorProto], *more: Any, **options: Any) -> ModelProto:
    graph = helper.make_graph(nodes, "g", [X], [Y], tensors)
    options = {"opset_imports": [OPSET, *more], "ir_version": 8, **options}
    return helper.make_model(graph, **options)


def aliased() -> ModelProto:
    """Every node and the opset named `ai.onnx`, which the format says is the empty domain."""
    made = model([CONV, NORM, RELU], stored())
    made.opset_import[0].domain = "ai.onnx"
    for one in made.graph.node:
        one.domain = "ai.onnx"
    return made


def sparse_of(tensor: TensorProto, by_coordinates: bool) -> Any:
    array = numpy_helper.to_array(tensor)
    where = np.argwhere(array) if by_coordinates else np.flatnonzero(array)
    values = numpy_helper.from_array(array[array != 0], tensor.name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(where.astype(np.int64)), array.shape)


def with_sparse_weight() -> ModelProto:
    weight, *vectors = stored()
    made = model([CONV, NORM, RELU], vectors)
    made.graph.sparse_initializer.append(sparse_of(weight, by_coordinates=False))
    return made


def with_sparse_constant() -> ModelProto:
    weight, *vectors = stored()
    constant = node("Constant", [], ["W"], sparse_value=sparse_of(weight, by_coordinates=False))
    return model([constant, CONV, NORM, RELU], vectors)


def of_a_function() -> ModelProto:
    body = [node("Conv", ["a", "w"], ["c"]), node("BatchNormalization", ["c", *"gbmv"], ["d"])]
    block = helper.make_function("own", "Block", ["a", "w", *"gbmv"], ["d"], body, [OPSET])
    relu = helper.make_function("own", "relu", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [OPSET])
    nodes = [
        node("Block", ["x", "W", *"gbmv"], ["d"], domain="own"),
        node("relu", ["d"], ["y"], domain="own"),
    ]
    return model(nodes, stored(), helper.make_opsetid("own", 1), functions=[block, relu])


FORMS: list[Callable[[], ModelProto]] = [aliased, with_sparse_weight, with_sparse_constant, of_a_function]


@pytest.mark.parametrize("form", FORMS)
def test_a_rare_form_folds_and_takes_batch_norms_again(tmp_path: Path, form: Callable[[], Any]) -> None:
    onnx.save(form(), tmp_path / "m.onnx")
    result = fold_onnx(tmp_path / "m.onnx", tmp_path / "folded.onnx")
    assert not result.skips
    assert nodes_of(tmp_path / "folded.onnx") in (["Conv", "Relu"], ["Constant", "Conv", "Relu"])
    assert len(insert_onnx(tmp_path / "folded.onnx", tmp_path / "again.onnx").sites) == 1


def test_sparse_indices_may_be_coordinates(tmp_path: Path) -> None:
    matrix = numpy_helper.from_array(np.diag(np.arange(3, dtype=np.float32)), "W")
    made = model([node("Identity", ["W"], ["y"])], [])
    made.graph.sparse_initializer.append(sparse_of(matrix, by_coordinates=True))
    onnx.save(made, tmp_path / "m.onnx")
    found = open_onnx(tmp_path / "m.onnx").model.graph.initializers["W"].const_value
    assert found is not None
    assert np.array_equal(found.numpy(), numpy_helper.to_array(matrix))


# -- where files live -----------------------------------------------------------------------------------


def in_a_cache(folder: Path) -> Path:
    """Model and data as links into one folder of blobs, as the cache of a model hub keeps them."""
    blobs, shown = folder / "blobs", folder / "snapshots" / "1"
    blobs.mkdir()
    shown.mkdir(parents=True)
    onnx.save(
        model([CONV, NORM, RELU], stored()),
        blobs / "m",
        save_as_external_data=True,
        location="d",
        size_threshold=0,
    )
    made = onnx.load(blobs / "m", load_external_data=False)
    for tensor in made.graph.initializer:
        tensor.external_data[0].value = "m.onnx_data"
    onnx.save(made, blobs / "m")
    (shown / "m.onnx").symlink_to("../../blobs/m")
    (shown / "m.onnx_data").symlink_to("../../blobs/d")
    return shown / "m.onnx"


def test_a_model_of_a_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    path = in_a_cache(tmp_path)
    assert inspect_file(path).found.suspicious == []
    assert not fold_onnx(path, tmp_path / "folded.onnx").skips
    assert [p.name for p in path.parent.iterdir() if not p.is_symlink()] == []


@pytest.mark.parametrize("how", ["gone", "cut", "hard", "out"])
def test_one_sentence_tells_what_is_wrong_with_the_data(tmp_path: Path, how: str) -> None:
    made = model([CONV, NORM, RELU], stored())
    (tmp_path / "in").mkdir()
    path, data = tmp_path / "in" / "m.onnx", tmp_path / "in" / "sub" / "d"
    data.parent.mkdir()
    onnx.save(made, path, save_as_external_data=True, location="sub/d", size_threshold=0)
    assert not fold_onnx(path, tmp_path / "folded.onnx").skips
    if how == "hard":
        os.link(data, tmp_path / "second")
    elif how == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        data.rename(tmp_path / "elsewhere")
    if how == "out":
        data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadError) as folded:
        fold_onnx(path, tmp_path / "again.onnx")
    looked = inspect_file(path)
    assert looked.error is not None
    said = folded.value.what.removeprefix("m.onnx ")
    assert said.startswith("takes ")
    assert said in looked.error.what
