"""A model behind a URL goes round in the loop: against the local policy, through a server process that
reads the messages by the model's own chat template, and that also hangs, drips, lies and dies."""
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from chat_server import NONSENSE
from test_traces import HERE, Server, looks_of, no_proxy, teacher_of  # noqa: F401
from ivt_min import teachers
from ivt_min.core import read_jsonl
from ivt_min.scenes import split
from ivt_min.model import OFFICIAL, load
from ivt_min.answer import Turn
from ivt_min.loop import Loop, model_policy, picture, record, rollout
from ivt_min.lab import ask_all
from ivt_min.teachers import _confidence, served, served_policy, user_message

torch.set_num_threads(1)
TURN = Loop(form="turn")
BAD = ["soon", "429", "500", "odd", "408", "hang", "cut", "cut at once", *NONSENSE]


@pytest.fixture(scope="module")
def vlm():
    return load(device="cpu")


@pytest.fixture(scope="module")
def samples():
    return split("val", 12)


@pytest.fixture(scope="module")
def local(vlm, samples):
    return rollout(model_policy(vlm, TURN), samples, TURN)


@pytest.fixture(scope="module")
def once(tmp_path_factory, vlm, samples):
    """All samples asked through a server: the episodes, what the server saw, the cache."""
    folder = tmp_path_factory.mktemp("once")
    with Server(folder, tiny=True, wait=.03) as server:
        policy = served_policy(served(server.url, "tiny", folder / "c.jsonl", workers=3), TURN, vlm.prompt)
        return rollout(policy, samples, TURN), server.asked(), folder / "c.jsonl"


def served_rollout(server, vlm, samples, cache, loop=TURN, keys=None, **more):
    ask = served(server.url, "tiny", cache, **dict(timeout=5, tries=3) | more)
    return rollout(served_policy(ask, loop, vlm.prompt), samples, loop, keys=keys)


def agree(far, near):
    for f, n in zip(far, near, strict=True):
        assert f.boxes == n.boxes and f.drawn == n.drawn
        for t, u in zip(f.turns, n.turns, strict=True):
            assert t.text.startswith(u.text) and (t.ids, t.logps) == ((), ())
            assert (t.confidence is None) == (u.confidence is None)
            assert t.confidence is None or abs(t.confidence - u.confidence) <= 1e-3


def pictures_in(body):
    parts = [p for m in body["messages"] if m["role"] == "user" for p in m["content"]]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))) for u in urls]


def words_in(body):
    """(role, words) of each message."""
    return [(m["role"], m["content"] if m["role"] == "assistant" else m["content"][1]["text"])
            for m in body["messages"]]


# ---- it is the loop

def test_served_loop_is_the_local_loop(once, local):
    far, asked, cache = once
    agree(far, local)
    assert sum(t.text != u.text for f, n in zip(far, local) for t, u in zip(f.turns, n.turns)) == 0
    assert len(asked) == 36 == len(read_jsonl(cache)) == len({r["name"] for r in asked})
    assert max(r["now"] for r in asked) == 3  # workers, and never one more


def test_other_budgets_and_no_answer_are_the_local_ones(tmp_path, vlm, samples):
    """Where the budget cuts every answer there is no box: nothing is drawn, and that is said."""
    loop = replace(TURN, steps=1, max_tokens=6)
    near = rollout(model_policy(vlm, loop), samples[:3], loop)
    with Server(tmp_path, tiny=True) as server:
        far = served_rollout(server, vlm, samples[:3], tmp_path / "c.jsonl", loop)
        bodies = [json.loads(r["body"]) for r in server.asked()]
    agree(far, near)
    assert all(f.boxes == (None, None) for f in far)
    assert {b["max_tokens"] for b in bodies} == {6}
    last = [words_in(b)[-1][1] for b in bodies if len(b["messages"]) == 3]
    assert len(last) == 3 and all(w.startswith("\nNo box.\nLocate: ") for w in last)


