"""Views of a picture, the verdict on what they dispute, and the box that is kept."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from ivt_min import refine, verdict
from ivt_min.boxes import format_box, iou
from ivt_min.columns import columns, pick
from ivt_min.core import from_row, to_row
from ivt_min.loop import Episode, Loop, record
from ivt_min.answer import Turn
from ivt_min.model import load
from ivt_min.scenes import split
from ivt_min.verdict import Views, go_round, keep, move, places, views

torch.set_num_threads(1)
BOX = st.tuples(*[st.integers(0, 400)] * 2, *[st.integers(500, 1000)] * 2)


@pytest.fixture(scope="module")
def vlm():
    return load(device="cpu")


def said(boxes):
    """An episode that answered these boxes."""
    sample = split("val", 1)[0]
    turns = tuple(Turn((), (), format_box(b) if b else "none") for b in boxes)
    return Episode(sample, sample.image, (sample.id,), turns, tuple(boxes))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.none() | BOX, min_size=1, max_size=9))
def test_every_box_points_to_one_place(boxes):
    there = places(boxes)
    assert sum(there.values()) == sum(b is not None for b in boxes)
    for i, n in there.items():
        assert boxes[i] is not None and 1 <= n <= len(boxes)
    if boxes.count(None) == len(boxes): assert there == {}
    for i in there:     # no two places are one
        assert all(i == j or iou(boxes[i], boxes[j]) < 1 for j in there)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-9, 9)), min_size=2, max_size=3))
def test_the_place_with_the_most_for_it_is_kept(places_of):
    """Against Bayes' rule by hand: the share of the answers times the odds of the verdict."""
    boxes, odds, want = [], {}, []
    for k, (n, z) in enumerate(places_of):
        box = (300 * k, 10, 300 * k + 200, 300)
        boxes += [box] * n
        odds[box] = z
        want.append((n * np.exp(z), box))
    spoken = lambda vlm, loop, dialogues: [odds[d] for d in dialogues]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "judge", spoken)
        patch.setattr(verdict, "shown", lambda vlm, loop, sample, box: box)
        done = keep(None, Views(), said(boxes))
    best = max(w for w, _ in want)
    assert dict((b, w) for w, b in want)[done.held] == pytest.approx(best)
    assert [v for v in done.verdicts if v is not None] == [z for _, z in places_of]


@pytest.mark.parametrize("boxes, kept", [([None] * 3, 0), ([None, (1, 1, 9, 9)], 1)])
def test_without_a_dispute_nothing_is_asked(boxes, kept):
    done = keep(None, Views(), said(boxes))     # no model is there to be asked
    assert (done.kept, set(done.verdicts), done.held) == (kept, {None}, boxes[kept])
    assert from_row(to_row(record(done))) == record(done)


@pytest.mark.parametrize("size", [(128, 128), (90, 300), (7, 5)])
def test_moved_pictures_hold_what_was_there(size):
    g = np.random.default_rng(0)
    image = Image.fromarray(g.integers(0, 255, (*size[::-1], 3), np.uint8))
    ways = set()
    for step in range(8):
        moved, (dx, dy) = move(image, step)
        assert moved.size == size and abs(dx) <= max(1, min(size) // 25) >= abs(dy)
        a, b = np.asarray(image), np.asarray(moved)
        h, w = a.shape[:2]
        assert (b[max(0, dy):h + min(0, dy), max(0, dx):w + min(0, dx)]
                == a[max(0, -dy):h + min(0, -dy), max(0, -dx):w + min(0, -dx)]).all()
        ways.add((dx, dy))
    assert len(ways) == 8


def test_a_batch_is_its_rows_and_columns_take_what_is_kept(vlm):
    few = split("val", 12)
    loop = Views(steps=2)
    done = go_round(vlm, few, loop)
    alone = [go_round(vlm, [s], loop)[0] for s in few]
    same = [a.boxes == b.boxes and a.kept == b.kept for a, b in zip(done, alone)]
    assert np.mean(same) > .9       # a tie may fall the other way
    rows = columns("x", [*map(record, done)], [])
    free = [r["value"] for r in rows if r["column"] == "label-free" and r["metric"] == "miou"]
    own = np.mean([iou(e.held, e.sample.truth) for e in done])
    assert free == [pytest.approx(own, abs=1e-6)]
    assert pick(record(done[0]), "kept") == done[0].held


def test_refine_says_the_verdicts(vlm):
    few = split("val", 24)
    found = refine([s.image for s in few], [s.expression for s in few], vlm, loop=Views())
    judged = [f for f in found if any(s.verdict is not None for s in f.steps)]
    assert 0 < len(judged) < len(found)
    for f in judged:
        best = max((s for s in f.steps if s.verdict is not None), key=lambda s: s.verdict)
        assert f.final in [s.box for s in f.steps] and best.box


def test_words_that_are_no_token_are_named(vlm):
    loop = replace(Views(), verdict=(" yes", " certainly not"))
    with pytest.raises(ValueError, match="' certainly not': .* tokens of tiny"):
        verdict.verdict_ids(vlm, loop)
    plain = go_round(vlm, split("val", 2), Loop(steps=0))
    assert [e.kept for e in plain] == [None] * 2
