from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bntool.core.errors import ObserveError
from bntool.observe.inference import guesses, observe_inferred


def _shape(model: nn.Module, **options: bool) -> tuple[int, ...]:
    (tensor,) = next(guesses(model, **options)).args
    return tuple(tensor.shape)


@pytest.mark.parametrize(
    ("layer", "full", "small"),
    [
        (nn.Conv2d(3, 4, 3), (1, 3, 224, 224), (1, 3, 64, 64)),
        (nn.Conv2d(1, 4, 3), (1, 1, 28, 28), (1, 1, 28, 28)),
        (nn.Conv2d(16, 4, 3), (1, 16, 64, 64), (1, 16, 64, 64)),
        (nn.Conv1d(2, 4, 3), (1, 2, 1024), (1, 2, 256)),
        (nn.Conv3d(3, 4, 3), (1, 3, 16, 112, 112), (1, 3, 8, 64, 64)),
        (nn.ConvTranspose2d(8, 4, 3), (1, 8, 8, 8), (1, 8, 8, 8)),
        (nn.Linear(5, 2), (1, 5), (1, 5)),
        (nn.LSTM(5, 2), (1, 16, 5), (1, 16, 5)),
        (nn.Embedding(9, 2), (1, 16), (1, 16)),
        (nn.BatchNorm1d(6), (2, 6), (2, 6)),
        (nn.BatchNorm2d(6), (1, 6, 32, 32), (1, 6, 32, 32)),
        (nn.BatchNorm3d(6), (1, 6, 8, 8, 8), (1, 6, 8, 8, 8)),
    ],
)
def test_the_first_layer_tells_the_shape(
    layer: nn.Module, full: tuple[int, ...], small: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Identity(), layer)
    assert _shape(model) == full
    assert _shape(model, small=True) == small


def test_guesses_are_seeded_typed_and_say_where_they_come_from() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float64))
    first, again = next(guesses(model)), next(guesses(model))
    assert torch.equal(first.args[0], again.args[0])
    assert first.args[0].dtype == torch.float64
    assert first.origin == "inferred 1x3x224x224 from the first layer, 0"
    tokens = next(guesses(nn.Sequential(nn.Embedding(9, 2)))).args[0]
    assert tokens.dtype == torch.int64
    assert int(tokens.max()) < 9


def test_the_size_a_model_records_comes_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.default_cfg = {"input_size": (3, 48, 40)}
    assert _shape(model) == (1, 3, 48, 40)
    model.pretrained_cfg = {"input_size": "unknown"}
    assert _shape(model) == (1, 3, 48, 40)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.image_size = 72
    found = next(guesses(model))
    assert tuple(found.args[0].shape) == (1, 3, 72, 72)
    assert "configuration" in found.origin


def test_the_next_guess_is_tried_where_the_first_does_not_fit() -> None:
    # 28 pixels leave 13·13·4 features, 32 leave 15·15·4
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(15 * 15 * 4, 2))
    seen = observe_inferred(model)
    assert seen.inputs.shapes() == "1x1x32x32"
    assert "1x1x32x32" in seen.inputs.origin


def test_where_no_guess_fits_the_first_failure_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(ObserveError, match="1x1x28x28") as caught:
        observe_inferred(model)
    assert caught.value.where == "2"


def test_a_model_without_a_telling_layer_asks_for_an_input() -> None:
    with pytest.raises(ObserveError) as caught:
        observe_inferred(nn.Sequential(nn.ReLU()))
    assert "cannot infer" in caught.value.what
    assert "--input" in caught.value.next_step


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.conv(x) + other


def test_a_model_of_two_inputs_is_not_guessed() -> None:
    with pytest.raises(ObserveError, match="other"):
        observe_inferred(_TwoInputs(), small=True)


def test_a_lazy_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(ObserveError, match="lazy") as caught:
        observe_inferred(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)))
    assert "run the model once" in caught.value.next_step


def test_a_lazy_first_layer_is_refused_too() -> None:
    with pytest.raises(ObserveError, match="lazy"):
        observe_inferred(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_layers_that_are_made_in_another_order_than_they_run() -> None:
    """The head is the first layer of `__init__`; the one that refuses its guess is the first to run."""

    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Conv2d(8, 2, 1), nn.Conv2d(1, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    found = observe_inferred(HeadFirst().eval(), small=True)
    assert found.inputs.shapes() == "1x1x28x28"
    assert found.inputs.origin == "inferred 1x1x28x28 from the first layer, stem"
