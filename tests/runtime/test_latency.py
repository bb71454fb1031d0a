from __future__ import annotations

import dataclasses
import json
import math
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bntool.core.errors import ExportError, UsageError
from bntool.core.latencies import Benchmark, Cost, Latency, Versus, outside_by_chance
from bntool.graph.inputs import Inputs
from bntool.results.latency import latency_text
from bntool.runtime import benchmarking, ort_runner, ready
from bntool.runtime.benchmarking import Candidate, benchmark
from bntool.runtime.libraries import CPU, CUDA
from bntool.runtime.memory import PeakMemory
from bntool.runtime.onnx_flops import onnx_flops
from tests.exports import export_onnx

IMAGE = Inputs((torch.zeros(1, 3, 8, 8),))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()


def latency(name: str, *seconds: float, device: str = "cpu", batch: int = 1) -> Latency:
    return Latency(name, batch, device, "torch", seconds)


def spread(name: str, low: float, high: float, **more: Any) -> Latency:
    """Thirteen samples, evenly from low to high: the middle half is from a quarter to three quarters."""
    return latency(name, *(low + (high - low) * i / 12 for i in range(13)), **more)


# -- what may be claimed ----------------------------------------------------------------------------------


def test_median_middle_half_and_throughput():
    row = spread("a", 1.0, 3.0, batch=4)
    assert (row.median, row.middle, row.throughput) == (2.0, (1.5, 2.5), 2.0)


@pytest.mark.parametrize(
    ("b", "says"),
    [
        ((0.5, 1.5), "b is 2.00x faster than a (from 2.00 to 2.00)"),
        ((2.0, 6.0), "b is 2.00x slower than a (from 2.00 to 2.00)"),
        ((1.01, 3.03), "no measurable difference between a and b (0.99 : 1, from 0.99 to 0.99)"),
    ],
)
def test_a_difference_is_claimed_round_by_round(b, says):
    """However far the machine drifts meanwhile: each round is beside its own."""
    found = Versus(spread("a", 1.0, 3.0), spread("b", *b))
    assert found.verdict == f"batch 1: {says}"
    assert found.measurable == ("no measurable" not in says)


