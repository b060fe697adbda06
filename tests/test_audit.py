"""The audit kit: answers of any program, the figures, the page in a real browser, the command."""
import gzip
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_min.boxes import iou, to_pixels
from ivt_min.columns import label_free, single
from ivt_min.core import Sample, Trajectory, data_path, read_json, read_jsonl, write_json, write_jsonl
from ivt_min.evaluate import ious, read_run
from ivt_min.evidence import placebo, power, reliability, risk_coverage
from ivt_min.scenes import split
from test_command import ROOT, run

sys.path.insert(0, str(ROOT / "nbs"))
from audit import audit, gallery, in_words, read_answers, write_page    # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUNS = "naive", "verdict", "sft_paper-s1"


@pytest.fixture(scope="module")
def samples(): return split("test")


@pytest.fixture(scope="module")
def val(): return split("val")


def read(name, samples=None, part="test"):
    return read_answers(data_path(f"runs/{name}/{part}.jsonl.gz"), samples)[0]


def row(k=0, **more):
    return dict(id=f"q{k}", expression="the cup", truth=[100, 100, 300, 300],
                boxes=[[100, 100, 300, 250], [100, 100, 300, 300]]) | more


def test_the_kit_is_what_its_notebook_says():
    cells = ["".join(c["source"]) for c in json.loads((ROOT/"nbs/23_audit.ipynb").read_text("utf-8"))["cells"]]
    kit = [cell.removeprefix("#| kit\n") for cell in cells if cell.startswith("#| kit\n")]
    text = (ROOT/"nbs/audit.py").read_text("utf-8")
    assert len(kit) > 10 and text.endswith("\n\n".join(kit) + "\n") and len(text.split('"""')) == 1


# ---- the figures

@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_results_json(name, samples, val):
    """The audit of a stored run says what 40_results stored, row for row."""
    base = single(read("base", samples), "step 0")
    found = audit(name, read(name, samples), read(name, val, "val"), dict(base=base))
    stored = [r for r in read_json(data_path("runs/results.json")) if r["run"] == name]
    ours = {(r["column"], r["metric"]): r for r in found["rows"]}
    columns = {"step 0", "last", "label-free", "oracle", "dynamics", "label-free vs base"}
    compared = [r for r in stored if r["column"] in columns]
    assert len(compared) > 100 and {r["column"] for r in compared} == columns
    for r in compared:
        assert {k: v for k, v in ours[r["column"], r["metric"]].items() if k != "holm"} == r
    assert f"n = {found['n']}" in found["verdict"] and json.loads(json.dumps(found)) == found


def test_a_reading_changes_nothing(samples):
    for name in RUNS:
        for old, new in zip(read_run(data_path(f"runs/{name}"), "test", samples), read(name, samples)):
            assert (old.boxes, old.kept, old.id, old.truth) == (new.boxes, new.kept, new.id, new.truth)
            assert new.verdicts == (old.verdicts if old.kept is not None else [])


@pytest.mark.parametrize("low, high, rival, head", [
    (.01, .03, None, "Gain without"), (.01, .03, (.001, .02), "Gain without"),
    (.01, .03, (-.01, .02), "Gain over the first answer, not shown over every control,"),
    (0., .03, None, "No gain shown"), (-.01, .02, (.01, .02), "No gain shown"),
    (-.03, -.001, None, "Loss"), (-.03, 0., None, "No gain shown"), (0., 0., None, "No gain shown")])
def test_the_verdict_is_no_stronger_than_its_interval(low, high, rival, head):
    def said(column, low, high):
        return dict(column=column, metric="d_miou", low=low, high=high, value=(low + high) / 2, n=50)
    rows = [said("label-free vs step 0", low, high), said("last vs step 0", 0, 1), said("oracle vs step 0", 0, 1)]
    if rival: rows.insert(1, said("label-free vs vote", *rival))
    text = in_words(rows, "mean")
    assert text.startswith(head) and f"[{100 * low:+.1f}, {100 * high:+.1f}] of mean IoU, n = 50" in text
    assert ("against vote" in text) == bool(rival) and ("no control" in text) == (not rival)


