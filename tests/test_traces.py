"""Traces: geometry and words against a second reading of both, and the served teacher against a real
server process that answers, refuses, hangs and talks nonsense."""
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from chat_server import NONSENSE, answer_to
from ivt_min.core import Sample, Trajectory, data_path, read_jsonl
from ivt_min.boxes import iou
from ivt_min.render import draw_box
from ivt_min.scenes import draw_sample
from ivt_min.traces import (Look, STAY, check, interpolate, errors_of, scripted_teacher,
                            statements, write_traces)
from ivt_min.teachers import PROMPT, prompted_teacher, served, served_teacher, words_for

HERE = Path(__file__).parent
FUZZ = settings(max_examples=200, deadline=None)
FLIP = dict(left="right", up="down", top="bottom", wide="narrow", tall="short", high="low", wider="narrower",
            taller="shorter", larger="smaller", large="small", upwards="downwards", leftwards="rightwards")
FLIP |= {v: k for k, v in FLIP.items()}
HAND = (100, 100, 300, 300), (150, 100, 300, 300)  # the left edge goes right, the box gets narrower


# ---- the way back

def box_of(x0, y0, w, h):
    return x0, y0, min(1000, x0 + w), min(1000, y0 + h)


boxes = st.builds(box_of, *[st.floats(0, 900)] * 2, *[st.floats(5, 900)] * 2)


@FUZZ
@given(boxes, boxes, st.integers(1, 5))
def test_way_is_straight_and_ends_at_the_truth(box, truth, steps):
    way = interpolate(box, truth, steps)
    assert len(way) == steps
    assert way[-1] == pytest.approx(truth, abs=1e-9)
    for t, target in enumerate(way, 1):
        for a, b, c in zip(box, truth, target):
            assert c == pytest.approx(a * (1 - t / steps) + b * t / steps, abs=1e-9)


def test_last_target_is_the_truth_exactly_for_the_stored_traces():
    for row in read_jsonl(data_path("runs/traces.jsonl.gz")):
        truth = row["targets"][-1]
        assert interpolate(row["box"], truth, 2) == [tuple(t) for t in row["targets"]]


def trajectory(name, box, truth):
    return Trajectory(name, "hand", "the red star", truth, [box], [], [])


def test_errors_are_kept_and_nothing_else():
    truth = (100, 100, 300, 300)
    some = [trajectory(str(k), (100, 100, 300, 300 + k), truth) for k in range(0, 200, 5)]
    none = trajectory("none", None, truth)
    assert errors_of(some + [none]) == [t for t in some if iou(t.boxes[0], truth) <= .85]
    assert 0 < len(errors_of(some)) < len(some)
    assert errors_of([trajectory("far", (500, 500, 600, 600), truth)])


def test_fresh_scenes_are_those_that_were_asked():
    rows = [r for r in read_jsonl(data_path("runs/traces.jsonl.gz")) if r["id"].startswith("harvest")]
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        sample = draw_sample(row["id"], int(row["id"][8:]), "harvest")
        assert (sample.id, sample.source) == (row["id"], row["source"])
        assert list(sample.truth) == row["targets"][-1]


# ---- the script

def one(box, target, seed=0, key=("x", 0)):
    return scripted_teacher(seed)([Look(None, "", box, target, key)])[0]


@FUZZ
@given(boxes, boxes, st.integers(0, 50))
def test_script_says_only_what_is_true_and_says_what_matters(box, target, seed):
    text = one(box, target, seed)
    assert check(text, box, target) == []
    assert text == one(box, target, seed)


@given(boxes)
def test_script_says_that_a_box_fits(box):
    for seed in range(9):
        assert [kind for kind, *_ in statements(one(box, box, seed), box, box)] == ["keep"]


def test_wordings_vary():
    said = {one(*HAND, seed) for seed in range(40)}
    assert len(said) >= 6


# ---- the checker

