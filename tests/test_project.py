"""Checks of the project as a whole. Each is a function from files to a list of complaints, so that
a bad example at the end of this file can show that it is able to complain."""
import ast
import importlib
import inspect
import io
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest
from fastcore.docments import docments
from nbdev.config import get_config
from run_notebooks import cleaned, output_problems

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(p for p in (ROOT / "ivt_min").glob("*.py") if p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("[!_.]*.ipynb") if ".ipynb_" not in str(p))
NAME = [p.name for p in NOTEBOOKS]

DEPENDENCIES = {"torch", "transformers", "peft", "bitsandbytes", "PIL", "numpy",
                "safetensors", "huggingface_hub", "filelock"}  # the last two come with transformers
LIGHT = {"core", "boxes", "render", "scenes", "datasets", "evaluate", "columns", "traces",
         "teachers"}
OPTIONAL = {"pyarrow"}  # asked for by name where it is missing
HAND_MADE = {"__init__", "cli"}  # modules without a notebook
FRAMEWORKS = set(
    "trl lightning pytorch_lightning deepspeed accelerate verl openrlhf unsloth axolotl swift "
    "llamafactory fastai ignite composer colossalai torchtune catalyst keras torchvision".split()
)
TRAINER = re.compile(r"\w*Trainer$|\w*TrainingArguments$")
UNSAFE = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
TOP = {"nbs", "ivt_min", "data", "tests", "settings.ini", "setup.py", "README.md", "LICENSE"}
MEGABYTE = 1_000_000
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FREE_TOKENS = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENCODING, tokenize.ENDMARKER)


# ---- reading

def read_notebook(path):
    return json.loads(Path(path).read_text("utf-8"))


