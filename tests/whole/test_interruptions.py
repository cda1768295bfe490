"""Ctrl-C once: one line, everything in order. Twice: the end at once. Terminals send it to the whole process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from helpers.kills import ended, forked
from helpers.made_runs import QUICK, Maker, command
from helpers.processes import end_group, ran, started
from helpers.suites import WORK, little
from helpers.waiting import SECONDS, until

from loracurve.baselines.single import Single
from loracurve.bench.config import SuiteTask
from loracurve.bench.provenance import plain
from loracurve.cli import main
from loracurve.system.folders import LOCK
from loracurve.system.tensors import read_tensors
from loracurve.training.config import LoopConfig

SAID = "loracurve: interrupted; the same command goes on (fit and quickstart: with --resume)\n"
LOUD = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
SLOW = ["--curve_training.steps=1000000", "--curve_training.checkpoint_every=1"]


def test_a_fit_that_is_interrupted_keeps_its_checkpoint_and_says_one_line(fitted: Maker, tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    words = ["fit", fitted.config("letter"), "--out", out, *QUICK, *SLOW]

    def program() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
        sys.argv, sys.stderr = ["loracurve", *map(str, words)], os.fdopen(2, "w", buffering=1)
        sys.exit(main())

    child = forked(program)
    try:
        until(
            (out / "training" / "checkpoint.json").is_file,
            "a checkpoint",
            lambda: psutil.Process(child).status() != psutil.STATUS_ZOMBIE,
        )
        os.killpg(child, signal.SIGINT)
        code = ended(child)
    finally:
        end_group(child)
    assert code == 130 and said.read_text() == SAID
    assert not (out / LOCK).exists() and not [*out.rglob(".*.tmp")]
    state = json.loads((out / "training" / "checkpoint.json").read_text())
    assert read_tensors(out / "training" / state["tensors"])


TWICE = """
import os, signal, sys
from loracurve import cli

def work(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            signal.pause()
    finally:
        print("in order", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            signal.pause()

cli._run = work
sys.exit(cli.main())
"""


def test_a_second_interruption_ends_the_process_while_the_first_is_handled() -> None:
    done = ran([sys.executable, "-c", TWICE])
    assert (done.returncode, done.stdout, done.stderr) == (130, "in order\n", "")


def test_a_caller_in_python_has_its_own_handler_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    command("--version")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_suite_in_several_processes_ends_with_all_of_them(tmp_path: Path) -> None:
    training = LoopConfig(steps=1_000_000, batch_size=4, learning_rate=1e-2, checkpoint_every=1)
    tasks = {"made": SuiteTask(scoring="label")}
    suite = little(tmp_path, training=training, tasks=tasks, methods={"one": Single()}, seeds=[0, 1])
    (tmp_path / "suite.yaml").write_text(json.dumps(plain(suite)))
    words = ["bench", tmp_path / "suite.yaml", "--out", tmp_path / "out", "--jobs", "2"]
    with started([sys.executable, "-m", "loracurve", *words], **LOUD) as process:
        until(
            lambda: len([*tmp_path.glob(f"out/anchors/made/*/{WORK}/checkpoint.json")]) == 2,
            "both processes train",
            lambda: process.poll() is None,
        )
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=SECONDS)
        psutil.wait_procs(workers, timeout=SECONDS)
    assert process.returncode == 130 and said[1].endswith(SAID) and "Traceback" not in said[1], said[1]
    assert not (tmp_path / "out" / LOCK).exists()
