"""Cells spread over a Ray cluster. What Ray loses, a worker or a whole node, it runs again somewhere else.

A cell that is run again goes on from its checkpoints, and one that had just been stored is left as it is. The store's
folder, and data and models that are folders, must be the same on all nodes, and so must the current folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch

from loracurve.bench.cells import Outcome, Result, Say, run_cell
from loracurve.bench.config import SuiteConfig
from loracurve.bench.pool import spread
from loracurve.bench.store import record_of
from loracurve.bench.suite import Cell
from loracurve.system.errors import UserError, one_line
from loracurve.system.folders import remove_leftovers

__all__ = ["import_ray", "run_on_ray", "shares"]


RETRIES = 3
"""Times that a cell is run again because its worker or node was lost."""


def run_on_ray(
    suite: SuiteConfig,
    cells: list[Cell],
    out: Path,
    jobs: int,
    end: float | None,
    say: Say,
    address: str | None = None,
) -> dict[Cell, Outcome]:
    """Run cells as tasks of a Ray cluster; each group's first cell trains its anchors, the others follow it.

    Args:
        jobs: cells at a time; 0: one for each GPU of the cluster, or for each node of one without GPUs.
        address: of the cluster, `auto` for one that was started on this machine. Default: what RAY_ADDRESS says, else
            a cluster of this machine alone that ends with the suite.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    ray = import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Cells are the work: they do not stand back behind whatever else runs here, as Ray's workers do.
        os.environ.setdefault("RAY_worker_niceness", "0")
        local = {"num_cpus": max(os.cpu_count() or 1, jobs), "object_store_memory": 10**8, "include_dashboard": False}
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # Ray's own default is without end
    try:
        ray.init(address, logging_level="error", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"address: expected that of a running Ray cluster, found {address!r}: {one_line(error, 200)}; start one "
            "with 'ray start', or leave the option out"
        ) from error
    try:
        jobs, wanted = shares(ray.nodes(), jobs)
        task = ray.remote(max_retries=RETRIES, **wanted)(_task)

        def submit(place: int, cell: Cell) -> Future[Result]:  # Ray chooses the place
            reference = task.options(name=str(cell)).remote(suite, cell, out.resolve(), os.getcwd())
            return cast("Future[Result]", reference.future())

        return spread(cells, jobs, submit, end, say)
    finally:
        ray.shutdown()
        remove_leftovers(out)


def import_ray() -> Any:
    """The package, which is an extra."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "executor ray: expected the package ray, found none; install it with pip install 'loracurve[ray]'"
        ) from error
    return ray


def shares(nodes: Sequence[Mapping[str, Any]], jobs: int) -> tuple[int, dict[str, float]]:
    """How many cells run at a time, and what each of them takes, so that each node holds its part of them.

    Args:
        nodes: as `ray.nodes()` lists them.
        jobs: cells at a time; 0: one for each GPU, or for each node where there are no GPUs.

    Returns:
        The number of cells, and `num_cpus` and, where there are GPUs, `num_gpus` of one.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not alive:
        raise UserError("expected a Ray cluster with CPUs, found none in it; start a node with 'ray start'")
    gpus = any(resources.get("GPU", 0) for resources in alive)
    places = [(r["CPU"], r.get("GPU", 0) if gpus else 1) for r in alive if not gpus or r.get("GPU", 0)]
    total = int(sum(count for _, count in places))
    jobs = jobs or total
    on_each = -(-jobs // total)
    wanted = {"num_cpus": float(max(min(cpus // (count * on_each) for cpus, count in places), 1))}
    return jobs, wanted | ({"num_gpus": 1 / on_each} if gpus else {})


def _task(suite: SuiteConfig, cell: Cell, out: Path, folder: str) -> Result:
    """On a node: run one cell, unless an earlier worker was lost between storing it and saying so."""
    os.chdir(folder)  # relative names mean the same everywhere
    if (record := record_of(suite, cell, out)) and record["status"] == "done":
        return "done", [f"{cell}: done by a worker that was lost"]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which Ray sets to the cell's share
    return run_cell(suite, cell, out)
