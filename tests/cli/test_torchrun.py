"""`bntool calibrate` and `bntool compare` under torchrun."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.conftest import contents
from tests.experiment.nets import NET_CODE, write_npz

ROOT = Path(__file__).resolve().parents[2]
LINE = ("compare", "net.py:net", "--data", "data.npz", "--batch-size", "24", "--lr", "0.05", "--epochs", "2")
CALIBRATE = ("calibrate", "net.pt", "--data", "x.npy", "--batch-size", "3", "--input", "1x1x9x9")


def torchrun(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write_norms() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 3))
    torch.save(net.double(), "net.pt")
    np.save("x.npy", np.random.default_rng(0).normal(size=(20, 1, 9, 9)))


def test_two_machines_calibrate_as_one_process_does(bntool, folder: Path) -> None:
    """Two torchruns that meet at a port: to them, each is a machine."""
    write_norms()
    alone = bntool(*CALIBRATE, "--trust-pickle", "-o", "alone.pt", "--json")
    assert alone.code == 0, alone
    port = free_port()
    meeting = (
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=test",
        f"--rdzv-endpoint=localhost:{port}",
        "--local-addr=localhost",
    )
    job = (*meeting, "-m", "bntool", *CALIBRATE, "--trust-pickle", "-o", "together.pt")
    agents = [torchrun(*job), torchrun(*job)]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    out = "".join(text for text, _ in said)
    assert out.count("1 BatchNorm layer") == out.count("wrote       together.pt") == 1
    assert "2 processes, each with one of every 2 batches" in out
    one, both = (torch.load(name, weights_only=False).state_dict() for name in ("alone.pt", "together.pt"))
    for name, tensor in one.items():
        # float64 moments, merged in another order.
        torch.testing.assert_close(both[name], tensor, rtol=1e-12, atol=1e-12)


DYING = textwrap.dedent(
    """
    import os, signal
    import torch

    class Dies(torch.nn.Module):
        calls = 0

        def forward(self, x):
            Dies.calls += 1
            if os.environ.get("RANK") == "1" and Dies.calls > 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return x
    """
)


def test_a_killed_process_ends_the_job_and_leaves_whole_files(folder: Path) -> None:
    write_npz(folder)
    net = NET_CODE.replace("from torch import nn", DYING + "\nfrom torch import nn")
    (folder / "net.py").write_text(net.replace("nn.Flatten(),", "nn.Flatten(), Dies(),"))
    job = torchrun("--nproc-per-node=2", "-m", "bntool", *LINE)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1, out + err
    assert err.count("error: ") == 1, err
    assert re.search(r"error: (another process of the job has ended|the job was told to end)", err)
    assert "exitcode: -9" in re.sub(r"exitcode +:", "exitcode:", err)
    assert "epoch 1: loss" in out
    left = contents(folder)
    assert "net_compare/runs/plain-0.05-0.pt" in left
    assert not [name for name in left if ".tmp" in name or "compare.json" in name or "trained" in name]
    torch.load("net_compare/runs/plain-0.05-0.pt", weights_only=True)


def test_the_others_do_not_come(refused, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_norms()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    words = (*CALIBRATE, "--timeout", "1")
    refused(*words, code=8, says="the processes of the job do not find each other")
    refused(*words, "--json", code=8, says="rank 0 of 2, localhost:")


def test_a_comparison_goes_on_with_as_many_processes_as_it_began(bntool, refused, folder: Path) -> None:
    (folder / "net.py").write_text(NET_CODE)
    write_npz(folder)
    assert bntool(*LINE, "--lr", "1e30").code == 1
    path = folder / "net_compare" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "number_of_processes": 2}))
    refused(*LINE, code=2, says="another number of processes: 2 there, 1 here")


@pytest.mark.parametrize("command", ["insert", "summary", "fold"])
def test_what_one_process_does_is_not_done_once_by_each(
    refused, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    write_norms()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    refused(command, "net.pt", code=2, says=f"bntool {command} runs in one process, and torchrun started 2")
