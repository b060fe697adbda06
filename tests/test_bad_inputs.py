"""Thirty kinds of bad input and the right answer to each, in one table: `pytest -s` prints it.

E is a typed error that names the reason, S a sample that is skipped, counted and scored 0, and F is
handled. What is expected is a text in which `...` stands for anything. Wherever it applies an input
goes through the command, too.
"""
import contextlib
import io
import json
import math
import re
import resource
import shutil
import socket
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import torch as safe

from bad_pictures import TRUTH, make_all, red_box, scene
from ivt_min import cli, grpo
from ivt_min.boxes import iou, to_permille, to_pixels
from ivt_min.core import Sample, Trajectory, data_path, read_jsonl, write_json, write_jsonl
from ivt_min.datasets import read_rows
from ivt_min.evaluate import check_answers
from ivt_min.grpo import advantage, reward, train_grpo
from ivt_min.answer import Turn
from ivt_min.loop import Loop, model_policy, record, rollout, transcript
from ivt_min.answer import score
from ivt_min.model import ask, load, to_patches
from ivt_min.render import draw_box, open_image
from ivt_min.scenes import split
from ivt_min.sft import SFT, train_sft
from ivt_min.train import last_checkpoint, save_checkpoint
import test_grpo
import test_sft

torch.set_num_threads(1)
ROW = dict(image="plain.png", expression="the red one", box=list(TRUTH))
SKIPPED = ["bomb.png", "large.jpg", "1x201.png", "zero.png", "cut.jpg", "page.jpg", "float.tiff",
           "gone.png"]
SEEN = ["plain.png", "1x1.png", "15x640.png", "exif6.jpg", "exif5.jpg", "exif7.jpg", "rgba.png",
        "palette.png", "la.png", "l.png", "1.png", "cmyk.jpg", "grey16.png", "film.gif", "film.webp"]


def scripted(say):
    """A policy that says what a function says."""
    def policy(episodes, memory=None): return [Turn((), (), say(e)) for e in episodes], None
    return policy


# ---- ways in

