from __future__ import annotations

import ctypes
import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of_torch

from bntool.core.errors import ObserveError
from bntool.graph.dataflow import Graph, Op
from bntool.graph.inputs import Inputs
from bntool.observe.aliasing import MARK
from bntool.observe.eager import Observation, observe

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.written = forward
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.written(self, *args, **kwargs)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3)


def look(model: nn.Module, *args: Any) -> Observation:
    return observe(model.eval(), Inputs(args or (X,)))


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops]


def only(graph: Graph, kind: str) -> Op:
    (op,) = graph.of_kind(kind)
    return op


def readers(graph: Graph, op: Op) -> list[str]:
    return [graph.ops[reader].kind for reader, _ in graph.output(op).readers]


# -- the graph ------------------------------------------------------------------------------------------


def test_ops_values_and_scopes_of_a_small_model() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    graph = look(model).graph
    assert kinds(graph) == ["conv", "batch_norm", "relu", "flatten", "linear"]
    assert [op.scope for op in graph.ops] == ["0", "1", "2", "3", "4"]
    for earlier, later in zip(graph.ops, graph.ops[1:], strict=False):
        assert graph.input(later).id == earlier.outputs[0]
        assert graph.producer(graph.input(later)) is earlier
        assert graph.output(earlier).readers == [(later.id, "input")]
    assert graph.input(graph.ops[0], "weight").handle == "0.weight"
    assert graph.input(graph.ops[1], "running_var").handle == "1.running_var"
    assert [graph.output(op).shape for op in graph.ops][-1] == (2, 2)
    assert graph.output(graph.ops[-1]).is_output
    assert [v.is_output for v in graph.values].count(True) == 1
    assert graph.modules["0"].role == "conv"
    assert graph.modules[""].whole == [[0, 1, 2, 3, 4]]
    assert graph.signature() == {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_the_output_and_the_inputs_are_those_of_the_model() -> None:
    model = Net(lambda s, x: F.relu(s.conv(x.mul_(2))), conv=conv())
    seen = look(model)
    assert torch.equal(seen.output, F.relu(model.conv(X * 2)))
    assert seen.inputs.args[0] is X


def test_a_forward_that_writes_to_its_input_does_not_reach_the_callers() -> None:
    before = X.clone()
    look(Net(lambda s, x: s.conv(x.zero_()), conv=conv()))
    assert torch.equal(X, before)


def test_nested_and_keyword_inputs_are_inputs() -> None:
    model = Net(lambda s, pair, *, scale: s.conv(pair["a"][0]) * scale, conv=conv())
    graph = observe(model.eval(), Inputs(({"a": [X]},), {"scale": torch.ones(())})).graph
    assert not graph.input(only(graph, "conv")).constant
    assert not graph.input(only(graph, "mul"), "other").constant


def test_what_runs_inside_train_mode_only_is_not_seen() -> None:
    model = Net(lambda s, x: s.conv(F.dropout(x, 0.5, s.training)), conv=conv())
    assert kinds(observe(model.train(), Inputs((X,))).graph) == ["conv"]
    assert model.training


# -- in place, views ------------------------------------------------------------------------------------


def test_an_inplace_op_makes_a_new_value() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        y.relu_()
        y += 1
        return y * 2

    graph = look(Net(forward, conv=conv())).graph
    assert kinds(graph) == ["conv", "relu", "add", "mul"]
    assert [op.inplace for op in graph.ops] == [False, True, True, False]
    assert readers(graph, graph.ops[0]) == ["relu"]
    assert readers(graph, graph.ops[1]) == ["add"]


def test_writing_to_a_view_changes_what_the_whole_holds() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        y[:, 1:].relu_()
        return s.head(y)

    graph = look(Net(forward, conv=conv(), head=nn.Conv2d(4, 1, 1))).graph
    first, head = graph.of_kind("conv")
    source = graph.producer(graph.input(head))
    assert source is not None
    assert source.kind == "overwritten_view"
    assert readers(graph, only(graph, "relu")) == ["overwritten_view"]
    assert sorted(readers(graph, first)) == ["overwritten_view", "slice"]


def test_writing_to_the_whole_changes_what_a_view_holds() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        flat = y.view(2, -1)
        y.relu_()
        return flat.sum()

    graph = look(Net(forward, conv=conv())).graph
    source = graph.producer(graph.input(only(graph, "sum")))
    assert source is not None
    assert source.kind == "overwritten_view"


def test_a_value_is_found_again_behind_a_detached_tensor() -> None:
    graph = look(Net(lambda s, x: F.relu(s.conv(x).detach().data), conv=conv())).graph
    source = graph.producer(graph.input(only(graph, "relu")))
    assert source is not None
    assert source.kind in ("conv", "identity")


def test_an_op_that_writes_to_a_list_makes_new_values() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        torch._foreach_mul_([y], 2.0)
        return F.relu(y)

    graph = look(Net(forward, conv=conv())).graph
    assert readers(graph, only(graph, "conv")) == ["_foreach_mul"]


def test_out_arguments_are_written() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        target = torch.empty_like(y)
        torch.add(y, 1, out=target)
        return F.relu(target)

    graph = look(Net(forward, conv=conv())).graph
    source = graph.producer(graph.input(only(graph, "relu")))
    assert source is not None
    assert source.kind == "add"


def test_reading_the_shape_alone_is_no_reading() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        noise = torch.zeros_like(y) + y.new_ones(y.size())
        return F.relu(y) + noise

    graph = look(Net(forward, conv=conv())).graph
    assert readers(graph, only(graph, "conv")) == ["relu"]


# -- constants ------------------------------------------------------------------------------------------


def _constant_factor(graph: Graph) -> Tensor | None:
    value = graph.input(only(graph, "mul"), "other")
    return graph.constant(value) if value.constant else None


def test_a_constant_made_in_the_forward_keeps_its_numbers() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        factor = torch.full((1, 4, 1, 1), 2.0)
        y = s.conv(x) * factor
        factor.zero_()
        return y

    factor = _constant_factor(look(Net(forward, conv=conv())).graph)
    assert factor is not None
    assert torch.equal(factor, torch.full((1, 4, 1, 1), 2.0))


def test_a_buffer_changed_before_use_has_the_numbers_it_was_used_with() -> None:
    model = Net(lambda s, x: s.conv(x) * s.scale.add_(4), conv=conv(), scale=torch.full((1, 4, 1, 1), 2.0))
    factor = _constant_factor(look(model).graph)
    assert factor is not None
    assert torch.equal(factor, torch.full((1, 4, 1, 1), 6.0))
    assert torch.equal(model.scale, torch.full((1, 4, 1, 1), 2.0))


@pytest.mark.parametrize(
    "noise",
    [
        lambda y: torch.rand(1, 4, 1, 1),
        torch.randn_like,
        lambda y: torch.ones(1, 4, 1, 1).uniform_(),
        lambda y: torch.bernoulli(torch.full((1, 4, 1, 1), 0.5)),
        lambda y: F.dropout(torch.ones(1, 4, 1, 1), 0.5, True),
    ],
)
def test_random_numbers_are_not_constants(noise: Callable[[Tensor], Tensor]) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return y * noise(y)

    assert _constant_factor(look(Net(forward, conv=conv())).graph) is None


def test_a_buffer_written_from_the_data_is_no_constant() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.scale[0] = x.mean()
        return s.conv(x) * s.scale

    model = Net(forward, conv=conv(), scale=torch.ones(1, 4, 1, 1))
    assert _constant_factor(look(model).graph) is None
    assert torch.equal(model.scale, torch.ones(1, 4, 1, 1))


def test_a_number_read_from_the_data_is_no_constant() -> None:
    graph = look(Net(lambda s, x: s.conv(x) * x.abs().max().item(), conv=conv())).graph
    assert only(graph, "mul").attrs["number"] is None
    graph = look(Net(lambda s, x: s.conv(x) * torch.tensor(float(x.max())), conv=conv())).graph
    assert _constant_factor(graph) is None
    graph = look(Net(lambda s, x: s.conv(x) * 3, conv=conv())).graph
    assert only(graph, "mul").attrs["number"] == 3.0


@pytest.mark.parametrize(
    "read",
    [
        lambda m: torch.tensor(m.tolist()),
        lambda m: torch.from_numpy(m.numpy() * 2),
        lambda m: torch.as_tensor(np.asarray(m)),
    ],
)
def test_numbers_that_python_is_handed_as_a_list_or_an_array_are_no_constants(
    read: Callable[[Tensor], Tensor],
) -> None:
    model = Net(lambda s, x: s.conv(x) * read(x.mean((0, 1, 2, 3), keepdim=True)), conv=conv())
    graph = look(model).graph
    assert graph.reads_numbers
    assert _constant_factor(graph) is None


def _large(m: Tensor) -> Tensor:
    return m > 0.5


@pytest.mark.parametrize(
    "decides",
    [
        lambda m: bool(_large(m.max())),
        lambda m: bool(_large(m).all()),
        lambda m: torch.equal(m, torch.ones_like(m)),
        lambda m: torch.allclose(m, torch.ones_like(m)),
        lambda m: len(_large(m).nonzero()) > 0,
        lambda m: len(torch.argwhere(_large(m))) > 0,
        lambda m: len(m[_large(m)]) > 0,
        lambda m: len(m.masked_select(_large(m))) > 0,
        lambda m: len(m.unique()) > 1,
        lambda m: len(torch.unique_consecutive(m)) > 1,
        lambda m: str(m) == "1",
        lambda m: "1" in repr(m),
        lambda m: float(np.from_dlpack(m)[0]) > 1,
        lambda m: float(torch.from_dlpack(m).numpy()[0]) > 1,
        lambda m: len(torch.where(_large(m))[0]) > 0,
        lambda m: m.to_sparse()._nnz() > 0,
        lambda m: torch.nn.functional.one_hot(m.abs().long()).shape[-1] > 1,
        lambda m: len(m.tensor_split(m.long().abs()[:1])[0]) > 1,
        lambda m: m.untyped_storage()[3] > 1,
        lambda m: bytes(m.untyped_storage())[3] > 1,
        lambda m: m.storage()[0] > 1,
        lambda m: m.storage().tolist()[0] > 1,
        lambda m: ctypes.c_float.from_address(m.data_ptr()).value > 1,
        lambda m: bool(m.clone().apply_(lambda number: number)[0].shape),
        lambda m: bool(m.clone().map_(m, lambda a, b: a)[0].shape),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_branch_on_a_tensor_reads_its_numbers(decides: Callable[[Tensor], bool]) -> None:
    """What it decides may be another number for another input: a constant factor it is not."""
    model = Net(lambda s, x: s.conv(x) * (2.0 if decides(x.amax((1, 2, 3))) else 3.0), conv=conv())
    graph = look(model).graph
    assert graph.reads_numbers
    assert only(graph, "mul").attrs["number"] is None


@pytest.mark.parametrize("taken", [True, False])
def test_of_a_branch_of_torch_cond_the_one_that_is_taken_is_seen(taken: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        branches = (lambda y: net.conv(y).relu(), lambda y: net.conv(y).sigmoid())
        return torch.cond(x.max() > (-1e9 if taken else 1e9), *branches, (x,))

    graph = look(Net(forward, conv=conv())).graph
    assert graph.reads_numbers
    assert [op.kind for op in graph.ops if op.kind in ("conv", "relu", "sigmoid")] == [
        "conv",
        "relu" if taken else "sigmoid",
    ]
    assert graph.values[next(graph.of_kind("conv")).inputs["weight"]].handle == "conv.weight"


def test_an_operator_that_is_given_functions_is_an_op_as_others_are() -> None:
    from torch._higher_order_ops import map as mapped

    graph = look(Net(lambda s, x: mapped(lambda row: row * 2.0, s.conv(x)), conv=conv())).graph
    conv_op, map_op = (op for op in graph.ops if op.kind in ("conv", "map_impl"))
    assert conv_op.outputs[0] in map_op.inputs.values()


def test_a_mask_or_an_index_that_does_not_come_from_the_data_reads_nothing() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) > 0
        kept = len(mask.nonzero()) + len(x[:, mask]) + len(x.masked_select(mask[:, None, None]))
        return net.conv(x[torch.arange(len(x))]) * (2.0 if kept else 3.0)

    graph = look(Net(forward, conv=conv())).graph
    assert not graph.reads_numbers
    assert only(graph, "mul").attrs["number"] == 2.0


# -- modules --------------------------------------------------------------------------------------------


def test_calls_are_counted_and_told_apart() -> None:
    graph = look(Net(lambda s, x: s.conv(x) + s.conv(x * 2), conv=conv())).graph
    assert graph.modules["conv"].calls == 2
    assert [op.call for op in graph.of_kind("conv")] == [0, 1]
    assert graph.modules["conv"].whole == [[0], [2]]


def test_a_module_under_two_names_is_one_module() -> None:
    shared = conv()
    model = Net(lambda s, x: s.b(x), a=shared, b=shared)
    graph = look(model).graph
    assert [op.scope for op in graph.ops] == ["a"]
    assert graph.aliases == {"a": ["b"], "a.weight": ["b.weight"], "a.bias": ["b.bias"]}
    assert set(graph.modules) == {"", "a"}


def test_identities_hand_values_on() -> None:
    model = nn.Sequential(conv(), nn.Identity(), nn.Dropout(), nn.Sequential(nn.Identity()), nn.ReLU()).eval()
    graph = look(model).graph
    assert kinds(graph) == ["conv", "relu"]
    assert graph.output(graph.ops[0]).through == ["1", "2", "3.0", "3"]


class _Pair(nn.Module):
    def forward(self, first: Tensor, second: list[Tensor]) -> Tensor:
        return first.relu() + second[0].relu()


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_hook_watches_every_input_and_output(by_keyword: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        first, second = s.a(x), s.b(x)
        return s.pair(first=first, second=[second]) if by_keyword else s.pair(first, [second])

    model = Net(forward, a=conv(), b=conv(), pair=_Pair())
    assert all(not v.watched for v in look(model).graph.values)
    model.pair.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    graph = look(model).graph
    watched = {op.scope: graph.output(op).watched for op in graph.ops if graph.output(op).watched}
    assert watched == {"a": ["pair"], "b": ["pair"], "pair": ["pair"]}
    assert graph.modules["pair"].hooked


def test_a_hook_that_changes_the_output_is_seen_as_an_op() -> None:
    model = nn.Sequential(conv(), nn.ReLU())
    model[0].register_forward_hook(lambda m, a, out: out * 2)
    graph = look(model).graph
    assert kinds(graph) == ["conv", "mul", "relu"]
    assert graph.output(graph.ops[0]).watched == ["0"]


def test_scripted_modules_are_seen_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        body = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval())
    graph = look(nn.Sequential(conv(), body)).graph
    assert [k for k in kinds(graph) if k in ("conv", "batch_norm", "relu")] == [
        "conv",
        "conv",
        "batch_norm",
        "relu",
    ]
    assert {graph.modules[n].role for n in ("1", "1.0", "1.1")} == {"scripted"}
    assert {op.scope for op in graph.ops} == {"0", "1"}


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_frozen_norm_is_one_op(package: str) -> None:
    if package == "torchvision":
        from torchvision.ops import FrozenBatchNorm2d as Frozen
    else:
        from timm.layers import FrozenBatchNormAct2d as Frozen
    graph = look(nn.Sequential(conv(), Frozen(4), nn.Conv2d(4, 2, 1)).eval()).graph
    assert [k for k in kinds(graph) if k not in ("relu", "identity")] == ["conv", "batch_norm", "conv"]
    op = only(graph, "batch_norm")
    assert [graph.input(op, r).handle for r in ("weight", "running_mean")] == ["1.weight", "1.running_mean"]
    for item in graph.ops:
        for role, value in item.inputs.items():
            assert (item.id, role) in graph.values[value].readers
    for value in graph.values:
        assert all(graph.ops[reader].inputs[role] == value.id for reader, role in value.readers)


def test_writing_to_a_view_of_the_input_changes_what_the_input_holds() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x[:, 1:].relu_()
        return s.conv(x)

    graph = look(Net(forward, conv=conv())).graph
    source = graph.producer(graph.input(only(graph, "conv")))
    assert source is not None
    assert source.kind == "overwritten_view"


# -- escapes --------------------------------------------------------------------------------------------

_SEEN: list[Tensor] = []


def _escaping(graph: Graph) -> bool:
    return graph.output(next(graph.of_kind("conv"))).escapes


def test_a_value_kept_on_self_escapes() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.cache = s.conv(x)
        return F.relu(s.cache)

    assert _escaping(look(Net(forward, conv=conv())).graph)


def test_a_view_kept_on_self_escapes_with_what_is_written_to_it_later() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        s.seen = y.view(-1)
        y.relu_()
        return y * 2

    graph = look(Net(forward, conv=conv())).graph
    assert graph.output(only(graph, "overwritten_view")).escapes


def test_a_value_kept_in_a_global_escapes() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        _SEEN.append(s.conv(x))
        return F.relu(_SEEN[-1])

    try:
        assert _escaping(look(Net(forward, conv=conv())).graph)
    finally:
        _SEEN.clear()


def test_a_value_overwritten_after_it_was_kept_does_not_escape() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.cache = s.conv(x)
        return s.cache.relu_() + 0

    graph = look(Net(forward, conv=conv())).graph
    assert not _escaping(graph)
    assert graph.output(only(graph, "relu")).escapes


def test_a_reference_cycle_is_no_escape_and_a_view_that_is_returned_neither() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        cycle: list[Any] = [s.conv(x)]
        cycle.append(cycle)
        return F.relu(cycle[0]).flatten(1)

    gc.disable()
    try:
        assert not any(v.escapes for v in look(Net(forward, conv=conv())).graph.values)
    finally:
        gc.enable()


# -- the model stays as it was --------------------------------------------------------------------------


def _everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "marks": [n for n, t in model.state_dict(keep_vars=True).items() if hasattr(t, MARK)],
    }


def _require_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = _everything(model)
    old, new = before.pop("state"), after.pop("state")
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    assert after == before


def _counting(s: Any, x: Tensor) -> Tensor:
    s.count += 1
    s.table[0] = x.mean()
    s.lazy = x.sum()
    with torch.no_grad():
        s.conv.weight.mul_(2)
    return F.relu(s.conv(x))


def test_what_the_forward_writes_is_put_back() -> None:
    model = Net(_counting, conv=conv(), count=torch.zeros((), dtype=torch.long), table=torch.ones(3))
    model.train()
    model.conv.eval()
    before = _everything(model)
    look_in_train = observe(model, Inputs((X,)))
    _require_same(model, before)
    assert "count" in look_in_train.graph.tensors


def test_what_a_failing_forward_wrote_is_put_back() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        _counting(s, x)
        s.plain.add_(1)
        raise KeyError("no such scale")

    model = Net(forward, conv=conv(), count=torch.zeros(()), table=torch.ones(3)).eval()
    model.plain = torch.zeros(2)
    before = _everything(model)
    with pytest.raises(ObserveError, match="no such scale"):
        observe(model, Inputs((X,)))
    _require_same(model, before)
    assert torch.equal(model.plain, torch.zeros(2))
    assert not hasattr(model.plain, MARK)


def test_what_an_interrupted_forward_wrote_is_put_back() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        _counting(s, x)
        raise KeyboardInterrupt

    model = Net(forward, conv=conv(), count=torch.zeros(()), table=torch.ones(3)).eval()
    before = _everything(model)
    with pytest.raises(KeyboardInterrupt):
        observe(model, Inputs((X,)))
    _require_same(model, before)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.batch_norm(x, s.bn.running_mean, s.bn.running_var, training=True),
        lambda s, x: F.instance_norm(x, s.bn.running_mean, s.bn.running_var, use_input_stats=True),
        lambda s, x: s.bn.train()(x),
    ],
)
def test_running_statistics_that_move_in_eval_mode_are_put_back(forward: Callable[..., Any]) -> None:
    model = Net(forward, bn=nn.BatchNorm2d(3)).eval()
    before = _everything(model)
    look(model)
    _require_same(model, before)


