"""A soak: kills, fuzz and memory, each try with a seed and a time limit; a table of counts at the end.

    python tests/soak.py --minutes 30 --seed 0
    python tests/soak.py --only folders --seed 17 --minutes 0     # the try with seed 17 once more

kill     SFT, GRPO, traces and an evaluation, killed at random times and gone on with until they are
         done: the end must be that of a run that nobody disturbed, bit for bit
parser   mutated and random answers: no crash, no box where a plain reader sees none, linear time
readers  mutated row files and pictures: samples, a picture, a ValueError or an OSError
folders  mutated adapters and models: one line of a ValueError or an OSError, or the same answers
memory   1,000 samples through the loop, and the memory after every hundred

Every try runs in a process of its own, which is killed when its time is up. Ctrl-C prints the table.
"""
import argparse
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import torch as safe
from transformers.utils import logging

from bad_pictures import make_all
from ivt_min import cli
from ivt_min.boxes import parse_box
from ivt_min.core import data_path, read_json, read_jsonl, write_json, write_jsonl
from ivt_min.datasets import read_rows, scan
from ivt_min.evaluate import read_run
from ivt_min.grpo import train_grpo
from ivt_min.loop import Loop, model_policy, rollout
from ivt_min.model import load
from ivt_min.render import open_image
from ivt_min.scenes import split
from ivt_min.sft import train_sft
from ivt_min.traces import errors_of, scripted_teacher, write_traces
from ivt_min.train import save_adapter
from ivt_min.verdict import go_round, loop_of
from test_parser import CASES, PIECES
import test_grpo
import test_sft

torch.set_num_threads(1)
HOME = Path(tempfile.mkdtemp(prefix="ivt_min_soak."))
MOST = 16 * 2**30   # memory of a try, bytes
KNOWN = {}      # what is made once: ends of undisturbed runs, answers of whole folders


def row(what, tries=1, failed=(), **counts):
    """What a try has to say: how many tries it was, why some failed, and what else it counted."""
    return dict(what=what, tries=tries, failed=list(failed), counts={k: int(v) for k, v in counts.items()})


def start(function, *args):
    """A child that does something and ends: its id. What goes wrong stands in HOME/errors."""
    child = os.fork()
    if child: return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2): os.dup2(null, stream)
        function(*args)
        code = 0
    except BaseException:
        with open(HOME / "errors", "a") as f: f.write(f"{traceback.format_exc()}\n")
    finally: os._exit(code)


def in_child(function, seed, limit):
    """The rows of a try, which has a process group of its own and so much time, seconds."""
    out, into = os.pipe()
    def told():
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))    # a flipped digit asks for terabytes
        data = json.dumps(function(seed)).encode()
        with open(into, "wb") as f: f.write(data)
    child, end, data = start(told), time.time() + limit, b""
    os.close(into)
    try:
        while select.select([out], [], [], max(0, end - time.time()))[0]:
            new = os.read(out, 10**6)
            if not new: break
            data += new
        late = time.time() >= end
    finally:
        for kill, whom in ((os.killpg, child), (os.kill, child)):
            try: kill(whom, signal.SIGKILL)
            except ProcessLookupError: pass
        os.waitpid(child, 0)
        os.close(out)
    if data: return json.loads(data)
    why = f"no end within {limit} s" if late else "died"
    said = (HOME / "errors").read_text().strip().splitlines() if (HOME / "errors").exists() else [""]
    return [row(function.__name__, 1, [f"the try: {why}, {said[-1]}"])]


def mutated(data, dice, more):
    """Text or bytes with a few pieces gone, doubled or replaced by others."""
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(data))
        end = at + dice.choice((0, 1, 1, 2, 8, 64))
        new = dice.choice((data[:0], data[at:end] * 2, dice.choice(more), dice.choice(more)))
        data = data[:at] + new + data[end:] if dice.random() < .95 else data[:at]
    return data


# ---- 1: kill

def job_sft(folder):
    vlm, params = test_sft.fresh(test_sft.TINY)
    train_sft(vlm, params, test_sft.singles(4), test_sft.TINY, folder)
    save_adapter(vlm, "x", folder / "x", test_sft.TINY.loop)


def job_grpo(folder):
    vlm, params = test_grpo.lesson()
    s = replace(test_grpo.TINY, steps=3, format_weight=.5)
    train_grpo(vlm, params, split("train", 4), s, folder)


def job_traces(folder):
    samples = split("val")
    errors = errors_of(read_run(data_path("runs/base"), "val", samples))
    for k in range(4):
        rows = write_traces(errors, samples, scripted_teacher(k), "scripted")
        write_jsonl(folder / f"traces-{k}.jsonl", rows)


