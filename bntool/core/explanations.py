"""What every reason code means, with a model that triggers it and what to do about it.

`bntool explain CODE` prints one of these, and docs/reasons.md is made from them. An example defines
`model`; `torch`, `nn` and `F` (`torch.nn.functional`) are imported, and its BatchNorms have been trained.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap

from bntool.core.errors import UsageError
from bntool.core.reasons import Reason
from bntool.core.text import Lines, as_lines


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One reason: a line, a paragraph, a small PyTorch model that triggers it, and what to do."""

    code: str
    title: str
    paragraph: str
    example: str
    remedy: str

    def __str__(self) -> str:
        parts = (
            f"{self.code}: {self.title}",
            Lines(textwrap.fill(self.paragraph, 90)),
            as_lines("Example:", *textwrap.indent(self.example, "    ").split("\n")),
            Lines(textwrap.fill(f"What to do: {self.remedy}", 90)),
        )
        return Lines("\n\n".join(parts))

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def explain(code: str | Reason) -> Explanation:
    """The explanation of a reason code; case and `_` for `-` do not matter.

    Raises:
        UsageError: there is no such code; the closest ones are suggested.
    """
    wanted = str(code).strip().lower().replace("_", "-")
    try:
        return EXPLANATIONS[Reason(wanted)]
    except ValueError:
        close = difflib.get_close_matches(wanted, [reason.value for reason in Reason], n=3, cutoff=0.5)
        raise UsageError(
            f"there is no reason code {str(code)!r}",
            next_step=f"did you mean {', '.join(close)}?" if close else "bntool explain lists every code",
        ) from None


EXPLANATIONS: dict[Reason, Explanation] = {}
"""Every reason's explanation, in the order of the codes."""


def _add(reason: Reason, title: str, paragraph: str, example: str, remedy: str) -> None:
    code = textwrap.dedent(example).strip()
    EXPLANATIONS[reason] = Explanation(reason.value, title, _one_line(paragraph), code, _one_line(remedy))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- insertion ------------------------------------------------------------------------------------------

_add(
    Reason.ALREADY_NORMALISED,
    "a normalisation already follows this layer",
    """The layer's output goes straight into a BatchNorm, GroupNorm, LayerNorm or InstanceNorm. A second
    norm would undo the first.""",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())",
    "Nothing; this is how the layer should look.",
)
_add(
    Reason.NO_ACTIVATION,
    "no activation follows this layer",
    """BatchNorm belongs between a layer and its activation. Here something else reads the output (a pool,
    a sum), the model returns it, or nothing reads it. The last layer of a network always ends like this.""",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU())",
    "Move the activation next to the layer where that is what you meant; otherwise nothing.",
)
_add(
    Reason.OTHER_ACTIVATION,
    "the activation that follows was not asked for",
    "An activation follows, but not one of those to look for. The default is ReLU alone.",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU())",
    "Name it (--activation silu), or take every activation with --activation any.",
)
_add(
    Reason.OUTPUT_USED_ELSEWHERE,
    "something else reads this output too",
    """A change for one reader would change what the other sees. Inserting: a skip connection or a second
    branch takes the layer's raw output. Folding: the layer before the BatchNorm also feeds a path that has
    no BatchNorm.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
        def forward(self, x):
            y = self.conv(x)
            return F.relu(y) + y
    model = Model()
    """,
    "Take the second path from after the activation, if the architecture allows it.",
)
_add(
    Reason.CALLED_MORE_THAN_ONCE,
    "this layer runs more than once in a forward",
    """A layer reused at several places sees several distributions. One BatchNorm behind it would mix their
    statistics, and one set of weights cannot take in a fold that only one of the calls needs.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
        def forward(self, x):
            return F.relu(self.conv(F.relu(self.conv(x))))
    model = Model()
    """,
    """For a fold, `bntool fold --unshare` clones the layer for each call; where one attribute is called
    twice, in the exported graph (`--unshare --export onnx`). Else give each place a layer of its own.""",
)
_add(
    Reason.NOT_OBSERVED,
    "this layer did not run on the example input",
    """The model was run once in eval mode, and this layer took no part: an auxiliary head that only
    trains, a branch the input did not take, or a layer that is left over. What it feeds is not known.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.extra = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        def forward(self, x):
            return F.relu(self.extra(x) if self.training else self.conv(x))
    model = Model()
    """,
    "Give an input that takes the branch (--input, or example_inputs in Python).",
)
_add(
    Reason.OUTPUT_ESCAPES,
    "this output is kept beyond the forward",
    """After the forward the tensor is still held somewhere: on `self`, in a list, in a cache. Whoever reads
    it there would see changed values.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
        def forward(self, x):
            self.features = self.conv(x)
            return F.relu(self.features)
    model = Model()
    """,
    "Return the tensor or stop keeping it; keep what comes after the activation instead.",
)
_add(
    Reason.NOT_A_MODULE,
    "a function call, not a layer of its own",
    """The convolution or its activation is written as a function inside a forward, so the module tree has
    no place for a BatchNorm there.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
        def forward(self, x):
            return F.relu(F.conv2d(x, self.conv.weight))
    model = Model()
    """,
    "Make it a layer and call that: self.conv(x).",
)
_add(
    Reason.FORM_BROKE_MODEL,
    "every way to insert here changed what the model computes",
    """Each form that fits was tried and the model run again. Either the new BatchNorm was never called, or
    the output changed. Typical causes: modules reached through a plain list, code that counts on the
    numbering of a Sequential.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 8, 3), nn.ReLU()
            self.order = [self.conv, self.act]
        def forward(self, x):
            return self.order[1](self.order[0](x))
    model = Model()
    """,
    "Hold the modules in an nn.ModuleList or nn.Sequential and call them from there.",
)
_add(
    Reason.EXCLUDED,
    "left out on request",
    "The name does not match --include, or it matches --exclude.",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())  # with --exclude '*'",
    "Change the patterns. They are shell patterns over qualified names, such as 'features.*'.",
)

