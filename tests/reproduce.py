"""Make stored runs again, from the shipped base: what `ivt_min reproduce` does.

The runs are made in a copy of the checkout (ivt_min_runs/reproduced), each by the slow cell of the study that
made it, in a process of its own, one a core. What is finished stays: asked again, it goes on, trainings from
their checkpoints in ~/.cache/ivt_min. At the end the new answers are held against the stored ones.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {     # a study -> the names of the runs that it makes; in this order
    "32_exam": "base|no_image", "33_naive": "naive|naive_copy|naive_turn", "36_sft_runs": "sft_paper.*",
    "37_grpo_runs": "grpo_paper.*", "39_verdict": "verdict", "42_paper": "views-6|samples-6|naive_confirm",
}


def about(name):
    """What the config of a stored run says."""
    return json.loads((ROOT / "data/runs" / name / "config.json").read_text("utf-8"))


def stored_runs():
    """Study -> the names of its stored runs."""
    names = sorted(p.parent.name for p in (ROOT / "data/runs").glob("*/config.json"))
    return {study: [n for n in names if re.fullmatch(pattern, n)] for study, pattern in STUDIES.items()}


def minutes(names):
    """What each run of a study costs on one core: as measured, or else as the median of those that were."""
    known = {n: about(n).get("minutes") for n in names}
    measured = [m for m in known.values() if m]
    usual = statistics.median(measured) if measured else 2.
    return {n: m or usual for n, m in known.items()}


def plan(only):
    """[(study, its runs that are made)], and what each run costs; with the run that another begins at."""
    studies = stored_runs()
    wanted = {only} if only else {n for names in studies.values() for n in names}
    if only and not any(only in names for names in studies.values()):
        raise ValueError(f"no stored run {only!r} that a study makes: choose from "
                         + ", ".join(n for names in studies.values() for n in names))
    start = only and about(only).get("start")
    if start and not (Path.home() / ".cache/ivt_min" / start / "adapter").exists(): wanted.add(start)
    costs = {n: m for names in studies.values() for n, m in minutes(names).items()}
    return [(study, [n for n in names if n in wanted]) for study, names in studies.items()], costs


def checkout(folder, names):
    """A copy of what git knows, without the runs that are to be made; made once."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if not (ROOT / name).exists(): continue
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, part / name)
        part.rename(folder)
    for name in names:      # what has no log yet is the stored one
        if not (folder / f"{name}.log").exists(): shutil.rmtree(folder / "data/runs" / name, ignore_errors=True)


def cells(study):
    """The code of a study up to its last cell that keeps runs, without other slow cells."""
    notebook = json.loads((ROOT / f"nbs/lab/{study}.ipynb").read_text("utf-8"))
    codes = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    keeps = [k for k, code in enumerate(codes) if "keep_run(data_path" in code]
    return [code for k, code in enumerate(codes[:keeps[-1] + 1]) if k in keeps or "#| slow" not in code]


def make(study, name, folder):
    """One run, in a process of its own; the time it took stands in its config."""
    if (folder / "data/runs" / name / "config.json").exists(): return f"{name}: is there"
    env = {**os.environ, "PYTHONPATH": str(folder), "IVT_ONLY": name, "OMP_NUM_THREADS": "1",
           "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / f"{name}.log", "w") as log:
        code = subprocess.run([sys.executable, __file__, study], cwd=folder / "nbs/lab", env=env,
                              stdout=log, stderr=log).returncode
    if code: return f"{name}: FAILED, see {log.name}"
    return f"{name}: {compared(folder, name)}"


def compared(folder, name):
    """How far the new answers of a run are those that are stored."""
    from ivt_min.evaluate import ious, read_run
    said = []
    for path in sorted((ROOT / "data/runs" / name).glob("[!l]*.jsonl.gz")):
        part = path.name.split(".")[0]
        old, new = (read_run(root / "data/runs" / name, part) for root in (ROOT, folder))
        same = sum(a.boxes == b.boxes for a, b in zip(old, new))
        means = [ious(ts, -1).mean() for ts in (old, new)]
        said.append(f"{part} {same} of {len(old)} the same, IoU of the last {means[0]:.4f}, now {means[1]:.4f}")
    took = json.loads((folder / "data/runs" / name / "config.json").read_text("utf-8"))["minutes"]
    return f"{took} min; " + "; ".join(said)


def main(only=None, just_list=False):
    """Say what it costs; then make the runs."""
    studies, costs = plan(only)
    workers = os.cpu_count() or 1
    for study, names in studies:
        for n in names: print(f"{study:13} {n:24} about {costs[n]:4.0f} min on one core")
    total = sum(costs[n] for _, names in studies for n in names)
    print(f"in all about {total / 60:.1f} h on one core, {total / 60 / workers:.1f} h on {workers}", flush=True)
    if just_list: return
    folder = Path("ivt_min_runs/reproduced").resolve()
    checkout(folder, [n for _, names in studies for n in names])
    for study, names in studies:    # a study may begin at adapters of an earlier one
        with ThreadPoolExecutor(workers) as pool:
            for line in pool.map(lambda n: make(study, n, folder), names): print(line, flush=True)


if __name__ == "__main__":      # in the process of one run: the cells of its study
    space = {}
    for cell in cells(sys.argv[1]): exec(compile(cell, sys.argv[1], "exec"), space)
