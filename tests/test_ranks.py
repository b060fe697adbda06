"""Several processes, started by torchrun, do what one does; the number changes nothing."""
import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from nbconvert import PythonExporter
from safetensors.torch import load_file

from ivt_min.train import ranks, total
from test_project import ROOT
from test_traces import Server

JOB = [str(ROOT / "tests/rank_job.py")]


def start(n, *words, cwd=ROOT, **more):
    """A line for Python, by so many processes."""
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", TORCHDYNAMO_DISABLE="1", **more)
    return subprocess.run([sys.executable, *how, *map(str, words)], capture_output=True, text=True,
                          cwd=cwd, env=env, timeout=300)


def last(folder):
    """The newest checkpoint of a run, and its log without the times."""
    path = sorted(folder.glob("[0-9]*"))[-1]
    log = json.loads((path / "manifest.json").read_text())["log"]
    for row in log: row.pop("seconds", None)
    return load_file(path / "tensors.safetensors"), log


def close(a, b):
    """Whether weights, moments and logs are the same but for the order of sums in fp64."""
    (x, log), (y, other) = a, b
    assert x.keys() == y.keys() and len(log) == len(other)
    assert max((x[k] - y[k]).abs().max().item() for k in x) < 1e-9
    for one, two in zip(log, other):
        assert one.keys() == two.keys()
        for k in one: assert one[k] == pytest.approx(two[k], rel=1e-6, abs=1e-9), k


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a job's run by so many processes leaves; each is made once."""
    @cache
    def made(n, what):
        folder = tmp_path_factory.mktemp(f"{what}-{n}") / "run"
        done = start(n, *JOB, what, folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return folder
    return made


def cut(folder, to):
    """A copy of a run that was stopped before its last checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(sorted(to.glob("[0-9]*"))[-1])
    return to


@pytest.mark.parametrize("what", ["sft", "grpo"])
def test_two_are_as_one(tmp_path, whole, what):
    close(last(whole(1, what)), last(whole(2, what)))
    done = start(1, *JOB, what, cut(whole(2, what), tmp_path / "cut"))  # stopped with two, it goes on with one
    assert done.returncode == 0, done.stderr[-2000:]
    close(last(whole(1, what)), last(tmp_path / "cut"))


def test_a_killed_process_ends_the_others_and_a_restart_goes_on(tmp_path, whole):
    done = start(2, *JOB, "sft", tmp_path / "run", 2)
    assert done.returncode != 0
    assert [p.name for p in sorted((tmp_path / "run").glob("[0-9]*"))] == ["000001", "000002"]
    told = [line for line in done.stderr.splitlines() if line.startswith("rank_job:")]
    assert len(told) <= 1 and all("another process has ended" in line for line in told)
    again = start(2, *JOB, "sft", tmp_path / "run")
    assert again.returncode == 0, again.stderr[-2000:]
    (x, log), (y, other) = last(tmp_path / "run"), last(whole(2, "sft"))
    assert log == other and all(torch.equal(x[k], y[k]) for k in x)


def test_who_stays_is_told_who_left(tmp_path):
    done = start(2, *JOB, "leave", tmp_path)
    assert done.returncode != 0
    assert "rank_job: another process has ended: start all of them again" in done.stderr


def test_processes_go_on_from_one_step(tmp_path, whole):
    """A folder that only one of them sees: nothing is learned from a mixture."""
    cut(whole(1, "sft"), tmp_path / "0")
    done = start(2, *JOB, "apart", tmp_path)
    assert done.returncode != 0 and "other processes see another" in done.stderr


def test_a_run_goes_on_with_less_memory(tmp_path, whole):
    """Micro-batches and checkpointing are no other run: the next start may take smaller ones."""
    done = start(1, *JOB, "micro", cut(whole(1, "sft"), tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    close(last(whole(1, "sft")), last(tmp_path / "run"))


def test_prompts_that_do_not_divide_are_refused(tmp_path):
    done = start(2, *JOB, "three", tmp_path / "run")
    assert done.returncode != 0 and "3 prompts a step, 4 samples, 2 processes" in done.stderr


def test_an_evaluation_is_the_same_file(tmp_path):
    """Rows, order, every digit: of two processes, and of one that goes on where two were stopped."""
    shutil.copytree(ROOT / "data/examples", tmp_path / "rows")
    rows = (tmp_path / "rows/rows.jsonl").read_text().splitlines()
    (tmp_path / "rows/many.jsonl").write_text("\n".join(
        json.dumps(json.loads(row) | dict(id=f"{k}-{i}")) for k in range(3) for i, row in enumerate(rows)))
    words = "-m", "ivt_min.cli", "evaluate", "sft", "rows/many.jsonl", "--device", "cpu", "--batch", "4"
    done = start(2, *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("kept in") == 1 and not list(tmp_path.glob("run/*.part*"))     # one of them speaks
    whole = (tmp_path / "run/test.jsonl").read_bytes()
    (tmp_path / "run/test.jsonl").unlink()
    kept = whole.splitlines(True)
    (tmp_path / "run/test.part1-77").write_bytes(b"".join(kept[4:8]) + kept[12][:40])
    again = start(1, *words, "--out", "run", cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "run/test.jsonl").read_bytes() == whole


def test_the_page_about_scale_is_a_program(tmp_path):
    """45_scale as two processes, on the tiny model: from rows to the table, and once more."""
    code, _ = PythonExporter().from_filename(ROOT / "nbs/lab/45_scale.ipynb")
    (tmp_path / "45_scale.py").write_text("import os; os.environ['IVT_DATA'] = 'rec'\n" + code)
    with Server(tmp_path, tiny=True) as server:
        for n in (2, 1):    # the second time nothing is asked or learned again
            done = start(n, "45_scale.py", cwd=tmp_path, IVT_SERVER=server.url)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("| loop | oracle") == 1
        assert len(server.asked()) == 18
    assert len((tmp_path / "rec/paper").glob("served-*/test.jsonl").__next__().read_text().splitlines()) == 6
    for name in ("sft", "grpo"):
        assert (tmp_path / "rec/paper" / name / "adapter_model.safetensors").exists()
    answers = (tmp_path / "rec/paper/loop/test.jsonl").read_text().splitlines()
    assert len(answers) == 6 and all(len(json.loads(row)["boxes"]) == 3 for row in answers)


def test_without_torchrun_there_is_one():
    assert ranks() == (0, 1) and total([1, 2.5]) == [1, 2.5]
