"""Detection of other sets, by the tables of a suite: mean AUROC over all of them, and how often a reference is beaten.

python results/detection.py final "ensemble 3, five units"
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

name, reference = sys.argv[1:]
tables = Path(__file__).parent / name / "tables"
auroc = pd.read_csv(tables / "detection.csv")
auroc = auroc[auroc["set"].str.startswith("ood:")]
print(auroc.groupby(["score", "method"], sort=False)["AUROC"].agg(["mean", "count"]).round(3).to_string())
paired = pd.read_csv(tables / "detection_differences.csv")
paired = paired[(paired["reference"] == reference) & paired["set"].str.startswith("ood:")]
paired["better"], paired["worse"] = paired["AUROC low"] > 0, paired["AUROC high"] < 0
print(f"\nagainst {reference}")
print(paired.groupby(["score", "method"], sort=False)[["better", "worse"]].sum().to_string())
