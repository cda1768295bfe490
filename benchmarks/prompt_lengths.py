"""How many tokens the tasks of a suite have: what `full_size.py` and `cost.py` need to know of the data.

    python benchmarks/prompt_lengths.py --data DATA --tokenizer FOLDER

For each task the mean padded tokens of a row in a micro-batch of 1, 3 and 10 adapters (drawn and laid out as in
training on a GPU), and the tokens of all sets that a method predicts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from loracurve.bench.shared import open_sets
from loracurve.bench.suite import load_suite
from loracurve.inference.prediction import GPU_LENGTHS, GPU_TOKENS
from loracurve.tasks.batching import collate, evaluation_batches
from loracurve.tasks.encoding import Encoded
from loracurve.training.anchors import slot_seeds
from loracurve.training.config import LoopConfig
from loracurve.training.loop import batch_numbers
from loracurve.training.micro_batches import CAPTURED_LENGTHS

ADAPTERS, STEPS = (1, 3, 10), 50


def row_lengths(train: Encoded, config: LoopConfig) -> dict[str, float]:
    """Mean padded tokens of a row by the number of adapters trained side by side."""
    rows = -(-config.batch_size // config.accumulation)
    found = {}
    for adapters in ADAPTERS:
        lengths = []
        for step in range(STEPS):
            drawn = [batch_numbers(s, step, len(train), config.batch_size)[:rows] for s in slot_seeds(0, adapters)]
            numbers, slots = sum(drawn, []), [m for m in range(adapters) for _ in range(rows)]
            lengths.append(collate(train, numbers, 1, True, slots, CAPTURED_LENGTHS).input_ids.shape[1])
        found[str(adapters)] = sum(lengths) / STEPS
    return found


def predicted(encoded: Encoded) -> dict[str, int]:
    batches = evaluation_batches(encoded, GPU_TOKENS, pad_to=GPU_LENGTHS)
    return {"rows": len(encoded), "tokens": sum(b.tokens for b in batches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="paper")
    parser.add_argument("--data", required=True, help="folder of data sets")
    parser.add_argument("--tokenizer", required=True, help="folder or name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    suite = load_suite(options.suite, ["--data_folder", options.data])
    tasks: dict[str, Any] = {}
    for name in suite.tasks:
        task, sets = open_sets(suite, name, tokenizer, 4096)
        train, own = task.encode("train"), [len(e.prompt) for e in task.encode("train").examples]
        tasks[name] = {
            "train": {"rows": len(train), "mean_tokens": sum(own) / len(own), "most_tokens": max(own)},
            "row_tokens": row_lengths(train, suite.training_of(name, suite.seeds[0])),
            "sets": {k: predicted(v) for k, v in sets.items()},
        }
        print(name, tasks[name]["train"], tasks[name]["row_tokens"], flush=True)
    name = Path(options.tokenizer).name.split(".")[0]
    record = {"benchmark": "prompt_lengths", "suite": options.suite, "tokenizer": name, "tasks": tasks}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"prompt_lengths-{options.suite}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
