"""Write docs/reasons.md from the explanations: `python tools/docs/make_reasons.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bntool.core.explanations import EXPLANATIONS, Explanation  # noqa: E402

_HEAD = """# Reason codes

Why bntool leaves a place as it is. `bntool explain CODE` prints one of these. The codes are stable:
reports and `--json` use them. In the examples `torch`, `nn` and `F` (`torch.nn.functional`) are
imported, and the BatchNorms have been trained.
"""


def document() -> str:
    """The page: a table of all codes, then a section for each."""
    found = EXPLANATIONS.values()
    rows = "\n".join(f"| [`{e.code}`](#{e.code}) | {e.title} |" for e in found)
    return "\n".join((_HEAD, "| code | in a line |", "|---|---|", rows, "", "\n".join(map(_section, found))))


def _section(e: Explanation) -> str:
    return f"## {e.code}\n\n**{e.title}.** {e.paragraph}\n\n```python\n{e.example}\n```\n\n{e.remedy}\n"


if __name__ == "__main__":
    (ROOT / "docs" / "reasons.md").write_text(document(), encoding="utf-8", newline="\n")
