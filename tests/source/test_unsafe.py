"""What is not safe to edit is refused with its line, and no text is changed."""

from __future__ import annotations

import dataclasses

import pytest

from bntool.core.errors import LoadError
from bntool.source.proof import prove
from tests.source.conftest import HEAD, Edit

CLASS = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
FORWARD = "    def forward(self, x):\n        return F.relu(self.conv1(x))\n"
CONV = "        self.conv1 = nn.Conv2d(3, 4, 3)\n"

UNSAFE: dict[str, tuple[str, str, str]] = {
    # what -> code, the text that begins the line at fault, a word of the reason
    "factory": (
        "def conv3x3(i, o):\n    return nn.Conv2d(i, o, 3)\n\n\n"
        + CLASS
        + "        self.conv1 = conv3x3(3, 4)\n"
        + FORWARD,
        "        self.conv1 =",
        "conv3x3 is a factory",
    ),
    "wrapped": (
        CLASS + "        self.conv1 = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))\n"
        "        self.act = nn.ReLU()\n\n"
        "    def forward(self, x):\n        return self.act(self.conv1(x))\n",
        "        self.conv1 =",
        "is a factory",
    ),
    "made by a method": (
        CLASS + "        self.net = self.make()\n\n"
        "    def make(self):\n        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n\n"
        "    def forward(self, x):\n        return self.net(x)\n",
        "        self.net =",
        "self.make()",
    ),
    "loop over a ModuleList": (
        CLASS + "        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)])\n\n"
        "    def forward(self, x):\n        for c in self.convs:\n            x = F.relu(c(x))\n"
        "        return x\n",
        "        self.convs =",
        "a ModuleList",
    ),
    "names set in a loop": (
        CLASS + "        for i in range(2):\n            setattr(self, f'conv{i}', nn.Conv2d(3, 3, 3))\n\n"
        "    def forward(self, x):\n        return F.relu(self.conv1(F.relu(self.conv0(x))))\n",
        "            setattr",
        "not by name",
    ),
    "made in a loop": (
        CLASS + "        for width in (4,):\n            self.conv1 = nn.Conv2d(3, width, 3)\n\n" + FORWARD,
        "            self.conv1 =",
        "loop",
    ),
    "Sequential(*list)": (
        CLASS
        + "        layers = [nn.Conv2d(3, 4, 3), nn.ReLU()]\n        self.net = nn.Sequential(*layers)\n\n"
        "    def forward(self, x):\n        return self.net(x)\n",
        "        self.net =",
        "*layers hides",
    ),
    "star arguments": (
        CLASS + "        self.conv1 = nn.Conv2d(*(3, 4, 3))\n\n" + FORWARD,
        "        self.conv1 =",
        "hides",
    ),
    "alias in forward": (
        CLASS + CONV + "\n    def forward(self, x):\n        f = self.conv1\n        return F.relu(f(x))\n",
        "        f = self.conv1",
        "another name",
    ),
    "alias in a second branch": (
        CLASS + CONV + "\n    def forward(self, x):\n        if self.training:\n            g = self.conv1\n"
        "            return g(x)\n        return F.relu(self.conv1(x))\n",
        "            g = self.conv1",
        "another name",
    ),
    "called twice, once in training": (
        CLASS + CONV + "\n    def forward(self, x):\n        if self.training:\n"
        "            return self.conv1(x)\n        return F.relu(self.conv1(x))\n",
        "        return F.relu",
        "called here and in line",
    ),
    "reached by getattr": (
        CLASS + CONV + "\n    def forward(self, x):\n        if self.training:\n"
        "            return getattr(self, 'con' + 'v1')(x)\n        return F.relu(self.conv1(x))\n",
        "            return getattr",
        "computed name",
    ),
    "children in turn": (
        CLASS + CONV + "\n    def forward(self, x):\n        if self.training:\n"
        "            for m in self.children():\n                x = m(x)\n"
        "        return F.relu(self.conv1(x))\n",
        "            for m in self.children",
        "in turn",
    ),
    "indexed in training": (
        CLASS + "        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n\n"
        "    def forward(self, x):\n        if self.training:\n            return self.net[1](x)\n"
        "        return self.net(x)\n",
        "            return self.net[1]",
        "by its number",
    ),
    "a key with its number": (
        CLASS + "        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))\n\n"
        "    def forward(self, x):\n        return self.net(x)\n\n\nHEAD = 'net.2.weight'\n",
        "HEAD =",
        "by its number",
    ),
    "conditional expression": (
        CLASS + "        self.conv1 = nn.Conv2d(3, 4, 3) if True else nn.Identity()\n\n" + FORWARD,
        "        self.conv1 =",
        "condition chooses",
    ),
    "conditional layer": (
        CLASS + "        if True:\n            self.conv1 = nn.Conv2d(3, 4, 3)\n        else:\n"
        "            self.conv1 = nn.Identity()\n\n" + FORWARD,
        "            self.conv1 = nn.Identity",
        "nn.Identity stands here",
    ),
    "conditional Sequentials": (
        CLASS + "        if True:\n            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
        "        else:\n            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())\n\n"
        "    def forward(self, x):\n        return self.net(x)\n",
        "            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh",
        "do not have the same places",
    ),
    "instances that disagree": (
        "class Block(nn.Module):\n    def __init__(self, act):\n        super().__init__()\n"
        "        self.conv1 = nn.Conv2d(3, 3, 3)\n        self.act = act\n\n"
        "    def forward(self, x):\n        return self.act(self.conv1(x))\n\n\n"
        + CLASS
        + "        self.a, self.b = Block(nn.ReLU()), Block(nn.Tanh())\n\n"
        "    def forward(self, x):\n        return self.b(self.a(x))\n",
        "        self.conv1 =",
        "b.conv1, which gets none (other-activation)",
    ),
    "a subclass that calls it": (
        CLASS + CONV + "\n" + FORWARD + "\n\nclass Bare(Net):\n    def forward(self, x):\n"
        "        return self.conv1(x)\n",
        "        return self.conv1(x)",
        "called here and in line",
    ),
    "called from outside": (
        CLASS + CONV + "\n" + FORWARD + "\n\ndef stem(net, x):\n    return net.conv1(x)\n",
        "    return net.conv1",
        "from outside",
    ),
    "exchanged from outside": (
        CLASS + CONV + "\n" + FORWARD + "\n\ndef gray():\n    net = Net()\n"
        "    net.conv1 = nn.Conv2d(1, 8, 3)\n    return net\n",
        "    net.conv1 =",
        "from outside",
    ),
    "a subclass of Sequential that is indexed": (
        "class Unit(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())\n\n\n"
        + CLASS
        + "        self.unit = Unit()\n\n    def forward(self, x):\n        if self.training:\n"
        "            return self.unit[1](x)\n        return self.unit(x)\n",
        "            return self.unit[1]",
        "by its number",
    ),
    "a subclass of Sequential that is looped over": (
        "class Unit(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())\n\n\n"
        + CLASS
        + "        self.unit = Unit()\n\n    def forward(self, x):\n        if self.training:\n"
        "            for m in self.unit:\n                x = m(x)\n        return self.unit(x)\n",
        "            for m in self.unit",
        "another name",
    ),
    "the class's own name clash": (
        "BatchNorm2d = None\nfrom torch.nn import Conv2d\n\n\n"
        + CLASS
        + "        self.conv1 = Conv2d(3, 4, 3)\n\n"
        + FORWARD,
        "        self.conv1 =",
        "means something else",
    ),
    "a local meaning": (
        "class Net(nn.Module):\n    def __init__(self, nn=nn):\n        super().__init__()\n"
        + CONV
        + FORWARD,
        "        self.conv1 =",
        "local name",
    ),
    "two targets": (
        CLASS + "        self.conv1 = self.other = nn.Conv2d(3, 4, 3)\n\n" + FORWARD,
        "        self.conv1 =",
        "together with",
    ),
    "a tuple of targets": (
        CLASS + "        self.conv1, self.n = nn.Conv2d(3, 4, 3), 1\n\n" + FORWARD,
        "        self.conv1,",
        "several targets",
    ),
    "a line of two statements": (
        CLASS + "        self.conv1 = nn.Conv2d(3, 4, 3); self.n = 1\n\n" + FORWARD,
        "        self.conv1 =",
        "several statements",
    ),
    "a suite of one line": (
        CLASS + "        if True: self.conv1 = nn.Conv2d(3, 4, 3)\n\n" + FORWARD,
        "        if True:",
        "several statements",
    ),
    "an element made elsewhere": (
        "ACT = nn.ReLU()\nCONV = nn.Conv2d(3, 4, 3)\n\n\n"
        + CLASS
        + "        self.net = nn.Sequential(CONV, ACT)\n\n"
        + "    def forward(self, x):\n        return self.net(x)\n",
        "        self.net =",
        "made elsewhere",
    ),
    "a local layer handed on": (
        CLASS + "        c = nn.Conv2d(3, 4, 3)\n        self.again = [c]\n"
        "        self.net = nn.Sequential(c, nn.ReLU())\n\n"
        "    def forward(self, x):\n        return self.net(x)\n",
        "        self.again =",
        "handed on here too",
    ),
    "a foreign class in between": (
        CLASS + "        self.net = nn.TransformerEncoder if False else nn.ModuleDict(\n"
        "            {'a': nn.Conv2d(3, 4, 3)}\n        )\n\n"
        "    def forward(self, x):\n        return F.relu(self.net['a'](x))\n",
        "        self.net =",
        "a ModuleDict",
    ),
    "a lambda": (
        CLASS + CONV + "        self.f = lambda x: F.relu(self.conv1(x))\n\n"
        "    def forward(self, x):\n        return (lambda y: F.relu(self.conv1(y)))(x)\n",
        "        return (lambda",
        "called here and in line",
    ),
    "the class twice": (
        CLASS + CONV + FORWARD + "\n\n" + CLASS.replace("Net(", "Net(") + CONV + "\n" + FORWARD,
        "class Net",
        "more than once",
    ),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_an_unsafe_pattern_is_refused_with_its_line(edit: Edit, what: str) -> None:
    code, start, why = UNSAFE[what]
    made = edit(HEAD + code)
    assert made.plan.sites, "the model itself has a site"
    lines = made.file.text.splitlines()
    at = [number for number, line in enumerate(lines, 1) if line.startswith(start)]
    assert made.refused
    for line, reason in made.refused:
        assert line == at[-1]
        assert why in reason
    assert made.edits.text == made.file.text


def test_one_unsafe_site_stops_them_all(edit: Edit) -> None:
    code = (
        CLASS + CONV + "        self.rest = nn.Sequential(*[nn.Conv2d(4, 4, 3), nn.ReLU()])\n\n"
        "    def forward(self, x):\n        return self.rest(F.relu(self.conv1(x)))\n"
    )
    made = edit(HEAD + code)
    assert [r.conv for r in made.edits.refusals] == ["rest.0"]
    assert made.edits.text == made.file.text
    assert edit(HEAD + code, exclude=("rest.*",)).added[0] == "self.bn1 = nn.BatchNorm2d(4)"


def test_a_class_of_another_file_is_named(edit: Edit) -> None:
    made = edit("from torchvision.models.alexnet import AlexNet as Net\n", shape=(1, 3, 64, 64))
    assert {why for _, why in made.refused} == {
        "torchvision.models.alexnet.AlexNet is not defined in this file"
    }


def test_a_file_that_is_not_python(edit: Edit) -> None:
    made = edit(HEAD + CLASS + CONV + FORWARD)
    made.file.path.write_bytes(b"def (:\n")
    with pytest.raises(LoadError, match="cannot be read as Python"):
        type(made.file)(made.file.path, made.file.module)
    made.file.path.write_bytes(b"# coding: no-such-thing\n")
    with pytest.raises(LoadError, match="cannot be read as Python"):
        type(made.file)(made.file.path, made.file.module)


# The proof is what stands behind the edits: each wrong text must fail it.
@pytest.mark.parametrize(
    ("right", "wrong", "why"),
    [
        ("self.bn1(self.conv1(x))", "self.conv1(x)", "does not stand between"),
        ("F.relu(self.bn1(self.conv1(x)))", "self.bn1(F.relu(self.conv1(x)))", "does not stand between"),
        ("self.bn1 = nn.BatchNorm2d(4)", "self.bn1 = nn.BatchNorm2d(5)", "the weights do not fit"),
        ("self.bn1 = nn.BatchNorm2d(4)", "self.bn9 = nn.BatchNorm2d(4)", "the weights do not fit"),
        ("self.bn1 = nn.BatchNorm2d(4)", "self.bn1 = nn.BatchNorm2d(4, eps=0.1)", "computes something else"),
        ("self.bn1(self.conv1(x))", "self.bn1(self.conv1(x)) * 1", "does not stand between"),
        ("return F.relu", "return 1 * F.relu", "other operations"),
        ("import torch.nn as nn", "import nothing.at.all", "importing it raised ModuleNotFoundError"),
        ("super().__init__()", "super().__init__(", "importing it raised SyntaxError"),
    ],
)
def test_a_wrong_text_is_not_proved(edit: Edit, right: str, wrong: str, why: str) -> None:
    made = edit(HEAD + CLASS + CONV + FORWARD)
    assert right in made.edits.text
    found, check = made.proof(made.edits.text.replace(right, wrong))
    assert why in found
    assert check is None or not check.passed


def test_the_proof_looks_at_the_weights_too(edit: Edit) -> None:
    task = edit(HEAD + CLASS + CONV + FORWARD).task()
    assert prove(task)[0] == ""
    less = {k: v for k, v in task.state.items() if k != "conv1.bias"}
    assert "missing" in prove(dataclasses.replace(task, state=less))[0]
