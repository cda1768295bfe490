"""Run benchmarks one after the other, each in a process of its own with a time limit, and make the table.

    python benchmarks/all.py training_step:7b points:7b anchors:smollm2 --limit 150

Names are scripts of this folder, with a shape after the colon. Options that are not known here go to every script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import CHECKED, check

HERE = Path(__file__).parent
DEFAULT = ["training_step", "points", "anchors", "whole_set:smollm2", "quickstart", "four_bit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=DEFAULT, help="NAME, NAME:SHAPE or NAME:SHAPE:SECONDS")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each where none are given")
    parser.add_argument("--out", default=str(HERE / "results"))
    options, others = parser.parse_known_args()
    os.environ[CHECKED] = json.dumps(check())
    for entry in options.names:
        name, shape, limit, *_ = [*entry.split(":"), "", ""]
        command = [sys.executable, "-W", "ignore", str(HERE / f"{name}.py"), "--out", options.out, *others]
        command += ["--shape", shape] if shape else []
        print(f"== {entry}", flush=True)
        start = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=float(limit or options.limit)).returncode
        except subprocess.TimeoutExpired:
            code = -1
        state = {0: "done", -1: "stopped at its time limit; what was measured is written"}.get(code, f"failed ({code})")
        print(f"== {entry}: {state} after {time.perf_counter() - start:.0f} s", flush=True)
    subprocess.run([sys.executable, str(HERE / "table.py"), "--out", options.out], check=False)


if __name__ == "__main__":
    main()
