"""Run every cell of every notebook in a fresh copy, as Jupyter's "Run all" does.

    python tests/run_all.py                            # all of nbs/
    python tests/run_all.py 20_datasets 36_sft_runs       # these alone

What git tracks is copied, as it lies in the working tree, into a folder with a git and a home of
its own: no cache of this machine is there. Then nbclient runs the notebooks there one after the
other, without network. It knows nothing of `#| slow`, `#| gpu` and `#| eval: false`. What ran is
not written back, so the copy must end as it began: a tracked file that changed, or a new file that
.gitignore does not cover, is a failure of the notebook that left it. Needs `nbclient`.
"""
import argparse
import os
import shutil
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {k: v for k, v in os.environ.items()
         if not k.startswith("GIT_") and k not in ("IVT_RERUN", "IN_TEST")}


def git(folder, *args):
    """What a git command prints."""
    who = ["-c", "user.name=run_all", "-c", "user.email=run_all", "-c", "commit.gpgsign=false"]
    command = ["git", *who, *args]
    done = subprocess.run(command, cwd=folder, env=CLEAN, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {args[0]}: {done.stderr.strip()}")
    return done.stdout


def make_copy(copy):
    """The tracked files in a folder and a git of their own."""
    for name in filter(None, git(ROOT, "ls-files", "-z").split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    git(copy, "init", "-q")
    git(copy, "add", "-Af")
    git(copy, "commit", "-qm", "copy", "--no-verify")


def status(copy):
    """Lines of `git status`."""
    return git(copy, "status", "--porcelain", "--untracked-files=all").splitlines()


def left_behind(copy):
    """What changed or is new since the last call, files that .gitignore covers left out."""
    lines = [line for line in status(copy) if line[1] != " "]
    git(copy, "add", "-A")
    return [f"leaves {line}" for line in lines]


def environment(copy, home):
    """The kernel's: the copy's library before all others, an empty home, no network."""
    path = os.pathsep.join(filter(None, [str(copy), CLEAN.get("PYTHONPATH")]))
    home.mkdir()
    return CLEAN | dict(PYTHONPATH=path, HOME=str(home), PYTHONUSERBASE=site.getuserbase(),
                        HF_HUB_OFFLINE="1", GIT_CEILING_DIRECTORIES=str(copy.parent))


def own_kernel():
    """A kernel of this very interpreter, whatever kernels are installed."""
    return AsyncKernelManager(kernel_name="python3",
                              kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def run(path, env, limit):
    """Run all cells of a notebook; the number of code cells, the seconds, and what went wrong."""
    notebook, start, now = nbformat.read(path, 4), time.time(), {}
    client = NotebookClient(
        notebook, km=own_kernel(), resources=dict(metadata=dict(path=str(path.parent))),
        timeout_func=lambda cell: max(1, int(start + limit - time.time())),
        on_cell_start=lambda cell, cell_index: now.update(cell=cell))
    try:
        client.execute(env=env, cleanup_kc=True, stderr=subprocess.DEVNULL)
        wrong = ""
    except Exception as e:  # a cell's exception, a cell without end, a kernel that died
        lines = [x for x in now["cell"].source.splitlines() if x[:2] != "#|"] if now else ["start"]
        said = f"{getattr(e, 'ename', type(e).__name__)}: {getattr(e, 'evalue', e)}"
        wrong = f"{lines[0]} -> {' '.join(said.split())[:120]}"
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    return cells, time.time() - start, wrong


def main():
    parser = argparse.ArgumentParser(description="Run all cells of the notebooks in a fresh copy.")
    parser.add_argument("names", nargs="*", help="notebooks (default: all of nbs/)")
    parser.add_argument("--limit", type=int, default=600, help="seconds for a notebook")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        copy.mkdir()
        make_copy(copy)
        env, failed = environment(copy, copy.parent / "home"), []
        names = [Path(name).stem for name in args.names]
        known = {p.stem: p for p in sorted((copy / "nbs").rglob("[!_.]*.ipynb"))}
        if unknown := set(names) - known.keys():
            parser.error(f"no such notebook: {', '.join(sorted(unknown))}")
        print("notebook | cells | seconds | result\n--- | --- | --- | ---", flush=True)
        for name in names or known:
            cells, seconds, wrong = run(known[name], env, args.limit)
            wrong = "; ".join([*filter(None, [wrong]), *left_behind(copy)])
            failed += [name] * bool(wrong)
            print(f"{name} | {cells} | {seconds:.0f} | {wrong or 'ok'}", flush=True)
        print("git status --porcelain:", *(status(copy) or ["nothing"]), sep="\n")
    print(f"failed: {', '.join(failed)}" if failed else "all ran")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
