"""Several processes on the CPU that share a task as those of a launcher do, forked from the test: nothing is loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from helpers.waiting import SECONDS


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in names.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def together(work: Callable[[int], Any], folder: Path, size: int = 2, join: bool = True) -> list[Any]:
    """What `work(rank)` returns in `size` processes; a failed or hanging one fails the test."""
    port, children = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        code = 70
        try:
            torch.set_num_threads(1)
            os.environ |= environment(rank, size, port)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            if join:
                from loracurve.system.distributed import join as meet

                meet()
            result = work(rank)
            (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
            code = 0
            if join:
                # The first keeps the store: it stays until all have met, however short the work was.
                with contextlib.suppress(RuntimeError):
                    torch.distributed.barrier()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    codes: list[int | None] = [None] * size
    with ThreadPoolExecutor(size) as pool:
        ends = [pool.submit(os.waitpid, child, 0) for child in children]
        wait(ends, SECONDS)
        for rank, (child, end) in enumerate(zip(children, ends, strict=True)):
            if end.done():
                codes[rank] = os.waitstatus_to_exitcode(end.result()[1])
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    assert codes == [0] * size, f"processes ended with {codes} (None: hung)"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]