# -- folding: the BatchNorm itself ----------------------------------------------------------------------

_add(
    Reason.BATCH_STATISTICS,
    "this BatchNorm normalises by the statistics of each batch",
    """It has no running statistics, or it stays in train mode while the model is in eval mode. Its map
    changes with every batch, so there is nothing fixed to fold.""",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))",
    "Train it with running statistics and put it in eval mode; model.eval() reaches every layer by default.",
)
_add(
    Reason.BAD_STATISTICS,
    "this BatchNorm holds numbers that are not usable",
    "A statistic or parameter is NaN or infinite, or a variance is negative. A fold would spread it.",
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].running_var[3] = float("nan")
    """,
    "Find out when training diverged, and load an earlier checkpoint.",
)
_add(
    Reason.CUSTOM_FORWARD,
    "the class has a forward of its own",
    """A subclass of a BatchNorm, convolution or linear layer that overrides forward may do more than its
    parent, so its parent's algebra may not hold for it.""",
    """
    class NormAndRelu(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAndRelu(8))
    """,
    "Use the stock class, and put the extra work in a module beside it.",
)
_add(
    Reason.FUNCTIONAL,
    "F.batch_norm is called in a forward",
    """The normalisation is a function call; no module can be taken out, and the call would still run after
    a fold.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x):
            return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var)
    model = Model()
    """,
    "Call the module: self.bn(...). Or let ONNX Runtime fuse it in the exported file.",
)
_add(
    Reason.SCRIPTED,
    "this BatchNorm belongs to a TorchScript module",
    "The code of a TorchScript module is compiled. Its layers cannot be exchanged.",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.BatchNorm2d(8)))",
    "Fold the Python module before it is scripted.",
)

# -- folding: the way -----------------------------------------------------------------------------------

