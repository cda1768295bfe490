"""What a result was made with: versions, device, threads."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loracurve.system.source import source

__all__ = ["environment"]


def environment(commit: str | None = None) -> dict[str, Any]:
    """Versions, device and threads, recorded beside every result.

    Args:
        commit: of the code, where it runs without its git folder.
    """
    own = source()
    versions: dict[str, str | None] = {}
    for package in ("loracurve", "torch", "transformers", "peft", "accelerate", "torchmetrics", "datasets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": sys.version.split()[0],
        "platform": platform.system(),
        "device": device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "commit": commit or (None if own.changed else own.commit),
        "code": own.sha256,
        "command": " ".join(["loracurve", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