def test_request_is_of_the_protocol(once, samples, vlm):
    far, asked, _ = once
    bodies = [json.loads(r["body"]) for r in asked]
    [third] = [b for b in bodies if len(b["messages"]) == 5
               and words_in(b)[0][1] == vlm.prompt.replace("{expression}", samples[0].expression)]
    e = far[0]
    after = TURN.prompt.replace("{expression}", e.sample.expression)
    assert words_in(third)[1:] == [("assistant", e.turns[0].text), ("user", after),
                                   ("assistant", e.turns[1].text), ("user", after)]
    shown = [e.image, *(picture(TURN, replace(e, drawn=e.drawn[:t])) for t in (1, 2))]
    assert [p.tobytes() for p in pictures_in(third)] == [p.tobytes() for p in shown]
    assert (third["model"], third["temperature"], third["max_tokens"]) == ("tiny", 0, 64)
    assert third["logprobs"] is True and type(third["seed"]) is int


def test_a_picture_has_no_more_than_its_budget(tmp_path, vlm, samples):
    large = replace(samples[0], image=samples[0].image.resize((640, 400)))
    with Server(tmp_path, tiny=True) as server:
        ask = served(server.url, "tiny", tmp_path / "c.jsonl")
        for budget in (1024 * 1024, 40_000):
            [e] = rollout(served_policy(ask, TURN, vlm.prompt, budget), [large], TURN)
            assert e.image.size == (640, 400) and len(e.turns) == 3
        sizes = {p.size for r in server.asked() for p in pictures_in(json.loads(r["body"]))}
    assert sizes == {(640, 400), (252, 158)} and len(read_jsonl(tmp_path / "c.jsonl")) == 6


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20_000))
def test_budget_holds_for_any_shape(width, height, budget):
    if max(width, height) > 200 * min(width, height) or budget < 200:
        return
    image = Image.new("RGB", (width, height))
    body = dict(messages=[user_message("x", image, budget)])
    [shown] = pictures_in(body)
    assert shown.width * shown.height <= max(budget, 1) and image.size == (width, height)
    if width * height <= budget:
        assert shown.size == image.size


def test_a_group_is_sampled_apart_and_again_the_same(tmp_path, vlm, samples):
    loop, keys = replace(TURN, temperature=1.2, steps=1), [("group", k) for k in range(4)]
    with Server(tmp_path, tiny=True) as server:
        found = [served_rollout(server, vlm, samples[:1] * 4, tmp_path / name, loop, keys) for name in "ab"]
        bodies = [json.loads(r["body"]) for r in server.asked() if r["body"]]
    texts = [[t.text for t in e.turns] for e in found[0]]
    assert texts == [[t.text for t in e.turns] for e in found[1]]
    assert len({t[0] for t in texts}) > 1
    seeds = {(b["seed"], len(b["messages"])) for b in bodies}
    assert len(seeds) == 8 == len({s for s, _ in seeds}) and {b["temperature"] for b in bodies} == {1.2}


def test_no_log_probabilities_no_confidence(tmp_path, vlm, samples):
    with Server(tmp_path, tiny=True) as server:
        ask = served(server.url, "tiny", tmp_path / "c.jsonl")
        [e] = rollout(served_policy(ask, TURN, vlm.prompt, logprobs=False), samples[:1], TURN)
        assert {json.loads(r["body"])["logprobs"] for r in server.asked()} == {False}
    assert all(e.boxes) and [t.confidence for t in e.turns] == [None] * 3


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(0, 5))
def test_confidence_is_that_of_the_tokens_of_the_box(cuts, ahead):
    """Any cut of a text into tokens, by a second reading: a token counts if it has a character of the box."""
    text = "\u661f\U0001f600" * ahead + 'so {"bbox_2d": [1, 20, 300, 400]}.'
    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    tokens = [text[a:b] for a, b in zip(places, places[1:])]
    told = [dict(token=t, logprob=-float(k * k)) for k, t in enumerate(tokens)]
    begin, end = text.index("1, 20"), text.index("]")
    inside = [-float(k * k) for k, (a, b) in enumerate(zip(places, places[1:])) if a < end and b > begin]
    assert _confidence(told) == pytest.approx(sum(inside) / len(inside))


@pytest.mark.parametrize("form", ["prefix", "other"])
def test_only_turns(form):
    with pytest.raises(ValueError, match=form):
        served_policy(None, Loop(form=form), OFFICIAL)


