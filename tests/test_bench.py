"""The benchmarks run, their gates hold, and README says what they measured."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*args):
    """The lines of a quick run."""
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "bench.py", "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_rollout_and_an_update_do_what_others_do_and_less():
    """Equal ids, log-probabilities and gradients, with fewer positions and patches."""
    code, rows = bench("--quick", "--repeats", "1", "--only", "rollout_batched", "sft_update")
    assert code == 0 and {r["gate"] for r in rows} == {"held"}
    ours, theirs = next(r for r in rows if r["name"] == "rollout_batched")["counts"]
    assert 2 * ours["positions"] < theirs["positions"] and 2 * ours["patches"] < theirs["patches"]


def test_a_loss_needs_little_memory():
    done = subprocess.run([sys.executable, ROOT / "tests" / "bench.py", "--peak", "ours", "512"],
                          capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 1 < float(done.stdout.split()[-1]) < 350     # MB


def ratio_problems(readme, rows):
    """Ratios that README names and the stored benchmarks do not have, to one digit."""
    known = {r["name"]: f"{r['ratio']:.1f}" for r in rows if "ratio" in r}
    said = re.findall(r"<!-- bench (\w+) -->(.*?)<!-- /bench -->", readme)
    return [name for name, text in said if known.get(name) != text]


def test_readme_says_what_was_benchmarked():
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = [json.loads(line) for line in open(ROOT / "data" / "runs" / "bench.jsonl")]
    assert readme.count("<!-- bench ") == 3 and ratio_problems(readme, rows) == []
    assert {r.get("gate", "held") for r in rows} == {"held"}


@pytest.mark.parametrize("text, bad", [("2.0", []), ("2.1", ["a"]), ("", ["a"])])
def test_ratio_check_can_fail(text, bad):
    assert ratio_problems(f"<!-- bench a -->{text}<!-- /bench -->", [dict(name="a", ratio=2.04)]) == bad
