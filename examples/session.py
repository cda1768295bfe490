# %% [markdown]
# # A session, from data to abstaining
#
# A curve of adapters on a model so small that all of this takes seconds on one core: fine-tune anchors, look at the
# paths between them, train a curve, then calibrate its predictions and let it abstain. The model has random weights and
# the data are made here, so the numbers say how the pieces fit together and nothing about language models.

# %%
import json
import random
import tempfile
from pathlib import Path

import peft
import torch
from matplotlib import pyplot as plt

import loracurve as lc
from loracurve.bench.tiny_model import tiny_model
from loracurve.inference.calibration import apply_temperature
from loracurve.inference.metrics import accuracy, negative_log_likelihood, risk_coverage_curve
from loracurve.landscape.barriers import barrier_frame
from loracurve.landscape.paths import anchor_paths, curve_path, grid
from loracurve.landscape.scan import lay_out, scan_paths
from loracurve.report import plots
from loracurve.tasks.dataset import Row

# %% [markdown]
# ## Data
#
# Reviews that end in an adjective. Most adjectives decide the label; "fine" and "plain" do not, their label is a coin
# flip. The rows called *unseen* have adjectives that no training row has.

# %%
BAD, GOOD, OPEN, UNSEEN = (
    ["dull", "poor", "weak"],
    ["great", "lovely", "bright"],
    ["fine", "plain"],
    ["zesty", "quirky"],
)
OPENINGS = ["The film is", "It was", "A story that is", "I found it", "This one is rather"]
draw = random.Random(0)


def review(name: str, words: list[str]) -> dict[str, object]:
    word = draw.choice(words)
    label = 0 if word in BAD else 1 if word in GOOD else draw.randrange(2)
    return {"id": name, "text": f"{draw.choice(OPENINGS)} {word}", "label": label}


folder = Path(tempfile.mkdtemp())
for split, size in {"train": 120, "validation": 200, "test": 200}.items():
    lines = [json.dumps(review(f"{split}-{i}", BAD + GOOD + OPEN)) for i in range(size)]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
meta = {"name": "reviews", "task": "classification", "labels": ["negative", "positive"]}
(folder / "meta.json").write_text(json.dumps(meta))

base, tokenizer = tiny_model()
task = lc.load_task(lc.TaskConfig(data=str(folder), scoring="label"), tokenizer)
validation, test = task.encode("validation"), task.encode("test")
print(tokenizer.decode(test.examples[0].prompt))

# %% [markdown]
# ## Anchors and the paths between them
#
# Three adapters, fine-tuned side by side. The straight line between two of them in (A, B) may have a barrier; the same
# line between aligned adapters, and the one in Delta W, tell whether that is a matter of their rescaling freedom
# (gauge): (R A, B R^-1) is the same adapter as (A, B).

# %%
config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = lc.CurveModel(base, config, lc.CurveSpec.slots(3))
fine_tune = lc.LoopConfig(steps=70, batch_size=16, learning_rate=6e-3, evaluate_every=7)
result = lc.fit_anchors(model, task, fine_tune, progress=False)
anchors = model.control_points()
print("validation NLL of the anchors:", [round(x, 2) for x in result.validation_nll])

# %%
model.anchor(degree=2)  # aligned, and a curve through them whose inner points lie on the line
training = lc.FitConfig(steps=50, batch_size=16, learning_rate=2e-3, evaluate_every=5, points=2, share_points=True)
lc.fit(model, task, training, progress=False)

paths = anchor_paths(anchors, ["straight", "delta_w", "balanced+procrustes"], model.scalings)
paths["curve"] = curve_path(model)
splits = [lay_out(model, validation, "validation"), lay_out(model, test, "test")]
scan = scan_paths(model, paths, splits, {name: grid(path.segments, 9) for name, path in paths.items()})
axis = plots.paths(scan.frame(), plt.figure(figsize=(6, 3.6)).gca(), split="test")
axis.legend()

# %%
barriers = barrier_frame(scan, chosen_on="validation", tested_on="test")
print("highest barrier on test rows, nats:")
print(barriers.groupby("path", sort=False)["excess"].max().round(2).to_string())

# %% [markdown]
# ## The average, and what it does not know
#
# Ten points of the curve, averaged. The entropy of the average splits into what the data leave open (expected entropy)
# and what the points disagree about (mutual information), both in nats.

# %%
t, weights = lc.quadrature("uniform", points=10, segments=model.spec.segments)
calibration, tested = (lc.predict_split(model, rows, t, weights) for rows in (validation, test))
new = [Row(f"unseen-{i}", text=str(review("", UNSEEN)["text"])) for i in range(100)]
unseen = lc.predict_split(model, task.encode_rows(new, "unseen", labelled=False), t, weights)

known, truth = task.labels("validation"), task.labels("test")
print(f"test: accuracy {accuracy(tested.probs, truth):.2f}, NLL {negative_log_likelihood(tested.probs, truth):.2f}")
is_open = torch.tensor([str(row.text).split()[-1] in OPEN for row in task.dataset.rows("test")])
for name, part in {"decided": tested.index(~is_open), "open": tested.index(is_open), "unseen": unseen}.items():
    expected, information = part.expected_entropy.mean(), part.mutual_information.mean()
    print(f"{name:8} expected entropy {expected:.2f}, mutual information {information:.3f}")

# %% [markdown]
# ## Calibrate
#
# One temperature for the average, fitted on validation rows, and prediction sets that miss the label with a probability
# of at most 10 %. (Validation rows have chosen the trained state, too, so that guarantees hold only nearly. Keep rows
# apart for this where you can.)

# %%
temperature = lc.fit_temperature(calibration.log_probs, known)
tempered = [apply_temperature(p.log_probs, temperature).exp() for p in (calibration, tested)]
print(f"temperature {temperature:.2f}: test NLL {negative_log_likelihood(tempered[1], truth):.2f}")
sets = lc.prediction_sets(tempered[1], lc.conformal_quantile(tempered[0], known, alpha=0.1))
covered = sets[torch.arange(len(truth)), truth].double().mean()
print(f"prediction sets: {sets.sum(1).double().mean():.2f} labels on average, {covered:.2f} of them hold the true one")

# %% [markdown]
# ## Abstain
#
# The threshold on the entropy below which at most 5 % of the answers are wrong, with probability 90 % over the
# validation rows, and what it does on test rows.

# %%
rule = lc.selective_threshold(calibration.entropy, ~calibration.correct(known), risk=0.05, delta=0.1)
answered, wrong = rule.answered(tested.entropy), ~tested.correct(truth)
print(f"answered {answered.double().mean():.2f} of the test rows, {wrong[answered].double().mean():.2f} of them wrong")
print(f"answered {rule.answered(unseen.entropy).double().mean():.2f} of the rows with unseen adjectives")

coverage, risk = risk_coverage_curve(tested.entropy, wrong)
axis = plt.figure(figsize=(6, 3.2)).gca()
axis.plot(coverage, risk)
axis.axhline(rule.risk, color="grey", linestyle=":")
axis.set(xlabel="coverage: share of rows answered", ylabel="risk: error rate among them")