@pytest.mark.parametrize("words, error", [("", ValueError), (7, TypeError), ("x" * 6000, ValueError)])
def test_a_bad_expression_is_named(tmp_path, vlm, samples, words, error):
    policy = served_policy(served("http://127.0.0.1:9/", "m", tmp_path / "c.jsonl"), TURN, OFFICIAL)
    with pytest.raises(error, match=samples[0].id):
        rollout(policy, [replace(samples[0], expression=words)], TURN)


# ---- trouble

def test_trouble_changes_nothing(tmp_path, vlm, samples, local):
    with Server(tmp_path, tiny=True, trouble=BAD, each=True, hang=7) as server:
        far = served_rollout(server, vlm, samples, tmp_path / "c.jsonl", timeout=5)
        asked = server.asked()
    agree(far, local)
    assert len({r["name"] for r in asked}) == 36 == len(read_jsonl(tmp_path / "c.jsonl"))
    assert {r["what"] for r in asked} == {*BAD, "answer"} and len(asked) >= 36 + 36


def test_what_never_comes_ends_the_loop_and_is_asked_again(tmp_path, vlm, samples):
    loop, cache = replace(TURN, steps=1), tmp_path / "c.jsonl"
    with Server(tmp_path, tiny=True, trouble=["503"] * 2, each=True) as server:
        with pytest.warns(UserWarning, match="2 of 2 without an answer: status 503"):
            with pytest.raises(OSError, match="no answer to .*'val-0000'"):
                served_rollout(server, vlm, samples[:2], cache, loop, tries=1)
        assert not cache.exists()
        far = served_rollout(server, vlm, samples[:2], cache, loop, tries=2)
        assert all(all(e.boxes) for e in far)


def test_a_stopped_evaluation_goes_on(tmp_path, vlm, samples, once):
    """Refused half-way, then asked again: what was answered is not asked again."""
    cache = tmp_path / "c.jsonl"
    with Server(tmp_path, tiny=True, refuse=17) as server:
        with pytest.raises(ValueError, match="401"):
            served_rollout(server, vlm, samples, cache)
    held = {r["key"] for r in read_jsonl(cache)}
    assert 17 <= len(held) < 36
    with Server(tmp_path, tiny=True) as server:
        far = served_rollout(server, vlm, samples, cache)
        names = [r["name"] for r in server.asked()]
    assert not held & set(names) and len(names) == 36 - len(held)
    assert [e.turns for e in far] == [e.turns for e in once[0]]


CLIENT = """import sys
sys.path.insert(0, sys.argv[3])
from test_served import TURN, load, rollout, served, served_policy, split
ask = served(sys.argv[1], "tiny", sys.argv[2])
rollout(served_policy(ask, TURN, load(device="cpu").prompt), split("val", 12), TURN)"""


def test_a_killed_evaluation_goes_on(tmp_path, vlm, samples, once):
    cache = tmp_path / "c.jsonl"
    with Server(tmp_path, tiny=True, wait=.05) as server:
        command = [sys.executable, "-c", CLIENT, server.url, str(cache), str(HERE)]
        client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
        while not cache.exists() or cache.read_bytes().count(b"\n") < 15:
            assert client.poll() is None
            time.sleep(.005)
        client.send_signal(signal.SIGKILL)
        client.wait()
        held, before = {r["key"] for r in read_jsonl(cache)}, len(server.asked())
        with open(cache, "ab") as f:
            f.write(b'{"ke')
        far = served_rollout(server, vlm, samples, cache)
        asked = server.asked()
    assert 15 <= len(held) < 36 and not held & {r["name"] for r in asked[before:]}
    assert len({r["name"] for r in asked}) == 36 == len(read_jsonl(cache)) and len(asked) <= 36 + 4
    assert [e.turns for e in far] == [e.turns for e in once[0]]


def test_the_cache_needs_no_server(once, vlm, samples):
    far, _, cache = once
    before = cache.read_bytes()
    ask = served("http://127.0.0.1:9/v1", "tiny", cache, tries=1)
    assert rollout(served_policy(ask, TURN, vlm.prompt), samples, TURN) == far
    assert cache.read_bytes() == before


@pytest.mark.parametrize("trouble", ["hang", "drip", "drip head", "continue"])
def test_time_is_that_of_the_whole_request(tmp_path, trouble):
    with Server(tmp_path, trouble=[trouble] * 2, hang=6) as server:
        start = time.time()
        with pytest.warns(UserWarning, match="1 of 1 without an answer: Timeout"):
            assert teacher_of(server, tmp_path / "c.jsonl", timeout=.5, tries=2)(looks_of(1)) == [None]
        assert time.time() - start < 3