def command(*words):
    """What the command prints; a mistake is one line and exit code 2, and is raised again."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main([*words])
    if not code: return out.getvalue(), err.getvalue()
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("ivt_min: "), lines
    raise ValueError(lines[0])


def looked_at(names, words="the red one"):
    """What `ivt_min refine` says of pictures: a dict each."""
    out, _ = command("refine", *names, words, "--model", "tiny", "--steps", "0", "--json")
    return {row["image"]: row for row in map(json.loads, out.splitlines())}


def rows(*changed, path="rows.jsonl"):
    """A file with one good row, and some that are changed."""
    write_jsonl(path, [dict(ROW, id="good"), *(dict(ROW, **change) for change in changed)])
    return path


def evaluated(*changed, images="."):
    """What `ivt_min evaluate` prints of a good row, and of some that are changed."""
    return command("evaluate", "tiny", rows(*changed), "--steps", "0", "--images", images,
                   "--out", "none")[0]


class Here:
    """What the cases share: a folder of pictures, the model, and one run of the command over all."""
    def __init__(self, patch):
        self.patch, self.vlm = patch, load("tiny", "cpu")
        size = dict(width=80, height=60)
        named = [dict(ROW, **size, image=name, id=name) for name in SKIPPED]
        good = [dict(ROW, image=n, id=n, box=[0, 0, *open_image(n).size]) for n in SEEN]
        write_jsonl("all.jsonl", named + good)
        _, self.said = command("evaluate", "tiny", "all.jsonl", "--steps", "0", "--out", "run")
        self.run = {row["id"]: row for row in read_jsonl("run/test.jsonl")}
        self.shown = looked_at(SEEN)
        self.samples = split("train", 4)

    def skipped(self, name):
        "S, the reason in the run of the command, its IoU, and how many are counted."
        row = self.run[name]
        assert f"counts as no box: {name}: " in self.said
        return f"S: {row['notes'][0]}; IoU {iou(row['boxes'][0], row['truth'])}, n {len(self.run)}"

    def trained(self, name):
        "What a training says of it before its first update."
        lesson = Sample("x", "", "a", (0, 0, 9, 9), name), None
        return train_sft(self.vlm, {}, [lesson], SFT(loop=Loop()), Path("trained"))

    def seen(self, name, other="plain.png"):
        "Whether a picture is drawn on and read as another is, and what the command says of it."
        a, b = open_image(name), open_image(other)
        far = np.abs(np.asarray(a, int) - np.asarray(b, int)).max() if a.size == b.size else "?"
        boxes = (0, 0, 500, 500), to_permille(red_box(a), *a.size)
        same = all(np.array_equal(draw_box(name, box), draw_box(a, box)) for box in boxes)
        read = torch.equal(to_patches(self.vlm, name).patches, to_patches(self.vlm, a).patches)
        assert same and read and self.shown[name]["size"] == [*a.size]
        assert self.run[name]["texts"][0]   # it was asked
        return f"{a.mode}, {far} apart, IoU {iou(red_box(a), TRUTH):.2f}"

    def heard(self, text):
        "The box that the loop reads in an answer, its note, and the reward for form alone."
        sample = Sample("x", "", "a", (100, 200, 300, 400), "plain.png")
        start = time.process_time()
        [e] = rollout(scripted(lambda e: text), [sample], Loop(steps=0), progress=False)
        took = time.process_time() - start
        form = reward(e, format_weight=1.) - reward(e, format_weight=0.)
        slow = ", slow" if took > 2 else ""
        return f"{e.boxes[0]}, {record(e).notes[0]!r}, form {form:.0f}{slow}"

    def forced(self, token):
        "What a model says that wants to say one token only, twice; whether the steps are aligned."
        head, i = self.vlm.model.lm_head, self.vlm.tokenizer.convert_tokens_to_ids(token)
        def push(module, args, out): return out.index_add(
            -1, torch.tensor([i]), torch.full((*out.shape[:-1], 1), 50.))
        loop, hook = Loop(steps=1, max_tokens=6), head.register_forward_hook(push)
        try:
            [e] = rollout(model_policy(self.vlm, loop), self.samples[:1], loop, progress=False)
            whole = transcript(self.vlm, loop, e)
            with torch.no_grad(): new = score(self.vlm, [whole.dialogue], [whole.mask])
        finally: hook.remove()
        aligned = np.abs(new.numpy() - whole.logps).max() < 1e-4
        said = [turn.ids.count(i) for turn in e.turns]
        return f"{said} times, {record(e).notes[1]}, aligned {aligned}"

    def sft(self, *bad):
        "The log of four updates of SFT, some of which have a NaN loss."
        vlm, params = test_sft.fresh(test_sft.TINY)
        with self.patch.context() as m:
            test_sft.poison(m, set(bad), True)
            s = replace(test_sft.TINY, batch=1, steps=4)
            log = train_sft(vlm, params, test_sft.singles(2), s, f"sft{bad}")
        assert all(p.isfinite().all() for p in params.values())
        return [row["loss"] is None for row in log]

    def grpo(self, value):
        "A step of GRPO in which all rewards are one value."
        vlm, params = test_grpo.lesson()
        before = [p.detach().clone() for p in params.values()]
        with self.patch.context() as m:
            m.setitem(grpo.REWARDS, "final", lambda ious: value)
            s = replace(test_grpo.TINY, format_weight=0., beta=0.)
            [row] = train_grpo(vlm, params, self.samples[:2], s, f"grpo{value}")
        same = all(map(torch.equal, before, params.values()))
        return f"flat {row['flat']}, norm {row['norm']}, weights as before {same}"


# ---- runs and folders

def checkpoints(folder, n=2, size=9):
    for k in range(n):
        tensors = dict(x=torch.full((size,), float(k + 1)))
        save_checkpoint(folder, k + 1, tensors, dict(settings_hash="mine", log=[]))
    return folder


def goes_on(folder, digest="mine"):
    step, tensors, _ = last_checkpoint(folder, digest)
    return f"step {step}" + (f" of {int(tensors['x'][0])}" if step else "")


def harmed(name, harm):
    """Where a run of two checkpoints goes on, after a file of the second was harmed."""
    path = Path(checkpoints(f"{harm.__name__}-{name[:4]}"), "000002", name)
    harm(path)
    return goes_on(path.parent.parent)


def half(data): return data[:len(data) // 2]
def flip(data): return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def gone(path): path.unlink()
def cut(path): path.write_bytes(half(path.read_bytes()))
def flipped(path): path.write_bytes(flip(path.read_bytes()))


def killed():
    """A kill in the middle of a write leaves a folder that has no name yet, and a file beside."""
    folder = Path(checkpoints("killed"))
    shutil.copytree(folder / "000002", folder / ".000003.4711")
    cut(folder / ".000003.4711/tensors.safetensors")
    (folder / ".log.jsonl.4711.tmp").write_bytes(b'{"st')
    return goes_on(folder)


def full_disk():
    """No file may be larger than 1 MB, and a checkpoint of 4 MB is written."""
    checkpoints("full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try: save_checkpoint("full", 3, dict(x=torch.ones(10**6)), dict(settings_hash="mine"))
    except OSError: return goes_on("full")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def folder_of(name, source, **files):
    """A copy of a model's or adapter's folder; of a file None, or a function of its bytes."""
    shutil.copytree(data_path(source), name)
    for file, change in files.items():
        path = Path(name, file.replace("__", "."))
        path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    return f"./{name}"


def tensors(change):
    "A function of a file's bytes that changes its tensors."
    def of(data):
        weights = safe.load(data)
        change(weights)
        return safe.save(weights, metadata=dict(format="pt"))
    return of


def says(*at, **changed):
    "A function of a JSON file's bytes that changes some fields, of the dict that lies there."
    def of(data):
        value = inner = json.loads(data)
        for name in at: inner = inner[name]
        inner.update(changed)
        return json.dumps(value).encode()
    return of


def shorter(weights):
    name = next(iter(weights))
    weights[name] = weights[name][:-1].contiguous()


def poisoned(weights): next(iter(weights.values())).view(-1)[7] = math.nan


def answers(folder):
    """The first words of a model that was loaded from a folder that is not whole."""
    return f"it loads: {load(folder, 'cpu').name}"


def pickled(name, source, weights, pickle):
    """A folder whose weights are a pickle."""
    folder = Path(folder_of(name, source))
    torch.save(safe.load_file(folder / weights), folder / pickle)
    (folder / weights).unlink()
    return answers(f"./{name}")


# ---- small ways to say an input

def bounded(path, size):
    """A file of zeros, read by rows, and the memory that takes."""
    with open(path, "wb") as f: f.truncate(size)
    tracemalloc.start()
    try: return read_jsonl(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6, peak


def raw(data, path="raw.jsonl"):
    Path(path).write_bytes(data)
    return len(read_rows(path))


def quick(f, *args):
    start = time.process_time()
    try: return f(*args)
    finally: assert time.process_time() - start < .5


def drawn(*boxes):
    return [draw_box("plain.png", box).size for box in boxes][-1]


def marks(vlm, words):
    "How often the marks of a picture and of a turn's end stand in a question."
    ids = ask(vlm, words, ["plain.png"]).ids
    names = "<|image_pad|>", "<|im_end|>"
    return [ids.count(i) for i in vlm.tokenizer.convert_tokens_to_ids(names)]


def inert(vlm, words): return marks(vlm, words) == marks(vlm, "x")


def whole(size):
    "Whether the whole of a picture is a box whose arithmetic is exact, and is drawn so."
    box = to_permille((0, 0, *size), *size)
    name = "%dx%d.png" % size
    return box, to_pixels(box, *size) == (0, 0, *size) == red_box(draw_box(name, box))


def pixels(n=30):
    "Answers in pixels of pictures of 100 px, where the truth is in permille."
    truth = [(0, 0, 500 + i, 900) for i in range(n)]
    done = [Trajectory(str(i), "", "a", t, [tuple(v / 10 for v in t)], [], []) for i, t in enumerate(truth)]
    check_answers(done, done)


ZERO = f"IoU 0.0, n {len(SKIPPED + SEEN)}"
LINE = json.dumps(dict(ROW)).encode()
CASES = [   # number, input, expected, function of Here
    (1, "a PNG of 20,000 x 20,000, training", "E: ...x: bomb.png...",
     lambda h: quick(h.trained, "bomb.png")),
    (1, "the same, refine", "E: ivt_min: picture: bomb.png: ...",
     lambda h: quick(looked_at, ["bomb.png"])),
    (1, "the same, evaluate", f"S: bomb.png: ...; {ZERO}", lambda h: h.skipped("bomb.png")),
    (2, "a JPEG of 13,000 x 13,000, training", "E: ...13000 x 13000 pixels",
     lambda h: h.trained("large.jpg")),
    (2, "the same, refine", "E: ...large.jpg: 13000 x 13000 pixels",
     lambda h: looked_at(["large.jpg"])),
    (2, "the same, evaluate", f"S: ...13000 x 13000 pixels; {ZERO}",
     lambda h: h.skipped("large.jpg")),
    (3, "a strip of 1 x 201, training", "E: ...aspect ratio of 1 x 201 ...",
     lambda h: h.trained("1x201.png")),
    (3, "the same, refine", "E: ...aspect ratio of 1 x 201 ...",
     lambda h: looked_at(["1x201.png"])),
    (3, "the same, evaluate", f"S: ...aspect ratio ...; {ZERO}", lambda h: h.skipped("1x201.png")),
    (4, "1 x 1 px", "F: ((0.0, 0.0, 1000.0, 1000.0), True)", lambda h: whole((1, 1))),
    (4, "15 x 640 px", "F: ((0.0, 0.0, 1000.0, 1000.0), True)", lambda h: whole((15, 640))),
    (4, "both, refine", "F: [[1, 1], [15, 640]]",
     lambda h: [h.shown[n]["size"] for n in SEEN[1:3]]),
    (5, "a file without a byte, training", "E: ...zero.png: ...", lambda h: h.trained("zero.png")),
    (5, "the same, refine", "E: ...zero.png: ...", lambda h: looked_at(["zero.png"])),
    (5, "the same, evaluate", f"S: zero.png: ...; {ZERO}", lambda h: h.skipped("zero.png")),
    (6, "half a JPEG, training", "E: ...cut.jpg: ...truncated...", lambda h: h.trained("cut.jpg")),
    (6, "the same, refine", "E: ...cut.jpg: ...truncated...", lambda h: looked_at(["cut.jpg"])),
    (6, "the same, evaluate", f"S: cut.jpg: ...; {ZERO}", lambda h: h.skipped("cut.jpg")),
    (7, "a page of HTML, training", "E: ...page.jpg: ...", lambda h: h.trained("page.jpg")),
    (7, "the same, refine", "E: ...page.jpg: ...", lambda h: looked_at(["page.jpg"])),
    (7, "the same, evaluate", f"S: page.jpg: ...; {ZERO}", lambda h: h.skipped("page.jpg")),
    (8, "EXIF 6", "F: RGB, ... apart, IoU 1.00", lambda h: h.seen("exif6.jpg")),
    (9, "EXIF 5", "F: RGB, ... apart, IoU 1.00", lambda h: h.seen("exif5.jpg")),
    (9, "EXIF 7", "F: RGB, ... apart, IoU 1.00", lambda h: h.seen("exif7.jpg")),
    (10, "a transparent ground", "F: RGB, 0 apart, IoU 1.00", lambda h: h.seen("rgba.png")),
    (11, "a transparent colour of a palette", "F: RGB, 0 apart, IoU 1.00",
     lambda h: h.seen("palette.png")),
    (12, "LA", "F: RGB, ...",
     lambda h: open_image("la.png").mode + ", " + str(h.shown["la.png"]["size"])),
    (12, "L", "F: RGB, ...",
     lambda h: open_image("l.png").mode + ", " + str(h.shown["l.png"]["size"])),
    (12, "1 bit", "F: RGB, ...",
     lambda h: open_image("1.png").mode + ", " + str(h.shown["1.png"]["size"])),
    (13, "CMYK, inverted by Adobe", "F: RGB, ... apart, IoU 1.00", lambda h: h.seen("cmyk.jpg")),
    (14, "16 bits of grey", "F: [0, 1, 2, ..., 253, 254, 255]",
     lambda h: np.asarray(open_image("grey16.png"))[..., 0].ravel().tolist()),
    (15, "a TIFF of floats, refine", "E: ...float.tiff: pixels of mode F",
     lambda h: looked_at(["float.tiff"])),
    (15, "the same, evaluate", f"S: ...mode F; {ZERO}", lambda h: h.skipped("float.tiff")),
    (15, "GIF, two frames: the first", "F: RGB, 0 apart, IoU 1.00", lambda h: h.seen("film.gif")),
    (15, "WebP, two frames: the first", "F: RGB, 0 apart, IoU 1.00", lambda h: h.seen("film.webp")),
    (16, "a path out of the folder", "E: ...row 2: image ...outside the folder ...",
     lambda h: evaluated(dict(image="../secret.png"))),
    (16, "a link out of the folder", "E: ...row 2: image ...outside the folder ...",
     lambda h: evaluated(dict(image="link.png"))),
    (16, "a URL in a row", "E: ...row 2: image ...outside the folder ...",
     lambda h: evaluated(dict(image="https://example.org/a.png"))),
    (16, "a URL, refine", "E: ...example.org/a.png: a URL; no network here",
     lambda h: looked_at(["https://example.org/a.png"])),
    (17, "no such picture, training", "E: ...gone.png...", lambda h: h.trained("gone.png")),
    (17, "the same, refine", "E: ...gone.png...", lambda h: looked_at(["gone.png"])),
    (17, "the same, evaluate", f"S: gone.png: ...; {ZERO}", lambda h: h.skipped("gone.png")),
    (18, "a true box that is reversed", "E: ...row 2: box ...reversed...",
     lambda h: evaluated(dict(box=[30, 20, 10, 50]))),
    (18, "without area", "E: ...row 2: box ...under 1 px...",
     lambda h: evaluated(dict(box=[10, 20, 10, 50]))),
    (18, "outside the picture", "E: ...row 2: box ...leaves the picture...",
     lambda h: evaluated(dict(box=[60, 20, 90, 50]))),
    (19, "NaN in the true box", "E: ...raw.jsonl, line 1: ...NaN...",
     lambda h: raw(LINE.replace(b"10", b"NaN"))),
    (19, "inf", "E: ...row 1: box ...",
     lambda h: read_rows([dict(ROW, box=[10, 20, 30, math.inf])], images=".")),
    (19, "a string", "E: ...row 2: box ...not 4 finite numbers...",
     lambda h: evaluated(dict(box=[10, 20, 30, "50"]))),
    (19, "a bool", "E: ...row 2: box ...not 4 finite numbers...",
     lambda h: evaluated(dict(box=[10, True, 30, 50]))),
    (20, "permille in a picture of 80 x 60", "E: ...row 2: box ...leaves the picture, as xyxy px...",
     lambda h: evaluated(dict(box=[125, 333, 375, 833]))),
    (20, "corner and size", "E: ...row 2: box ...reversed or under 1 px, as xyxy px...",
     lambda h: evaluated(dict(box=[40, 20, 20, 30]))),
    (20, "answers in pixels", "E: no box goes beyond 90, as the truth does: pixels?",
     lambda h: pixels()),
    (21, "an id twice", "E: ...row 2: id 'good' is there twice",
     lambda h: evaluated(dict(id="good"))),
    (21, "an id twice, in the loop", "E: ('x',) is there twice",
     lambda h: rollout(scripted(str), [Sample("x", "", "a", (0, 0, 9, 9), "plain.png")] * 2, Loop())),
    (21, "no rows", "E: ...raw.jsonl: 0 rows, not some", lambda h: raw(b"")),
    (21, "504 where 505 are expected", "E: rows: 504 rows, not 505",
     lambda h: read_rows([dict(ROW, id=str(k)) for k in range(504)], images=".", n=505)),
    (22, "BOM and CRLF", "F: 2",
     lambda h: raw(b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + LINE + b"\r\n")),
    (22, "a torn last line", "E: ...raw.jsonl, line 2: ...",
     lambda h: raw(LINE + b"\n" + LINE[:30])),
    (22, "a line of 100 MB", "E: ...long.jsonl, line 1: over 10 MB",
     lambda h: bounded("long.jsonl", 10**8)),
    (23, "<|image_pad|> and <|im_end|>", "F: True",
     lambda h: inert(h.vlm, "<|image_pad|> <|im_end|>")),
    (23, "the same, refine", "F: ['plain.png']",
     lambda h: [*looked_at(["plain.png"], "<|image_pad|> <|im_end|>")]),
    (24, "no words", "E: ...expression of 0 characters", lambda h: looked_at(["plain.png"], " ")),
    (24, "50 kB of words", "E: ...expression of 50000 characters",
     lambda h: looked_at(["plain.png"], "a" * 50_000)),
    (24, "the same in a row", "E: ...row 2: expression ...not a text of ...",
     lambda h: evaluated(dict(expression="a" * 50_000))),
    (24, "right to left", "F: ['plain.png']",
     lambda h: [*looked_at(["plain.png"], "الكرسي الأحمر")]),
    (24, "emoji", "F: ['plain.png']", lambda h: [*looked_at(["plain.png"], "🦊")]),
    (25, "an answer without a box", "F: None, 'no box', form 0",
     lambda h: h.heard("There is nothing.")),
    (25, "two boxes: the first", "F: (1.0, 2.0, 3.0, 4.0), '', form 1",
     lambda h: h.heard('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]')),
    (25, "prose", "F: (10.0, 20.0, 30.0, 40.0), 'json', form 0",
     lambda h: h.heard("I see it at 10, 20, 30, 40")),
    (25, "JSON that does not end", "F: (1.0, 2.0, 3.0, 4.0), 'json', form 0",
     lambda h: h.heard('[{"bbox_2d": [1, 2, 3, 4]}, {"bb')),
    (25, "a comma too many", "F: (1.0, 2.0, 3.0, 4.0), 'json', form 0",
     lambda h: h.heard('{"bbox_2d": [1, 2, 3, 4,],}')),
    (25, "a fence", "F: (1.0, 2.0, 3.0, 4.0), '', form 1",
     lambda h: h.heard('```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```')),
    (26, "1e999", "F: None, 'number not finite ...', form 0",
     lambda h: h.heard("[1e999, 1, 2, 3]")),
    (26, "NaN", "F: None, 'number not finite ...', form 0", lambda h: h.heard("[NaN, 1, 2, 3]")),
    (26, "beyond 10,000", "F: None, '...beyond 10,000', form 0",
     lambda h: h.heard("[10001, 1, 2, 3]")),
    (26, "4,000 digits", "F: None, 'number not finite ...', form 0",
     lambda h: h.heard(f"[{'9' * 4000}, 1, 2, 3]")),
    (26, "10,000 nested brackets", "F: None, 'no box', form 0", lambda h: h.heard("[" * 10_000)),
    (26, "a megabyte of brackets", "F: None, 'no box', form 0",
     lambda h: h.heard("[1, " * 250_000)),
    (26, "-5 and 1001", "F: (0.0, 10.0, 130.0, 1000.0), 'clipped', form 0",
     lambda h: h.heard("[-5, 10, 130, 1001]")),
    (27, "no area once it is clipped", "F: None, 'no area; ...clipped', form 0",
     lambda h: h.heard("[1200, 5, 1300, 9]")),
    (27, "corners reversed", "F: (10.0, 20.0, 30.0, 40.0), 'ordered', form 0",
     lambda h: h.heard("[30, 40, 10, 20]")),
    (27, "strings for numbers", "F: (1.0, 2.0, 3.0, 4.0), 'json', form 0",
     lambda h: h.heard('["1", "2", "3", "4"]')),
    (27, "such boxes, drawn", "F: (80, 60)",
     lambda h: drawn((5, 5, 5, 9), (30, 40, 10, 20), (-9, -9, 1e9, 2), None)),
    (28, "a model that wants <|image_pad|>", "F: [0, 0] times, ..., aligned True",
     lambda h: h.forced("<|image_pad|>")),
    (28, "a model that never stops", "F: [6, 6] times, no box; cut at the budget, aligned True",
     lambda h: h.forced("a")),
    (29, "equal rewards", "F: [[0.0, 0.0, 0.0]]", lambda h: advantage([[.1] * 3]).tolist()),
    (29, "equal rewards, a step", "F: flat 1.0, norm 0.0, weights as before True",
     lambda h: h.grpo(.5)),
    (29, "a NaN reward", "E: step 0, sample train-..., member 0: reward nan",
     lambda h: h.grpo(math.nan)),
    (29, "a NaN loss", "F: [False, True, False, False]", lambda h: h.sft(1)),
    (29, "three in a row", "E: update 3: loss or gradient not finite, 3 in a row",
     lambda h: h.sft(1, 2, 3)),
    (30, "kill -9 in a write", "F: step 2 of 2", lambda h: killed()),
    (30, "half of the tensors", "F: step 1 of 1", lambda h: harmed("tensors.safetensors", cut)),
    (30, "tensors of other bits", "F: step 1 of 1",
     lambda h: harmed("tensors.safetensors", flipped)),
    (30, "half of a manifest", "F: step 1 of 1", lambda h: harmed("manifest.json", cut)),
    (30, "no manifest", "F: step 1 of 1", lambda h: harmed("manifest.json", gone)),
    (30, "a manifest of another version", "F: step 1 of 1",
     lambda h: harmed("manifest.json", lambda p: write_json(p, dict(step=2)))),
    (30, "a full disk", "F: step 2 of 2", lambda h: full_disk()),
    (30, "a folder that cannot be written", "E: ...", lambda h: checkpoints("plain.png/run")),
    (30, "the same, evaluate", "E: ivt_min: ...plain.png/run...",
     lambda h: command("evaluate", "tiny", rows(), "--out", "plain.png/run")),
    (30, "the same, refine", "E: ivt_min: ...plain.png/a.jpg: cannot be written...",
     lambda h: command("refine", "plain.png", "a", "--model", "tiny", "--out", "plain.png/a.jpg")),
    (30, "checkpoint of another run", "E: ...000002 is of another run",
     lambda h: goes_on(checkpoints("other"), "its")),
    (30, "adapter of another model", "E: ...a1: not as its ivt.json...",
     lambda h: answers(folder_of("a1", "adapters/sft", adapter_model__safetensors=tensors(shorter)))),
    (30, "adapter with a NaN", "E: ...adapter_model.safetensors: ...",
     lambda h: answers(folder_of("a2", "adapters/sft", adapter_model__safetensors=tensors(poisoned)))),
    (30, "adapter of other bits", "E: ...a3: not as its ivt.json...",
     lambda h: answers(folder_of("a3", "adapters/sft", adapter_model__safetensors=flip))),
    (30, "half an adapter", "E: ...",
     lambda h: answers(folder_of("a4", "adapters/sft", adapter_model__safetensors=half))),
    (30, "adapter of another alpha", "E: ...a5: not as its ivt.json...",
     lambda h: answers(folder_of("a5", "adapters/sft", adapter_config__json=says(lora_alpha=7)))),
    (30, "model with a weight missing", "E: ...m1: not as its ivt.json...",
     lambda h: answers(folder_of("m1", "tiny", model__safetensors=tensors(lambda w: w.pop(max(w)))))),
    (30, "model with a NaN", "E: ...m2/model.safetensors: not finite: ...",
     lambda h: answers(folder_of("m2", "tiny", model__safetensors=tensors(poisoned)))),
    (30, "model of another vocabulary", "E: ...m3: not as its ivt.json...",
     lambda h: answers(folder_of("m3", "tiny", config__json=says("text_config", vocab_size=99)))),
    (30, "model without a tokenizer", "E: ...m4: not as its ivt.json...",
     lambda h: answers(folder_of("m4", "tiny", tokenizer__json=None))),
    (30, "half a model", "E: ...",
     lambda h: answers(folder_of("m5", "tiny", model__safetensors=half))),
    (30, "model whose weights are pickled", "E: ...m6: no weights as safetensors",
     lambda h: pickled("m6", "tiny", "model.safetensors", "pytorch_model.bin")),
    (30, "adapter whose weights are pickled", "E: ...a6: no weights as safetensors",
     lambda h: pickled("a6", "adapters/sft", "adapter_model.safetensors", "adapter_model.bin"))]


def outcome(function, here):
    """What came of a case, in one line."""
    try: value = function(here)
    except (ValueError, TypeError, OSError) as e: value = f"E: {e}"
    except Exception as e: value = f"CRASH: {type(e).__name__}: {e}"
    text = value if str(value).startswith(("E: ", "S: ", "CRASH")) else f"F: {value}"
    return " / ".join(text.split("\n"))


def fits(expected, seen):
    """Whether what was seen is what was expected, `...` being anything."""
    return re.fullmatch(".*".join(map(re.escape, expected.split("..."))), seen) is not None


@pytest.mark.filterwarnings("ignore")
def test_thirty_bad_inputs(tmp_path, monkeypatch):
    def refuse(*args, **kw): raise AssertionError("network")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    make_all(Path())
    scene().save("../secret.png")
    Path("link.png").symlink_to("../secret.png")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    here = Here(monkeypatch)
    lines, wrong = [], []
    for number, given, expected, function in CASES:
        seen = outcome(function, here)
        held = fits(expected, seen)
        lines.append(f"{'' if held else '!':1} {number:2}  {given:38.38}  {expected:52.52}  {seen:.150}")
        if not held: wrong.append(lines[-1])
    table = "\n".join(["   #  input, expected, seen; ! where they differ", *lines])
    print(f"\n{table}\n{len(CASES)} cases of {len({n for n, *_ in CASES})} inputs, {len(wrong)} wrong")
    assert not wrong, "\n".join(["", *wrong])
    assert {n for n, *_ in CASES} == set(range(1, 31))