def boxes_of(n, rng, steps=3):
    corner = rng.uniform(0, 600, (n, steps, 2))
    return np.concatenate([corner, corner + rng.uniform(50, 400, (n, steps, 2))], -1)


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_a_placebo_knows_nothing_of_its_sample(seed, n):
    rng = np.random.default_rng(seed)
    made = [Trajectory(str(k), "s", "x", tuple(boxes[0]), [*map(tuple, boxes[1:])], [], [])
            for k, boxes in enumerate(boxes_of(n, rng, 4))]
    moved = placebo(made)
    assert [t.boxes[0] for t in moved] == [t.boxes[0] for t in made]
    blind = placebo([replace(t, truth=(0., 0., 1., 1.)) for t in made])
    assert [t.boxes for t in blind] == [t.boxes for t in moved]     # no truth goes into it
    shifts = [np.subtract(t.boxes[1], t.boxes[0]) for t in made]
    for t, own in zip(moved, shifts):   # each moves as another one, as far as the picture lets it
        shift = np.subtract(t.boxes[1], t.boxes[0])
        others = [np.clip(np.add(t.boxes[0], s), 0, 1000) - t.boxes[0] for s in shifts if s is not own]
        assert not shift.any() or any(np.allclose(shift, other) for other in others)


def test_power_is_that_of_the_interval():
    assert power([0., 0.]) == (0., 0) and power([1, -1])[0] == pytest.approx(2.8)
    rng = np.random.default_rng(3)
    least, needed = power(rng.normal(0, .2, 900))
    assert least == pytest.approx(2.8 * .2 / 30, rel=.1) and needed == pytest.approx(900 * (least / .01) ** 2, rel=.01)


def test_calibration_by_hand():
    said, right = np.array([.05, .55, .56, 1.]), np.array([False, True, False, True])
    rows = reliability("x", said, right)
    assert [(r["metric"], r["value"], r["n"]) for r in rows] == [("bin 0", 0, 1), ("bin 5", .5, 2), ("bin 9", 1, 1)]
    risk = risk_coverage("x", said, right)
    assert [r["n"] for r in risk] == [1, 1, 2, 2, 2, 3, 3, 4, 4, 4] and [risk[k]["value"] for k in (0, 2, 9)] == [0, .5, .5]


def test_rules_are_not_chosen_on_what_they_are_judged_by():
    """With cross-fitting a sample's own truth does not matter to its own box."""
    rng = np.random.default_rng(0)
    made = [Trajectory(str(k), "s", "x", tuple(boxes[0]), [*map(tuple, boxes[1:])], [], [])
            for k, boxes in enumerate(boxes_of(30, rng, 4))]
    before = label_free(made)[0]
    for k in range(30):
        other = made[:k] + [replace(made[k], truth=(0., 0., 1., 1.))] + made[k + 1:]
        assert label_free(other)[0][k].boxes == before[k].boxes


# ---- answers of any program

FORMS = {
    "qwen": dict(texts=['```json\n[{"bbox_2d": [100, 100, 300, 250], "label": "cup"}]\n```',
                        'Looking again, the box is {"bbox_2d": [100, 100, 300, 300]}.']),
    "vrrl": dict(turn_responses=["<THINK>left of it</THINK><ANSWER>[100, 100, 300, 250]</ANSWER>",
                                 "<THINK>fits</THINK><FINAL>[100, 100, 300, 300]</FINAL>"]),
    "boxes": dict(boxes=[[100, 100, 300, 250], [100, 100, 300, 300]]),
    "both": dict(boxes=[[100, 100, 300, 250], [100, 100, 300, 300]], texts=["[100, 100, 300, 250]", "[100, 100, 300, 300]"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "results"])
def test_forms_of_other_programs(tmp_path, form, kind):
    rows = [dict(id=k, question="the cup", ground_truth=[100, 100, 300, 300]) | FORMS[form] for k in range(3)]
    path = tmp_path/f"log.{'jsonl' if kind == 'jsonl' else 'json'}"
    if kind == "jsonl": write_jsonl(path, rows)
    else: write_json(path, rows if kind == "json" else dict(accuracy=1, results=rows))
    done, asked = read_answers(path)
    assert [[round(iou(b, t.truth), 2) for b in t.boxes] for t in done] == [[.75, 1]] * 3
    assert asked[0].expression == "the cup" and [t.id for t in done] == ["0", "1", "2"]


def test_an_evaluators_file_is_one_answer_a_question_and_can_be_a_control(tmp_path):
    """As VLM-R1's evaluator writes: px, one output, no id, a list under `results`."""
    r1 = [dict(image=f"coco/{k}.jpg", question="the cup", ground_truth=[64, 48, 192, 144], width=640, height=480, correct=1,
               extracted_answer=[64, 48, 192, 144], model_output="<think>[1, 2, 3, 4]</think><answer>[64, 48, 192, 144]</answer>")
          for k in range(3)]
    write_json(tmp_path/"r1.json", dict(accuracy=100., results=r1))
    done, asked = read_answers(tmp_path/"r1.json", mode="abs")
    assert [t.id for t in done] == ["r1-0000", "r1-0001", "r1-0002"] and ious(done).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"\[1\] boxes"): audit("r1", done)


