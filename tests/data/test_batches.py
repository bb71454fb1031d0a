from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from bntool import open_batches
from bntool.core.errors import LoadError, UsageError
from bntool.data.loaders import inputs_of
from bntool.graph.inputs import Inputs

LIKE = Inputs((torch.zeros(1, 3, 8, 8),))


def sizes(batches):
    return [len(next(iter(inputs.tensors().values()))) for inputs in batches]


def whole(batches):
    return torch.cat([inputs.args[0] for inputs in batches])


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((9, 3, 8, 8))


# -- arrays --------------------------------------------------------------------------------------------------


def test_npy_is_cut_into_batches_of_the_models_type(tmp_path, images):
    np.save(tmp_path / "x.npy", images)
    batches = open_batches(tmp_path / "x.npy", batch_size=4, shuffle=False, like=LIKE)
    assert sizes(batches) == [4, 5]  # a last batch of one joins the one before
    assert sizes(batches) == [4, 5]  # and it can be read again
    assert whole(batches).dtype == torch.float32
    assert torch.equal(whole(batches), torch.from_numpy(images).float())
    assert sizes(open_batches(tmp_path / "x.npy", batch_size=4, like=LIKE, limit=1)) == [4]
    assert sizes(open_batches(tmp_path / "x.npy", batch_size=1, like=LIKE)) == [1] * 8 + [1]
    assert sizes(open_batches(tmp_path / "x.npy", batch_size=100)) == [9]


def test_npz_and_pt_find_the_array_that_fits(tmp_path, images):
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(9))
    torch.save((torch.from_numpy(images), torch.arange(9)), tmp_path / "pair.pt")
    torch.save({"y": torch.arange(9), "data": torch.from_numpy(images)}, tmp_path / "dict.pt")
    torch.save(torch.from_numpy(images), tmp_path / "plain.pt")
    for name in ("x.npz", "pair.pt", "dict.pt", "plain.pt"):
        found = whole(open_batches(tmp_path / name, like=LIKE))
        assert torch.equal(found, torch.from_numpy(images).float())


def test_several_inputs_go_by_their_names(tmp_path, images):
    np.savez(tmp_path / "x.npz", mask=images * 0, input=images)
    like = Inputs((torch.zeros(1, 3, 8, 8),), {"mask": torch.zeros(1, 3, 8, 8)})
    (inputs,) = open_batches(tmp_path / "x.npz", like=like)
    assert torch.equal(inputs.args[0], torch.from_numpy(images).float())
    assert not inputs.kwargs["mask"].any()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((9, 1, 8, 8)), r"9x1x8x8, and the model takes 1x3x8x8"),
        (np.zeros((3, 8, 8)), r"3x8x8, and the model takes 1x3x8x8"),
        (np.zeros((9, 3, 8, 8), dtype=np.uint8), "uint8, and the model takes float32"),
        (np.zeros((0, 3, 8, 8)), "no sample"),
        (np.float32(1.0), "no array of samples"),
        (np.zeros((9, 3, 8, 8), dtype="U1"), "of type <U1"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_when_it_is_opened(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UsageError, match=said):
        open_batches(tmp_path / "x.npy", batch_size=16, like=LIKE)


def test_arrays_that_cannot_be_told_apart_or_do_not_match(tmp_path, images):
    np.savez(tmp_path / "x.npz", a=images, b=images)
    with pytest.raises(UsageError, match=r"a 9x3x8x8, b 9x3x8x8"):
        open_batches(tmp_path / "x.npz", like=LIKE)
    np.savez(tmp_path / "y.npz", input_0=images, input_1=images[:4])
    with pytest.raises(UsageError, match="input_0 9, input_1 4"):
        open_batches(tmp_path / "y.npz", like=Inputs((torch.zeros(1, 3, 8, 8),) * 2))


def test_tokens_may_be_of_any_length(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 21), dtype=np.int32))
    like = Inputs((torch.zeros(1, 16, dtype=torch.long),))
    assert sizes(open_batches(tmp_path / "x.npy", like=like)) == [4]


def test_files_that_hold_no_data(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}]), allow_pickle=True)
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")
    (tmp_path / "x.csv").write_text("1,2\n")
    for name in ("x.npy", "model.pt", "x.csv"):
        with pytest.raises(LoadError) as caught:
            open_batches(tmp_path / name)
        assert caught.value.next_step
    with pytest.raises(LoadError, match="no such data"):
        open_batches(tmp_path / "missing.npy")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"limit": 0}])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(UsageError, match="is 0"):
        open_batches([], **wrong)


