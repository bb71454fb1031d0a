"""The page of the comparison with other BatchNorm folders, from its rows."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.sweeps.peer_tools import BNTOOL, ON_FILES, PEERS

FILES_RESULTS = Path(__file__).resolve().parents[2] / "docs" / "peers-onnx.jsonl"
FILES_START = "## ONNX files of other exporters"

Row = Mapping[str, Any]

EXPLAINED: dict[str, str] = {}
"""`model bn` -> why a peer folds it and bntool does not. The tests ask for an entry for each."""

_INTRO = """\
# bntool and its peers

How many BatchNorms the best tools leave, model by model. Written by `make peers` from `peers.jsonl`, which
has every name; the peers are installed in an environment of their own, `.venv-peers`, and nowhere else.

The models are a sample of all kinds, and those of the sweep ([coverage](coverage.md)) on which bntool
keeps a BatchNorm: where it keeps none, no peer can be ahead. So the shares below are of the hardest models;
of the whole sweep bntool folds what the page on coverage says.

Random weights, randomised statistics, γ of both signs (0.3 times as large where rounding alone would decide
what the model computes), small images where the model takes them. The torch tools get the same model; the
ONNX tools get the same unfolded file, its batch size fixed, which helps them.

- **bntool**: what `bntool fold --export onnx` leaves, batch size open. **module**: what `bntool.fold` leaves
  in the module. **file**: what `bntool fold FILE.onnx` leaves of the file that the peers get.
- **torch.fx**: `torch.fx.experimental.optimization.fuse`; **jit.freeze**: `torch.jit.trace`, then
  `torch.jit.freeze`; **exporter**: `torch.onnx.export(dynamo=True, optimize=True)`; **onnxsim** and
  **onnxslim**: as they come; **ORT**: ONNX Runtime's own optimiser, level extended (the next one is for one
  machine's layout); **OpenVINO**: its `convert_model`.

**What counts as left.** A BatchNorm is y = s·x + t, and here the numbers of s name it. It is left where the
result still multiplies by s, whatever op does it (BatchNormalization, a product with a constant, a 1×1
depthwise convolution), or adds t alone behind anything but the layer whose bias it could be. Every BatchNorm
must be found so in the unfolded file before anything is measured. `+n` after a number: products that carry
nobody's s, two layers composed for instance; they count as left.

**wrong**: the result runs, yet lies farther from the original in float64 than the model's own float32
rounding explains ([how far that is](checking.md)), or OpenVINO's rounding, which is measured on the file
that bntool has folded; nothing of it counts as folded. **undecided**: that
rounding alone moves the output too far to tell. **–**: the tool fails on the model.
"""


def left(found: Row) -> int:
    """How many BatchNorms a result that is right still computes."""
    return len(found["left"]) + int(found["unnamed"])


def folded_by(row: Row, tools: Iterable[str]) -> dict[str, list[str]]:
    """Each BatchNorm that one of `tools` folds rightly -> the tools that do."""
    found: dict[str, list[str]] = {}
    for tool in tools:
        result = row["tools"][tool]
        if result["status"] == "ok":
            for name in row["bn"]:
                if name not in result["left"]:
                    found.setdefault(name, []).append(tool)
    return found


def only_bntool(row: Row) -> list[str]:
    """The BatchNorms that bntool folds and no peer does."""
    peers = folded_by(row, PEERS)
    return [name for name in folded_by(row, ["bntool"]) if name not in peers]


def only_peers(row: Row) -> dict[str, list[str]]:
    """The BatchNorms that a peer folds and bntool does not -> which peers."""
    ours = folded_by(row, ["bntool"])
    return {name: tools for name, tools in folded_by(row, PEERS).items() if name not in ours}


def behind(row: Row) -> bool:
    """Whether some peer leaves fewer BatchNorms than bntool."""
    ours, theirs = row["tools"]["bntool"], [row["tools"][tool] for tool in PEERS]
    best = min((left(found) for found in theirs if found["status"] == "ok"), default=len(row["bn"]))
    return (left(ours) if ours["status"] == "ok" else len(row["bn"])) > best


def page(results: Mapping[str, Row]) -> str:
    rows = sorted((r for r in results.values() if r.get("tools")), key=lambda r: str(r["model"]).lower())
    parts = [_INTRO, _summary(rows), _table(rows), _only_bntool(rows), _only_peers(rows), _troubles(rows)]
    rest = [row for row in results.values() if row["status"] != "ok"]
    if rest:
        lines = [f"- {row['model']}: {row['status']}, {_first(row)}" for row in rest]
        parts.append("\n".join(["## Not measured", "", *lines]) + "\n")
    return "\n".join([*parts, _versions(rows), _of_files()])


def _summary(rows: list[Row]) -> str:
    total = sum(len(row["bn"]) for row in rows)
    lines = [f"{len(rows)} models, {total:,} BatchNorms. Folded, of all of them:", ""]
    lines += ["| tool | folded | % | models wrong | models not done |", "|---|---|---|---|---|"]
    for tool in (*BNTOOL, *PEERS):
        results = [(row, row["tools"][tool]) for row in rows]
        folded = sum(len(row["bn"]) - left(found) for row, found in results if found["status"] == "ok")
        wrong = sum(found["status"] == "wrong" for _, found in results)
        failed = sum(found["status"] not in ("ok", "wrong") for _, found in results)
        lines.append(f"| {tool} | {folded:,} | {100 * folded / max(total, 1):.1f} | {wrong} | {failed} |")
    worse = [str(row["model"]) for row in rows if behind(row)]
    verdict = (
        f"fewer than bntool is left by some peer on: {', '.join(worse)}"
        if worse
        else ("On every model bntool leaves at most what the best of its peers leaves.")
    )
    return "\n".join([*lines, "", verdict]) + "\n"


def _table(rows: list[Row]) -> str:
    tools = (*BNTOOL, *PEERS)
    names = [tool.removeprefix("bntool, ").removeprefix("ONNX ") for tool in tools]
    lines = [
        "## BatchNorms left",
        "",
        f"| model | BN | {' | '.join(names)} |",
        "|---" * (len(tools) + 2) + "|",
    ]
    for row in rows:
        cells = " | ".join(_cell(row["tools"][tool]) for tool in tools)
        lines.append(f"| {_short(row['model'])} | {len(row['bn'])} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(found: Row) -> str:
    if found["status"] == "ok":
        return f"{len(found['left'])}" + (f"+{found['unnamed']}" if found["unnamed"] else "")
    return str(found["status"]) if found["status"] in ("wrong", "undecided") else "–"


def _only_bntool(rows: list[Row]) -> str:
    found = {str(row["model"]): only_bntool(row) for row in rows}
    found = {model: names for model, names in found.items() if names}
    count = sum(map(len, found.values()))
    lines = ["## Folded by bntool alone", "", f"{count:,} BatchNorms in {len(found)} models."]
    lines += ["", "| model | how many | such as |", "|---|---|---|"]
    for model, names in found.items():
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(f"| {_short(model)} | {len(names)} | {shown} |")
    return "\n".join(lines) + "\n"


def _only_peers(rows: list[Row]) -> str:
    lines = ["## Folded by a peer and not by bntool", ""]
    entries = [(str(row["model"]), name, tools) for row in rows for name, tools in only_peers(row).items()]
    for model, name, tools in entries:
        why = EXPLAINED.get(f"{model} {name}", "not explained")
        lines.append(f"- {_short(model)} `{name}`, by {', '.join(tools)}: {why}")
    return "\n".join(lines if entries else [*lines, "None."]) + "\n"


def _troubles(rows: list[Row]) -> str:
    """What is wrong or fails, with the tool's own words, models with the same words together."""
    same: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for row in rows:
        for tool in (*BNTOOL, *PEERS):
            found = row["tools"][tool]
            if found["status"] != "ok":
                same[tool, found["status"], _first(found)].append(_short(row["model"]))
    lines = ["## Wrong results and failures", ""]
    lines += [f"- {tool}, {status}: {', '.join(on)}{why}" for (tool, status, why), on in same.items()]
    return "\n".join(lines if same else [*lines, "None."]) + "\n"


