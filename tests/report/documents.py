"""Documents as the commands write them, small, and with the worst names there can be."""

from __future__ import annotations

from typing import Any

EVIL = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"


def layer(name: str, kind: str, reads: list[int], parameters: int = 0, *, op: bool = False) -> dict[str, Any]:
    shape = [1, 8, 4, 4]
    return {"name": name, "kind": kind, "from": reads, "parameters": parameters, "op": op, "shape": shape}


def norm(name: str, channels: int = 8) -> dict[str, Any]:
    values = [0.5 + 0.1 * i for i in range(channels)]
    lists = {"scale": values, "shift": [-v for v in values], "variance": [0.0, *values[1:]]}
    return {
        "name": name,
        "channels": channels,
        "shown": channels,
        "eps": 1e-5,
        "dead": 1,
        "at": None,
        **lists,
    }


def check(stage: str = "fold", *, passed: bool = True, relative: float | None = 2e-7) -> dict[str, Any]:
    return {
        "stage": stage,
        "device": "cpu",
        "provider": "torch",
        "passed": passed,
        "max_abs": 1e-6,
        "relative": relative,
        "rms": 1e-7,
        "cosine": 1.0,
        "top1": None,
        "noise_floor": 1e-7,
        "ratio": 2.0,
        "limit": 1e-6,
        "batches": 3,
        "detail": "",
        "worst": {"output": "output", "index": [0]},
        "precision": "",
    }


def counts(before: int, after: int) -> dict[str, Any]:
    sides = {
        side: {"trainable": n, "frozen": 0, "buffers": 17, "bytes": 4 * n}
        for side, n in (("before", before), ("after", after))
    }
    change = {key: sides["after"][key] - sides["before"][key] for key in sides["after"]}
    return {**sides, "delta": {**change, "conv_bias": 0}}


def fold(evil: str = "") -> dict[str, Any]:
    """A residual block: one BatchNorm folded, one kept."""
    kept = f"block.bn2{evil}"
    before = [
        layer("stem", "Conv2d", [], 72),
        layer("block.conv", "Conv2d", [0], 72),
        layer("block.bn1", "BatchNorm2d", [1], 16),
        layer(kept, "BatchNorm2d", [2], 16),
        layer("block", f"add{evil}", [3, 0], op=True),
    ]
    after = [
        before[0],
        before[1],
        layer(kept, "BatchNorm2d", [1], 16),
        layer("block", "add", [2, 0], op=True),
    ]
    modules = {"": "Net", "block": "Block"}
    sides = {
        side: {"class": f"Net{evil}", "layers": rows, "modules": modules, "left_out": 0}
        for side, rows in (("before", before), ("after", after))
    }
    return {
        "schema_version": 1,
        "command": "fold",
        "status": "ok",
        "parameters": counts(176, 160),
        "sites": [{"bn": "block.bn1", "into": ["block.conv"], "laws": ["relu", "conv"], "level": "module"}],
        "skips": [{"bn": kept, "reason": "nonlinear", "detail": f"a sigmoid is in the way {evil}"}],
        "bn_total": 2,
        "bn_folded": 1,
        "checks": [check(), check("runtime", relative=0.0)],
        "notes": [f"a remark {evil}"],
        "model": {
            "reference": f"net.pt{evil}",
            "input": "1x3x4x4",
            **sides,
            "norms": [norm("block.bn1"), norm(kept)],
            "norms_of": "before",
        },
        "latency": latency(evil),
    }


def latency(evil: str = "") -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "batch": 1,
            "device": "cpu",
            "provider": "torch",
            "median_seconds": seconds,
            "quartiles_seconds": [0.9 * seconds, 1.1 * seconds],
            "rounds": 7,
            "samples_per_second": 1 / seconds,
            "memory_bytes": None,
            "note": "",
        }
        for name, seconds in ((f"before{evil}", 0.02), ("after", 0.01))
    ]
    said = [{"verdict": f"batch 1: after is 2.00x faster than before{evil}"}]
    return {"rows": rows, "costs": [], "comparisons": said, "threads": 1, "tf32": False, "notes": []}