def sources(path, kind="code"):
    """The text of each cell of one kind."""
    cells = read_notebook(path)["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def code_lines(source):
    """The lines of a cell that are code: directives are not."""
    return [line for line in source.strip().splitlines() if not line.startswith("#|")]


def notebook_code(path):
    """All code of a notebook as one Python text; lines for the shell or IPython are dropped."""
    lines = "\n".join(sources(path)).splitlines()
    return "\n".join("pass" if re.match(r"\s*[%!]", line) else line for line in lines)


def imported(code):
    """Every dotted name that the code imports, wherever in it; `from a import b` gives `a.b`."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "ivt_min" * bool(node.level) + "." * bool(node.level and node.module)
            names += [f"{base}{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if called(node) in ("import_module", "__import__"):
                names.append(str(node.args[0].value))
    return names


def called(node):
    """The last part of the name that a call calls."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def module_numbers(notebooks):
    """{module: number of the notebook that makes it}."""
    numbers = {}
    for path in notebooks:
        found = re.search(r"^#\|\s*default_exp\s+(\w+)", "\n".join(sources(path)), re.M)
        if found:
            numbers[found[1]] = notebook_number(path)
    return numbers


def notebook_number(path):
    """5 for 04_model.ipynb, 5.01 for 05_answer.ipynb; one without a number comes after all others."""
    found = re.match(r"(\d+)([a-z]?)_", Path(path).name)
    if not found: return 10_000
    return int(found[1]) + ("abcdefghijklmnopqrstuvwxyz".find(found[2] or "a")) / 100


# ---- the checks

def bad_direction(code, own, numbers, strict):
    """Imports of a module whose notebook does not come earlier (strict) or comes later."""
    bad = []
    for name in imported(code):
        parts = name.split(".")
        if parts[0] != "ivt_min":
            continue
        module = parts[1] if len(parts) > 1 else ""
        module = "verdict" if module in ("", "refine") else module  # what the package itself gives
        if module.startswith("__"):
            continue
        theirs = numbers.get(module, 20_000)
        if theirs > own or (strict and theirs == own):
            bad.append(f"{name} is not of a lower number")
    return bad


def bad_imports(code, allowed=None):
    """Imports of trainer frameworks and, where `allowed` is given, of anything outside it."""
    bad = []
    for name in imported(code):
        top, last = name.split(".")[0], name.split(".")[-1]
        if top in FRAMEWORKS or TRAINER.match(last):
            bad.append(f"{name} is a framework")
        elif allowed is not None and top not in allowed | sys.stdlib_module_names | {"ivt_min"}:
            bad.append(f"{name} is no dependency")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and TRAINER.match(node.attr) and node.attr != "BpeTrainer":
            bad.append(f"{node.attr} is a framework's")
    return bad


def unsafe_calls(code):
    """Ways of running what a file or a string says."""
    bad = [name for name in imported(code) if name.split(".")[0] in UNSAFE]
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            bad.append(node.func.id)
        if (owner, called(node)) == ("torch", "load"):
            bad.append("torch.load")
        if any(k.arg == "allow_pickle" and getattr(k.value, "value", 1) for k in node.keywords):
            bad.append("allow_pickle")
    return bad


def long_lines(code, most=100):
    """Numbers of lines that are too long; the list `__all__` is nbdev's and not counted."""
    free = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            free |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(code.splitlines(), 1)
    return [n for n, line in lines if len(line) > most and n not in free]


def orphans(folder, numbers):
    """Modules that no notebook makes."""
    known = set(numbers) | HAND_MADE | {"_modidx"}
    return [p.name for p in Path(folder).glob("*.py") if p.stem not in known]


RECIPES = {"31_pretrain"}  # all of its code stays in the notebook, so its cells may be longer


def shape_problems(path):
    """Where a notebook is larger than the style allows."""
    code = [n for n in (len(code_lines(s)) for s in sources(path)) if n]
    cells, recipe = len(read_notebook(path)["cells"]), Path(path).stem in RECIPES
    words = sum(len(text.split()) for text in sources(path, "markdown"))
    size = Path(path).stat().st_size
    short = sum(n <= 15 for n in code) / max(1, len(code))
    checks = {
        f"{size} bytes": size <= 300_000,
        f"{cells} cells": cells <= 100,
        f"{words} words": words <= 1500,
        f"a cell of {max(code, default=0)} lines": max(code, default=0) <= 35,
        f"only {short:.0%} of cells have <= 15 lines": short >= (0.7 if recipe else 0.9),
        f"median cell {statistics.median(code or [0])} lines":
            statistics.median(code or [0]) <= (12 if recipe else 5),
    }
    return [what for what, fine in checks.items() if not fine]


def anatomy_problems(path):
    """What a notebook lacks at its beginning or end."""
    cells = read_notebook(path)["cells"]
    first, last = ("".join(cells[i]["source"]) for i in (0, -1))
    headings = re.findall(r"^#+ +(.+)$", "\n".join(sources(path, "markdown")), re.M)
    checks = {
        "no '# name' with '> one line' first": re.match(r"# .+\n+> .+", first),
        "no hidden nbdev_export() last": "#| hide" in last and "nbdev_export()" in last,
        "no 'What is left out'": "What is left out" in headings,
    }
    return [what for what, fine in checks.items() if not fine]


def shows_something(source):
    """Does a cell surely show something when it runs: a print, a picture, or a value at its end?"""
    body = ast.parse(notebook_free(source)).body
    if re.search(r"^#\|\s*eval:\s*false", source, re.M) or not body:
        return False
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if called(node.value) in ("print", "display"):
                return True
    end = body[-1]
    if not isinstance(end, ast.Expr) or source.rstrip().endswith(";"):
        return False
    if isinstance(end.value, ast.Call):
        return called(end.value) in ("show", "filmstrip", "curve", "SVG", "len", "sorted", "list",
                                     "round")
    return not isinstance(end.value, ast.Constant)


def notebook_free(source):
    """A cell's source without lines for the shell or IPython."""
    return "\n".join(x for x in source.splitlines() if not re.match(r"\s*[%!]", x))


def stored_problems(path):
    """Outputs that are missing, or that should not be there."""
    bad, stored = [], 0
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] != "code":
            continue
        source, outputs = "".join(cell["source"]), cell["outputs"]
        stored += bool(outputs)
        bad += [f"{what}: {source[:50]!r}" for what in output_problems(outputs)]
        if shows_something(source) and not outputs:
            bad.append(f"no output stored: {source[:50]!r}")
    return bad + ["no outputs at all"] * (not stored)