def test_the_truth_need_not_be_the_runs_own(tmp_path):
    asked = [Sample(f"q{k}", "set", "the cup", (100., 100., 300., 300.), None) for k in range(2)]
    lied = [row(k, truth=[100, 100, 300, 250]) for k in range(2)]
    write_jsonl(tmp_path/"log.jsonl", lied)
    assert ious(read_answers(tmp_path/"log.jsonl")[0]).tolist() == [1, 1]
    done, _ = read_answers(tmp_path/"log.jsonl", asked)
    assert np.allclose(ious(done), .75) and done[0].source == "set"
    more = [*asked, replace(asked[0], id="q9")]
    assert read_answers(tmp_path/"log.jsonl", more)[0][2].notes == ["nobody answered"] * 2


def test_units_are_told_and_checked(tmp_path):
    rng = np.random.default_rng(5)
    quads = boxes_of(40, rng, 2)
    path = tmp_path/"log.jsonl"
    def write(unit, **size):
        write_jsonl(path, [row(k, truth=[*np.multiply(q[0], unit)], boxes=[[*np.multiply(q[1], unit)]] * 2, **size)
                           for k, q in enumerate(quads)])
    write(1)
    right = ious(read_answers(path)[0])
    for unit, mode, size in ((1e-3, "rel1", {}), ([.64, .48] * 2, "abs", dict(width=640, height=480))):
        write(unit, **size)
        assert np.allclose(ious(read_answers(path, mode=mode)[0]), right)
        for other in {"rel1000", "rel1", "abs"} - {mode}:
            if mode == "rel1" and other == "abs": continue      # without a size
            with pytest.raises(ValueError, match=f"look like {mode}|no {other} box"): read_answers(path, mode=other)
    write([1.92, 1.08] * 2, width=1920, height=1080)
    with pytest.raises(ValueError, match="look like abs|no rel1000 box"): read_answers(path)
    mixed = [row(k, truth=[*np.multiply(q[0], [.64, .48] * 2)], boxes=[[*q[1]]] * 2, width=640, height=480) for k, q in enumerate(quads)]
    write_jsonl(path, mixed)    # as Qwen3-VL answers questions whose truth is in pixels
    assert np.allclose(ious(read_answers(path, truth_mode="abs")[0]), right)


BAD = [     # what is wrong in row 2, and what the message says of it
    (dict(boxes=[[1, 2, 3]]), "four numbers"), (dict(boxes=[[1, 2, 3, "4"], 7]), "four numbers"),
    (dict(boxes=[1, 2, 3, 4]), "four numbers"), (dict(boxes=[]), "neither"), (dict(boxes=7), "neither"),
    (dict(boxes=[True, None]), "four numbers"), (dict(truth=None), "truth"), (dict(truth=[1, 2, 3]), "four numbers"),
    (dict(truth=[300, 300, 100, 100]), "truth"), (dict(truth=[5, 5, 5, 9]), "truth"), (dict(truth="nothing"), "truth"),
    (dict(confidences=[-1]), "length"), (dict(confidences=["x", 0]), ""), (dict(confidences=[1e999, 0]), ""),
    (dict(width="640", height=480), "width"), (dict(kept=5), "keep"), (dict(kept=1.), "kept"), (dict(kept=True), "kept"), (dict(verdicts=[1]), "length"), (dict(id="q0"), "twice"), (dict(single=[1, 2]), "four numbers")]


