"""Make the table of benchmarks/README.md from the JSON files: every goal with what was measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- table:start -->", "<!-- table:end -->"

# Name, what it is, file, path inside it, direction and goal.
ROWS: list[tuple[str, str, str, str, str, float]] = [
    ("P1", "curve step / PEFT step, 7B shapes, 8 x 256", "training_step-7b-cuda", "8x256/time_over_peft", "<=", 0.60),
    (
        "",
        "the same, PEFT with bfloat16 adapters",
        "training_step-7b-cuda",
        "8x256/time_over_peft_adapters_bf16",
        "<=",
        0.60,
    ),
    (
        "P2",
        "curve step 16 x 256: share of the matrix rate",
        "training_step-7b-cuda",
        "16x256/share_of_matrix_rate",
        ">=",
        0.65,
    ),
    ("P3", "8 points, one 128-token prompt: PEFT mixed / ours", "points-7b-cuda", "1x128/mixed_over_curve", ">=", 20),
    ("", "the same: time / floor", "points-7b-cuda", "1x128/curve_over_floor", "<=", 1.5),
    ("P4a", "10 points, whole data set, PEFT sorted / ours", "whole_set-smollm2-cuda", "sorted_over_ours", ">=", 2),
    ("P4b", "the same, PEFT in fixed rows / ours", "whole_set-smollm2-cuda", "fixed_rows_over_ours", ">=", 4),
    ("", "P4a at 7B shapes", "whole_set-7b-cuda", "sorted_over_ours", ">=", 2),
    ("", "P4b at 7B shapes", "whole_set-7b-cuda", "fixed_rows_over_ours", ">=", 4),
    ("P5", "3 anchors in one pass: PEFT / ours, GPU", "anchors-smollm2-cuda", "3_fine_tunes_over_ours", ">=", 8),
    ("", "the same on CPU cores", "anchors-smollm2-cpu", "3_fine_tunes_over_ours", ">=", 1.3),
    ("P6", "memory of a step / PEFT, 8 x 256", "training_step-7b-cuda", "8x256/memory_over_peft", "<=", 1.02),
    (
        "",
        "the same, PEFT with bfloat16 adapters",
        "training_step-7b-cuda",
        "8x256/memory_over_peft_adapters_bf16",
        "<=",
        1.02,
    ),
    ("P7", "step at S = 4 / S = 1, 7B shapes", "training_step-7b-cuda", "8x256/s4_over_s1_captured", "<=", 1.05),
    ("P8", "quickstart on two CPU cores, seconds", "quickstart-smollm2-cpu", "s", "<=", 180),
    ("P9", "4-bit base: curve step / PEFT QLoRA step", "four_bit-7b-cuda", "captured_over_peft", "<=", 1.0),
    ("P10", "training step 16 x 256, 7B shapes: one GPU / two", "scaling-7b-cuda", "2/training/speedup", ">=", 1.8),
    ("", "the same, one GPU / four", "scaling-7b-cuda", "4/training/speedup", ">=", 3.4),
    ("", "evaluation of a data set: one GPU / two", "scaling-7b-cuda", "2/evaluation/speedup", ">=", 1.8),
    ("", "the same, one GPU / four", "scaling-7b-cuda", "4/evaluation/speedup", ">=", 3.4),
    ("", "a suite's cells: one worker / four through Ray", "suite_time-smollm2-cuda", "ray/speedup", ">=", 3.4),
    (
        "P12",
        "ten points / their floor over a merged adapter's pipeline, all layers adapted, GPU",
        "predicting-smollm2-cuda",
        "all layers/10/over_floor",
        "<=",
        1.3,
    ),
    (
        "",
        "ten points / their floor over a merged adapter's pipeline, upper third adapted, GPU",
        "predicting-smollm2-cuda",
        "upper third/10/over_floor",
        "<=",
        1.3,
    ),
    (
        "",
        "ten points / their floor over a merged adapter's pipeline, all layers adapted, two CPU cores",
        "predicting-smollm2-cpu",
        "all layers/10/over_floor",
        "<=",
        1.3,
    ),
    (
        "",
        "ten points / their floor over a merged adapter's pipeline, upper third adapted, two CPU cores",
        "predicting-smollm2-cpu",
        "upper third/10/over_floor",
        "<=",
        1.3,
    ),
    (
        "",
        "a distilled adapter: sets of eight with an NLL within .003 of its curve's, taught by unlabelled texts too",
        "distilling-cuda",
        "within/unlabelled",
        ">=",
        6,
    ),
    (
        "",
        "the same: AUROC of foreign texts minus the curve's, by the part within points, lowest of seven pairs",
        "distilling-cuda",
        "lowest_auroc_within_minus_curve/unlabelled",
        ">=",
        0,
    ),
    (
        "P13",
        "Gaussians and distance at ten points / the curve's training",
        "unknowns-small-cpu",
        "build_curve_share",
        "<=",
        0.25,
    ),
    ("", "the same with the base's states", "unknowns-small-cpu", "build_base_share", "<=", 0.25),
    ("P14", "predictions with them / without", "unknowns-small-cpu", "predict_curve_over_without", "<=", 1.05),
    ("", "the same with the base's states", "unknowns-small-cpu", "predict_base_over_without", "<=", 1.15),
    (
        "P15",
        "step of 32 SST-2 texts at points of their own: packed / a row each",
        "real_lengths-7b-cuda",
        "sst2/packed_over_a_row_each",
        "<=",
        0.6,
    ),
    ("", "the same, AG News", "real_lengths-7b-cuda", "ag_news/packed_over_a_row_each", "<=", 0.7),
    ("", "SST-2, SmolLM2's shapes", "real_lengths-smollm2-cuda", "sst2/packed_over_a_row_each", "<=", 0.6),
    ("", "AG News, SmolLM2's shapes", "real_lengths-smollm2-cuda", "ag_news/packed_over_a_row_each", "<=", 0.7),
]


def find(value: Any, path: str) -> Any:
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def lines(results: Path) -> list[str]:
    out = ["| | measure | goal | measured | reached | device |", "|---|---|---|---|---|---|"]
    for name, text, file, path, direction, goal in ROWS:
        source = results / f"{file}.json"
        data = json.loads(source.read_text()) if source.exists() else {}
        value, device = find(data, path), find(data, "environment/device") or ""
        if value is None:
            shown, reached = data.get("not_measured", "not measured"), ""
        else:
            shown = f"{value:.3g}"
            reached = "yes" if (value <= goal if direction == "<=" else value >= goal) else "no"
        out.append(f"| {name} | {text} | {direction} {goal:g} | {shown} | {reached} | {device} |")
    return out


def write_table(page: Path, table: list[str]) -> None:
    """Put a table between the marks of a page."""
    text = page.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n" + "\n".join(table) + f"\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder with the JSON files")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    options = parser.parse_args()
    table = lines(options.out)
    print("\n".join(table))
    write_table(options.readme, table)


if __name__ == "__main__":
    main()
