"""Fuzz the targets for a while each: `python -m fuzz.run [TARGET ...]`, from the folder tests.

FUZZ_SECONDS (60) is the time of a target, FUZZ_WORKERS (2) how many run at a time, FUZZ_SEED (of the day) where the
draws begin. A fault is any end but a UserError of one line or a valid read: another exception, more than the target's
time, more than 2 GiB, a file written. Its input is kept in fuzz/corpus/TARGET, which the ordinary tests read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fuzz.limits import little_memory, read_or_refused
from fuzz.targets import TARGETS, Target, make_world, seen

__all__ = ["CORPUS", "main", "tried"]

CORPUS = Path(__file__).parent / "corpus"

LARGEST_KEPT = 2**16

# Beyond its time, for the start and the last file.
GRACE = 120


def tried(target: Target, content: bytes, world: Path, before: dict[str, Any]) -> tuple[bool, str | None]:
    """Read a changed file; returns whether it was read, and what is wrong about how that went, if anything."""
    target.file.write_bytes(content)
    refused: str | None = ""
    try:
        refused = read_or_refused(target.read, target.seconds)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/loracurve/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
        return False, f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"
    if written := sorted(changed(before, seen(world, target))):
        return refused is None, f"written: {', '.join(written[:3])}"
    return refused is None, None


def changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def fuzz(name: str, world: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Change and read one target's file until the time is up; returns counts, and a line for each kind of fault."""
    target = TARGETS[name](world)
    seeds = [target.file.read_bytes(), *(p.read_bytes() for p in sorted((CORPUS / name).glob("*")))]
    said = quiet(lambda: read_or_refused(target.read, target.seconds))
    assert said is None, f"{name}: the real file is refused: {said}"
    before, draw = seen(world, target), random.Random(f"{seed} {name}")
    counts, faults = {"read": 0, "refused": 0}, {}
    ends = time.monotonic() + seconds
    with little_memory():
        while time.monotonic() < ends:
            content = target.mutation(draw.choice(seeds), draw)
            if draw.randrange(4) == 0:
                content = target.mutation(content, draw)
            read, fault = quiet(lambda: tried(target, content, world, before))  # noqa: B023
            counts["read" if read else "refused"] += 1
            if fault is not None and (kind := fault.partition(": ")[0]) not in faults:
                faults[kind] = f"{fault} [{keep(name, content)}]"
            if fault is not None and fault.startswith("written"):
                before = seen(world, target)
    target.close.close()
    return {"name": name, **counts, "faults": list(faults.values())}


def quiet(work: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


def keep(name: str, content: bytes) -> str:
    """Put an input into the corpus, unless it is large; returns where it is."""
    folder = CORPUS / name if len(content) <= LARGEST_KEPT else Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(content).hexdigest()[:12]
    path.write_bytes(content)
    return str(path)


def apart(name: str, made: Path, folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Fuzz one target in a process and a world of its own; a process that ends or hangs is a fault."""
    world = Path(shutil.copytree(made, folder / name))
    words = [sys.executable, "-m", "fuzz.run", "--one", name, str(world), str(seconds), str(seed)]
    log = folder / f"{name}.log"
    with log.open("w") as errors, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            out, _ = process.communicate(timeout=seconds + GRACE)
            return dict(json.loads(out.splitlines()[-1]))
        except (subprocess.TimeoutExpired, IndexError, ValueError):
            process.kill()
            process.wait()
            tail = " ".join(log.read_text(errors="replace").split())[-300:]
            ended = f"the process ended or hung (code {process.returncode}): {tail}"
            with contextlib.suppress(Exception):
                ended += f" [{keep(name, TARGETS[name](world).file.read_bytes())}]"
            return {"name": name, "read": 0, "refused": 0, "faults": [ended]}


def main(words: list[str]) -> int:
    """Returns 0 where nothing was found, 1 otherwise."""
    logging.disable(logging.CRITICAL)
    if words[:1] == ["--one"]:
        name, world, seconds, seed = words[1:]
        with contextlib.chdir(world):
            found = fuzz(name, Path(world), float(seconds), int(seed))
        print(json.dumps(found), flush=True)
        os._exit(0)  # threads of a server that was refused memory may not end
    if unknown := set(words) - TARGETS.keys():
        print(f"expected targets of {', '.join(TARGETS)}, found {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    seconds, workers = float(os.environ.get("FUZZ_SECONDS", "60")), int(os.environ.get("FUZZ_WORKERS", "2"))
    seed = int(os.environ.get("FUZZ_SEED", time.strftime("%Y%m%d")))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        made = folder / "made"
        quiet(lambda: make_world(made))
        faults = 0
        with ThreadPoolExecutor(workers) as pool:
            for found in pool.map(lambda name: apart(name, made, folder, seconds, seed), words or TARGETS):
                print(f"{found['name']:20}{found['read']:8} read{found['refused']:8} refused", flush=True)
                for line in found["faults"]:
                    print(f"  FAULT {line}", flush=True)
                faults += len(found["faults"])
    print(f"{faults} kinds of faults (FUZZ_SEED={seed})")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