@pytest.mark.parametrize("bad, words", BAD)
def test_a_bad_row_is_named(tmp_path, bad, words):
    rows = [row(0), row(1) | bad, row(2)]
    (tmp_path/"log.jsonl").write_text("\n".join(json.dumps(r).replace("Infinity", "1e999") for r in rows))
    with pytest.raises(ValueError) as e: read_answers(tmp_path/"log.jsonl")
    assert "log.jsonl" in str(e.value) and "row 2" in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_what_is_wrong_with_an_answer_is_said_and_counts(tmp_path):
    rows = [row(0, boxes=[[100, 100, 300, 1300], None]), row(1, texts=["[100, 100, 300, 250]", "[9, 9, 20, 20]"]),
            row(2, confidences=[.5, -.5]), row(3, boxes=[[300, 300, 100, 100]]), row(4, texts=["cannot"] * 2)]
    del rows[4]["boxes"]
    write_jsonl(tmp_path/"log.jsonl", rows)
    done, asked = read_answers(tmp_path/"log.jsonl")
    assert [t.notes for t in done] == [["clipped", "no box"], ["", "text differs"], ["", ""], ["ordered", "stopped before"], ["no box"] * 2]
    found = audit("log", done, samples=asked)
    assert found["warnings"] == {
        "clipped": ["q0"], "no box": ["q0", "q4"], "text differs": ["q1"], "log-probability above 0": ["q2"],
        "ordered": ["q3"], "stopped before": ["q3"]}


@pytest.mark.parametrize("n, words", [(1, "1 sample"), (6, "Too few samples"), (19, "Too few samples"), (20, "Gain without")])
def test_few_samples_carry_no_verdict(tmp_path, n, words):
    write_jsonl(tmp_path/"log.jsonl", [row(k) for k in range(n)])
    done, asked = read_answers(tmp_path/"log.jsonl")
    if n == 1:
        with pytest.raises(ValueError, match=words): audit("log", done, samples=asked)
    else: assert audit("log", done, samples=asked)["verdict"].startswith(words)


def test_a_loop_keeps_a_box_in_all_rows_or_in_none(tmp_path):
    write_jsonl(tmp_path/"log.jsonl", [row(0, kept=1), row(1)])
    with pytest.raises(ValueError, match="`kept` in 1 of 2 rows"): read_answers(tmp_path/"log.jsonl")


def test_a_control_that_is_not_there_for_all_is_none(tmp_path):
    write_jsonl(tmp_path/"log.jsonl", [row(k, **({"single": [1, 2, 3, 4]} if k else {})) for k in range(20)])
    done, asked = read_answers(tmp_path/"log.jsonl")
    with pytest.raises(ValueError, match="q0 has no `single`"): audit("log", done, samples=asked)


# ---- the page

class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_nothing_else(tmp_path, samples):
    test = read("verdict", samples)
    nasty = [replace(t, expression="</script><img src=x onerror=alert(1)> & \u202e") for t in test]
    found = audit("verdict", test) | dict(cards=gallery(nasty, samples))
    write_page(tmp_path/"page.html", found)
    page = (tmp_path/"page.html").read_text("utf-8")
    assert len(page.encode()) < 3_000_000 and page.count("</script>") == 2 and "onerror=alert(1)>" in page
    links = Links()
    links.feed(page)
    assert all(x.startswith(("#", "data:")) for x in links.found)
    assert "default-src 'none'" in page and not re.search(r"@import|fetch\(|XMLHttp|innerHTML|eval\(", page)
    held = json.loads(re.search(r'id="found">(.*?)</script>', page, re.S)[1])
    assert {k: held[k] for k in found} == json.loads(json.dumps(found))


def test_a_lesson_of_each_section_is_there():
    template = data_path("audit.html").read_text("utf-8")
    lessons = set(re.findall(r"\b(?:lab/)?\d\d[a-z]?_\w+", template))
    assert len(lessons) >= 5 and template.count('"FOUND"') == 1
    for lesson in lessons: assert (ROOT/f"nbs/{lesson}.ipynb").exists(), lesson


def test_gallery_shows_what_went_wrong(samples):
    test = read("naive", samples)
    cards = gallery(test, samples, most=30)
    wrong = [t.id for t in test if min(iou(b, t.truth) for b in t.boxes) < .5]
    assert [c["id"] for c in cards] == wrong[:30] and all(len(c["ious"]) == 3 and c["picture"] for c in cards)
    bare = gallery(test[:50], [replace(x, image=None) for x in samples[:50]])
    assert bare and not any(c["picture"] for c in bare)


