"""P8: seconds of `loracurve quickstart`, packages and converted model in place."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, report, show


def main() -> None:
    options = arguments(__doc__)
    options.shape = "smollm2"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        start = time.perf_counter()
        command = [sys.executable, "-c", "from loracurve.cli import main; import sys; sys.exit(main(sys.argv[1:]))"]
        done = subprocess.run([*command, "quickstart", "--out", str(out)], capture_output=True, text=True)
        figures: dict[str, Any] = {"s": time.perf_counter() - start}
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            figures = {"not_measured": last}
        else:
            figures["parts_s"] = json.loads((out / "metrics.json").read_text())["seconds"]
    report("quickstart", options, figures)
    show("quickstart", figures)


if __name__ == "__main__":
    main()