def test_a_plain_tensor_attribute_is_put_back() -> None:
    model = Net(lambda s, x: s.conv(x) + s.plain.add_(1), conv=conv())
    model.plain = torch.zeros(1)
    look(model)
    assert torch.equal(model.plain, torch.zeros(1))
    assert not hasattr(model.plain, MARK)


def test_views_of_one_memory_are_put_back() -> None:
    flat = torch.arange(8.0)
    model = Net(
        lambda s, x: s.conv(x) + s.low.zero_().sum() + s.flat.sum(), conv=conv(), flat=flat, low=flat[:4]
    )
    graph = look(model).graph
    assert torch.equal(flat, torch.arange(8.0))
    changed = [op for op in graph.of_kind("sum") if graph.input(op).handle == "flat"]
    assert changed == [], "flat no longer holds what it held"


def test_the_model_can_train_after_it_was_observed() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        if not hasattr(s, "grid"):
            s.grid = torch.ones(4, 1, 1)
        return (s.conv(x) * s.grid).sum()

    model = Net(forward, conv=conv())
    look(model)
    assert not hasattr(model, "grid")
    model(X).backward()
    assert model.conv.weight.grad is not None


def test_random_state_is_put_back() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.conv(x) * random.random() * float(np.random.rand()) * torch.rand(())  # noqa: NPY002

    model = Net(forward, conv=conv())
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    look(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_gradients_and_grad_mode_are_left_alone() -> None:
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    model(X).sum().backward()
    gradient = model[0].weight.grad.clone()
    look(model)
    assert torch.is_grad_enabled()
    assert torch.equal(model[0].weight.grad, gradient)


# -- failures -------------------------------------------------------------------------------------------


def test_a_failing_forward_says_what_where_and_what_next() -> None:
    model = nn.Sequential(conv(), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 1, 1)))
    global_hooks = (len(hooks_of_torch._global_forward_hooks), len(hooks_of_torch._global_forward_pre_hooks))
    with pytest.raises(ObserveError) as caught:
        look(model)
    error = caught.value
    assert "2x3x8x8" in error.what
    assert "channels" in error.what
    assert "\n" not in error.what
    assert error.where == "1.1"
    assert "--input" in error.next_step
    assert global_hooks == (
        len(hooks_of_torch._global_forward_hooks),
        len(hooks_of_torch._global_forward_pre_hooks),
    )
    assert torch.is_inference_mode_enabled() is False


