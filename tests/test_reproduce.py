"""`ivt_min reproduce`: what it says that it will make, and that the cells it takes are those that make it."""
import os
import subprocess
import sys

import pytest

import reproduce
from ivt_min.cli import main
from ivt_min.core import data_path, read_json
from test_project import ROOT


def test_every_stored_run_of_a_study_is_made_by_one():
    made = sum(reproduce.stored_runs().values(), [])
    rules = {"random_object", "most_central", "largest"}    # no model; written by 07_evaluate
    kept = {p.parent.name for p in data_path("runs").glob("*/test.jsonl.gz")} - rules
    assert len(made) == len(set(made)) and kept <= set(made)


def test_it_says_what_a_run_costs_and_makes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--only", "sft_paper-s0", "--list"]) is None
    said = capsys.readouterr().out
    minutes = read_json(data_path("runs/sft_paper-s0/config.json"))["minutes"]
    assert f"about {minutes:4.0f} min" in said and said.count(" min on one core") == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["reproduce", "--only", "nonsense"]) == 2
    assert "sft_paper-s0" in capsys.readouterr().err


def test_all_of_it_takes_four_hours_on_two_cores_at_most():
    studies, costs = reproduce.plan(None)
    assert sum(costs[n] for _, names in studies for n in names) / 60 / 2 <= 4


def test_a_run_brings_the_one_that_it_begins_at(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))       # a machine without adapters in its cache
    studies, _ = reproduce.plan("grpo_paper-s0")
    assert [names for _, names in studies if names] == [["sft_paper-s0"], ["grpo_paper-s0"]]


@pytest.mark.parametrize("study", ["36_sft_runs", "37_grpo_runs", "42_paper"])
def test_the_cells_of_a_study_run_up_to_its_runs(study):
    assert "keep_run(data_path" in reproduce.cells(study)[-1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "IVT_ONLY": "none of them", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "tests/reproduce.py", study], cwd=ROOT / "nbs/lab",
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_answers_are_held_against_the_stored_ones():
    said = reproduce.compared(ROOT, "sft_paper-s0")
    for part, n in dict(val=510, test=505, confirm=505).items():
        assert f"{part} {n} of {n} the same" in said
