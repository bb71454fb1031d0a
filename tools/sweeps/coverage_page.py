"""The pages of the sweeps over models: `docs/coverage.md`, `docs/elsewhere.md`."""

from __future__ import annotations

import collections
import statistics
from typing import Any

NARROWS = "narrows inside"
"""What the check notes of a model that casts to a narrower type even in float64."""


def page(results: dict[str, dict[str, Any]], title: str, target: str, file: str) -> str:
    from bntool.core.tolerances import ALGEBRA_LIMIT

    rows = sorted(results.values(), key=lambda row: row["model"])
    good = [row for row in rows if row["status"] == "ok"]
    with_bn = [row for row in good if row["bn_total"]]
    total, folded = (sum(row[key] for row in with_bn) for key in ("bn_total", "folded"))
    share = 100 * folded / max(total, 1)
    kept: collections.Counter[str] = collections.Counter()
    for row in with_bn:
        kept.update(row["kept"])
    ratios = [row["error_over_noise"] for row in good if "error_over_noise" in row]
    exact, narrow = (
        {
            r["model"]: r["float64"]
            for r in good
            if "float64" in r and (NARROWS in r.get("note", "")) is inside
        }
        for inside in (False, True)
    )
    amplified = [f"{model} {error:.1e}" for model, error in exact.items() if error > ALGEBRA_LIMIT]
    sites = [row for row in good if row.get("sites")]
    lines = [
        f"# {title}",
        "",
        "Random weights, randomised BatchNorm statistics with γ of both signs. Written by",
        f"`make {target}` from `{file}`, one line a model, which has every figure.",
        "",
        f"- models run: {len(good)} of {len(rows)} tried",
        f"- with BatchNorm: {len(with_bn)}; BatchNorm layers: {total:,}; folded: {folded:,} ({share:.1f} %)",
        f"- kept, by reason: {', '.join(f'{n:,} {reason}' for reason, n in kept.most_common()) or 'none'}",
    ]
    baked = [row for row in with_bn if row.get("baked")]
    if baked:
        more, worst = sum(row["baked"] for row in baked), max(row["baked_float64"] or 0.0 for row in baked)
        lines.append(
            f"- with `--bake`, which stores weights that layers compute: {more} more in {len(baked)} models, "
            f"to {worst:.1e} in float64"
        )
    # where every BatchNorm folded, or the plan was made before this was asked, it is the same
    positive = [row.get("folded_positive", row["folded"]) for row in with_bn]
    if any("folded_positive" in row for row in with_bn):
        lines.append(
            f"- with no γ < 0: {sum(positive):,} folded ({100 * sum(positive) / max(total, 1):.1f} %)"
        )
    silent = {row["model"]: row["no_verdict"] for row in good if row.get("no_verdict")}
    if any("no_verdict" in row for row in good):
        told = ", ".join(f"{len(names)} in {model}" for model, names in silent.items())
        lines.append(f"- BatchNorms that ran and got no verdict: {told or 'none'}")
    if ratios:
        lines.append(
            f"- float32 error over the model's own noise: median {statistics.median(ratios):.2f}, "
            f"largest {max(ratios):.2f}"
        )
    if exact:
        lines.append(
            f"- float64 agreement, relative to the peak, in {len(exact)} models: to {ALGEBRA_LIMIT:.0e} in "
            f"{len(exact) - len(amplified)}, the largest of them "
            f"{max((error for error in exact.values() if error <= ALGEBRA_LIMIT), default=0.0):.1e}"
        )
    if amplified:
        lines.append(
            f"- held to their own rounding in float64, which they amplify further: {', '.join(amplified)}"
        )
    if narrow:
        lines.append(
            f"- {len(narrow)} models cast to a narrower type inside, so that they are not in float64 all the "
            f"way and are held to their own rounding: largest {max(narrow.values()):.1e}"
        )
    calm = [row for row in good if "gain" in row]
    if calm:
        lines.append(
            f"- judged with γ of {calm[0]['gain']} times, since with the usual one they amplify float64's "
            f"own rounding beyond comparison: {len(calm)} ({', '.join(row['model'] for row in calm)})"
        )
    if sites:
        count = sum(row["sites"] for row in sites)
        unequal = [row["model"] for row in sites if not row["insert_exact"]]
        lines.append(
            f"- insertion (any activation): {count:,} sites in {len(sites)} models, "
            f"{'all equal to the last bit' if not unequal else 'not equal: ' + ', '.join(unequal)}; "
            f"folded back, the weights differ by at most {max(row['round_trip'] for row in sites):.1e}"
        )
    again = [row for row in good if "sites_again" in row]
    if again:
        more = [row["model"] for row in again if row["sites_again"]]
        lines.append(
            f"- a second insertion, in {len(again)} models: "
            f"{'changes nothing' if not more else 'finds more sites in ' + ', '.join(more)}"
        )
    traced = [row for row in good if row.get("fx", "cannot trace") != "cannot trace"]
    if traced:
        differ = [row["model"] for row in traced if row["fx"] != "agrees"]
        lines.append(
            f"- pairs of convolution and activation against torch.fx, where it traces: {len(traced)} models, "
            f"{'all agree' if not differ else 'different: ' + ', '.join(differ)}"
        )
    rest = [row for row in rows if row["status"] != "ok"]
    lines += [
        "",
        "| model | BN | folded | kept | error / noise | float64 | seconds to fold |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in with_bn:
        reasons = ", ".join(f"{n} {reason}" for reason, n in row["kept"].items())
        lines.append(
            f"| {row['model']} | {row['bn_total']} | {row['folded']} | {reasons} | "
            f"{row.get('error_over_noise', '')} | {row.get('float64', '')} | {row['seconds_fold']} |"
        )
    if rest:
        lines += ["", "Not run:", ""]
        for row in rest:
            why = row.get("error", "").partition("\n")[0]
            lines.append(f"- {row['model']}: {row['status']} {why}".rstrip())
    return "\n".join(lines) + "\n"
