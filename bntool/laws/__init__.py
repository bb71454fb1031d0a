"""The laws by which an affine map passes an op, or is taken in by it: one small class each."""

from bntool.laws import (  # noqa: F401  (registers the laws)
    averaging,
    parts,
    pointwise,
    sampling,
    scattering,
    shapes,
    slopes,
    spreads,
)
from bntool.laws.base import LAWS, Context, Maps, Refused

__all__ = ["LAWS", "Context", "Maps", "Refused"]
