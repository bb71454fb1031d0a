"""Plan a fold: for every BatchNorm, move its affine map along the graph until linear layers take it in.

Upstream first (into the producer), then downstream (into every consumer), then split: scale one way and
shift the other. A way counts only where every step of it is exact; otherwise the BN stays, with the
reason. The planner reads numbers and touches nothing; `surgery` carries the plan out.
"""

from bntool.folding.agreement import at_graph_level, plan_on_all
from bntool.folding.planner import plan_fold

__all__ = ["at_graph_level", "plan_fold", "plan_on_all"]
