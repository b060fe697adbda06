"""Run notebooks by the rules of nbdev_test and store what their cells show.

    python tests/run_notebooks.py nbs/03_scenes.ipynb nbs/04_model.ipynb
    python tests/run_notebooks.py                                 # all of nbs/
    python tests/run_notebooks.py --flags slow nbs/21_tiny.ipynb  # its slow cells, too

Each notebook has a process of its own, with nbs/ as the working directory and IN_TEST=1. Cells with
`#| slow`, `#| gpu` or `#| eval: false` are left out and keep the output they have. A notebook is
written only when every cell ran and nothing it shows belongs to this machine alone.
"""
import argparse
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "IN_TEST": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
LOCAL = {
    "an absolute path": re.compile(
        r"(?<![\w./:])/(?:home|root|work|tmp|Users|opt|usr|var|mnt|private)/\w"
        r"|\b[A-Z]:\\|site-packages"
    ),
    "a progress bar or terminal codes": re.compile(r"\r|\d%\||\d ?it/s|\x1b\["),
}


def output_text(output):
    """All text of one stored output, pictures left out."""
    parts = [output.get("text", "")]
    parts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "".join("".join(p) for p in parts)


def output_problems(outputs):
    """What in a cell's outputs must not be stored."""
    found = []
    for output in outputs:
        if output["output_type"] == "error":
            found.append("an exception")
        if output.get("name") == "stderr":
            found.append("text on stderr")
        found += [what for what, pattern in LOCAL.items() if pattern.search(output_text(output))]
    return found


def is_skipped(cell, flags):
    """Does nbdev_test leave this cell out? `flags` are those that leave a cell out."""
    directives = cell.directives_ or {}
    evaluated = directives.get("eval:", ["true"])[0].lower() != "false"
    return "nbdev_export(" in cell.source or not evaluated or bool(flags & directives.keys())


def cleaned(notebook, cfg):
    """The notebook (a plain dict, changed in place) as the file text that nbdev_clean leaves."""
    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb
    clean_nb(notebook, cfg.clear_all, clean_ids=cfg.clean_ids)
    return nb2str(notebook)


def run_one(path, run_flags):
    """Run one notebook in this process and store its outputs; the list of what went wrong."""
    import json
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    cfg = get_config()
    skip = set(cfg.tst_flags.split()) - set(run_flags)
    notebook = json.loads(path.read_text("utf-8"))
    path.write_text(cleaned(notebook, cfg), "utf-8")  # every cell has an id from here on
    sys.path.insert(0, str(cfg.config_path))
    os.chdir(path.parent)
    shell = CaptureShell(path)
    shown, problems = {}, []
    for cell in NBProcessor(path, procs=FrontmatterProc, process=True).nb.cells:
        if cell.cell_type != "code" or is_skipped(cell, skip):
            continue
        outputs = shell.run(cell.source)
        if shell.exc:
            traceback.print_exception(shell.exc)
            return [f"cell {cell.id} failed:\n{cell.source}"]
        outputs = [dict(o) for o in outputs if o.get("name") != "stderr"]
        shown[cell.id] = json.loads(json.dumps(outputs))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = shown.get(cell["id"], cell["outputs"])
    text = cleaned(notebook, cfg)
    for cell in notebook["cells"]:
        for what in output_problems(cell.get("outputs", [])):
            problems.append(f"cell {cell['id']} shows {what}: {''.join(cell['source'])[:60]!r}")
    if not problems:
        part = path.with_suffix(".part")
        part.write_text(text, "utf-8")
        os.replace(part, path)
    return problems


def main():
    parser = argparse.ArgumentParser(description="Run notebooks and store their outputs.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all of nbs/)")
    parser.add_argument("--flags", default="", help='flags to run that are left out: "slow gpu"')
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        problems = run_one(args.paths[0], args.flags.split())
        print("\n".join(problems), file=sys.stderr)
        return int(bool(problems))
    failed = 0
    for path in args.paths or sorted((ROOT / "nbs").rglob("[!_.]*.ipynb")):
        start = time.time()
        command = [sys.executable, __file__, "--here", "--flags", args.flags, str(path.resolve())]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}).returncode
        failed += code != 0
        size = path.stat().st_size // 1000 if path.exists() else 0
        took = time.time() - start
        print(f"{path.name}: {'FAILED' if code else 'stored'}, {took:.0f} s, {size} KB", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