def is_clean(path):
    """Is the file as nbdev_clean leaves it?"""
    return cleaned(read_notebook(path), get_config(path=ROOT)) == Path(path).read_text("utf-8")


def bad_top(names):
    """Files or folders at the top that have no business there; dot-files are free."""
    return sorted({n.split("/")[0] for n in names if not n.startswith(".")} - TOP)


def commands(readme):
    """The command lines in the shell blocks of a README."""
    return blocks(readme, "sh|bash|shell")


def blocks(readme, kinds):
    """The lines in a README's blocks of some kinds, without comments of their own line."""
    found = re.findall(rf"^```(?:{kinds})\n(.*?)^```", readme, re.M | re.S)
    lines = "".join(found).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def readme_table(readme):
    """[(run, column, metric, text of the cell)] of the table between the two marks.

    The first mark names the metric of all columns but `n`, or none: then the second column of the
    table is the results' column, and the others are metrics.
    """
    block = re.search(r"<!-- results ?(\w*) -->(.*?)<!-- /results -->", readme, re.S)
    lines = block[2].split("\n") if block else []
    lines = [line.strip() for line in lines if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not rows:
        return []
    head, body = rows[0], [r for r in rows[1:] if not set("".join(r)) <= set("-: ")]
    if block[1]:
        cells = [(r[0], "step 0" if name == "n" else name, "n" if name == "n" else block[1], text)
                 for r in body for name, text in zip(head[1:], r[1:])]
    else:
        cells = [(r[0], r[1], metric, text) for r in body for metric, text in zip(head[2:], r[2:])]
    return [c for c in cells if re.search(r"\d", c[3])]


def figure_problems(readme, results):
    """Figures of README's table that are not those of results.json, rounded to the digits shown.

    A cell is `value` or `value [low, high]`; column `n` is the number of samples of its whole row.
    """
    entries = {(r["run"], r["column"], r["metric"].lower()): r for r in results}
    table, bad = readme_table(readme), []
    for run, column, metric, text in table:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
        rows = [r for (a, b, m), r in entries.items() if (a, b) == (run, column)]
        keys = ("n",) if metric == "n" else ("value", "low", "high")
        rows = [r for r in rows if r["metric"].lower() == metric.lower()
                or metric == "n" and "/" not in r["metric"]]
        if not rows or len(numbers) not in (1, len(keys)):
            bad.append(f"{run}, {column}, {metric}: no such result as {text!r}")
        for row in rows:
            for key, shown in zip(keys, numbers):
                digits = len(shown.partition(".")[2])
                if f"{row[key]:.{digits}f}" != shown:
                    bad.append(f"{run}, {column}, {metric}: {key} is {row[key]}, not {shown}")
    return bad + ["the table is empty"] * (bool(results) and not table)


def loose_figures(readme):
    """Figures that look measured and stand outside the table, where no test compares them."""
    held = r"<!-- results.*?<!-- /results -->|^```.*?^```"
    text = re.sub(held, "", readme, flags=re.M | re.S)
    found = re.findall(r"(?<![\w.])0\.\d{2,}|\d+(?:\.\d+)? ?%", text)
    return [figure for figure in found if figure != "95 %"]  # the level of every interval


def broken_links(readme, root):
    """Relative links that lead nowhere."""
    links = re.findall(r"\]\(([^)#]+)", readme) + re.findall(r'(?:src|href)="([^"#]+)"', readme)
    return [x for x in links if not x.startswith("http") and not (Path(root) / x).exists()]


def difference(before, after):
    """Names of the files that differ between two folders, caches left out."""
    def files(folder):
        paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb")]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    old, new = files(before), files(after)
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def tracked():
    """Every file that git knows, as paths from the top."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [name for name in found.stdout.split("\0") if name and (ROOT / name).exists()]


# ---- the project under the checks

def test_something_is_checked():
    assert len(LIBRARY) > 1 and len(NOTEBOOKS) > 1


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_module(path):
    code, numbers = path.read_text("utf-8"), module_numbers(NOTEBOOKS)
    allowed = DEPENDENCIES if path.stem not in LIGHT else {"numpy", "PIL"}
    assert bad_imports(code, allowed | OPTIONAL) == []
    assert unsafe_calls(code) == []
    assert long_lines(code) == []
    if path.stem not in HAND_MADE:
        assert bad_direction(code, numbers.get(path.stem, -1), numbers, strict=True) == []


def test_no_module_is_an_orphan():
    assert orphans(ROOT / "ivt_min", module_numbers(NOTEBOOKS)) == []


def test_two_notebooks_never_make_one_module():
    made = [m for p in NOTEBOOKS for m in module_numbers([p])]
    assert len(made) == len(set(made))


def code_lines_of(code):
    """{line: number of Python tokens} of code: comments, docstrings and `__all__` are free."""
    free, lines, counts = set(FREE_TOKENS), set(), Counter()
    for node in ast.walk(ast.parse(code)):
        first = getattr(node, "body", [None])[0] if isinstance(node, DOCUMENTED) else None
        text = isinstance(getattr(getattr(first, "value", None), "value", None), str)
        if isinstance(first, ast.Expr) and text:
            lines |= set(range(first.lineno, first.end_lineno + 1))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            lines |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in free and token.start[0] not in lines:
            counts[token.start[0]] += 1
    return counts


def golf_problems(codes, tokens=32_000, mean=12.5, dense=.03, longest=35):
    """Where a library is larger or denser than the house allows."""
    lines = [n for code in codes for n in code_lines_of(code).values()]
    functions = [node for code in codes for node in ast.walk(ast.parse(code))
                 if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    checks = {
        f"{sum(lines)} tokens": sum(lines) <= tokens,
        f"{sum(lines) / len(lines):.1f} tokens a line": sum(lines) / len(lines) <= mean,
        f"{sum(n >= 30 for n in lines)} dense lines": sum(n >= 30 for n in lines) <= dense * len(lines),
        f"{max(long, key=long.get, default='')} is long": max(long.values(), default=0) <= longest,
    }
    return [what for what, fine in checks.items() if not fine]


def undocumented(function):
    """Arguments without a comment of their own, as fastcore's docments files them."""
    found = docments(inspect.unwrap(function), full=False, returns=False)
    return [name for name, text in found.items() if text is None and name not in ("self", "cls")]


def export_problems(path):
    """Export cells with several public definitions, and more than two of them without a value."""
    bad, silent = [], 0
    for source in sources(path):
        if not source.lstrip().startswith("#| export"):
            silent = 0 if code_lines(source) else silent
            continue
        made = re.findall(r"^(?:def|class) (\w+)", source, re.M)
        public = [name for name in made if not name.startswith("_")]
        if len(public) > 1: bad.append(f"{' and '.join(public)} in one cell")
        silent += bool(made)
        if silent == 3: bad.append(f"no value in the three cells up to {made[0]}")
    return bad


def test_library_is_small_and_readable():
    made = [p for p in LIBRARY if not p.stem.startswith("_")]
    assert golf_problems([p.read_text("utf-8") for p in made]) == []


def test_golf_check_can_fail_and_counts_as_by_hand():
    code = '"""Doc."""\n\n__all__ = ["f"]\n\ndef f(\n    x,  # why\n):\n    "Doc."\n    return x + 1\n'
    assert sorted(code_lines_of(code).values()) == [2, 2, 3, 4]     # x,  ):  def f(  return x + 1
    assert golf_problems([code]) == []
    for limit in (dict(tokens=10), dict(mean=2.7), dict(longest=4)):
        assert len(golf_problems([code], **limit)) == 1
    assert golf_problems(["x = " + "1 + " * 20 + "1"], mean=99) == ["1 dense lines"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_every_argument_is_documented(path):
    module = importlib.import_module("ivt_min" if path.stem == "__init__" else f"ivt_min.{path.stem}")
    public = [f for name, f in vars(module).items() if inspect.isfunction(f)
              and f.__module__ == module.__name__ and not name.startswith("_")]
    assert {f.__name__: undocumented(f) for f in public if undocumented(f)} == {}


def test_argument_check_can_fail():
    def poor(a, b):  # what b is
        pass
    def rich(
        a,  # what a is
        b,  # what b is
    ): pass
    assert undocumented(poor) == ["a"] and undocumented(rich) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAME)
def test_export_cells_are_small_and_have_values_between(path):
    assert export_problems(path) == []


def test_export_check_can_fail(tmp_path):
    def made(*cells): return export_problems(notebook(tmp_path, *((c, []) for c in cells)))
    one = "#| export\ndef f(): pass\ndef _g(): pass"
    assert made(one, one, "f()", one, one) == [] == made("#| export\nimport os", one, one)
    assert made(one + "\nclass G: pass") == ["f and G in one cell"]
    assert made(one, one, "# text", one) == ["no value in the three cells up to f"]


def python(code, *args, cwd=ROOT):
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


HEAVY = """import sys, importlib
importlib.import_module(sys.argv[1])
heavy = {"torch", "transformers", "peft", "bitsandbytes", "IPython", "fastcore", "scipy",
         "matplotlib"}
print(sorted(heavy & sys.modules.keys()))"""


@pytest.mark.parametrize("module", ["", *(f".{p.stem}" for p in LIBRARY if p.stem in LIGHT)])
def test_import_is_light(module):
    done = python(HEAVY, "ivt_min" + module)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAME)