@pytest.mark.parametrize("text, faults", [
    ("The left edge must go right.", []),
    ("The left side is too far left.", []),
    ("The left-hand edge should shift rightwards.", []),
    ("Make the box narrower, it is too wide.", []),
    ("It is too large.", []),
    ("The left edge must go left.", ["wrong edge"]),
    ("The left edge must go up.", ["wrong edge"]),
    ("The right edge must go right.", ["wrong edge", "silent"]),
    ("The box must go left.", ["wrong shift"]),
    ("The box must go down.", ["wrong shift", "silent"]),
    ("Move the left edge right. The box is too tall.", ["wrong size"]),
    ("Move the left edge right. Then make it bigger.", ["wrong size"]),
    ("The box fits.", ["wrong keep"]),
    ("Keep the box.", ["wrong keep"]),
    ("The blue star is meant.", ["silent"]),
    ("Move the top edge.", ["silent"]),
    ("The left edge must not go right.", ["negation"]),
    ("The box isn't too narrow, move it right.", ["wrong size", "negation"]),
    ("Move the left edge right by 50.", ["number"]),
    ("Right.", ["length"]),
    ("Move it right. " * 21, ["length", "grammar"]),
    ("Move the left edge right", ["grammar"]),
    ("move the left edge right.", ["grammar"]),
    ("Move the the left edge right.", ["grammar"]),
    ("Move the left edge right.<|im_end|>", ["grammar"]),
    ('{"bbox_2d": [150, 100, 300, 300]}', ["silent", "number", "grammar"]),
    ("", ["empty"]), (" \n", ["empty"]), (None, ["empty"]), (7, ["empty"]),
])
def test_reasons(text, faults):
    assert check(text, *HAND) == faults


def test_an_edge_that_stays_may_not_be_moved():
    box, target = (100, 100, 300, 300), (100 + STAY, 100, 300, 340)
    assert check("The left edge must go right. The bottom edge must go down.", box, target) == ["wrong edge"]
    assert check("The bottom edge must go down.", box, target) == []


def test_either_of_two_edges_that_move_furthest_will_do():
    box, target = (100, 100, 300, 300), (140, 100, 260, 300)
    for side, way in (("left", "right"), ("right", "left")):
        assert check(f"The {side} edge must go {way}.", box, target) == []


ANY = st.one_of(st.floats(), st.floats(0, 1000), st.just(0.))
WORDS = ["The", "left", "right", "edge", "too", "far", "wide", "It", "box", "up", "higher", "lower", "not", "keep",
         "fits", "bigger", "7", ".", "\n", "too left", "ſmall", "rıght", "\ud800", "wid", "larger", "LEFT EDGE"]
TEXTS = st.one_of(st.none(), st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join))


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.tuples(*[ANY] * 4), st.tuples(*[ANY] * 4))
def test_checker_never_raises(text, box, target):
    faults = check(text, box, target)
    assert len(set(faults)) == len(faults) and all(isinstance(f, str) for f in faults)
    for kind, words, true, about in statements(text or "", box, target):
        assert kind in ("edge", "shift", "size", "keep") and words in text and set(about) <= set(range(4))


def test_checker_takes_linear_time():
    start = time.time()
    for part in ("a", "left ", "too ", "too far ", "a a", "é"):
        check(part * 50_000, *HAND)
    assert time.time() - start < 5


def flip(text, g):
    """A text with one word of direction or size turned round; None where it has none. The name of an edge is
    no such word: where a whole box moves left, what is true of its left edge is true of its right one."""
    found = [*re.finditer(r"\b(%s)\b(?! edge| side)" % "|".join(FLIP), text)]
    if found:
        m = g.choice(found)
        return text[:m.start()] + FLIP[m[0]] + text[m.end():]


def other_words(box, target, g):
    """A second writer, which shares nothing with the script: an edge, a size, or the whole box."""
    said, move = [], [b - a for a, b in zip(box, target)]
    names = (("left", "top", "right", "bottom"), ("left", "upper", "right", "lower"))[g.random() < .3]
    far = max(range(4), key=lambda e: abs(move[e]))
    for e in {far, g.randrange(4)}:
        if abs(move[e]) > STAY:
            back, on = (("left", "right"), ("high", "low") if g.random() < .5 else ("up", "down"))[e % 2]
            was = back if move[e] > 0 else on
            way = (("left", "right"), ("up", "down"))[e % 2][move[e] > 0]
            said.append(g.choice([f"The {names[e]} side is too far {was}", f"Shift the {names[e]} edge {way}wards"])
                        if was not in ("high", "low") else f"The {names[e]} edge is too {was}")
    for k, (less, more) in enumerate((("narrower", "wider"), ("shorter", "taller"))):
        a, b = box[k + 2] - box[k], target[k + 2] - target[k]
        if abs(b - a) > .05 * a:
            said.append(f"Make the box {more if b > a else less}")
    return "; then ".join(said)[:1].upper() + "; then ".join(said)[1:] + "."