def noisy(rounds, generator, *, slower=1.0):
    """Seconds of two models on a busy machine: a drift and bursts that slow both, and noise of each alone."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.05, rounds)))
    bursts = 1 + 3 * (generator.random(rounds) < 0.1)
    alone = np.exp(np.abs(generator.standard_t(3, (2, rounds))) * 0.1)  # the tail is long, and on one side
    both = 1e-3 * drift * bursts * alone
    return latency("a", *both[0]), latency("b", *(slower * both[1]))


@pytest.mark.parametrize("rounds", [11, 30])
def test_two_equal_models_are_told_apart_once_in_a_thousand(rounds):
    generator = np.random.default_rng(0)
    claims = sum(Versus(*noisy(rounds, generator)).measurable for _ in range(2000))
    assert claims <= 6  # of 2, by the sign test; six or fewer have a chance of 99.5 %
    found = sum(Versus(*noisy(rounds, generator, slower=1.5)).measurable for _ in range(100))
    assert found >= {11: 60, 30: 95}[rounds]


def test_the_interval_is_that_of_the_sign_test():
    """Rank of the lower end at 99.9 %, two-sided, of the median: by hand, and from tables of the binomial."""
    assert [outside_by_chance(n) for n in (10, 11, 13, 14, 30)] == [None, 0, 0, 0, 5]


def test_no_claim_from_few_rounds_or_across_devices():
    few = Versus(latency("a", 3.0, 3.1, 3.2), latency("b", 1.0, 1.1, 1.2))
    assert few.verdict == "batch 1: not compared, fewer than 11 rounds"
    apart = Versus(spread("a", 3, 4), spread("b", 1, 2, device="cuda:0 (X)"))
    assert apart.verdict == "batch 1: not compared, they ran on cpu and cuda:0 (X)"
    assert (few.to_dict()["ratio"], apart.to_dict()["ratio"], apart.measurable) == (None, None, False)


def test_pairs_are_compared_batch_by_batch():
    rows = tuple(spread(n, t, t + 1, batch=b) for n, t in (("a", 4), ("b", 1), ("c", 1)) for b in (1, 8))
    found = Benchmark(rows, (Cost("a", 10, 20),), (("a", "b"),), threads=2)
    assert [(v.first.name, v.second.name, v.first.batch) for v in found.versus] == [
        ("a", "b", 1),
        ("a", "b", 8),
    ]
    document = json.loads(json.dumps(found.to_dict()))
    assert document["costs"] == [{"name": "a", "parameters": 10, "flops": 20}]
    assert document["rows"][0]["quartiles_seconds"] == [4.25, 4.75]
    text = latency_text(found)
    assert "b is 3.00x faster than a" in text
    assert "2 threads, TF32 off" in text
    assert max(map(len, text.splitlines())) <= 80


# -- taking samples ---------------------------------------------------------------------------------------


def test_samples_are_taken_in_turn_every_second_round_backwards(monkeypatch):
    clock = [0.0]
    calls: list[str] = []
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: clock[0])

    def run(name: str, seconds: float) -> Any:
        def once() -> None:
            calls.append(name)
            clock[0] += seconds

        return once

    samples = benchmarking._interleaved([run("a", 0.5), run("b", 0.0015)], 8, seconds=100)
    assert samples == [pytest.approx([0.5] * 8), pytest.approx([0.0015] * 8)]
    # Three to warm up, one to see how long it takes: a short run is repeated to two milliseconds.
    assert calls[:8] == ["a"] * 4 + ["b"] * 4
    assert calls[8:14] == ["a", "b", "b", "b", "b", "a"]
    # Where time is up, eleven rounds are still taken.
    assert len(benchmarking._interleaved([run("a", 5.0)], 30, seconds=1)[0]) == 11


def test_models_and_files_side_by_side(tmp_path):
    model = network()
    model[1].train()
    path = export_onnx(model, IMAGE, tmp_path / "m.onnx").path
    found = benchmark(
        [Candidate("torch", model), Candidate("file", path)], IMAGE.batched(), batches=(1, 2), rounds=11
    )
    assert [(r.name, r.batch, r.device, r.provider) for r in found.rows] == [
        ("torch", 1, "cpu", "torch"), ("file", 1, "cpu", CPU),
        ("torch", 2, "cpu", "torch"), ("file", 2, "cpu", CPU),
    ]  # fmt: skip
    assert all(len(r.seconds) == 11 and min(r.seconds) > 0 for r in found.rows)
    # 4·3·9 weights, and γ and β; the file also holds the running statistics. 6x6 positions, two per product.
    assert found.costs == (Cost("torch", 116, 2 * 6 * 6 * 108), Cost("file", 124, 2 * 6 * 6 * 108))
    assert found.pairs == (("torch", "file"),)
    assert [m.training for m in model.modules()] == [False, False, True, False]


def test_flops_of_a_file_are_those_that_torch_counts(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, stride=2, groups=2)
            self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
            self.head, self.mix = nn.Linear(6, 5), nn.Linear(3, 2, bias=False)

        def forward(self, x, y):
            return self.head(self.up(self.conv(x)).mean((2, 3))), self.mix(y) @ torch.ones(2, 7)

    inputs = Inputs((torch.zeros(2, 4, 9, 9), torch.zeros(2, 5, 3)))
    model = Net().eval()
    path = export_onnx(model, inputs, tmp_path / "m.onnx").path
    counted = onnx_flops(path, inputs)
    assert counted == benchmarking._flops(model, inputs)
    # conv: 2·8·4·4 outputs of 2·9 products; up: as many inputs by 3·4; then 2·5·6, 2·5·2·3 and 2·5·7·2.
    assert counted == 2 * (256 * 18 + 256 * 12 + 60 + 60 + 140)
    assert onnx_flops(path, Inputs((torch.zeros(2, 4, 9, 9),))) is None


def test_a_slower_model_is_found_slower():
    class Waits(nn.Module):
        def forward(self, x):
            time.sleep(0.01)
            return x

    found = benchmark([Candidate("fast", nn.Identity()), Candidate("slow", Waits())], IMAGE.batched(),
                      batches=(1,), rounds=11)  # fmt: skip
    assert found.versus[0].measurable
    assert "slow is " in found.versus[0].verdict
    assert "slower than fast" in found.versus[0].verdict


def test_a_batch_that_a_file_does_not_take_is_left_out_and_said(tmp_path):
    path = export_onnx(network(), IMAGE, tmp_path / "m.onnx", dynamic_batch=False).path
    found = benchmark([Candidate("file", path)], IMAGE.batched(), batches=(1, 2), rounds=11)
    assert [row.batch for row in found.rows] == [1]
    assert found.notes[0].startswith("batch 2 is left out: ")
    with pytest.raises(UsageError, match="no batch size runs"):
        benchmark([Candidate("file", path)], IMAGE.batched(), batches=(2,), rounds=11)
    with pytest.raises(UsageError, match="tell no difference"):
        benchmark([Candidate("file", path)], IMAGE.batched(), rounds=3)


def test_nested_inputs_have_no_other_batch():
    inputs_of = Inputs(([torch.zeros(3, 8, 8)],)).batched()
    assert inputs_of(1) is not None
    assert inputs_of(2) is None


# -- memory -----------------------------------------------------------------------------------------------


def test_the_peak_is_what_was_held_at_once():
    watch = PeakMemory("cpu")
    if watch.grown() is None:
        pytest.skip("this machine does not tell the peak of its resident memory")
    torch.ones(1 << 24).sum()  # 64 MiB, freed at once
    grown = watch.grown()
    # Pages of other things come and go: a margin of 16 MiB either way.
    assert grown is not None and 48 << 20 < grown < 80 << 20
    again = PeakMemory("cpu").grown()
    assert again is not None and again < 16 << 20


# -- CUDA, against recorded sessions ----------------------------------------------------------------------


class FakeRunner:
    """Stands for a session on CUDA; `fails` says whether a CUDA graph can be captured."""

    cpu_nodes: tuple[str, ...] = ()
    fails = False
    device = "cuda:0 (Recorded)"
    provider = CUDA

    def __init__(
        self, path: Path, device: str, *, threads: int, tf32: bool, cuda_graph: bool = False
    ) -> None:
        assert not tf32
        self.cuda_graph = cuda_graph

    def bound(self, inputs: Inputs, *, fixed_outputs: bool = False) -> Any:
        assert fixed_outputs == self.cuda_graph
        if self.cuda_graph and self.fails:
            raise ExportError("cannot capture")
        return lambda: None


@pytest.mark.parametrize(
    ("cpu_nodes", "fails", "note"),
    [
        ((), False, "CUDA graph"),
        (("Shape a",), False, "no CUDA graph: some nodes stay on the CPU"),
        ((), True, "no CUDA graph: cannot capture"),
    ],
)
def test_a_cuda_graph_where_every_node_is_on_the_device(monkeypatch, cpu_nodes, fails, note):
    kind = type("Kind", (FakeRunner,), {"cpu_nodes": cpu_nodes, "fails": fails})
    monkeypatch.setattr(ready, "OrtRunner", kind)
    runner, run, said = ready._bound(Path("m.onnx"), "cuda", IMAGE, 1, tf32=False)
    run()
    assert said == note
    assert runner.cuda_graph == (note == "CUDA graph")


def test_inputs_and_outputs_are_bound_to_the_device(monkeypatch):
    calls: list[Any] = []

    class Binding:
        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            calls.append(("input", name, value))

        def bind_output(self, name: str, kind: str, index: int) -> None:
            calls.append(("output", name, kind, index))

        def get_outputs(self) -> list[str]:
            return ["memory of y"]

        def clear_binding_outputs(self) -> None:
            calls.append("clear")

        def bind_ortvalue_output(self, name: str, value: str) -> None:
            calls.append(("fixed", name, value))

    session = types.SimpleNamespace(
        io_binding=Binding,
        get_inputs=lambda: [types.SimpleNamespace(name="x", type="tensor(float)", shape=[1])],
        get_provider_options=lambda: {CUDA: {"device_id": "1"}},
        run_with_iobinding=lambda binding: calls.append("run"),
    )
    monkeypatch.setattr(ort_runner, "_to_value", lambda t, kind, index: (kind, index))
    runner = ort_runner.OrtRunner.__new__(ort_runner.OrtRunner)
    runner._session, runner._provider = session, CUDA
    runner.input_names, runner.output_names = ("x",), ("y",)
    run = runner.bound(IMAGE, fixed_outputs=True)
    run()
    assert calls == [
        ("input", "x", ("cuda", 1)), ("output", "y", "cuda", 1),
        "run", "clear", ("fixed", "y", "memory of y"), "run",
    ]  # fmt: skip


def test_cuda_memory_is_that_of_the_device(monkeypatch):
    held = iter([100, 340])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(held))
    assert PeakMemory("cuda:0").grown() == 240
    free = iter([(900, 1000), (500, 1000)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: next(free))
    assert PeakMemory("cuda", whole_device=True).grown() == 400


def test_where_it_ran_stays_readable_beside_long_names():
    names = ("net_bn_trained.pt", "net_bn_trained_folded.pt")
    rows = tuple(latency(name, *(1e-4 + 1.1e-6 * i for i in range(7))) for name in names)
    rows = tuple(dataclasses.replace(row, memory=1_400_000) for row in rows)
    text = latency_text(Benchmark(rows, (Cost(names[0], 723, 88_176),), (), threads=1), 80)
    assert text.count("torch cpu ") == 2
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "7 rounds in turn, 1 thread, TF32 off" in text


def test_long_times_and_unknown_figures_print():
    rows = (latency("a", *[1.5] * 7),)
    text = latency_text(Benchmark(rows, (Cost("a", 1, None),), (), threads=1, notes=("a note",)))
    assert "1,500" in text
    assert "a note" in text
    assert not math.isnan(rows[0].throughput)
