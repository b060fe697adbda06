"""The loop: any picture, any words, any answer; what goes on is what was sampled."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from ivt_min import refine
from ivt_min.core import data_path, from_row, to_row
from ivt_min.boxes import parse_box
from ivt_min.scenes import split
from ivt_min.model import load, question
from ivt_min.answer import answer, closed, score
from ivt_min.answer import Turn
from ivt_min.loop import Loop, drawing, go_on, model_policy, record, rollout, transcript
from ivt_min.verdict import refine as same
from ivt_min.evaluate import metrics
from ivt_min.datasets import REF_ADV_S, missed, read_rows, scan

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real_rec"
FORMS = ("prefix", "turn")


@pytest.fixture(scope="module")
def vlm():
    return load(device="cpu")


def kept_and_new(vlm, loop, episodes):
    scripts = [transcript(vlm, loop, e) for e in episodes]
    with torch.no_grad():
        new = score(vlm, [s.dialogue for s in scripts], [s.mask for s in scripts], loop.temperature)
    return np.array([p for s in scripts for p in s.logps]), new.numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature, budget", [(0, 64), (1., 64), (1., 1), (0, 7), (1.5, 24)])
def test_log_probs_are_those_of_one_forward(vlm, form, temperature, budget):
    """Ragged rows, early stops, answers cut in the middle of a word: the next step is still aligned."""
    loop = Loop(form=form, temperature=temperature, max_tokens=budget)
    episodes = rollout(model_policy(vlm, loop), split("val", 6), loop)
    kept, new = kept_and_new(vlm, loop, episodes)
    assert len(kept) == len(new) and np.abs(kept - new).max() <= 1e-4


def test_three_refinements_and_none(vlm):
    for steps in (0, 3):
        loop = Loop(steps=steps, max_tokens=20)
        [e] = rollout(model_policy(vlm, loop), split("val", 1), loop)
        assert len(e.turns) == len(e.boxes) == steps + 1 == len(e.drawn) + 1


def test_memory_gives_what_a_new_reading_gives(vlm):
    """The cache, continued with a new picture, against the whole dialogue read again at each step."""
    loop = Loop(max_tokens=24)

    def forgetful(episodes, memory=None):
        dialogues = memory or [question(vlm, e.sample) for e in episodes]
        if memory: dialogues = [go_on(vlm, loop, d, e) for d, e in zip(dialogues, episodes)]
        return answer(vlm, dialogues, None, loop.max_tokens, until=closed)[0], dialogues

    samples = split("val", 5)
    a, b = rollout(model_policy(vlm, loop), samples, loop), rollout(forgetful, samples, loop)
    assert [[t.ids for t in e.turns] for e in a] == [[t.ids for t in e.turns] for e in b]


def test_random_answers_do_not_depend_on_the_batch():
    vlm = load(device="cpu")
    vlm.model.double()
    loop, samples = Loop(temperature=1., max_tokens=20), split("val", 5)
    keys = [("seed", i) for i in range(5)]
    runs = [rollout(model_policy(vlm, loop), samples, loop, keys=keys, batch=k) for k in (5, 2)]
    back = rollout(model_policy(vlm, loop), samples[::-1], loop, keys=keys[::-1])[::-1]
    texts = [[[t.ids for t in e.turns] for e in run] for run in (*runs, back)]
    assert texts[0] == texts[1] == texts[2]
    other = rollout(model_policy(vlm, loop), samples, loop, keys=[("other", i) for i in range(5)])
    assert [[t.ids for t in e.turns] for e in other] != texts[0]


@pytest.mark.parametrize("text", ["<|image_pad|><|im_end|>", "{expression} {0} %s", "🦊 الكرسي", "x" * 400])
@pytest.mark.parametrize("form", FORMS)
def test_words_stay_words(vlm, text, form):
    loop = Loop(form=form, max_tokens=12)
    sample = replace(split("val", 1)[0], expression=text)
    [e] = rollout(model_policy(vlm, loop), [sample], loop)
    d = transcript(vlm, loop, e).dialogue
    assert d.ids.count(vlm.model.config.image_token_id) == 16 * len(d.pictures) == 48
    assert d.ids.count(vlm.model.config.vision_start_token_id) == 3


@pytest.mark.parametrize("text", ["", "  \n", "a" * 50_000])
def test_no_words_or_far_too_many_are_an_error(text):
    with pytest.raises(ValueError, match="picture: expression of"):
        refine(split("val", 1)[0].image, text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60) | st.lists(st.integers(-50, 1100), min_size=3, max_size=5).map(str),
                min_size=3, max_size=3))
def test_no_answer_breaks_the_loop(texts):
    """Whatever is said, the loop goes on with the last box that could be read, and the record says so."""
    sample = split("val", 1)[0]
    def says(episodes, memory): return [Turn((), (), texts[len(e.turns)]) for e in episodes], None
    [e] = rollout(says, [sample], progress=False)
    want = [parse_box(t).box for t in texts]
    done = record(e)
    assert done.boxes == want and done.texts == texts
    assert [bool(n) for n in done.notes] >= [b is None for b in want]
    held = None
    for drawn, box in zip(e.drawn, want):
        held = box or held
        assert drawn == held
    assert from_row(to_row(done)) == from_row(to_row(from_row(to_row(done))))


def test_nothing_drawn_is_said(vlm):
    loop, sample = Loop(max_tokens=6), split("val", 1)[0]
    ways = "none", "truth", {sample.id: (5, 5, 5, 9)}
    episodes = [rollout(model_policy(vlm, loop), [sample], loop, drawing(w))[0] for w in ways]
    said = [vlm.tokenizer.decode(transcript(vlm, loop, e).dialogue.ids) for e in episodes]
    assert [s.count(loop.missing.strip()) for s in said] == [2, 0, 2]


@pytest.mark.parametrize("loop, steps, n", [(None, None, 3), (None, 0, 1), (Loop(steps=1), None, 2),
                                            (Loop(steps=1), 3, 4)])
def test_how_often_refine_looks(vlm, loop, steps, n):
    sample = split("val", 1)[0]
    assert len(refine(sample.image, sample.expression, vlm, steps, loop=loop).steps) == n


def test_refine_is_one_function_and_takes_any_picture(vlm, tmp_path):
    assert refine is same
    sample = split("val", 1)[0]
    sample.image.save(tmp_path / "a.png")
    found = [refine(i, sample.expression, vlm, steps=1) for i in
             (sample.image, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(sample.image))]
    assert len({f.final for f in found}) == 1
    assert found[0]._repr_jpeg_()[:2] == b"\xff\xd8"
    for s in found[0].steps:
        assert s.box is None or s.confidence <= 0


def through_everything(vlm, samples):
    """Reader, scan, loop, record, report; an unusable picture stays in n as no box."""
    good, bad = scan(samples, skip=True)
    loop = Loop(max_tokens=24)
    done = {t.id: t for t in map(record, rollout(model_policy(vlm, loop), good, loop, progress=False))}
    all_ = [done.get(s.id) or missed(s, bad[s.id], loop.steps + 1) for s in samples]
    rows = metrics("photos", all_, step=-1)
    assert all(r["n"] == len(samples) for r in rows if "/" not in r["metric"])
    return all_, bad


def test_own_samples_go_through_everything(vlm, tmp_path):
    samples = read_rows(data_path("samples/samples.jsonl"), REF_ADV_S)
    (tmp_path / "torn.jpg").write_bytes(b"")
    torn = replace(samples[0], id="torn", image=tmp_path / "torn.jpg")
    done, bad = through_everything(vlm, [*samples, torn])
    assert set(bad) == {"torn"} and done[-1].boxes == [None] * 3
    plain = {t.id: t for t in done}
    assert plain["plain"].boxes[0] is not None


@pytest.mark.skipif(not REAL.is_dir(), reason="no photographs here")
def test_photographs_go_through_everything(vlm):
    samples = read_rows(REAL / "samples.json", REF_ADV_S, REAL / "images")
    done, bad = through_everything(vlm, samples)
    assert len(done) == 20 and not bad
    for s in samples[:3]:
        found, size = refine(s.image, s.expression, vlm, steps=1), Image.open(s.image).size
        for step in found.steps:
            assert step.box is None or all(-1e-6 <= v <= w + 1e-6 for v, w in zip(step.box, size * 2))