def test_a_huge_pause_is_a_minute(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(teachers, "time", SimpleNamespace(sleep=waits.append))
    with Server(tmp_path, trouble=["later"]) as server:
        [text] = teacher_of(server, tmp_path / "c.jsonl")(looks_of(1))
    assert text and waits == [60]


def test_no_secret_is_told(tmp_path):
    with Server(tmp_path, trouble=["400"], reason="Bad key sesame") as server:
        ask = served(f"{server.url}?key=sesame", "m", tmp_path / "c.jsonl")
        with pytest.raises(ValueError) as e:
            ask(lambda x: dict(messages=[]), [1])
    assert "sesame" not in str(e.value) and str(e.value).endswith("/v1/chat/completions: 400")
    with Server(tmp_path, trouble=["503"], reason="Bad key sesame") as server:
        ask = served(f"{server.url}?key=sesame", "m", tmp_path / "d.jsonl", tries=1)
        with pytest.warns(UserWarning) as seen:
            ask(lambda x: dict(messages=[]), [1])
    assert "sesame" not in str(seen[0].message)
    with pytest.raises(ValueError) as e:
        served("ftp://sesame", "m", tmp_path / "c.jsonl")
    assert "sesame" not in str(e.value)


def test_a_key_that_is_no_header_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVED_TEST_KEY", "open\nsesame")
    ask = served("http://127.0.0.1:9/", "m", tmp_path / "c.jsonl", key="SERVED_TEST_KEY", tries=1)
    with pytest.warns(UserWarning) as seen:
        ask(lambda x: dict(messages=[]), [1])
    assert "sesame" not in str(seen[0].message)


ROW = b'{"key": "%s", "text": "Up."}' % (b"0" * 64)


@pytest.mark.parametrize("data", [
    b"notes", b'{"a": 1}', b'{"key": "x"}', b"a,b\n1,2\n", b"notes\nmore", b'{"key": "a"}\n' + ROW, b"\n", b"\x00" * 99,
    b'[{"key": "a", "text": "b"}]', b'{"text": "a", "key": "b"}\n', ROW + b"\nnotes\n" + ROW + b"\n", b"0" * 10**6])
def test_another_file_is_left_as_it_is(tmp_path, data):
    path = tmp_path / "other.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="other.txt"):
        served("http://127.0.0.1:9/", "m", path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("kept", [b"", ROW + b"\n", (ROW + b"\n") * 3])
def test_a_torn_line_is_cut_off_wherever_it_was_torn(tmp_path, kept):
    path = tmp_path / "c.jsonl"
    for n in range(len(ROW) + 1):
        path.write_bytes(kept + ROW[:n])
        served("http://127.0.0.1:9/", "m", path)
        assert path.read_bytes() == kept


def test_a_bound_holds_under_trouble(tmp_path):
    with Server(tmp_path, trouble=["cut", "500", "bad json"], each=True, wait=.02) as server:
        texts = teacher_of(server, tmp_path / "c.jsonl", workers=3, timeout=5)(looks_of(20))
        assert None not in texts and max(r["now"] for r in server.asked()) == 3


def test_an_evaluation_is_not_baked_with_an_outage(tmp_path, vlm, samples):
    """A server that is down ends the run; asked again, only what is missing is asked."""
    some, cache, path = samples[:3], tmp_path / "c.jsonl", tmp_path / "run/test.jsonl"
    def policy(url): return served_policy(served(url, "tiny", cache, timeout=5, tries=1), TURN, vlm.prompt)
    def ask_of(url): return lambda part: rollout(policy(url), part, TURN, progress=False)
    with pytest.raises(OSError, match="no answer to"):
        ask_all(ask_of("http://127.0.0.1:9/v1/chat/completions"), some, path, TURN.steps, 2)
    assert not path.exists()
    with Server(tmp_path, tiny=True) as server:
        done = ask_all(ask_of(server.url), some, path, TURN.steps, 2)
        assert len(server.asked()) == 9
    assert all(len(t.boxes) == 3 and any(t.boxes) for t in done)