def test_notebook(path):
    code, numbers = notebook_code(path), module_numbers(NOTEBOOKS)
    assert bad_imports(code) == []
    assert bad_direction(code, notebook_number(path), numbers, strict=False) == []
    assert shape_problems(path) == []
    assert long_lines(code) == []
    if path.name != "index.ipynb":
        assert anatomy_problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAME)
def test_notebook_is_clean_and_has_its_outputs(path):
    assert is_clean(path), "run nbdev_clean"
    assert stored_problems(path) == []


def test_library_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", "ivt_min"):
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    done = python("import nbdev; from nbdev.clean import nbdev_clean\n"
                  "nbdev.nbdev_export(); nbdev_clean()", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("nbs", "ivt_min"):
        assert difference(ROOT / name, tmp_path / name) == []


def test_repository_is_small_and_tidy():
    names = tracked()
    assert bad_top(names) == []
    assert sum((ROOT / n).stat().st_size for n in names) <= 30 * MEGABYTE


def test_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    first, second = commands(readme)
    assert first == "pip install -e . && ivt_min"
    assert second == "pip install -e '.[dev]' && nbdev_test --do_print"
    assert broken_links(readme, ROOT) == []
    assert loose_figures(readme) == []
    names = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS if p.name != "index.ipynb"]
    assert [n for n in names if f"({n})" not in readme] == []