@pytest.mark.parametrize("writer", ["script", "other words"])
def test_lies_are_caught(writer):
    g, caught, lies = random.Random(writer), 0, 0
    rows = read_jsonl(data_path("runs/traces.jsonl.gz"))
    while lies < 1000:
        row, k = g.choice(rows), g.randrange(2)
        box, target = ([row["box"]] + row["targets"])[k], row["targets"][k]
        text = row["texts"][k]
        if writer == "other words":
            text = other_words(box, target, g)
            if max(abs(b - a) for a, b in zip(box, target)) <= STAY:
                continue
        assert check(text, box, target) == [], (text, box, target)
        lie = flip(text, g)
        if lie:
            lies += 1
            caught += check(lie, box, target) != []
    print(f"{writer}: caught {caught} of {lies}")
    assert caught >= 950


# ---- rows

def test_rows():
    image = Image.new("RGB", (64, 48))
    samples = [Sample(f"s{k}", "hand", "the red star", (100, 100, 300, 300), image) for k in range(3)]
    errors = [trajectory(s.id, (200, 100, 400, 300), s.truth) for s in samples]
    seen = []

    def teacher(looks):
        seen.extend(looks)
        return ["Move the box left.", "Move the box right.", None, "The box fits.", "Go left, box.", "x"]
    rows = write_traces(errors, samples, teacher, "mine", prompt="say")
    assert [r["id"] for r in rows] == ["s0", "s1", "s2"]
    assert list(rows[0]) == ["id", "source", "box", "targets", "texts", "faults", "teacher", "prompt_hash"]
    assert rows[0]["targets"] == [(150, 100, 350, 300), (100, 100, 300, 300)]
    assert [r["faults"] for r in rows] == [
        [[], ["wrong shift"]], [["empty"], ["wrong keep"]], [[], ["silent", "length", "grammar"]]]
    assert [(x.box[0], x.target[0], x.key) for x in seen[:2]] == [(200, 150, ("s0", 0)), (150, 100, ("s0", 1))]
    assert {r["teacher"] for r in rows} == {"mine"} and len({r["prompt_hash"] for r in rows}) == 1
    assert json.loads(json.dumps(rows))[0]["box"] == [200, 100, 400, 300]
    assert write_traces([], [], scripted_teacher(), "") == []


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_teacher_that_leaves_something_out_is_refused(n):
    sample = Sample("s", "", "x", (0, 0, 9, 9), None)
    with pytest.raises(ValueError):
        write_traces([trajectory("s", (5, 5, 9, 9), sample.truth)], [sample], lambda looks: ["x"] * n, "")


def test_prompt_is_filled_in_one_go():
    look = Look(None, "a {target} {box} {0}", (1.4, 2, 3, 4), (5, 6, 7, 8.6))
    assert words_for(look, "{expression}|{box}|{target}|{other}") == "a {target} {box} {0}|[1, 2, 3, 4]|[5, 6, 7, 9]|{other}"
    assert not re.search(r"[{}]", words_for(Look(None, "x", (1, 2, 3, 4), (5, 6, 7, 8)), PROMPT))


def test_prompted_teacher_sees_the_drawn_box():
    image = Image.new("RGB", (40, 40), "white")
    look = Look(image, "x", (250, 250, 750, 750), (0, 0, 500, 500))
    [(text, picture)] = prompted_teacher(lambda texts, pictures: list(zip(texts, pictures)))([look])
    assert text == words_for(look) and picture.tobytes() == draw_box(image, look.box).tobytes()
    assert image.getcolors() == [(1600, (255, 255, 255))]


# ---- the served teacher

