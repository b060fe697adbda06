"""`ivt_min reproduce`: what it says that it will make, and that the cells it takes are those that make it."""
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


def test_all_of_it_takes_some_four_hours_on_two_cores():
    studies, costs = reproduce.plan(None)
    assert sum(costs[n] or 3 for _, names in studies for n in names) / 60 / 2 <= 4.25


def test_a_run_brings_the_one_that_it_begins_at(tmp_path):
    studies, _ = reproduce.plan("grpo_paper-s0", tmp_path)
    assert [names for _, names in studies if names] == [["sft_paper-s0"], ["grpo_paper-s0"]]
    whole = tmp_path / "home/.cache/ivt_min/sft_paper-s0/adapter"
    whole.mkdir(parents=True)       # it was killed while it was written
    assert len([n for _, names in reproduce.plan("grpo_paper-s0", tmp_path)[0] for n in names]) == 2
    (whole / "ivt.json").touch()
    assert [n for _, names in reproduce.plan("grpo_paper-s0", tmp_path)[0] for n in names] == ["grpo_paper-s0"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout in which every run is still to be made."""
    folder = tmp_path_factory.mktemp("reproduced") / "copy"
    reproduce.checkout(sum(reproduce.stored_runs().values(), []), folder)
    return folder


@pytest.mark.parametrize("study", reproduce.STUDIES)
def test_the_cells_of_a_study_reach_its_runs(study, copy):
    """Nothing is made, for no run has this name; all that a run needs is there without any run."""
    assert "keep_run(data_path" in reproduce.cells(study)[-1]
    code = reproduce.run(study, copy, copy / "log", IVT_ONLY="none of them")
    assert code == 0, (copy / "log").read_text()[-2000:]
    assert not list((copy / "data/runs").glob("*_paper*/*.jsonl.gz"))


def test_what_fails_is_said(copy):
    fine, line = reproduce.make("42_paper", "no_such_run", copy)
    assert fine is False and "FAILED" in line


def test_answers_are_held_against_the_stored_ones():
    said = reproduce.compared(ROOT, "sft_paper-s0")
    for part, n in dict(val=510, test=505, confirm=505).items():
        assert f"{part} {n} of {n} the same" in said
