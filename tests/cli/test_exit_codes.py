"""Every exit code of docs/reference/exit-codes.md, once."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bntool.cli import run
from bntool.core import errors
from tests.cli import nets
from tests.cli.conftest import Shell
from tools.docs.make_reference import EXIT_CODES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "exit-codes.md"


@pytest.fixture
def models(folder: Path) -> Path:
    nets.save(nets.plain(), "model.pt")
    nets.save(nets.normalised(), "model_bn.pt")
    return folder


def _line(bntool: Shell, *words: str) -> int:
    return bntool(*words, *nets.INPUT).code


def test_0_done(bntool: Shell, models: Path) -> None:
    assert _line(bntool, "fold", "model_bn.pt") == 0


def test_1_a_verification_failed(bntool: Shell, models: Path) -> None:
    assert _line(bntool, "verify", "model.pt", "model_bn.pt") == 1


def test_2_usage(bntool: Shell, models: Path) -> None:
    assert _line(bntool, "fold", "model_bn.pt", "--expot", "onnx") == 2


def test_3_cannot_load(bntool: Shell, models: Path) -> None:
    assert _line(bntool, "fold", "not-there.pt") == 3


def test_4_nothing_to_do(bntool: Shell, models: Path) -> None:
    assert _line(bntool, "fold", "model.pt") == 4


def test_5_no_device(bntool: Shell, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _line(bntool, "fold", "model_bn.pt", "--export", "onnx", "--device", "cuda") == 5


def test_6_export_failed(bntool: Shell, models: Path) -> None:
    assert _line(bntool, "export", "model.pt", "--opset", "3") == 6


def test_7_bad_state(bntool: Shell, models: Path) -> None:
    model = nets.normalised()
    with torch.no_grad():
        model[1].running_var[0] = float("nan")
    nets.save(model, "nan.pt")
    assert _line(bntool, "fold", "nan.pt") == 7


def test_8_processes_that_do_not_meet(models: Path) -> None:
    job = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    torch.save(torch.randn(4, 3, 12, 12), "images.pt")
    words = ["calibrate", "model_bn.pt", "--data", "images.pt", "--timeout", "1"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bntool", *words],
        env={**os.environ, **job, "PYTHONPATH": str(PAGE.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 8, done.stderr


class _Unwritable(io.StringIO):
    """A standard output that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 9), (errno.EBADF, 9), (errno.EPIPE, 141)])
def test_9_output_lost_141_no_reader(
    models: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setattr(sys, "stdout", _Unwritable(number))
    assert run(["fold", "model_bn.pt", *nets.INPUT]) == code


def _raising(error: BaseException) -> Callable[..., None]:
    def broken(*args: object, **options: object) -> None:
        raise error

    return broken


def test_10_nothing_shown(bntool: Shell, models: Path) -> None:
    model = nets.normalised()
    for parameter in list(model.parameters())[-2:]:
        parameter.data.zero_()
    nets.save(model, "silent.pt")
    assert _line(bntool, "fold", "silent.pt") == 10


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError(), 70), (BrokenPipeError(), 70), (KeyboardInterrupt(), 130)]
)
def test_70_a_bug_130_ctrl_c(
    bntool: Shell, models: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    from bntool.pipeline import surgeries

    monkeypatch.setattr(surgeries, "fold", _raising(error))
    assert _line(bntool, "fold", "model_bn.pt") == code


def test_the_page_the_manual_the_errors_and_these_tests_name_the_same_codes() -> None:
    documented = set(re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    tested = set(re.findall(r"_(\d+)(?=_[a-z])", " ".join(n for n in globals() if n.startswith("test_"))))
    raised = {str(e.exit_code) for e in vars(errors).values() if hasattr(e, "exit_code")}
    assert documented == tested == set(EXIT_CODES)
    assert raised <= documented