class Server:
    """A server process, and what it has logged."""

    def __init__(self, folder, **plan):
        self.log = folder / f"server{len(list(folder.glob('server*')))}.jsonl"
        command = [sys.executable, str(HERE / "chat_server.py"), str(self.log), json.dumps(plan)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1/chat/completions"

    def lines(self):
        return read_jsonl(self.log) if self.log.exists() else []

    def asked(self):
        return [r for r in self.lines() if r["what"] not in ("done", "get")]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def looks_of(n):
    image = Image.new("RGB", (24, 16), "blue")
    return [Look(image, f"thing {k}", (100, 100, 500, 500), (100 + k, 100, 500, 500)) for k in range(n)]


def teacher_of(server, cache, **more):
    return served_teacher(served(server.url, "some-model", cache, **dict(timeout=.4, tries=5) | more))


def right(server, looks, texts):
    """Does each look have the answer to its own request?"""
    bodies = {r["name"]: r["body"] for r in server.asked() if r["body"]}
    for look, text in zip(looks, texts, strict=True):
        [body] = [b for b in bodies.values() if json.dumps(words_for(look))[1:-1] in b]
        assert text == answer_to(body.encode())
    return True


def test_request_is_of_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_TEST_KEY", "secret-123\n")
    looks = looks_of(1)
    with Server(tmp_path) as server:
        texts = teacher_of(server, tmp_path / "c.jsonl", key="TRACE_TEST_KEY")(looks)
        [r] = server.asked()
        assert right(server, looks, texts)
    assert r["path"] == "/v1/chat/completions" and r["auth"] == "Bearer secret-123"
    body = json.loads(r["body"])
    [message] = body["messages"]
    assert body["model"] == "some-model" and message["role"] == "user"
    picture, words = message["content"]
    assert words == {"type": "text", "text": words_for(looks[0])}
    head, data = picture["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == looks[0].shown.tobytes()
    assert "secret" not in r["body"] + (tmp_path / "c.jsonl").read_text()


def test_no_key_is_sent_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    with Server(tmp_path) as server:
        teacher_of(server, tmp_path / "c.jsonl")(looks_of(1))
        teacher_of(server, tmp_path / "d.jsonl", key="TRACE_TEST_NO_SUCH_KEY")(looks_of(1))
        assert [r["auth"] for r in server.asked()] == [None, None]


def test_key_does_not_follow_a_redirect(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_TEST_KEY", "secret-123")
    with Server(tmp_path) as other, Server(tmp_path, trouble=["redirect"] * 9, to=other.url) as server:
        assert teacher_of(server, tmp_path / "c.jsonl", key="TRACE_TEST_KEY", tries=1)(looks_of(1)) == [None]
        assert [(r["what"], r["auth"]) for r in other.lines()] == [("get", None)]


def test_nothing_is_lost_and_nothing_is_asked_twice(tmp_path):
    trouble = ["soon", "429", "500", "503", "odd", "408", "hang", "cut", "cut at once", *NONSENSE]
    looks, cache = looks_of(len(trouble)), tmp_path / "c.jsonl"
    with Server(tmp_path, trouble=trouble, each=True, hang=1) as server:
        texts = teacher_of(server, cache, workers=8)(looks + looks[:5])
        assert right(server, looks + looks[:5], texts)
        asked = server.asked()
        assert sorted(r["what"] for r in asked) == sorted(trouble + ["answer"] * len(trouble))
        assert len({r["name"] for r in asked}) == len(trouble)
        assert teacher_of(server, cache)(looks[::-1]) == texts[:len(looks)][::-1]
        assert len(server.asked()) == len(asked)
    assert sorted(r["text"] for r in read_jsonl(cache)) == sorted(texts[:len(looks)])
    assert teacher_of(server, cache)(looks) == texts[:len(looks)]  # no server is needed any more


def test_several_troubles_in_a_row_and_a_pause_as_it_is_asked_for(tmp_path):
    with Server(tmp_path, trouble=["soon", "soon", "cut", "bad json"]) as server:
        assert right(server, looks_of(1), teacher_of(server, tmp_path / "c.jsonl")(looks_of(1)))
        times = [r["time"] for r in server.asked()]
    assert len(times) == 5
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert max(gaps[:2]) < .2 and gaps[2] >= 1 and gaps[3] >= 2   # .25 * 2**t where nothing is said


def test_what_cannot_be_had_is_none_and_is_asked_again_later(tmp_path):
    cache = tmp_path / "c.jsonl"
    with Server(tmp_path, trouble=["500", "bad json"]) as server:
        assert teacher_of(server, cache, tries=2)(looks_of(2)) == [None, None]
        assert not cache.exists() or not cache.read_bytes()
        assert right(server, looks_of(2), teacher_of(server, cache, tries=1)(looks_of(2)))


@pytest.mark.parametrize("code", ["400", "401", "403", "404", "307"])
def test_a_refusal_raises_at_once(tmp_path, code):
    with Server(tmp_path, trouble=[code] * 9, wait=.02) as server:
        with pytest.raises(ValueError, match=f"chat/completions: {code}"):
            teacher_of(server, tmp_path / "c.jsonl", workers=2)(looks_of(30))
        assert len(server.asked()) < 10


def test_a_refusal_keeps_what_was_answered(tmp_path):
    looks, cache = looks_of(30), tmp_path / "c.jsonl"
    with Server(tmp_path, refuse=10, wait=.01) as server:
        with pytest.raises(ValueError, match="401"):
            teacher_of(server, cache)(looks)
        given_out = {r["name"] for r in server.lines() if r.get("as") == "answer"}
        assert len(given_out) >= 10
        assert {r["key"] for r in read_jsonl(cache)} == given_out
    with Server(tmp_path) as server:
        texts = teacher_of(server, cache)(looks)
        assert not given_out & {r["name"] for r in server.asked()}
        assert len(set(texts)) == 30 and len(read_jsonl(cache)) == 30


@pytest.mark.parametrize("workers", [1, 3])
def test_requests_at_once_are_bounded(tmp_path, workers):
    with Server(tmp_path, wait=.03) as server:
        teacher_of(server, tmp_path / "c.jsonl", workers=workers)(looks_of(12))
        assert max(r["now"] for r in server.asked()) == workers


CLIENT = """import sys
sys.path.insert(0, sys.argv[3])
from test_traces import looks_of, served, served_teacher
served_teacher(served(sys.argv[1], "some-model", sys.argv[2], timeout=2))(looks_of(60))"""


def test_a_killed_client_goes_on_where_it_was(tmp_path):
    cache, looks = tmp_path / "c.jsonl", looks_of(60)
    with Server(tmp_path, wait=.02) as server:
        for least in (5, 20, 35):
            command = [sys.executable, "-c", CLIENT, server.url, str(cache), str(HERE)]
            client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
            while not cache.exists() or cache.read_bytes().count(b"\n") < least:
                assert client.poll() is None
                time.sleep(.005)
            client.send_signal(signal.SIGKILL)
            client.wait()
            held = {r["key"] for r in read_jsonl(cache)}
            before = len(server.asked())
            with open(cache, "ab") as f:
                f.write(b'{"key": "torn \xc3')
        texts = teacher_of(server, cache)(looks)
        asked = server.asked()
    assert not held & {r["name"] for r in asked[before:]}
    assert len({r["name"] for r in asked}) == 60 and len(asked) <= 60 + 3 * 4  # those under way at a kill
    assert len(set(texts)) == 60 and None not in texts
    assert len(read_jsonl(cache)) == len({r["key"] for r in read_jsonl(cache)}) == 60


def test_cache_is_of_the_content(tmp_path):
    look, cache = looks_of(1)[0], tmp_path / "sub" / "c.jsonl"
    other = Look(Image.new("RGB", (24, 16), "red"), look.expression, look.box, look.target)
    with Server(tmp_path) as server:
        for model, prompt in (("a", PROMPT), ("b", PROMPT), ("a", "{expression}?")):
            served_teacher(served(server.url, model, cache), prompt)([look, other])
        assert len(server.asked()) == 6 == len(read_jsonl(cache))


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://a.b/c", "http://a b/c", "http://a/\n", "/v1", ""])
def test_only_http(url, tmp_path):
    with pytest.raises(ValueError, match="http"):
        served(url, "m", tmp_path / "c.jsonl")