def job_evaluate(folder):
    rows = read_jsonl(data_path("examples/rows.jsonl"))
    many = [dict(r, id=f"{r['id']}-{k}") for k in range(4) for r in rows]
    if not (HOME / "many.jsonl").exists(): write_jsonl(HOME / "many.jsonl", many)
    code = cli.main(["evaluate", "tiny", str(HOME / "many.jsonl"), "--out", str(folder), "--batch", "2",
                     "--images", str(data_path("examples")), "--steps", "1"])
    if code: raise ValueError(f"exit code {code}")


JOBS = [job_sft, job_grpo, job_traces, job_evaluate]


def end_of(folder):
    """What a run leaves: bytes by the name of the file; a log without its times."""
    found = {}
    for path in sorted(p for p in folder.rglob("[!.]*") if p.is_file()):     # not the lock
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            data = re.sub(rb'("(?:seconds|sha256|whole)": )[^,}]*', rb"\1", data)
        found[str(path.relative_to(folder))] = data
    return found


def undisturbed(job):
    """The end of a run that nobody disturbs, and how long it takes."""
    if job.__name__ not in KNOWN:
        folder, began = HOME / job.__name__, time.time()
        if os.waitpid(start(job, folder), 0)[1]: raise ValueError(f"{job.__name__}: see {HOME}/errors")
        KNOWN[job.__name__] = end_of(folder), time.time() - began
    return KNOWN[job.__name__]


def kill(seed):
    job, dice = JOBS[seed % len(JOBS)], random.Random(seed)
    whole, took = undisturbed(job)
    folder, kills, status = HOME / f"{job.__name__}-{seed}", 0, signal.SIGKILL
    while status == signal.SIGKILL:
        child = start(job, folder)
        if kills < 6:
            time.sleep(dice.uniform(.05, .7 * took))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        kills += status == signal.SIGKILL
        errors = (HOME / "errors").read_text() if (HOME / "errors").exists() else ""
        if status and errors.strip().endswith("Invalid thread pool!"):     # torch's own, now and then after a fork
            (HOME / "errors").unlink()
            status = signal.SIGKILL
    found = end_of(folder) if status == 0 else {}
    other = [n for n in whole.keys() | found.keys() if whole.get(n) != found.get(n)]
    torn = [p.name for p in folder.rglob("*.tmp")]
    shutil.rmtree(folder, ignore_errors=True)
    failed = [f"not resumed: status {status}, {errors.strip()[-200:]}"] if status else [f"different: {sorted(other)}"] if other else []
    return [row(f"kill {job.__name__[4:]}", 1, failed, kills=kills, different=bool(other and not status),
                not_resumed=bool(status), left_over=len(torn))]


# ---- 2: the parser

NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def stands_there(text, numbers):
    """Whether a plain reader sees these four numbers in a row, with nothing but commas, spaces,
    quotes, parentheses, special tokens and thoughts between them."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    text = re.sub(r'(?is)\\[nrt"]|<\|\w+\|>|<(?:re)?think>.*?</(?:re)?think>', " ", text)
    found = [(m.start(), m.end(), abs(float(m[0]))) for m in NUMBER.finditer(text) if len(m[0]) < 400]
    for four in zip(found, found[1:], found[2:], found[3:]):
        between = "".join(text[a[1]:b[0]] for a, b in zip(four, four[1:]))
        if [v for *_, v in four] == [abs(v) for v in numbers] and not re.search(r"[^\s,()\"'+-]", between):
            return True
    return False


def misread(text):
    """What is wrong with what the parser makes of a text, or None."""
    start_ = time.process_time()
    try: p = parse_box(text)
    except Exception as e: return f"crash: {e!r}: {text[:200]!r}"
    if time.process_time() - start_ > 1 + len(text) / 10**5: return f"slow: {text[:200]!r}"
    if (p.box is None) == (p.error is None): return f"wrong: box and error: {text[:200]!r}"
    if p.box is None: return None
    x0, y0, x1, y1 = p.box
    if not (0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000): return f"wrong: {p.box}: {text[:200]!r}"
    if not stands_there(text, p.raw): return f"wrong: {p.raw} is not there: {text[:200]!r}"


def parser(seed):
    dice, failed = random.Random(seed), []
    known = [case["text"] for case in CASES]
    for k in range(2000):
        text = mutated(dice.choice(known), dice, PIECES) if k % 3 else "".join(
            dice.choices(PIECES, k=dice.randint(1, 30)))
        if k % 500 == 0: text = text * (10**5 // max(1, len(text)))
        failed.append(misread(text))
    failed = [why for why in failed if why]
    kinds = Counter(why.split(":")[0] for why in failed)
    return [row("parser", 2000, failed, crash=kinds["crash"], wrong=kinds["wrong"], slow=kinds["slow"])]


# ---- 3: readers

BYTES = [bytes([k]) for k in range(0, 256, 5)] + [
    b"null", b"-1", b"1e999", b'"', b"{", b"]", b"\n", b"\xff" * 4, b"../", b"99999999", b"NaN", b"[" * 9999]


def read_mutated(path, data):
    """What is wrong with what a reader makes of a file, or None."""
    path.write_bytes(data)
    try:
        if path.suffix not in (".json", ".jsonl"): fine = open_image(path).mode == "RGB"
        else:
            if path.suffix == ".jsonl": read_jsonl(path)
            samples = read_rows(path, images=data_path("examples"))
            usable, reasons = scan(samples, skip=True)
            inside = all(0 <= v <= 1000 for x in samples for v in x.truth)
            fine = inside and len(usable) + len(reasons) == len({x.id for x in samples})
    except (ValueError, OSError): return None
    except BaseException as e: return f"crash: {path.suffix} {e!r}"
    return None if fine else f"wrong: {path.suffix}"


def readers(seed):
    dice, folder = random.Random(seed), HOME / f"readers-{seed}"
    folder.mkdir()
    make_all(folder)
    whole = [p for p in [*folder.iterdir(), *data_path("samples").glob("*.[jp][pn]g")]
             if p.stem not in ("bomb", "zero")]
    rows = [dict(r, width=128, height=128) for r in read_jsonl(data_path("examples/rows.jsonl"))]
    write_jsonl(folder / "rows.jsonl", rows)
    write_json(folder / "rows.json", rows)
    failed = []
    for k in range(200):
        path = dice.choice(whole) if k % 2 else folder / dice.choice(("rows.jsonl", "rows.json"))
        failed.append(read_mutated(folder / f"x{path.suffix}", mutated(path.read_bytes(), dice, BYTES)))
    shutil.rmtree(folder)
    return [row("readers", 200, [f for f in failed if f], crash=sum("crash" in (f or "") for f in failed))]


# ---- 4: folders of adapters and models

def with_tensors(change):
    def harm(folder, dice):
        path = next(folder.glob("*.safetensors"))
        weights = safe.load_file(path)
        change(weights, dice.choice(sorted(weights)), dice)
        safe.save_file(weights, path, metadata=dict(format="pt"))
    return harm


def with_file(change):
    def harm(folder, dice):
        path = dice.choice(sorted(folder.iterdir()))
        path.write_bytes(change(path.read_bytes(), dice))
    return harm


def _drop(weights, name, dice): del weights[name]
def _rename(weights, name, dice): weights[name.replace(".0.", ".7.") + "_"] = weights.pop(name)
def _swap(weights, name, dice):
    other = dice.choice(sorted(weights))
    weights[name], weights[other] = weights[other].clone(), weights[name].clone()
def _nan(weights, name, dice):
    weights[name].view(-1)[dice.randrange(weights[name].numel())] = dice.choice((math.nan, math.inf))
def _flip(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1:]
def _cut(data, dice): return data[:dice.randrange(len(data))]
def _remove(folder, dice): dice.choice(sorted(folder.iterdir())).unlink()


def _alpha(folder, dice):
    about = read_json(folder / "adapter_config.json")
    name = dice.choice(("lora_alpha", "r", "use_rslora", "target_modules", "peft_type"))
    about[name] = dice.choice((None, 7, "x", True, dice.choice((8, 128))))
    write_json(folder / "adapter_config.json", about)


def _field(folder, dice):
    about = read_json(folder / "ivt.json")
    inner = dice.choice([about] + [v for v in about.values() if type(v) is dict])
    if dice.random() < .2: inner["nonsense"] = 1
    else: inner[dice.choice(sorted(inner))] = dice.choice((None, [], {}, 3, -1, "x", True, 1.5))
    write_json(folder / "ivt.json", about)


HARMS = {"drop": with_tensors(_drop), "rename": with_tensors(_rename), "swap": with_tensors(_swap),
         "nan": with_tensors(_nan), "flip": with_file(_flip), "truncate": with_file(_cut),
         "missing": _remove, "field": _field, "alpha": _alpha}


SOURCES = dict(adapter="adapters/sft", model="tiny")


def answers(folder):
    """What a model says, and how sure it is of it."""
    vlm = load(str(folder), "cpu")
    done = go_round(vlm, split("val", 3), loop_of(vlm))
    return [[(turn.text, turn.confidence) for turn in e.turns] for e in done]


def tried(folder):
    """What came of loading a folder and asking it: 'one line', 'equal', or what is wrong."""
    try: said = answers(folder)
    except (ValueError, OSError) as e:
        return "one line" if "\n" not in str(e).strip() else f"many lines: {e!s:.90}".replace("\n", " / ")
    except BaseException as e: return f"crash: {type(e).__name__}: {e!s:.90}".replace("\n", " / ")
    whole = KNOWN["adapter" if (folder / "adapter_config.json").exists() else "model"]
    return "equal" if json.dumps(said) == whole else "silent"


def folders(seed):
    dice, folder, kind = random.Random(seed), HOME / f"folder-{seed}", "adapter" if seed % 3 else "model"
    source = data_path(SOURCES[kind])
    shutil.copytree(source, folder)
    names = sorted(HARMS.keys() - ({"alpha"} if kind == "model" else set()))
    name = names[seed // 3 % len(names)]
    HARMS[name](folder, dice)
    left = end_of(folder)
    where = [name for name, data in end_of(source).items() if left.get(name) != data]
    found = tried(folder)
    shutil.rmtree(folder)
    bad = found not in ("one line", "equal")
    return [row(f"{kind}: {name}", 1, [f"{found} ({', '.join(where)})"] if bad else [],
                refused=found == "one line", equal=found == "equal", silent=found == "silent")]


# ---- 5: memory

def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(seed):
    vlm, samples, sizes = load("tiny", "cpu"), split("train", 1000), []
    for k in range(0, 1000, 100):
        rollout(model_policy(vlm, Loop()), samples[k:k + 100], Loop(), progress=False)
        sizes.append(round(resident()))
    failed = [f"{sizes} MB"] if sizes[-1] > 1.1 * sizes[0] + 20 else []
    return [row(f"memory, MB after each 100: {sizes}", 1, failed)]


# ---- all of it

# a part, the seconds of a try, and how much of the time is for it
PARTS = {part.__name__: (part, limit, share) for part, limit, share in (
    (kill, 300, 4), (parser, 60, 1), (readers, 120, 1), (folders, 90, 4), (memory, 900, 1))}


def prepare(names):
    """What tries are compared with is made once, before they fork."""
    if "kill" in names:
        for job in JOBS: undisturbed(job)
    if "folders" in names:      # in a child: torch cannot be forked once it has worked
        KNOWN.update(in_child(lambda seed: {kind: json.dumps(answers(data_path(name)))
                                            for kind, name in SOURCES.items()}, 0, 300))


def show(rows):
    """The table: a line for what was tried, then the failures with their seeds."""
    lines = {}
    for _, r in rows:
        line = lines.setdefault(r["what"], Counter())
        line.update(tries=r["tries"], failed=len(r["failed"]), **r["counts"])
    print("\n| what | tries | held | failed | counted |\n| --- | --- | --- | --- | --- |")
    for what, c in sorted(lines.items()):
        more = ", ".join(f"{v} {k}" for k, v in c.items() if k not in ("tries", "failed"))
        print(f"| {what} | {c['tries']} | {c['tries'] - c['failed']} | {c['failed']} | {more} |")
    shown = Counter()
    for seed, r in rows:
        for why in r["failed"]:
            shown[r["what"]] += 1
            if shown[r["what"]] <= 4: print(f"seed {seed}, {r['what']}: {why}")
    return sum(c["failed"] for c in lines.values())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=5, help="all in all; at least one try a part")
    p.add_argument("--seed", type=int, default=0, help="of the first try of each part; the next has one more")
    p.add_argument("--only", choices=PARTS, help="one part alone")
    args = p.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = [args.only] if args.only else list(PARTS)
    end, spent, tries, rows = time.time() + 60 * args.minutes, Counter(), Counter(), []
    try:
        prepare(names)
        while any(not tries[n] for n in names) or time.time() < end:
            open_ = [n for n in names if not tries[n] or n != "memory"] or names
            name = min(open_, key=lambda n: (tries[n] > 0, spent[n] / PARTS[n][2]))
            part, limit, _ = PARTS[name]
            seed, began = args.seed + tries[name], time.time()
            rows += [(seed, r) for r in in_child(part, seed, limit)]
            spent[name] += time.time() - began
            tries[name] += 1
    except KeyboardInterrupt: print("stopped", file=sys.stderr)
    finally:
        failed = show(rows)
        shutil.rmtree(HOME, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__": sys.exit(main())
