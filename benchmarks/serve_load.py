"""Load on `loracurve serve`: requests per second and latency by the number of clients, and memory over many requests.

    python benchmarks/serve_load.py --run quickstart     # a fitted run; without --run one is made by the quickstart

Each client sends one row, waits for the answer and sends the next. Figures of a CPU are of that machine; ratios within
one run say more.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from common import arguments, note, report, show

from loracurve.tasks.word_sentiment import word_sentiment

COMMAND = [sys.executable, "-m", "loracurve.cli"]


async def ask(port: int, bodies: list[bytes], found: list[tuple[int, float]]) -> None:
    """One client on one connection; after a refusal it waits as long as it is told to, and comes again."""
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while bodies:
        body, wait = bodies.pop(), 0
        while wait >= 0:
            if wait:
                writer.close()
                await asyncio.sleep(wait)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            started = time.perf_counter()
            writer.write(head % len(body) + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length, again = re.search(r"content-length: (\d+)", answer), re.search(r"retry-after: (\d+)", answer)
            assert length is not None
            await reader.readexactly(int(length[1]))
            found.append((int(answer.split()[1]), time.perf_counter() - started))
            wait = int(again[1]) if again is not None else -1
    writer.close()


def load(server: psutil.Process, port: int, words: list[str], clients: int, requests: int) -> dict[str, Any]:
    """What so many clients see, and what they cost: seconds of the CPU do not count those that others take."""

    def cpu_s() -> float:
        return sum(server.cpu_times()[:2])

    async def all_of_them() -> list[tuple[int, float]]:
        texts = [words[i % len(words)] for i in range(requests)]
        bodies = [json.dumps({"rows": [{"text": text}]}).encode() for text in texts]
        found: list[tuple[int, float]] = []
        await asyncio.gather(*(ask(port, bodies, found) for _ in range(clients)))
        return found

    started, used = time.perf_counter(), cpu_s()
    found = asyncio.run(all_of_them())
    seconds, used = time.perf_counter() - started, cpu_s() - used
    answered = sorted(s for status, s in found if status == 200)
    return {
        "clients": clients,
        "requests": requests,
        "per_second": len(answered) / seconds,
        "per_cpu_second": len(answered) / used,
        "p50_s": statistics.median(answered),
        "p99_s": answered[min(int(0.99 * len(answered)), len(answered) - 1)],
        "statuses": dict(Counter(status for status, _ in found)),
    }


def main() -> None:
    begun = time.perf_counter()
    options = arguments(
        __doc__ or "",
        run={"type": Path, "help": "a fitted run (default: the quickstart's, made anew)"},
        clients={"type": int, "nargs": "+", "default": [1, 8, 32, 128]},
        rounds={"type": int, "default": 5, "help": "requests of each client"},
        many={"type": int, "default": 2000, "help": "requests for the figures of memory"},
        serve={"nargs": "*", "default": [], "help": "options of loracurve serve, without their leading --"},
    )
    options.shape = "smollm2"
    with tempfile.TemporaryDirectory() as folder:
        run = options.run
        if run is None:
            run = Path(folder) / "quickstart"
            subprocess.run([*COMMAND, "quickstart", "--out", str(run)], check=True, capture_output=True)
        words = [row.text or "" for row in word_sentiment(seed=0).rows("test")]
        extra = [f"--{option}" for option in options.serve]
        server = subprocess.Popen([*COMMAND, "serve", str(run), "--port=0", *extra], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = re.search(r":(\d+) ", server.stdout.readline())
            assert address is not None, "the server did not start"
            port, process = int(address[1]), psutil.Process(server.pid)

            def mib() -> float:
                return process.memory_info().rss / 2**20

            load(process, port, words, 1, 5)
            figures: dict[str, Any] = {"mib_after_5": mib(), "load": []}
            for clients in options.clients:
                figures["load"].append(load(process, port, words, clients, max(options.rounds * clients, 20)))
                show("serve_load", figures["load"][-1])
            figures["mib_after_load"], figures["mib"] = mib(), {}
            for done in range(0, options.many, 250):
                load(process, port, words, 32, 250)
                figures["mib"][done + 250] = mib()
                note(begun, f"{done + 250} requests by 32 clients: {mib():.0f} MiB")
        finally:
            server.terminate()
            server.wait()
    single = figures["load"][0]
    for found in figures["load"]:
        found["throughput_ratio"] = found["per_second"] / single["per_second"]
        found["cpu_ratio"] = found["per_cpu_second"] / single["per_cpu_second"]
        found["p99_ratio"] = found["p99_s"] / single["p50_s"]
    command = f"python benchmarks/serve_load.py --run quickstart --rounds {options.rounds} --many {options.many}"
    report("serve_load", options, figures, command)
    show("serve_load", figures)


if __name__ == "__main__":
    main()
