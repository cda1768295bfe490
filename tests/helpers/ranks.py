"""Several processes on the CPU that share a task as those of a launcher do, forked from the test: nothing is loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from helpers.waiting import until


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in names.items()}}


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """A port that no other process is given inside the block; whoever knows it can listen there."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield int(keeper.getsockname()[1])


def together(work: Callable[[int], Any], folder: Path, size: int = 2, join: bool = True) -> list[Any]:
    """What `work(rank)` returns in `size` processes; one that fails ends the others, and the test."""
    folder.mkdir(parents=True, exist_ok=True)
    with kept_port() as port:
        children = [_forked(partial(_share, work, folder, rank, size, port, join)) for rank in range(size)]
        codes: dict[int, int] = {}

        def step() -> bool:
            for child in {*children} - {*codes}:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
            return len(codes) == size or any(codes.values())

        try:
            until(step, "all processes ended")
        finally:
            for child in {*children} - {*codes}:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    ends = [codes.get(child) for child in children]
    assert ends == [0] * size, f"processes ended with {ends} (None: then still at work)"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _forked(work: Callable[[], None]) -> int:
    if child := os.fork():
        return child
    code = 70
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _share(work: Callable[[int], Any], folder: Path, rank: int, size: int, port: int, join: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, size, port)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if join:
        from loracurve.system.distributed import join as meet

        meet()
    result = work(rank)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if join:
        # The first keeps the store: it stays until all have met, however short the work was.
        with contextlib.suppress(RuntimeError):
            torch.distributed.barrier()
