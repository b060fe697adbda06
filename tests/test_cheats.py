"""Ways to make a run look better than it was; each is refused at reading, or found by asking again."""
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from ivt_min.boxes import iou, to_pixels
from ivt_min.columns import compare, oracle, single
from ivt_min.core import data_path, rng, to_row, write_json, write_jsonl
from ivt_min.evaluate import check_answers, read_run
from ivt_min.loop import Loop
from ivt_min.model import load
from ivt_min.scenes import SIDE, split

ROOT = Path(__file__).resolve().parent.parent
STUDIES = runpy.run_path(str(ROOT / "nbs/lab/studies.py"))
answers, run_of = STUDIES["answers"], STUDIES["run_of"]


def function_of(study, name, **known):
    """A function that a study defines in a cell of its own."""
    notebook = json.loads((ROOT / f"nbs/lab/{study}.ipynb").read_text("utf-8"))
    [code] = [code for cell in notebook["cells"] if (code := "".join(cell["source"])).startswith(f"def {name}(")]
    exec(code, known)
    return known[name]


@pytest.fixture(scope="module")
def honest():
    return run_of("naive")


@pytest.fixture(scope="module")
def asked():
    return split("test")


def read_back(folder, rows, asked, loop=Loop()):
    write_jsonl(folder / "test.jsonl.gz", map(to_row, rows))
    write_json(folder / "config.json", dict(run="forged", loop=loop))
    return read_run(folder, "test", asked)


def moved_last(t):
    """The whole step that is best by the truth, at the end."""
    k = t.boxes.index(oracle(t))
    order = [i for i in range(len(t.boxes)) if i != k] + [k]
    return replace(t, **{name: [getattr(t, name)[i] for i in order]
                         for name in ("boxes", "texts", "notes", "confidences")})


BARE = dict(texts=[], notes=[], confidences=[])
REFUSED = {     # a cheat -> what is done to a trajectory, what the reader says
    "oracle's box": (lambda t: replace(t, boxes=[*t.boxes[:-1], oracle(t)]), "its texts say"),
    "truth as boxes": (lambda t: replace(t, boxes=[t.truth] * 3), "its texts say"),
    "IoU as confidence": (lambda t: replace(t, confidences=[iou(b, t.truth) for b in t.boxes]),
                          "log-probability above 0"),
    "truth moved": (lambda t: replace(t, truth=t.boxes[-1] or t.truth), "asked was"),
    "easier words": (lambda t: replace(t, expression="the thing"), "asked was"),
    "another split": (lambda t: replace(t, id=t.id.replace("test", "val")), "asked was"),
    "eight steps": (lambda t: replace(t, boxes=t.boxes * 3, **BARE), "9 answers, not 3"),
    "fewer steps": (lambda t: replace(t, boxes=t.boxes[:1], **BARE), "1 answers, not 3"),
    "pixels": (lambda t: replace(t, boxes=[b and to_pixels(b, SIDE, SIDE) for b in t.boxes], **BARE),
               "pixels"),
    "large pixels": (lambda t: replace(t, boxes=[b and to_pixels(b, 4000, 4000) for b in t.boxes], **BARE),
                     "none within 0 to 1000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_it_is_read(name, honest, asked, tmp_path):
    change, why = REFUSED[name]
    with pytest.raises(ValueError, match=why) as e:
        read_back(tmp_path, [change(t) for t in honest], asked)
    assert "test.jsonl.gz: " in str(e.value)


@pytest.mark.parametrize("some", [lambda ts: ts[:-1], lambda ts: ts[1:] + ts[:1],
                                  lambda ts: [t for t in ts if iou(t.boxes[-1], t.truth) > .5]])
def test_questions_left_out_or_in_another_order(some, honest, asked, tmp_path):
    with pytest.raises(ValueError, match="samples, not 505|asked was"):
        read_back(tmp_path, some(honest), asked)


def test_one_forged_row_is_enough(honest, asked, tmp_path):
    rows = [*honest[:300], replace(honest[300], boxes=[asked[300].truth] * 3), *honest[301:]]
    with pytest.raises(ValueError, match=f"{honest[300].id}: its texts say"):
        read_back(tmp_path, rows, asked)


UNSEEN = {      # keeps to every rule
    "oracle's step": moved_last,
    "IoU - 1 as confidence": lambda t: replace(t, confidences=[iou(b, t.truth) - 1 for b in t.boxes]),
    "truth without texts": lambda t: replace(t, boxes=[t.boxes[0], t.truth, t.truth], **BARE),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_found_by_asking_again(name, honest, asked, tmp_path):
    rows = read_back(tmp_path, [UNSEEN[name](t) for t in honest], asked)
    vlm, reask = load(device="cpu"), function_of("44_cheats", "reask", rng=rng, answers=answers)
    assert len(reask(vlm, rows, asked, Loop(), 6, seed=3)) >= 4
    assert reask(vlm, honest, asked, Loop(), 6, seed=3) == []


def test_a_spoilt_first_answer_gains_over_itself_only(honest):
    spoilt = [replace(t, boxes=[(990., 990., 999., 999.), *[t.boxes[0]] * 2], **BARE) for t in honest]
    base = single(run_of("base"), "step 0")
    ends, starts = single(spoilt, "last"), single(spoilt, "step 0")
    assert compare("a", "itself", ends, starts)[-1]["low"] > .5
    assert compare("a", "base", ends, base)[-1]["value"] == 0


def test_every_stored_run_is_what_it_says(asked):
    parts = {"test": asked, "val": split("val"), "confirm": split("confirm")}
    read = 0
    for part, samples in parts.items():
        for path in sorted(data_path("runs").glob(f"*/{part}.jsonl.gz")):
            read_run(path.parent, part, samples)
            read += 1
    assert read > 50


def test_nothing_is_no_run():
    check_answers([], [], 2)
    with pytest.raises(ValueError, match="0 samples, not 1"):
        check_answers([], run_of("base")[:1])
