from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bntool.core.errors import LoadError, UsageError
from bntool.experiment import training
from bntool.experiment.checkpoints import Progress
from bntool.experiment.failures import where_it_began
from bntool.experiment.randomness import random_state, random_state_kept, seed_everything
from bntool.experiment.samples import Data, Streamed
from bntool.experiment.settings import Settings, seed_for
from bntool.experiment.training import Trial, batch_bounds, train
from bntool.experiment.watching import Places, Watcher
from bntool.runtime.process_group import World
from tests.experiment.nets import classifier, thirds

SETTINGS = Settings(epochs=2, batch_size=20, lrs=(0.05,), watch_every=3)


def run(
    folder: Path,
    model: nn.Module | None = None,
    data: Data | None = None,
    settings: Settings = SETTINGS,
    tell: Any = None,
    lr: float = 0.05,
) -> tuple[nn.Module, Progress]:
    folder.mkdir(exist_ok=True)
    model = classifier(dropout=0.2) if model is None else model
    progress = train(
        model,
        thirds() if data is None else data,
        settings,
        Trial(
            lr,
            7,
            Watcher(model, Places((), {"0": "0.weight"}), settings.watched_steps(10)),
            folder / "run.pt",
        ),
        world=World(),
        tell=tell,
    )
    return model, progress


def test_a_run_is_the_loop_that_anyone_would_write(tmp_path: Path) -> None:
    model, progress = run(tmp_path, classifier())
    data, bare = thirds(), classifier()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(seed_for(7, "order", epoch))
        total = 0.0
        for part in torch.randperm(96, generator=generator).split(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(bare(data.train.inputs[part]), data.train.labels[part])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
        losses.append(total / 96)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))
    assert [figures["train_loss"] for figures in progress.history] == losses
    with torch.no_grad():
        hits = (bare.eval()(data.test.inputs).argmax(1) == data.test.labels).sum()
    assert progress.history[-1]["test_accuracy"] == float(hits) / 48


def test_log_probabilities_train_like_logits(tmp_path: Path) -> None:
    logits, _ = run(tmp_path / "a", classifier())
    log_probabilities, _ = run(tmp_path / "b", nn.Sequential(*classifier(), nn.LogSoftmax(1)))
    for a, b in zip(logits.parameters(), log_probabilities.parameters(), strict=True):
        # log-softmax of a log-softmax differs by the roundings of ten steps on values of about 1.
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_a_run_that_was_stopped_goes_on_to_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, stop: int
) -> None:
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, schedule="cosine")
    whole, figures = run(tmp_path / "whole", settings=settings)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)

    def interrupt(progress: Progress, steps: int) -> None:
        if progress.epoch * steps + progress.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", settings=settings, tell=interrupt)
    rest, resumed = run(tmp_path / "cut", settings=settings)
    assert resumed == figures
    assert [record["step"] for record in resumed.records] == [0, 3, 6, 9]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


KILLED = """
import os, signal, sys
from pathlib import Path
from bntool.experiment import training
from tests.experiment.test_training import run, shaky

training.CHECKPOINT_SECONDS = -1.0

def kill(progress, steps):
    if progress.epoch * steps + progress.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), data=shaky(), tell=kill)
"""


class Noisy(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Augmentation by every generator that people draw from."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.targets = samples.labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = torch.randn(()) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.samples.inputs[i] + noise, int(self.samples.labels[i])


def shaky() -> Data:
    data = thirds()
    return dataclasses.replace(data, train=Streamed(Noisy(data.train)))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a system without SIGKILL")
def test_a_run_that_was_killed_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    step = random.Random(0).randrange(2, 10)
    words = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    held = torch.load(tmp_path / "run.pt", weights_only=True)["progress"]
    assert held["epoch"] * 5 + held["step"] == step - 1
    rest, resumed = run(tmp_path, data=shaky())
    whole, figures = run(tmp_path / "whole", data=shaky())
    assert resumed == figures
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert [path.name for path in tmp_path.glob("*.pt")] == ["run.pt"]


def test_a_run_that_is_done_is_read_and_not_run(tmp_path: Path) -> None:
    model, first = run(tmp_path)

    def never(*_: Any) -> None:
        raise AssertionError("it ran again")

    again, second = run(tmp_path, tell=never)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(LoadError, match=r"run\.pt cannot be read") as caught:
        run(tmp_path)
    assert "remove it" in caught.value.next_step


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(LoadError, match="another model"):
        run(tmp_path, nn.Sequential(*classifier(), nn.Linear(3, 3)))


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path: Path) -> None:
    model, progress = run(tmp_path, lr=1e12)
    assert progress.diverged is not None
    assert progress.diverged["loss"] in ("NaN", "infinite")
    assert progress.diverged["epoch"] == 1
    assert 1 < progress.diverged["step"] <= 5
    layer = progress.diverged["layer"]
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    assert layer in {name.rpartition(".")[0] for name in bad} or "output" in progress.diverged["what"]
    assert run(tmp_path, lr=1e12)[1] == progress


def test_the_layer_at_which_it_began() -> None:
    model = classifier()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    assert where_it_began(model, torch.ones(2, 1, 9, 9)) == ("2", "its weight is not finite")
    assert where_it_began(classifier(), torch.full((2, 1, 9, 9), torch.inf))[0] == "0"
    layer, what = where_it_began(classifier(), torch.ones(2, 1, 9, 9))
    assert (layer, what[:8]) == ("", "the loss")


class Hungry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            torch.empty(1 << 55)
        return self.inner(x)  # type: ignore[no-any-return]


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too little memory to train on a batch of 20x1x9x9") as caught:
        run(tmp_path, Hungry())
    assert "--batch-size" in caught.value.next_step


def test_a_model_that_fails_on_a_batch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model fails on a batch of 20x1x9x9"):
        run(tmp_path, nn.Sequential(nn.Conv2d(2, 3, 3)))


def test_labels_beyond_the_outputs_of_a_streamed_dataset(tmp_path: Path) -> None:
    data = dataclasses.replace(shaky(), classes=2, labels=None)
    with pytest.raises(UsageError, match="a label is 2, and the model tells 2 classes apart"):
        run(tmp_path, data=data)


def test_a_last_sample_by_itself_joins_the_batch_before() -> None:
    assert batch_bounds(5, 2) == [(0, 2), (2, 5)]
    assert batch_bounds(6, 2) == [(0, 2), (2, 4), (4, 6)]
    assert batch_bounds(1, 2) == [(0, 1)]


def test_the_generators_of_the_caller_are_as_they_were(tmp_path: Path) -> None:
    before = random_state()
    run(tmp_path, data=shaky())
    with random_state_kept():
        seed_everything(3)
        random.random()
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["numpy"][2:] == after["numpy"][2:]
