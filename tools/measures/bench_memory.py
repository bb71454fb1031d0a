"""The most that a process holds while it folds a net: run by `make bench` as a process of its own."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from bench_nets import net, usual_input

import bntool

PAGE_SIZE = 4096


def held() -> int:
    """What this process holds in memory now, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_SIZE


@contextlib.contextmanager
def peak(into: dict[str, int], name: str) -> Iterator[None]:
    """Note the most that is held meanwhile, beyond what is held now."""
    before, most, done = held(), [held()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], held())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        into[name] = most[0] - before


def main() -> None:
    torch.set_num_threads(1)
    small = torchvision.models.resnet18().eval()
    bntool.fold(small, torch.randn(1, 3, 64, 64))  # imports, and what allocators take for good
    model = net(sys.argv[1])
    image = usual_input(model)
    found = {"weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers()))}
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(image),
        "unchecked": lambda: bntool.fold(model, image, check="none"),
        "proved": lambda: bntool.fold(model, image),
    }
    name = sys.argv[2]
    with peak(found, name), torch.no_grad():
        calls[name]()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