def test_an_image_without_its_batch_axis_is_a_wrong_shape_and_not_a_wrong_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ObserveError, match="expected 4D input") as caught:
        observe(model, Inputs((torch.zeros(3, 8, 8),)))
    assert "--input 1x3x224x224" in caught.value.next_step
    with pytest.raises(ObserveError) as caught:
        observe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)), Inputs((torch.zeros(1, 3, 8, 8),)))
    assert "5 channels and is given 4: mend the model" in caught.value.next_step


def test_an_exception_without_words_is_named_by_its_class() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    with pytest.raises(ObserveError, match="NotImplementedError"):
        look(Net(forward))


def test_a_lazy_layer_is_refused_and_stays_lazy() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), nn.Sequential(nn.LazyConv2d(2, 1)))
    with pytest.raises(ObserveError) as caught:
        observe(model, Inputs((X,)))
    assert caught.value.where == "2.0"
    assert "run the model once" in caught.value.next_step
    assert type(model[2][0]) is nn.LazyConv2d
    model(X)
    assert kinds(look(model).graph) == ["conv", "relu", "conv"]


def test_a_model_without_a_tensor_to_return_is_observed() -> None:
    graph = look(Net(lambda s, x: None if s.conv(x) is None else 3, conv=conv())).graph
    assert kinds(graph) == ["conv"]
    assert not any(v.is_output for v in graph.values)