def test_readme_says_what_was_measured():
    path = ROOT / "data" / "runs" / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else []
    assert figure_problems((ROOT / "README.md").read_text("utf-8"), results) == []


def test_setup_declares_what_is_used():
    wanted = {re.match(r"[\w-]+", r)[0] for r in shlex.split(get_config(path=ROOT).requirements)}
    assert wanted == {"torch", "transformers", "peft", "bitsandbytes", "pillow", "numpy",
                      "safetensors"}


def open_windows(requirements):
    """Requirements without a last version, by which a new release could break an install."""
    return [r for r in shlex.split(requirements) if not re.search(r"==|<", r)]


def test_windows_are_closed():
    cfg = get_config(path=ROOT)
    assert open_windows(cfg.requirements) == open_windows(cfg.dev_requirements) == []
    assert open_windows("'a>=1' 'b<2' c 'd==1'") == ["a>=1", "c"]


# ---- the checks under test: each complains about a bad example

NUMBERS = {"core": 0, "boxes": 1, "loop": 7, "verdict": 13}


@pytest.mark.parametrize("code", [
    "from ivt_min.loop import refine", "import ivt_min.loop", "from ivt_min import loop",
    "from ivt_min import refine", "from .loop import refine", "from . import loop",
    "import ivt_min", "import_module('ivt_min.loop')", "from ivt_min.boxes import iou",
    "from ivt_min.cli import main", "from ivt_min.ghost import x",
    "def f():\n    from ivt_min.loop import refine",
])
def test_direction_can_fail(code):
    assert bad_direction(code, 1, NUMBERS, strict=True)
    assert not bad_direction("from ivt_min.core import Sample", 1, NUMBERS, strict=True)