# ---- the command

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    shutil.copytree(ROOT/"data/examples", folder/"data/examples")
    lines = (ROOT/"data/examples/theirs.jsonl").read_bytes().splitlines(True)
    (folder/"part.jsonl").write_bytes(b"".join(lines[:2]))
    (folder/"torn.jsonl.gz").write_bytes(gzip.compress(b"".join(lines))[:3000])
    return folder


def test_the_command_of_readme(place):
    lines = re.findall(r"^ivt_min audit .*$", (ROOT/"README.md").read_text("utf-8"), re.M)
    assert any("theirs.jsonl" in line for line in lines)    # test_command runs it


def test_json_and_page_say_the_same(place):
    done = run(place, "audit data/examples/theirs.jsonl --mode abs --json --out a/report.html")
    found = json.loads(done.stdout)
    assert found["verdict"].startswith("No gain shown without labels: +0.0 points [+0.0, +0.0] of mean IoU, n = 505")
    page = (place/"a/report.html").read_text("utf-8")
    held = json.loads(re.search(r'id="found">(.*?)</script>', page, re.S)[1])
    assert found == {k: held[k] for k in found} and held["cards"]
    assert {r["column"] for r in found["rows"]} >= {"label-free vs single", "placebo oracle vs step 0", "gain"}


@pytest.mark.parametrize("line, words", [
    ("audit", ["RUN", "--model"]), ("audit nowhere.jsonl", ["nowhere.jsonl"]), ("gallery nowhere", ["nowhere"]),
    ("audit data/examples/theirs.jsonl", ["theirs.jsonl", "abs"]), ("audit data/examples/rows.jsonl", ["rows.jsonl", "row 1"]),
    ("audit data/examples/theirs.jsonl --mode abs --out page.xyz", ["page.xyz"]),
    ("audit data/examples/theirs.jsonl --mode abs --truth data/examples/rows.jsonl", ["row 1", "test-0000", "nobody"]),
    ("audit data/examples/theirs.jsonl --mode abs --baseline data/examples/rows.jsonl", ["rows.jsonl", "row 1"]),
    ("audit data/examples/theirs.jsonl --mode abs --baseline part.jsonl", ["part.jsonl", "test-0002", "fair"]),
    ("audit data/examples/theirs.jsonl --mode abs --baseline part.jsonl --baseline data/../part.jsonl", ["'part'", "twice"]),
    ("audit data/examples/theirs.jsonl --mode abs --out page.png", ["page.png", ".html"]),
    ("audit torn.jsonl.gz", ["torn.jsonl.gz", "ended before"]),
    ("audit --model tiny --steps 0", ["--steps 0", "no loop"]), ("audit --model nonsense", ["nonsense"])])
def test_a_mistake_is_one_line(place, line, words):
    before = set(place.rglob("*"))
    done = run(place, line)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    for word in words: assert word in done.stderr, done.stderr
    assert set(place.rglob("*")) == before


def test_a_model_is_asked_and_goes_on(place):
    line = "audit --model tiny --data data/examples/rows.jsonl --steps 1 --json"
    first = run(place, line)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    ways = {r["column"] for r in found["rows"] if r["column"].startswith("swap")}
    assert ways == {f"swap: {way}" for way in ("own", "truth", "another thing", "random", "none", "another text")}
    kept = place/"ivt_min_runs/tiny-rows/swaps"
    assert len(read_jsonl(kept/"own.jsonl")) == 6
    whole = (kept/"truth.jsonl").read_bytes()
    (kept/"truth.jsonl").unlink()
    (kept/"truth.part0-1").write_bytes(b"".join(whole.splitlines(True)[:2]) + b'{"id": "sce')
    assert json.loads(run(place, line).stdout) == found and (kept/"truth.jsonl").read_bytes() == whole


# ---- in a real browser

@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_page_in_a_browser(tmp_path, samples):
    """It draws its sections, without an error, a network or a leak of text into its markup."""
    test = read("naive", samples)
    nasty = [replace(t, expression="<b id=leak>x</b>") for t in test]
    write_page(tmp_path/"page.html", audit("naive", test) | dict(cards=gallery(nasty, samples, 20)))
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path/'profile'}", "--enable-logging=stderr",
             "--virtual-time-budget=4000", "--dump-dom", (tmp_path/"page.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "No gain shown" in dom and dom.count("<svg") > 10 and 'id="leak"' not in dom and "&lt;b id=leak&gt;" in dom
    assert not re.search(r"Uncaught|SyntaxError|TypeError|ReferenceError", done.stderr), done.stderr[-2000:]
