"""Nets as people write them, each with the lines that its new source has; every result is proved."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.source.conftest import HEAD, Edit, Edited

MODEL_1 = Path(__file__).with_name("model_1.py")
MODEL_2 = Path(__file__).with_name("model_2.py")

STYLES: dict[str, tuple[str, list[str]]] = {
    "functional": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)  # keep me
        self.conv2 = nn.Conv2d(4, 5, 3)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return self.conv2(x)
""",
        ["self.bn1 = nn.BatchNorm2d(4)", "x = F.relu(self.bn1(self.conv1(x)))"],
    ),
    "two statements, many lines, keywords": (
        """\
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(
            in_channels=3,
            kernel_size=3,
            out_channels=width * 2,  # twice
        )
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.stem(
            x,
        )
        x = self.relu(x)
        return x
""",
        ["self.stem_bn = nn.BatchNorm2d(width * 2)", "x = self.stem_bn(self.stem(", "))"],
    ),
    "blocks, one class many times": (
        """\
class Block(nn.Module):
    def __init__(self, planes, more):
        super().__init__()
        self.features_conv = nn.Conv2d(planes, more, 3, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.features_conv(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Block(3, 4), Block(4, 5))

    def forward(self, x):
        return self.body(x)
""",
        [
            "self.features_bn = nn.BatchNorm2d(more)",
            "return self.act(self.features_bn(self.features_conv(x)))",
        ],
    ),
    "sequential on many lines": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3),  # stem
            # the activation
            nn.ReLU(inplace=True),

            nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.Conv2d(5, 6, 3)
        )

    def forward(self, x):
        return F.relu(self.features(x))
""",
        [
            "nn.BatchNorm2d(4),",
            "nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),",
            "nn.Conv2d(5, 6, 3),",
            "nn.BatchNorm2d(6)",
        ],
    ),
    "sequential on one line, nested": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()))

    def forward(self, x):
        return self.f(x)
""",
        [
            (
                "self.f = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), "
                "nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()))"
            )
        ],
    ),
    "ordered dict of pairs": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(OrderedDict([
            ('conv0', nn.Conv2d(3, 4, 3)),
            ('relu0', nn.ReLU()),
            ('norm1', nn.GroupNorm(1, 4)),
        ]))

    def forward(self, x):
        return self.f(x)
""",
        ["('norm0', nn.BatchNorm2d(4)),"],
    ),
    "ordered dict of keywords": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(OrderedDict(conv0=nn.Conv2d(3, 4, 3), act=nn.ReLU()))

    def forward(self, x):
        return self.f(x)
""",
        [
            (
                "self.f = nn.Sequential(OrderedDict(conv0=nn.Conv2d(3, 4, 3), bn0=nn.BatchNorm2d(4), "
                "act=nn.ReLU()))"
            )
        ],
    ),
    "bare names from torch.nn": (
        """\
from torch.nn import Conv2d, Module


class Net(Module):
    def __init__(self):
        super().__init__()
        self.conv: Module = Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).relu()
""",
        [
            "from torch.nn import Conv2d, Module, BatchNorm2d",
            "self.bn = BatchNorm2d(4)",
            "return self.bn(self.conv(x)).relu()",
        ],
    ),
    "torch.nn written out": (
        """\
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.relu(self.conv(x))
""",
        ["self.bn = torch.nn.BatchNorm2d(4)", "return torch.relu(self.bn(self.conv(x)))"],
    ),
    "a subclass of Sequential": (
        """\
class Unit(nn.Sequential):
    def __init__(self, i, o):
        super().__init__(
            nn.Conv2d(i, o, 3),
            nn.ReLU(),
        )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Unit(3, 4)
        self.b = Unit(4, 5)

    def forward(self, x):
        return self.b(self.a(x))
""",
        ["nn.BatchNorm2d(o),"],
    ),
    "a layer kept in a local name": (
        """\
class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        width = 3
        last = nn.Conv2d(width, classes, 3)
        other = nn.Conv2d(3, width, 1)
        width = 7
        self.head = nn.Sequential(other, nn.ReLU(), last, nn.ReLU())
        for m in self.modules():
            if m is last:
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.head(x)
""",
        [
            (
                "self.head = nn.Sequential(other, nn.BatchNorm2d(other.out_channels), nn.ReLU(), last, "
                "nn.BatchNorm2d(classes), nn.ReLU())"
            )
        ],
    ),
    "either of two": (
        """\
class Net(nn.Module):
    def __init__(self, wide=False):
        super().__init__()
        if wide:
            self.conv = nn.Conv2d(3, 8, 3)
        else:
            self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.relu(self.conv(x))
""",
        [
            "self.bn = nn.BatchNorm2d(8)",
            "self.bn = nn.BatchNorm2d(4)",
            "return F.relu(self.bn(self.conv(x)))",
        ],
    ),
    "names that are taken": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = None, 3
        self.conv_1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)

    def bn2(self):
        return self.bn1

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv_1(x))))
""",
        [
            "self.bn_1 = nn.BatchNorm2d(4)",
            "self.conv2_bn = nn.BatchNorm2d(4)",
            "return F.relu(self.conv2_bn(self.conv2(F.relu(self.bn_1(self.conv_1(x))))))",
        ],
    ),
    "channels that are computed": (
        """\
def width():
    return 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width(), 3)

    def forward(self, x):
        return F.relu(self.conv1(x))
""",
        ["self.bn1 = nn.BatchNorm2d(self.conv1.out_channels)", "return F.relu(self.bn1(self.conv1(x)))"],
    ),
    "transposed": (
        """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, dtype=torch.float32)

    def forward(self, x):
        return F.relu(self.up(x, output_size=[10, 10]))
