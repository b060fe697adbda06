"""Make stored runs again, from the shipped base: what `ivt_min reproduce` does.

The runs are made in a copy of the checkout (ivt_min_runs/reproduced), on the CPU, each by the cells of the study
that made it, in a process of its own, one a core. What is finished stays, trainings go on from their checkpoints.
The copy has a home of its own, so that no adapter which is in the cache of this machine is taken for a new one. At
the end the new answers are held against the stored ones.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "ivt_min_runs/reproduced"
STUDIES = {     # a study -> the names of the runs that it makes; in this order
    "32_exam": "base|no_image", "33_naive": "naive|naive_copy|naive_turn", "36_sft_runs": "sft_paper.*",
    "37_grpo_runs": "grpo_paper.*", "39_verdict": "verdict", "42_paper": "views-6|samples-6|naive_confirm",
}


def about(name, root=ROOT):
    """What the config of a stored run says."""
    return json.loads((root / "data/runs" / name / "config.json").read_text("utf-8"))


def stored_runs():
    """Study -> the names of its stored runs."""
    names = sorted(p.parent.name for p in (ROOT / "data/runs").glob("*/config.json"))
    return {study: [n for n in names if re.fullmatch(pattern, n)] for study, pattern in STUDIES.items()}


def minutes(names):
    """What each run of a study costs on one core: as measured on a CPU, or as the median of those that were.

    Of six stored runs (sft_paper-s0 and -s1, grpo_paper-s0 to -s2, grpo_paper_signed) only the training was timed;
    for their answers 2.3 or 1.7 minutes were added by estimate.
    """
    known = {n: about(n).get("minutes") for n in names}
    measured = [m for m in known.values() if m]
    return {n: m or (statistics.median(measured) if measured else None) for n, m in known.items()}


def plan(only, copy=COPY):
    """[(study, its runs that are made)], and what each run costs; with the run that another begins at."""
    studies = stored_runs()
    every = [n for names in studies.values() for n in names]
    if only and only not in every:
        raise ValueError(f"no stored run {only!r} that a study makes: choose from {', '.join(every)}")
    wanted = {only} if only else set(every)
    start = only and about(only).get("start")
    if start and not (copy / "home/.cache/ivt_min" / start / "adapter/ivt.json").exists(): wanted.add(start)
    costs = {n: m for names in studies.values() for n, m in minutes(names).items()}
    return [(study, [n for n in names if n in wanted]) for study, names in studies.items()], costs


def files():
    """The files of the checkout: those that git knows, or, without git, all that lie there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode == 0: return [ROOT / n for n in listed.stdout.decode().split("\0") if n]
    left = {".git", ".venv", "ivt_min_runs", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not left & set(p.relative_to(ROOT).parts)]


def checkout(names, copy=COPY):
    """The copy, made once, without the answers of the runs that are to be made."""
    if not copy.exists():
        part = copy.with_name(copy.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        for path in filter(Path.exists, files()):
            new = part / path.relative_to(ROOT)
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new)
        part.rename(copy)
    for name in names:
        if (copy / f"{name}.log").exists(): continue    # was begun here
        folder = copy / "data/runs" / name
        for path in [folder / "config.json", *folder.glob("*.jsonl.gz")]: path.unlink(missing_ok=True)


def cells(study):
    """The code of a study up to its last cell that keeps runs, without other slow cells."""
    notebook = json.loads((ROOT / f"nbs/lab/{study}.ipynb").read_text("utf-8"))
    codes = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    keeps = [k for k, code in enumerate(codes) if "keep_run(data_path" in code]
    return [code for k, code in enumerate(codes[:keeps[-1] + 1]) if k in keeps or "#| slow" not in code]


def run(study, copy, log, **more):
    """The cells of a study, in a process of its own that knows nothing but the copy: its exit code."""
    env = {**os.environ, "PYTHONPATH": str(copy), "HOME": str(copy / "home"), "CUDA_VISIBLE_DEVICES": "",
           "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", **more}
    with open(log, "w") as out:
        return subprocess.run([sys.executable, copy / "tests/reproduce.py", study], cwd=copy / "nbs/lab", env=env,
                              stdout=out, stderr=out).returncode


def make(study, name, copy=COPY):
    """One run: whether it is there, and what is said of it."""
    log = copy / f"{name}.log"
    if not (copy / "data/runs" / name / "config.json").exists():
        run(study, copy, log, IVT_ONLY=name)
    if not (copy / "data/runs" / name / "config.json").exists(): return False, f"{name}: FAILED, see {log}"
    return True, f"{name}: {compared(copy, name)}"


def compared(copy, name):
    """How far the new answers of a run are those that are stored."""
    from ivt_min.evaluate import ious, read_run
    said = []
    for path in sorted((ROOT / "data/runs" / name).glob("[!l]*.jsonl.gz")):
        part = path.name.split(".")[0]
        old, new = (read_run(root / "data/runs" / name, part) for root in (ROOT, copy))
        same = sum(a.boxes == b.boxes for a, b in zip(old, new))
        means = [ious(ts, -1).mean() for ts in (old, new)]
        said.append(f"{part} {same} of {len(old)} the same, IoU of the last {means[0]:.4f}, now {means[1]:.4f}")
    return f"{about(name, copy).get('minutes')} min; " + "; ".join(said)


def main(only=None, just_list=False):
    """Say what it costs; then make the runs. ValueError where something is missing, or some failed."""
    studies, costs = plan(only)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for study, names in studies:
        for n in names:
            cost = f"about {costs[n]:4.0f} min on one core" if costs[n] else "not measured, minutes"
            print(f"{study:13} {n:24} {cost}")
    total = sum(costs[n] or 0 for _, names in studies for n in names)
    print(f"in all about {total / 60:.1f} h on one core, {total / 60 / cores:.1f} h on {cores}", flush=True)
    if just_list: return
    missing = [n for n in ("fastcore", "scipy", "matplotlib", "nbdev") if not find_spec(n)]
    if missing: raise ValueError(f"no {', '.join(missing)} here: pip install -e '.[dev]'")
    checkout([n for _, names in studies for n in names])
    failed = set()
    for study, names in studies:    # a study may begin at adapters of an earlier one
        names = [n for n in names if about(n).get("start") not in failed]
        if study == "36_sft_runs" and names and run(study, COPY, COPY / "harvest.log", IVT_ONLY="-", IVT_CALL="harvest"):
            raise ValueError(f"the base's own answers FAILED, see {COPY}/harvest.log")
        with ThreadPoolExecutor(cores) as pool:
            for name, (fine, line) in zip(names, pool.map(lambda n: make(study, n), names)):
                print(line, flush=True)
                if not fine: failed.add(name)
    if failed: raise ValueError(f"{len(failed)} runs failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":      # in a process of its own: the cells of a study
    from IPython.core.inputtransformer2 import TransformerManager
    class Shell:        # a study runs the cells of another notebook, and charts.py by %run
        def run_cell(self, source, silent): exec(source, space)
        def run_line_magic(self, name, path): space.update(run_path(path))
    space = {"get_ipython": Shell}
    for cell in cells(sys.argv[1]):
        code = TransformerManager().transform_cell(cell)
        try: exec(compile(code, sys.argv[1], "exec"), space)
        except FileNotFoundError:       # it shows a run that is not made yet
            if "keep_run(data_path" in cell: raise
    if os.environ.get("IVT_CALL"): space[os.environ["IVT_CALL"]]()     # once, before many want it