# -- images --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    red = np.zeros((20, 10, 3), dtype=np.uint8)
    red[..., 0] = 255
    image.fromarray(red).save(tmp_path / "images" / "b.png")
    image.fromarray(red[:8, :8, 1]).save(tmp_path / "images" / "deeper" / "a.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_images_are_scaled_cropped_and_normalised(folder):
    (inputs,) = open_batches(folder, like=LIKE)
    assert inputs.args[0].shape == (2, 3, 8, 8)
    expected = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1).expand(3, 8, 8)
    # the bilinear weights of a constant sum to 1 within a few roundings
    torch.testing.assert_close(inputs.args[0][0], expected, rtol=0, atol=16 * 2.0**-24)
    assert not inputs.args[0][1].any()
    (normed,) = open_batches(folder, like=LIKE, mean=[0.5], std=[0.5, 0.25, 0.125])
    assert normed.args[0][1, :, 0, 0].tolist() == [-1.0, -2.0, -4.0]


def test_images_become_gray_for_one_channel(folder):
    (inputs,) = open_batches(folder, like=Inputs((torch.zeros(1, 1, 8, 8),)))
    assert inputs.args[0].shape == (2, 1, 8, 8)


def test_without_pillow_the_error_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(LoadError, match="needs Pillow") as caught:
        list(open_batches(folder, like=LIKE))
    assert caught.value.next_step


def test_folders_that_cannot_serve(folder, tmp_path, images):
    with pytest.raises(UsageError, match="takes an input of unknown size"):
        open_batches(folder)
    with pytest.raises(UsageError, match="takes 1x5"):
        open_batches(folder, like=Inputs((torch.zeros(1, 5),)))
    with pytest.raises(UsageError, match=r"mean has 2 values, and the model.s input has 3"):
        open_batches(folder, like=LIKE, mean=[0.0, 0.0])
    with pytest.raises(UsageError, match="not positive"):
        open_batches(folder, like=LIKE, std=[0.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image"):
        open_batches(tmp_path / "empty", like=LIKE)
    (folder / "c.png").write_bytes(b"broken")
    with pytest.raises(LoadError, match=r"c\.png is no image"):
        list(open_batches(folder, like=LIKE))
    np.save(tmp_path / "x.npy", images)
    with pytest.raises(UsageError, match="for a folder of images"):
        open_batches(tmp_path / "x.npy", like=LIKE, mean=[0.0])


# -- loaders -------------------------------------------------------------------------------------------------


def test_named_loaders(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_loaders.py").write_text(
        "import torch\n"
        "fixed = [(torch.zeros(2, 3, 8, 8), 1)] * 3\n"
        "def made():\n    print('reading')\n    yield from fixed\n"
        "def broken():\n    yield fixed[0]\n    raise OSError('disk gone')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert sizes(open_batches("my_loaders:fixed", like=LIKE)) == [2, 2, 2]
    assert sizes(open_batches("my_loaders:made", like=LIKE, limit=2)) == [2, 2]
    assert sizes(open_batches(f"{tmp_path / 'my_loaders.py'}:fixed", like=LIKE)) == [2, 2, 2]
    assert "reading" not in capsys.readouterr().out
    with pytest.raises(LoadError, match="OSError: disk gone"):
        list(open_batches("my_loaders:broken", like=LIKE))
    with pytest.raises(LoadError, match="has no nothing"):
        open_batches("my_loaders:nothing")
    sys.modules.pop("my_loaders")


def test_iterables_are_checked_too():
    batches = [torch.zeros(2, 3, 8, 8, dtype=torch.float64), (torch.zeros(1, 4, 8, 8), 0)]
    reader = iter(open_batches(batches, like=LIKE))
    assert next(reader).args[0].dtype == torch.float32
    with pytest.raises(UsageError, match=r"1x4x8x8, and the model takes 1x3x8x8"):
        next(reader)
    with pytest.raises(UsageError, match="holds several arrays"):
        list(open_batches([{"a": torch.zeros(1), "b": torch.zeros(1)}], like=LIKE))
    with pytest.raises(UsageError, match="the loader gives"):
        list(open_batches(3))


def test_what_one_batch_may_be():
    one = torch.zeros(2, 3)
    model = nn.Linear(3, 3)
    for item in (one, (one, 1), [one], one.numpy(), Inputs((one,))):
        (inputs,) = inputs_of(model, [item])
        assert torch.equal(inputs.args[0], one)
    (inputs,) = inputs_of(nn.Bilinear(3, 3, 1), [(one, one + 1, "label")])
    assert len(inputs.args) == 2
    with pytest.raises(UsageError, match="a tuple of 1, and the model takes 2"):
        list(inputs_of(nn.Bilinear(3, 3, 1), [(one,)]))
