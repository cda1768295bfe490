"""Suites are parsed: shipped ones, those of the evidence, profiles, and faults in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.places import ROOT

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench.config import SuiteTask
from loracurve.bench.provenance import fingerprint, plain
from loracurve.bench.suite import cells_of, load_suite
from loracurve.bench.suite_files import shipped
from loracurve.bench.tiny_model import tiny_model
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import load_task
from loracurve.training.config import LoopConfig


@pytest.mark.parametrize("name", shipped("suites"))
def test_shipped_suites_parse(name: str) -> None:
    suite = load_suite(name)
    assert suite.tasks and suite.methods
    assert len({fingerprint(suite, c) for c in cells_of(suite)}) == len(cells_of(suite))


EVIDENCE = ROOT / "results" / "suites"


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.yaml")), ids=lambda p: p.stem)
def test_suites_of_the_evidence_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EVIDENCE.parents[1])
    suite = load_suite(path)
    assert len({fingerprint(suite, c) for c in cells_of(suite)}) == len(cells_of(suite))


@pytest.mark.parametrize("name", ["default", "blob", "laplace_lora", "authors"])
def test_profiles_parse_and_are_all_that_is_shipped(name: str) -> None:
    assert load_suite("smoke", ["--profile", name]).profile == name
    assert set(shipped("profiles")) == {"default", "blob", "laplace_lora", "authors"}


def test_a_profile_gives_defaults_the_suite_and_the_command_line_change(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "profile: blob\nmodel: {name: m}\ntraining: {steps: 7}\nseeds: [5]\ntasks: {sst2: {ood: [cr]}}\n"
        "methods: {single: , ensemble 3: {method: ensemble}, c: {method: curve, training: {learning_rate: 1e-3}}}\n"
    )
    suite = load_suite(path, ["--training.batch_size=2"])
    assert suite.training == LoopConfig(steps=7, batch_size=2, learning_rate=1e-4, eps=1e-6, keep="last")
    assert suite.seeds == [5] and suite.lora.target_modules == ["q_proj", "v_proj", "lm_head"]
    assert suite.tasks == {"sst2": SuiteTask(ood=["cr"])}
    assert suite.methods == {
        "single": Single(),
        "ensemble 3": Ensemble(3),
        "c": Curve(training={"learning_rate": 1e-3}),
    }
    path.write_text(json.dumps(plain(suite)))
    assert load_suite(path) == suite


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"sst2": {"scoring": "label"}}}, "unknown option task.sst2.scoring; did you mean 'tasks'"),
        ({"tasks": {"sst2": {"scorin": "label"}}}, "tasks.sst2: unknown option scorin; did you mean 'scoring'"),
        ({"tasks": {"sst2": {"scoring": "lm"}}}, "tasks.sst2: scoring: a suite compares predictions of classes"),
        ({"tasks": {"sst2": 3}}, "tasks.sst2: expected options"),
        ({"tasks": {}}, "tasks: expected at least one"),
        ({"methods": {"ensembl": {}}}, "method: expected one of .* found 'ensembl'; did you mean 'ensemble'"),
        ({"methods": {"ensemble": {"member": 2}}}, "methods.ensemble: unknown option member; did you mean 'members'"),
        ({"methods": {"c": {"method": "curve", "training": {"step": 2}}}}, "methods.c.training: unknown option step"),
        ({"methods": {"t": {"method": "temperature"}}}, "methods.t: expected only of"),
        ({"methods": {"curve": {"units": 2, "training": {"steps": 3}}}}, "units: expected no training.steps"),
        ({"references": ["none"]}, "references: expected methods of this suite, found 'none'"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"methods": {"single": {}, "a b": {"method": "single"}, "a_b": {"method": "single"}}}, "too alike"),
        ({"profile": "defaul"}, "profile: expected a YAML file or one of .*did you mean 'default'"),
    ],
)
def test_faults_in_a_suite_are_told_in_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"model": {"name": "m"}, "tasks": {"sst2": {}}, "methods": {"single": {}}}
    (tmp_path / "s.yaml").write_text(json.dumps(good | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_suite(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


def test_a_name_that_yaml_reads_as_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("model: {name: m}\ntasks: {sst2: {}}\nmethods: {5e-4: {method: single}}\n")
    with pytest.raises(UserError, match="methods: expected names, found the number 0.0005; put it in quotes"):
        load_suite(tmp_path / "s.yaml")


def test_local_tasks_of_the_small_suite_have_what_their_prompts_need(shared_data: Path) -> None:
    _, tokenizer = tiny_model()
    for name, task in load_suite("small").tasks.items():
        config = replace(task.to_task(str(shared_data / name)), limit_train=3, limit_validation=3, limit_test=3)
        assert isinstance(config, TaskConfig)
        assert len(load_task(config, tokenizer, 4096).encode("test")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"landscape": {"pairs": 10}}, "landscape.pairs: expected fewer pairs than anchors, found 10 of 10"),
        ({"landscape": {"pairs": -1}}, "landscape.pairs: expected a whole number >= 0, found -1"),
        ({"landscape": {"points": 2}}, r"landscape.points: expected a whole number in \[3, 100000\], found 2"),
        ({"landscape": {"paths": ["curve"]}}, "landscape.paths: expected some of straight, .*, found curve"),
        ({"methods": {"landscape": {"method": "single"}}}, "too alike for folders"),
    ],
)
def test_faults_in_a_landscape_are_told_in_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"model": {"name": "m"}, "tasks": {"sst2": {}}, "methods": {"single": {}}}
    (tmp_path / "s.yaml").write_text(json.dumps(good | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_suite(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)
