"""The command, its examples and those of README, as a user types them."""
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ivt_min.cli import COMMANDS, build_parser, main
from test_project import ROOT, blocks

SCENE, OTHER = "data/examples/scene-0.png", "data/examples/scene-1.png"
STAR = "the small red star that is right of the purple star"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like the top of the project, where files may be left."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "data/examples", folder / "data/examples")
    for name in ("naive", "base"):
        shutil.copytree(ROOT / "data/runs" / name, folder / "data/runs" / name)
    return folder


def run(place, line):
    """What a line for the command does, in this process: its exit code, stdout and stderr."""
    out, err, home = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = main(shlex.split(line) if isinstance(line, str) else line) or 0
            except SystemExit as stopped: code = stopped.code
    finally:
        os.chdir(home)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def alone(place, command, **more):
    """The same in a process of its own, with the modules of this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, **more)


def readme_lines():
    return blocks((ROOT / "README.md").read_text("utf-8"), "console")


EXAMPLES = list(dict.fromkeys(readme_lines() + [example for *_, example in COMMANDS.values()]))


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_runs_as_it_stands(place, line):
    name, *words = shlex.split(line)
    done = run(place, words)
    assert name == "ivt_min" and done.returncode == 0, done.stderr
    assert loud(done.stderr) == [] and done.stdout


def loud(stderr):
    """What is on stderr beside our own note and our own progress, which a slow machine shows after 5 s."""
    lines = re.split(r"[\r\n]+", stderr)
    return [x for x in lines if x and not re.match(r"note: |(test: +)?\d+%\|| +\d+%\|", x)]


def test_a_process_of_its_own_is_as_quiet(place):
    done = alone(place, [sys.executable, "-m", "ivt_min.cli", "demo", "-n", "2"])
    assert done.returncode == 0 and loud(done.stderr) == [] and "naive_turn" in done.stdout


def test_readme_example_runs_as_it_stands(place):
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"^```python\n(.*?)^```", readme, re.M | re.S)[1]
    code += "\nimport json; print(json.dumps(result.to_dict()['final']))"
    done = alone(place, [sys.executable, "-c", code])
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 4, done.stderr
    assert (place / "ivt_min_refined.jpg").stat().st_size > 1000
    assert "is a model of" in done.stderr and "Loading" not in done.stderr


def test_help_and_version():
    parser = build_parser()
    for name, (*_, example) in COMMANDS.items():
        assert name in parser.format_help()
        assert main_exit([name, "--help"]) == 0 and example.startswith(f"ivt_min {name}")
    assert main_exit(["--version"]) == 0


def main_exit(words):
    with pytest.raises(SystemExit) as stopped: main(words)
    return stopped.value.code


@pytest.mark.parametrize("line, word", [
    (f"refine {SCENE} star --steps -1", "-1"), (f"refine {SCENE} star --steps 2.5", "2.5"),
    (f"refine {SCENE} star --batch 0", "'0'"), ("-n 0", "'0'"), ("demo -n x", "'x'"),
    (f"refine {SCENE}", "expression"), ("refine", "image"), ("nonsense", "nonsense"),
    ("--model sft evaluate sft data/examples/rows.jsonl", "--model"),
    (f"refine {SCENE} star --colour red", "--colour"),
])
def test_a_mistyped_line_is_refused(capsys, line, word):
    assert main_exit(shlex.split(line)) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("line, words", [
    ("refine nowhere.png star", ["nowhere.png"]), (f"refine {SCENE} ' '", ["0 characters"]),
    (f"refine {SCENE} nowhere.png star", ["nowhere.png"]),
    (f"refine {SCENE} star --out a.xyz", ["a.xyz", ".png"]),
    (f"refine {SCENE} star --out /proc/none/a.png", ["/proc/none/a.png"]),
    ("demo --out a.xyz", ["a.xyz"]),
    (f"refine {SCENE} star --model nonsense", ["nonsense", "sft", "grpo", "tiny"]),
    (f"refine {SCENE} star --model no/such", ["no/such", "hub"]),
    (f"refine {SCENE} star --device abacus", ["abacus"]),
    ("evaluate nonsense data/examples/rows.jsonl", ["nonsense", "sft"]),
    ("evaluate sft nowhere.jsonl", ["nowhere.jsonl"]),
    ("evaluate sft broken.jsonl", ["broken.jsonl", "row 2", "box"]),
])
def test_a_mistake_is_one_line_and_nothing_is_done(place, line, words):
    rows = [json.loads(x) for x in (ROOT / "data/examples/rows.jsonl").read_text().splitlines()]
    rows = [dict(r, image=f"data/examples/{r['image']}") for r in rows]
    rows[1]["box"] = [0, 0, 999, 9]
    (place / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    start, before = time.time(), set(place.glob("*"))
    done = run(place, line)
    assert (done.returncode, done.stdout) == (2, "") and time.time() - start < 40
    assert done.stderr.startswith("ivt_min: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words)
    left = {p.name for p in set(place.glob("*")) - before}
    assert left <= {"ivt_min_refined"}     # an empty folder, which was tried
    assert not [p for name in left for p in (place / name).rglob("*") if p.is_file()]


def test_no_option_is_lost_wherever_it_stands(place):
    answers = [run(place, line).stdout for line in (
        f"refine {SCENE} '{STAR}' --json --model grpo --steps 3",
        f"--model grpo refine --steps 3 {SCENE} '{STAR}' --json",
        f"--steps 3 --json --model grpo refine {SCENE} '{STAR}'")]
    one = json.loads(answers[0])
    assert len(set(answers)) == 1
    assert (one["model"], len(one["steps"]), one["expression"]) == ("grpo", 4, STAR)


def test_many_pictures_are_a_folder_of_films_and_a_line_each(place):
    shutil.copy(ROOT / OTHER, place / "scene-0.png")     # the same name in another folder
    done = run(place, f"refine {SCENE} scene-0.png star --json --out films")
    assert [json.loads(x)["image"] for x in done.stdout.splitlines()] == [SCENE, "scene-0.png"]
    assert sorted(p.name for p in (place / "films").iterdir()) == ["0-scene-0.jpg", "1-scene-0.jpg"]


def test_a_reader_who_leaves_early_sees_no_traceback(place):
    line = f"{sys.executable} -m ivt_min.cli refine {SCENE} {OTHER} star --json | true"
    done = alone(place, line, shell=True)
    assert "Traceback" not in done.stderr


def many_rows(place, n):
    """A file of n questions about the example scenes."""
    rows = [json.loads(x) for x in (ROOT / "data/examples/rows.jsonl").read_text().splitlines()]
    rows = [dict(rows[k % 6], id=f"q{k}", image=f"data/examples/{rows[k % 6]['image']}")
            for k in range(n)]
    (place / "many.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return rows


def test_a_folder_named_like_a_shipped_model_is_not_passed_over(place):
    (place / "grpo").mkdir()
    done = run(place, f"refine {SCENE} star --model grpo")
    (place / "grpo").rmdir()
    assert done.returncode == 2 and "./grpo" in done.stderr


def test_evaluate_reads_the_rows_of_a_real_set(place):
    """As Ref-L4 writes them: corner and size, whole numbers as ids, pictures elsewhere."""
    rows = [json.loads(x) for x in (place / "data/examples/rows.jsonl").read_text().splitlines()]
    (place / "l4").mkdir()
    for k, row in enumerate(rows):
        x0, y0, x1, y1 = row["box"]
        rows[k] = dict(id=k, file_name=row["image"], caption=row["expression"], width=128, height=128,
                       bbox=[x0, y0, x1 - x0, y1 - y0], is_rewrite=False, split="val")
    (place / "l4/ref-l4-val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = "evaluate tiny l4/ref-l4-val.jsonl --layout ref-l4 --steps 0 --out run-l4"
    done = run(place, line + " --images data/examples")
    own = run(place, "evaluate tiny data/examples/rows.jsonl --steps 0 --out run-own")
    assert done.returncode == own.returncode == 0, done.stderr + own.stderr
    boxes = [[json.loads(x)["boxes"] for x in (place / run_ / "test.jsonl").read_text().splitlines()]
             for run_ in ("run-l4", "run-own")]
    assert boxes[0] == boxes[1] and any(boxes[0])
    assert run(place, line.replace("run-l4", "none")).returncode == 2    # no picture beside the rows
    wrong = run(place, line.replace("ref-l4 ", "own ") + " --images data/examples")
    assert wrong.returncode == 2 and "row 1" in wrong.stderr


def test_evaluate_goes_on_where_it_was_stopped(place):
    rows = many_rows(place, 24)
    whole = run(place, "evaluate sft many.jsonl --out whole --batch 4")
    assert whole.returncode == 0, whole.stderr
    lines = (place / "whole/test.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in lines] == [r["id"] for r in rows]

    (place / "part").mkdir()
    shutil.copy(place / "whole/config.json", place / "part")
    torn = "\n".join(lines[:5]) + "\n" + lines[5][:40]
    (place / "part/test.part0-7").write_text(torn)
    again = run(place, "evaluate sft many.jsonl --out part --batch 4")
    assert "part" in again.stdout and again.returncode == 0, again.stderr
    kept = (place / "part/test.jsonl").read_text().splitlines()
    assert kept[:5] == lines[:5]      # what was there is not asked again
    boxes = [[json.loads(x)["boxes"] for x in some] for some in (kept, lines)]
    assert boxes[0] == boxes[1]
    other = run(place, "evaluate grpo many.jsonl --out part")
    assert other.returncode == 2 and "other settings" in other.stderr


def test_ctrl_c_is_one_line_and_what_was_finished_is_kept(place):
    many_rows(place, 400)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "ivt_min.cli", *"evaluate sft many.jsonl --out cut".split()]
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL)    # in the background it is ignored
    job = subprocess.Popen(words + ["--batch", "4"], cwd=place, env=env, text=True, preexec_fn=heed,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    def kept(): return sum(p.read_bytes().count(b"\n") for p in place.glob("cut/test.part*"))
    end = time.time() + 120
    while time.time() < end and job.poll() is None and kept() < 8: time.sleep(.1)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130 and "Traceback" not in err
    assert err.rstrip().splitlines()[-1].endswith("stopped; what was finished is kept")
    assert kept() >= 8 and not (place / "cut/test.jsonl").exists()


def test_a_picture_that_cannot_be_opened_counts_as_no_box(place):
    rows = many_rows(place, 6)
    rows[2] |= dict(image="gone.png", width=128, height=128)
    (place / "many.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = run(place, "evaluate tiny many.jsonl --out gone --steps 0")
    assert done.returncode == 0 and "q2: " in done.stderr, done.stderr
    row = json.loads((place / "gone/test.jsonl").read_text().splitlines()[2])
    assert row["boxes"] == [None] and "| 6 |" in done.stdout


def test_the_rule_can_be_chosen_on_rows_of_its_own(place):
    rows = many_rows(place, 12)
    (place / "val.jsonl").write_text("\n".join(json.dumps(dict(r, id="v" + r["id"])) for r in rows))
    done = run(place, "evaluate sft many.jsonl --val val.jsonl --out chosen")
    assert done.returncode == 0 and "chosen on val.jsonl" in done.stdout, done.stderr
    assert (place / "chosen/val.jsonl").exists()
    shared = run(place, "evaluate sft many.jsonl --val many.jsonl --out shared")
    assert shared.returncode == 2 and "in test and in val" in shared.stderr
    assert not (place / "shared").exists()


def test_a_script_beside_a_clone_of_the_same_name(tmp_path):
    """A folder above a clone called ivt_min is on the path; the package must still be found."""
    clone = tmp_path / "ivt_min"
    clone.mkdir()
    (clone / "data").symlink_to(ROOT / "data")
    (clone / "ivt_min").symlink_to(ROOT / "ivt_min")
    code = "from ivt_min import refine; print(refine.__name__)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "refine", done.stderr
