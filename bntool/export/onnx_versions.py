"""Which opset came with which IR version, and which ONNX Runtime loads them."""

from __future__ import annotations

from bntool.core.errors import UsageError

LEAST_OPSET = 18
"""What torch's exporter writes its ops in; every other opset is converted from it."""
OPSETS = (LEAST_OPSET, 20, 22, 23)
"""Opsets to try, lowest first: some ops exist only in a later one."""

# The first ONNX Runtime release of each pair, from the table in its documentation on compatibility.
_RELEASES = (
    ("1.7", 13, 7),
    ("1.8", 14, 7),
    ("1.10", 15, 8),
    ("1.11", 16, 8),
    ("1.12", 17, 8),
    ("1.14", 18, 8),
    ("1.15", 19, 8),
    ("1.16", 19, 9),
    ("1.17", 20, 9),
    ("1.18", 21, 10),
)


def loads_in(opset: int, ir_version: int) -> str:
    """The first ONNX Runtime release that takes both, as `1.14`; empty where the table does not say."""
    return next((name for name, ops, ir in _RELEASES if ops >= opset and ir >= ir_version), "")


def chosen_ir_version(opset: int, asked: int | None) -> int:
    """The IR version to write: the one asked for, else the lowest that came with the opset.

    Raises `UsageError` for one older than the opset, which no runtime needs, or one that the installed onnx
    does not know.
    """
    import onnx

    least = next(int(row[1]) for row in onnx.helper.VERSION_TABLE if int(row[2]) >= opset)
    if asked is None:
        return least
    newest = int(onnx.IR_VERSION)
    if not least <= asked <= newest:
        raise UsageError(
            f"IR version {asked} does not go with opset {opset}, which came with IR version {least}",
            next_step=f"use --ir-version {least} to {newest}, or another --opset",
        )
    return asked