""",
        [
            "self.up_bn = nn.BatchNorm2d(4, dtype=torch.float32)",
            "return F.relu(self.up_bn(self.up(x, output_size=[10, 10])))",
        ],
    ),
    "made by a function": (
        """\
def Net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
    )
""",
        ["nn.BatchNorm2d(4),"],
    ),
}


def proved(made: Edited) -> Edited:
    """The edits, after making sure that they hold and that nothing was taken out of the old text."""
    rest = iter(made.edits.text)
    assert all(letter in rest for letter in made.file.text)
    assert made.refused == []
    why, check = made.proof()
    assert (why, check is not None and check.max_abs) == ("", 0.0)
    return made


@pytest.mark.parametrize("style", STYLES)
def test_the_lines_a_person_would_write(edit: Edit, style: str) -> None:
    code, added = STYLES[style]
    assert proved(edit(HEAD + code)).added == added


def test_model_1_becomes_model_2(edit: Edit) -> None:
    made = proved(edit(path=MODEL_1, shape=(1, 1, 28, 28)))
    assert made.edits.text == MODEL_2.read_text(encoding="utf-8")
    assert [site.bn for site in made.plan.insert_sites] == [f"bn{i}" for i in range(1, 8)]
    assert made.plan.key_map == {}


def test_the_sample_network(edit: Edit) -> None:
    path = Path(__file__).parents[2] / "samples" / "seed_network.py"
    made = proved(edit(path=path, name="seed_network", shape=(1, 1, 28, 28)))
    widths = [line for line in made.added if "BatchNorm" in line]
    assert widths == [f"nn.BatchNorm2d({n})," for n in (16, 32, 64, 32, 32, 32, 10)]


def test_options_are_written_where_they_are_not_the_default(edit: Edit) -> None:
    made = proved(edit(HEAD + STYLES["functional"][0], eps=1e-3, momentum=0.2, affine=False))
    assert made.added[0] == "self.bn1 = nn.BatchNorm2d(4, eps=0.001, momentum=0.2, affine=False)"


def test_linear_layers_and_sync(edit: Edit) -> None:
    code = """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(3, 4)

    def forward(self, x):
        return F.relu(self.fc1(x))
"""
    made = proved(edit(HEAD + code, shape=(2, 3), linear=True))
    assert made.added[0] == "self.fc1_bn = nn.BatchNorm1d(4)"
    assert "nn.SyncBatchNorm(4)" in edit(HEAD + code, shape=(2, 3), linear=True, sync=True).edits.text


@pytest.mark.parametrize("newline", ["\r\n", "\n"])
@pytest.mark.parametrize("indent", ["\t", "  "])
def test_newlines_tabs_marks_and_encodings_stay(edit: Edit, newline: str, indent: str) -> None:
    code = (HEAD + STYLES["functional"][0]).replace("    ", indent).replace("keep me", "bleib größer")
    old = f"# -*- coding: latin-1 -*-\n{code}".replace("\n", newline).encode("latin-1")
    made = proved(edit(old))
    new = made.file.encoded(made.edits.text)
    assert new.count(newline.encode()) == new.count(b"\n") == old.count(b"\n") + 1
    assert f"{indent * 2}self.bn1 = nn.BatchNorm2d(4){newline}".encode() in new
    assert "größer".encode("latin-1") in new
    marked = b"\xef\xbb\xbf" + (HEAD + STYLES["functional"][0]).encode()
    made = edit(marked)
    assert made.file.encoded(made.edits.text).startswith(b"\xef\xbb\xbfimport torch")


@pytest.mark.parametrize("style", ["functional", "sequential on many lines", "ordered dict of pairs"])
def test_a_second_run_finds_nothing_to_do(edit: Edit, style: str) -> None:
    again = edit(edit(HEAD + STYLES[style][0]).edits.text)
    assert again.added == []
    assert not again.plan


def test_old_weights_find_their_places(edit: Edit) -> None:
    made = edit(HEAD + STYLES["sequential on many lines"][0])
    assert made.plan.key_map == {
        "features.2.weight": "features.3.weight",
        "features.2.bias": "features.3.bias",
        "features.4.weight": "features.6.weight",
        "features.4.bias": "features.6.bias",
    }
    assert isinstance(made.model, nn.Module)


@pytest.mark.parametrize(
    ("file", "name", "sites"), [("alexnet.py", "AlexNet", 5), ("squeezenet.py", "SqueezeNet", 26)]
)
def test_torchvisions_own_files(edit: Edit, tmp_path: Path, file: str, name: str, sites: int) -> None:
    models = pytest.importorskip("torchvision.models")
    text = (Path(models.__file__).parent / file).read_text(encoding="utf-8")
    # Outside its package, and without the registry, where these names stand already.
    text = text.replace("from ..", "from torchvision.").replace("from ._", "from torchvision.models._")
    path = tmp_path / f"copied_{file}"
    path.write_text(text.replace("@register_model()\n", ""), encoding="utf-8")
    made = proved(edit(path=path, name=name, shape=(1, 3, 64, 64)))
    assert len(made.edits.lines) == sites
    if name == "SqueezeNet":
        assert "self.squeeze_bn = nn.BatchNorm2d(squeeze_planes)" in made.added
        assert "final_conv, nn.BatchNorm2d(self.num_classes), nn.ReLU" in made.edits.text
        assert made.edits.text.count("nn.BatchNorm2d(96)") == made.edits.text.count("nn.BatchNorm2d(64)") == 1
