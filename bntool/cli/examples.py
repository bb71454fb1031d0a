"""Lines to type, for each command's `--help` and for the manual. A test types them, in this order.

They are typed in a folder that holds the sample as `model.pt`, a class in `net.py`, and data of its shape in
`images.npy` and `data.npz`.
"""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "insert": (
        "bntool insert model.pt",
        "bntool insert model.pt --init calibrate --data images.npy --force",
        "bntool insert net.py:Net --source --input 1x3x12x12",
    ),
    "summary": (
        "bntool summary model.pt",
        "bntool summary model_bn.pt --baseline model.pt",
    ),
    "inspect": (
        "bntool inspect model.pt",
        "bntool inspect model.pt --json",
    ),
    "fold": (
        "bntool fold model_bn.pt --dry-run",
        "bntool fold model_bn.pt --export onnx --json > fold.json",
        "bntool fold model_bn.pt --require-all --force",
    ),
    "export": ("bntool export model_bn.pt --opset 20",),
    "bench": ("bntool bench model_bn.pt model_bn_folded.pt --batch-sizes 1 --rounds 11",),
    "verify": (
        "bntool verify model_bn.pt model_bn_folded.pt",
        "bntool verify model_bn.pt model_bn_folded.onnx --inputs images.npy",
    ),
    "calibrate": (
        "bntool calibrate model_bn.pt --data images.npy",
        "bntool calibrate model_bn.pt --data images.npy --freeze --force",
    ),
    "compare": ("bntool compare model.pt --data data.npz --epochs 1 --batch-size 16",),
    "report": (
        "bntool report fold.json",
        "bntool report fold.json --format md",
    ),
    "explain": (
        "bntool explain",
        "bntool explain shift-at-padding",
    ),
    "doctor": (
        "bntool doctor",
        "bntool doctor --json",
    ),
    "demo": ("bntool demo -o demo-out",),
    "completion": (
        "bntool completion bash > bntool.bash",
        "bntool completion fish > bntool.fish",
    ),
}


def epilog(command: str) -> str:
    """The examples for click's help, behind its mark for lines to keep."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[command])