@pytest.mark.parametrize("code", [
    "import trl", "from trl import GRPOTrainer", "import pytorch_lightning as pl",
    "from accelerate import Accelerator", "import deepspeed.ops",
    "from transformers import Trainer", "from transformers import TrainingArguments",
    "import transformers\nt = transformers.Trainer()",
    "try:\n    import torchvision\nexcept ImportError: pass",
])
def test_framework_check_can_fail(code):
    assert bad_imports(code)
    assert not bad_imports("import torch, fastcore.test\nfrom transformers import AutoTokenizer")


@pytest.mark.parametrize("code", [
    "import fastcore", "from IPython.display import display", "import scipy", "import requests",
])
def test_dependency_check_can_fail(code):
    assert bad_imports(code, DEPENDENCIES)
    assert bad_imports("def f():\n    import torch", {"numpy", "PIL"})
    assert not bad_imports("import json, numpy\nfrom PIL import Image", {"numpy", "PIL"})


@pytest.mark.parametrize("code", [
    "import pickle", "from pickle import loads", "eval(text)", "exec(text)", "torch.load(path)",
    "np.load(path, allow_pickle=True)", "def f():\n    import joblib",
])
def test_safety_check_can_fail(code):
    assert unsafe_calls(code)
    assert not unsafe_calls("model.eval()\nx = retrieval(1)\nnp.load(p, allow_pickle=False)")


def test_line_check_can_fail():
    assert long_lines("x = 1\ny = '" + "a" * 100 + "'") == [2]
    assert long_lines("__all__ = ['" + "a" * 100 + "',\n           'b']") == []


def test_light_check_can_fail():
    assert "scipy" in python(HEAVY, "scipy").stdout