def insert() -> dict[str, Any]:
    """One BatchNorm put in, and the layer behind it moved up."""
    before = [layer("0", "Conv2d", [], 72), layer("1", "ReLU", [0]), layer("2", "Conv2d", [1], 72)]
    after = [
        layer("0", "Conv2d", [], 72),
        layer("1", "BatchNorm2d", [0], 16),
        layer("2", "ReLU", [1]),
        layer("3", "Conv2d", [2], 72),
    ]
    site = {"conv": "0", "activation": "1", "bn": "1", "channels": 8, "form": "sequential", "dims": 2}
    sides = {
        side: {"class": "Sequential", "layers": rows, "modules": {"": "Sequential"}, "left_out": 0}
        for side, rows in (("before", before), ("after", after))
    }
    return {
        "schema_version": 1,
        "command": "insert",
        "status": "ok",
        "parameters": counts(144, 160),
        "sites": [{**site, "activation_kind": "relu", "slot": "", "calls": 1}],
        "skips": [{"name": "2", "reason": "no-activation", "detail": "nothing follows"}],
        "key_map": {"2.weight": "3.weight"},
        "check": check("insert", relative=0.0),
        "notes": [],
        "model": {"reference": "net.pt", "input": "", **sides, "norms": [norm("1")], "norms_of": "after"},
    }


def compare(evil: str = "", steps: int = 4) -> dict[str, Any]:
    """Two epochs of two runs of each arm, with what two layers' activations read at some steps."""
    arms, runs, watched = {}, [], {}
    for number, arm in enumerate(("plain", "batchnorm")):
        history = [
            {
                "epoch": epoch,
                "train_loss": 1.0 / epoch,
                "train_accuracy": 0.4 + 0.2 * epoch,
                "test_loss": 1.1 / epoch,
                "test_accuracy": 0.3 + 0.2 * epoch + 0.1 * number,
                "majority": 0.1,
                "test_samples": 100,
            }
            for epoch in (1, 2)
        ]
        for repeat in (0, 1):
            run = {"arm": arm, "lr": 0.1, "repeat": repeat, "seed": repeat, "trains": True, "diverged": None}
            runs.append({**run, "history": history})
        figures = {
            key: {"mean": history[-1][key], "spread": 0.01}
            for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        }
        arms[arm] = {
            "rates": [{"lr": 0.1, "trained": 2, **figures}],
            "best_rate": 0.1,
            "largest_rate_that_trains": 0.1,
        }
        value = {"mean": 0.0, "std": 1.0, "quantiles": [-2.0, -1.0, number, 1.0, 2.0], "dead": 0.0}
        watched[arm] = [
            {"step": 10 * i, "values": {f"0{evil}": value, "3": value}, "gradients": {"0": 0.1}}
            for i in range(steps)
        ]
    return {
        "schema_version": 1,
        "status": "ok",
        "data": "fashion-mnist",
        "settings": {"epochs": 2},
        "sites": insert()["sites"],
        "parameters": counts(144, 160),
        "arms": arms,
        "runs": runs,
        "watched": {"lr": 0.1, "repeat": 0, "quantiles": [0.01, 0.25, 0.5, 0.75, 0.99], **watched},
        "steps_per_epoch": 20,
    }


def large(layers: int = 500) -> dict[str, Any]:
    """A fold of a network of so many layers, every third of them a BatchNorm of 64 channels, all folded."""
    document = fold()
    rows, sites, norms = [], [], []
    for i in range(layers):
        name = f"stage{i // 100}.block{i // 9}.layer{i}"
        kind = ("Conv2d", "BatchNorm2d", "ReLU")[i % 3]
        rows.append(layer(name, kind, [i - 1] if i else [], 100))
        if kind == "BatchNorm2d":
            norms.append(norm(name, 120))
            sites.append({"bn": name, "into": [rows[-2]["name"]], "laws": ["conv"], "level": "module"})
    kept = [row for row in rows if row["kind"] != "BatchNorm2d"]
    kept = [{**row, "from": [i - 1] if i else []} for i, row in enumerate(kept)]
    side = {"class": "Deep", "modules": {"": "Deep"}, "left_out": 0}
    document["model"] |= {
        "before": {**side, "layers": rows},
        "after": {**side, "layers": kept},
        "norms": norms,
    }
    return {**document, "sites": sites, "skips": []}
