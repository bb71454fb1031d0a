"""Plan an insertion: BatchNorm between a convolution and its activation, wherever that is safe.

A site is a layer whose output goes to one activation and nowhere else. Everything else is a skip with its
reason. The planner also picks the form in which the module tree takes the newcomer in, the least intrusive
first: an `nn.Identity` already in the slot, a sibling in a plain `nn.Sequential`, the activation wrapped, a
convolution subclass (or, where no class of bntool's own is wanted, the convolution wrapped).
"""

from bntool.core.options import InsertOptions
from bntool.inserting.activations import ends_one
from bntool.inserting.biases import redundant_biases
from bntool.inserting.names import sequential_names
from bntool.inserting.places import activation_behind, layer_before
from bntool.inserting.planner import plan_insert, plan_insert_nodes
from bntool.inserting.replaying import require_same_places

__all__ = [
    "InsertOptions",
    "activation_behind",
    "ends_one",
    "layer_before",
    "plan_insert",
    "plan_insert_nodes",
    "redundant_biases",
    "require_same_places",
    "sequential_names",
]