def notebook(tmp_path, *cells, name="03_x.ipynb"):
    """A notebook file of (source, outputs) cells; a source that begins with '# ' is text."""
    made = []
    for i, (source, outputs) in enumerate(cells):
        cell = {"cell_type": "markdown", "id": f"c{i}", "metadata": {}}
        cell["source"] = source.splitlines(True)
        if not source.startswith("# "):
            cell |= {"cell_type": "code", "execution_count": None, "outputs": list(outputs)}
        made.append(cell)
    path = tmp_path / name
    whole = {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(cleaned(whole, get_config(path=ROOT)), "utf-8")
    return path


def stream(text, name="stdout"):
    return [{"name": name, "output_type": "stream", "text": [text]}]


@pytest.mark.parametrize("cells, word", [
    ([("\n".join(["x = 1"] * 36), [])], "36 lines"),
    ([("x\n" * 14 + "x", [])] * 8, "median"),
    ([("x", [])] * 8 + [("x\n" * 16, [])] * 2, "only"),
    ([("x", [])] * 101, "101 cells"),
    ([("# " + "word " * 1600, [])], "words"),
    ([("x", stream("a" * 300_000))], "bytes"),
])
def test_shape_check_can_fail(tmp_path, cells, word):
    assert any(word in problem for problem in shape_problems(notebook(tmp_path, *cells)))
    assert shape_problems(notebook(tmp_path, ("x", []), ("#| export\n" + "x = 1\n" * 5, []))) == []


@pytest.mark.parametrize("source, outputs", [
    ("print(1)", []), ("x = 1\nx", []), ("show(images)", []), ("a.b[0]", []), ("x == 1", []),
    ("1", stream("see /home/me/x.jpg")), ("1", stream("a warning", "stderr")),
    ("1", stream("\rstep 2")), ("1", stream("10%|# | 1/10")),
    ("1", [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]),
])
def test_output_check_can_fail(tmp_path, source, outputs):
    good = ("print(2)", stream("2 of https://a.b/home/x"))
    assert stored_problems(notebook(tmp_path, (source, outputs), good))
    quiet = [("x = 1", []), ("test_eq(1, 1)", []), ("x;", []),
             ("#| eval: false\nprint(1)", [])]
    assert stored_problems(notebook(tmp_path, good, *quiet)) == []
    assert stored_problems(notebook(tmp_path, *quiet)) == ["no outputs at all"]


def test_clean_check_can_fail(tmp_path):
    path = notebook(tmp_path, ("x", []))
    assert is_clean(path)
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 3'))
    assert not is_clean(path)


def test_anatomy_check_can_fail(tmp_path):
    end = ("#| hide\nimport nbdev; nbdev.nbdev_export()", [])
    good = [("# x\n\n> y", []), ("# What is left out\n\nmuch", []), end]
    assert anatomy_problems(notebook(tmp_path, *good)) == []
    assert len(anatomy_problems(notebook(tmp_path, ("# x", []), ("x", [])))) == 3


def test_orphan_check_can_fail(tmp_path):
    for name in ("__init__", "_modidx", "cli", "core", "ghost"):
        (tmp_path / f"{name}.py").touch()
    made = notebook(tmp_path, ("#| default_exp core", []), name="00_core.ipynb")
    assert orphans(tmp_path, module_numbers([made])) == ["ghost.py"]


def test_sync_check_can_fail(tmp_path):
    for name, text in (("a/x.py", "1"), ("b/x.py", "2"), ("b/y.py", ""), ("a/z.pyc", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert difference(tmp_path / "a", tmp_path / "b") == ["x.py", "y.py"]


def test_layout_check_can_fail():
    assert bad_top(["nbs/a", ".ci/run", ".gitignore", "LICENSE"]) == []
    assert bad_top(["nbs/a", "pyproject.toml", "src/x.py"]) == ["pyproject.toml", "src"]


WIDE = """
<!-- results mean -->
| run | step 0 | oracle | n |
|---|---|---|---|
| base | 0.71 [0.69, 0.74] | | 505 |
| naive | 0.71 | 0.90 | 505 |
<!-- /results -->
"""


def test_wide_figures():
    rows = [dict(run=run, column=column, metric="mean", value=value, low=.69, high=.74, n=505)
            for run, column, value in (("base", "step 0", .711), ("naive", "step 0", .711),
                                       ("naive", "oracle", .9))]
    assert figure_problems(WIDE, rows) == [] and len(readme_table(WIDE)) == 5
    for old, new in (("0.90", "0.91"), ("505", "504"), ("0.69", "0.68"), ("naive", "best")):
        assert figure_problems(WIDE.replace(old, new), rows)


TABLE = """
<!-- results -->
| run | column | Acc@0.5 | mean IoU | n |
|---|---|---|---|---|
| base | step 0 | 0.80 [0.76, 0.83] | 0.712 | 505 |
<!-- /results -->
"""
ROWS = [
    dict(run="base", column="step 0", n=505) | row for row in (
        dict(metric="acc@0.5", value=0.8041, low=0.7641, high=0.8339),
        dict(metric="mean IoU", value=0.7119, low=0.69, high=0.74),
    )
]


def test_figures_agree():
    assert len(readme_table(TABLE)) == 3 and figure_problems(TABLE, ROWS) == []
    assert figure_problems(TABLE.replace("0.80 [", "80.4 % of 1 ["), ROWS)


@pytest.mark.parametrize("old, new", [
    ("0.80 ", "0.81 "), ("0.76", "0.77"), ("0.83]", "0.84]"), ("0.712", "0.711"), ("505", "504"),
    ("| base", "| best"), ("step 0", "oracle"), ("Acc@0.5", "Acc@0.7"), ("[0.76, 0.83]", "[0.76]"),
    ("| base | step 0 | 0.80 [0.76, 0.83] | 0.712 | 505 |\n", ""), ("<!-- results -->", ""),
])
def test_figure_check_can_fail(old, new):
    assert old in TABLE and figure_problems(TABLE.replace(old, new), ROWS)


def test_readme_checks_can_fail(tmp_path):
    text = ("```sh\n# first\na && b\n```\nand\n```bash\nc\n```\n"
            "[x](gone.md) ![y](here.md) [z](https://a.b)\n")
    (tmp_path / "here.md").touch()
    assert commands(text) == ["a && b", "c"]
    assert broken_links(text, tmp_path) == ["gone.md"]
    loose = loose_figures("0.81 or 81 % (Acc@0.5; 95 % interval)" + TABLE + "```\n0.99\n```\n")
    assert loose == ["0.81", "81 %"]
