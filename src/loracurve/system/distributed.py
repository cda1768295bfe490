"""Several processes with one task, as torchrun and `accelerate launch` start them: who does what, and who speaks.

Every process has the whole model (or its share of a sharded base) and takes its share of the examples. The main one, of
rank 0, alone locks, writes and prints. What is decided is decided from numbers that all have, so that all do the same.
In one process everything here does nothing. torch is imported where it is used: the command line asks who speaks before
it is loaded.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from loracurve.system.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "alone",
    "backend",
    "gathered",
    "is_launched",
    "is_main",
    "join",
    "leave",
    "main_holds",
    "on_main",
    "same_everywhere",
    "share",
    "speaks_first",
    "sum_over_processes",
    "told",
    "world",
]


T = TypeVar("T")

_alone = False

_FAULT, _TOLD = "loracurve/fault", "loracurve/told"


def world() -> tuple[int, int]:
    """The rank of this process, and how many share the work."""
    dist = sys.modules.get("torch.distributed")  # whoever met others has loaded it
    if _alone or dist is None or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_main() -> bool:
    """Whether this process writes and prints."""
    return world()[0] == 0


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def join() -> None:
    """Meet the other processes of the launcher, if there is one.

    Raises:
        UserError: fewer GPUs than processes on this machine.
    """
    if not is_launched():
        return
    import accelerate
    import torch

    place, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if 0 < gpus <= place:
        raise UserError(f"expected a GPU for each process, found {gpus} for process {place}; start {gpus} processes")
    accelerate.PartialState(cpu=not torch.accelerator.is_available())


def backend(device: torch.device) -> str | None:
    """How the processes talk about tensors on a device: gloo, nccl; None in one process."""
    if world()[1] == 1:
        return None
    import torch.distributed as dist

    return dict(entry.split(":") for entry in str(dist.get_backend_config()).split(",")).get(device.type)


def leave() -> None:
    """Part from the others, after all is done."""
    if not is_launched():
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process works as if it were the only one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(items: Sequence[T]) -> Sequence[T]:
    """What this process takes of `items`: every item has exactly one process, and shares differ by one at most."""
    rank, size = world()
    return items[rank::size]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up a tensor of all processes, in place; bit-equal everywhere."""
    if world()[1] > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def gathered(work: Callable[[], T]) -> list[T]:
    """What `work` returns in each of the processes, by rank, in all of them.

    Raises:
        UserError, ValueError: in all processes, where `work` raises one in any.
    """
    size = world()[1]
    if size == 1:
        return [work()]
    import torch.distributed as dist

    found: list[Any] = [None] * size
    try:
        own: tuple[Any, ValueError | None] = work(), None
    except ValueError as error:
        own = None, error
    dist.all_gather_object(found, own)
    fault = own[1] or next((error for _, error in found if error is not None), None)
    if fault is not None:
        raise fault
    return [value for value, _ in found]


def same_everywhere(tensors: Sequence[Tensor]) -> None:
    """Give all processes the main one's values, in place."""
    if world()[1] > 1:
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def on_main(work: Callable[[], object]) -> None:
    """Do `work` in the main process, alone, while the others wait for it.

    Raises:
        UserError: in all processes, where `work` raises one.
        RuntimeError: in the others, where it breaks in another way.
    """
    if world()[1] == 1:
        work()
        return
    import torch.distributed as dist

    fault: Exception | None = None
    if is_main():
        try:
            with alone():
                work()
        except Exception as error:  # the others must hear of it; it is raised below
            fault = error
    outcome = [None if fault is None else (isinstance(fault, UserError), str(fault))]
    dist.broadcast_object_list(outcome, src=0)
    if fault is not None:
        raise fault
    if outcome[0] is not None:
        of_user, text = outcome[0]
        raise UserError(text) if of_user else RuntimeError(f"the main process failed: {text}")


@contextmanager
def main_holds(make: Callable[[], Any]) -> Iterator[None]:
    """Inside the block the main process is inside the context that `make` returns; its UserError is raised in all."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(make()))
        yield


def speaks_first() -> bool:
    """Whether this process is the first of all with a fault, so that one and the same is told once.

    The others return once it was told (`told`), or after a minute: a launcher ends all when one has ended.
    """
    if world()[1] == 1:
        return True
    import torch.distributed as dist

    try:
        store = dist.distributed_c10d._get_default_store()
        if store.add(_FAULT, 1) == 1:
            return True
        store.wait([_TOLD], datetime.timedelta(seconds=60))
    except RuntimeError:  # the process that kept the store has ended, with a fault of its own
        pass
    return False


def told() -> None:
    """Say that the fault was told; the others may end."""
    if world()[1] > 1:
        import torch.distributed as dist

        with suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().set(_TOLD, "")
