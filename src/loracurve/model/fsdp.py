"""A base model spread over processes: each holds its part of every layer's frozen weights (FSDP2).

Control points stay whole in every process: they are small, and their gradients are summed once for each step.
"""

from __future__ import annotations

import os

import accelerate
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from loracurve.model.curve_model import CurveModel
from loracurve.system.distributed import world
from loracurve.system.errors import UserError

__all__ = ["asked_to_shard", "shard_base"]


def asked_to_shard() -> bool:
    """Whether the launcher asks for FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`).

    Raises:
        UserError: it asks for FSDP's first version.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"fsdp_version: expected 2, found {version}; launch with --fsdp_version 2")
    return True


def shard_base(model: CurveModel) -> None:
    """Spread the weights of the decoder layers over the processes; in one process nothing happens.

    A layer's weights are gathered when it runs and dropped again. Embeddings and head stay whole. Every process then
    takes the same number of forward passes; captured graphs, compiled layers, points folded into the weights and the
    perturbation `flat_lora` are not available.

    Raises:
        UserError: the model has no stack of layers that holds the curve, or weights that FSDP cannot split.
    """
    if world()[1] == 1 or model.runner.sharded:
        return
    stack = model.runner.replication.stack
    if stack is None:
        raise UserError(f"model.shard: expected a stack of layers, found none in {type(model.model).__name__}")
    layers = [*model.model.get_submodule(stack).children()]
    own = {p for layer in model.layers.values() for p in layer.factors().values()}
    weights = [p for layer in layers for p in layer.parameters() if p not in own]
    if not all(p.is_floating_point() for p in weights):
        raise UserError("model.shard: expected floating-point weights, found quantised ones; set it to false")
    mesh = init_device_mesh(accelerate.PartialState().device.type, (world()[1],))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=own)
    whole = own | {p for p in model.model.parameters() if p not in {*weights}}
    fully_shard(model.model, mesh=mesh, ignored_params=whole)
    model.to(torch.device(accelerate.PartialState().device))
    model.runner.sharded = True
    model.runner.forget_graphs()