_add(
    Reason.NONLINEAR,
    "something that is not linear stands between",
    """A per-channel scale and shift cannot move past this op: an activation (ReLU lets a positive scale by,
    never a shift), a softmax, a norm, a product of two values that averages neither (attention does).""",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.BatchNorm2d(8))",
    """Nothing at inference. When you design the network: put the BatchNorm before the activation, or right
    before a convolution without zero padding.""",
)
_add(
    Reason.NEGATIVE_SCALE,
    "a channel has γ < 0 at a maximum or a ReLU",
    "max(s·x) = s·max(x) holds only for s ≥ 0. With γ < 0 the maximum would become a minimum.",
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8))
    nn.init.constant_(model[2].weight, -1.0)
    """,
    "Nothing at inference. When you design the network: put the BatchNorm before the pool.",
)
_add(
    Reason.ZERO_SCALE,
    "a multiplication by zero swallows the shift",
    """Upstream of a factor of zero nothing can be added that would come out as a shift, so the shift has
    nowhere to go.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.register_buffer("mask", torch.eye(8, 1).reshape(8, 1, 1))
        def forward(self, x):
            return self.bn(self.conv(x) * self.mask)
    model = Model()
    """,
    "Remove the masked channels before you fold, or apply the mask after the BatchNorm.",
)
_add(
    Reason.SHIFT_AT_PADDING,
    "zero padding has no shift",
    """The zeros that a padding adds do not go through the BatchNorm, so the border would be wrong if its
    shift moved past the padding. A zero shift, no padding, or one that copies real values can pass.""",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(8))",
    "Nothing at inference. When you design the network: pad after the BatchNorm, or by reflection.",
)
_add(
    Reason.SHIFT_BLOCKED,
    "the scale can move, the shift cannot",
    """The way takes a scale but not the shift that belongs to it, and the shift found no other way.
    A more exact code is given wherever the op that blocks it is known.""",
    "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))",
    "Nothing at inference. When you design the network: put the BatchNorm before the op that blocks it.",
)
_add(
    Reason.AXIS_MISMATCH,
    "the channels are not where they would have to be",
    """The map belongs to one axis, and on the way that axis is mixed with others or broadcast: a flatten
    before BatchNorm1d gives every pixel a scale of its own, which no filter can hold. Or the channels
    are there on the example, and elsewhere on an input of another size. Inserting: the output does not
    have the axes that BatchNorm works on.""",
    """
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 26 * 26))
    """,
    "Nothing at inference. When you design the network: normalise before the reshape.",
)
_add(
    Reason.REACHES_INPUT,
    "nothing before this BatchNorm can take it in",
    "On the way up there is only the model's input (or a constant), and no weight.",
    "model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3))",
    "Normalise the data outside the model, and drop the layer.",
)
_add(
    Reason.REACHES_OUTPUT,
    "what would have to change is an output of the model",
    """Upstream, the layer's raw output is also returned; downstream, the BatchNorm's result is returned
    before any weight could take the map in.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y), y
    model = Model()
    """,
    "Stop returning the raw value if nobody needs it.",
)
_add(
    Reason.MIXED_BRANCHES,
    "the branches that meet here cannot all take their part",
    """Where branches are added or joined, each must take the scale and one of them the shift. A branch that
    is a constant, or that carries another scale, does not allow that.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(9)
        def forward(self, x):
            y = self.conv(x)
            return self.bn(torch.cat([y, torch.ones(y.shape[0], 1, *y.shape[2:])], 1))
    model = Model()
    """,
    "Nothing at inference. When you design the network: give each branch its own BatchNorm.",
)
_add(
    Reason.UNKNOWN_OP,
    "no law covers an op on the way",
    """bntool has no law for the op, or its law does not cover this use: a factor that was read from the data
    or drawn at random, indices that are not known, parts of different rank.""",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x):
            return self.bn(self.conv(x) / x.max().item())
    model = Model()
    """,
    "Nothing at inference. Where the op is common and exact, a report of it is welcome.",
)
_add(
    Reason.HOOKED,
    "a hook sees this value",
    "A hook on the layer, or on one that receives the value, would see other numbers than before.",
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].register_forward_hook(lambda module, inputs, output: None)
    """,
    "Remove the hook (handle.remove()), or do the surgery before it is registered.",
)

# -- folding: the layer that would take it in -----------------------------------------------------------

_add(
    Reason.WEIGHT_SHARED,
    "another layer uses the same weight",
    "The weight would have to change for one user and stay for the other.",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.b.weight = self.a.weight
        def forward(self, x):
            return torch.relu(self.bn(self.a(x))) + self.b(x)
    model = Model()
    """,
    "Let each have its own: bntool fold --unshare clones the weight and says what that adds.",
)
_add(
    Reason.WEIGHT_COMPUTED,
    "the weight is computed in the forward, not stored",
    """Weight normalisation, spectral normalisation, weight standardisation, pruning masks and autocast make
    the weight anew on every call. A change to the stored tensor would not come out as the same change.""",
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    nn.utils.parametrizations.weight_norm(model[0])
    """,
    """Where a layer computes it from its own parameters, --bake (bake=True in Python) stores what it computes
    and folds; training then no longer goes through what computed it. In an ONNX file whose inputs list the
    weights too, for a caller to replace, --freeze-inputs takes them for constants.""",
)
_add(
    Reason.QUANTIZED,
    "the weight, or an operator on the way, is not floating point",
    "Quantised weights and operators have scales of their own; a BatchNorm must be folded before that.",
    """
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.conv.weight = nn.Parameter(torch.ones(8, 3, 3, 3, dtype=torch.int64), False)
            self.conv.bias = None
        def forward(self, x):
            return self.bn(self.conv(x.long()).float())
    model = Model()
    """,
    "Fold the floating-point model, then quantise the result.",
)
_add(
    Reason.OVERFLOW,
    "the folded weight does not fit its type",
    "float16 ends at 65,504. A tiny variance or a large γ takes the folded weight or bias beyond it.",
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).half()
    nn.init.constant_(model[0].weight, 100.0)
    nn.init.constant_(model[1].weight, 6e4)
    """,
    "Fold with --dtype float32 (in Python: bntool.fold(model.float())), or look at the channel that has "
    "collapsed.",
)
_add(
    Reason.NOT_PROVED,
    "the fold did not stand up to the proof",
    "By the laws it is exact on what was seen, yet the folded model computes something else, or does not "
    "run, on another input. forward may branch on sizes or numbers, or read attributes of the layer that "
    "is gone.",
    """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        def forward(self, x):
            return self.bn(self.conv(x)) * self.bn.num_features
    model = Net()
    """,
    "Give the input sizes you serve with --input, and keep forward free of attributes of the BatchNorm.",
)