def _first(found: Row) -> str:
    if "error" in found:
        return f" ({str(found['error']).splitlines()[0][:160]})".replace("|", "\\|").replace("_", "\\_")
    ratio = found.get("error_over_noise")
    return f" (error {ratio:,.0f} × the model's own noise)" if ratio is not None else ""


def _versions(rows: list[Row]) -> str:
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for row in rows:
        for package, version in row["versions"].items():
            found[package][version] = None
    listed = ", ".join(f"{package} {' and '.join(versions)}" for package, versions in found.items())
    return f"## Versions\n\n{listed}.\n"


def _of_files() -> str:
    """The section on files as `make peers AS=onnx` found them last; nothing before."""
    if not FILES_RESULTS.exists():
        return ""
    lines = FILES_RESULTS.read_text(encoding="utf-8").splitlines()
    return files_section({row["model"]: row for row in map(json.loads, lines)})


def behind_on_files(row: Row) -> bool:
    """Whether some peer leaves fewer BatchNorms of a file than bntool."""
    lefts = {tool: found["left"] for tool, found in row["tools"].items() if found["status"] == "ok"}
    return lefts.get("bntool", row["bn"]) > min(lefts.values(), default=row["bn"])


def files_section(results: Mapping[str, Row]) -> str:
    """How many BatchNorms each tool leaves of graphs in the styles of other exporters."""
    rows = [row for row in results.values() if row.get("tools")]
    styles = list(dict.fromkeys(str(row["model"]).partition("-")[0] for row in rows))
    of = {style: [row for row in rows if str(row["model"]).startswith(style)] for style in styles}
    total = sum(row["bn"] for row in rows)
    heads = [f"{style} ({sum(row['bn'] for row in of[style])})" for style in styles]
    lines = [
        FILES_START,
        "",
        f"{len(rows)} graphs made at random (`make styles` tells how) with {total:,} BatchNorms, many of",
        "them written out as arithmetic, at opsets 7 to 23. Left of each style's, found by value as above;",
        "all of a graph's where a tool is wrong or fails. Written by `make peers AS=onnx`.",
        "",
        f"| tool | {' | '.join(heads)} | wrong | not done |",
        "|---" * (len(styles) + 3) + "|",
    ]
    for tool in ON_FILES:
        found = {style: [(row, row["tools"][tool]) for row in of[style]] for style in styles}
        cells = [
            str(sum(f["left"] if f["status"] == "ok" else row["bn"] for row, f in found[style]))
            for style in styles
        ]
        statuses = [f["status"] for pairs in found.values() for _, f in pairs]
        wrong, done = statuses.count("wrong"), statuses.count("ok")
        lines.append(f"| {tool} | {' | '.join(cells)} | {wrong} | {len(statuses) - wrong - done} |")
    worse = [str(row["model"]) for row in rows if behind_on_files(row)]
    verdict = "On every graph bntool leaves at most what the best of its peers leaves."
    lines += ["", f"Fewer than bntool is left by some peer on: {', '.join(worse)}." if worse else verdict]
    lines += ["", _versions(rows).replace("## Versions\n\n", "Versions: ")]
    return "\n".join(lines)


def _short(model: Any) -> str:
    return str(model).rpartition(":")[2]
