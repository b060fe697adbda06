"""SFT: the loop's own ids, a gradient that knows no batches, a run that survives being killed."""
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from peft import PeftModel

from ivt_min import sft, train
from ivt_min.core import data_path, read_json, read_jsonl
from ivt_min.boxes import format_box
from ivt_min.scenes import split
from ivt_min.model import encode, load, question
from ivt_min.answer import Turn, score
from ivt_min.loop import Loop, go_on, model_policy, rollout, transcript
from ivt_min.verdict import refine
from ivt_min.lab import keep_answers
from ivt_min.train import add_lora, last_checkpoint, save_adapter
from ivt_min.sft import SFT, make_row, train_sft

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
TINY = SFT(rank=4, alpha=4, batch=3, micro=2, bf16=False, steps=4, warmup=1, every=2, lr=3e-3)


@pytest.fixture(scope="module")
def vlm():
    return load(device="cpu")


@pytest.fixture(scope="module")
def traced():
    """Pairs of a sample of the training split and its trace."""
    few = {x.id: x for x in split("train", 120)}
    rows = read_jsonl(data_path("runs/traces.jsonl.gz"))
    return [(few[r["id"]], r) for r in rows if r["id"] in few][:8]


def singles(n):
    return [(x, None) for x in split("train", n)]


def fresh(s, name="x"):
    vlm = load(device="cpu")
    return vlm, add_lora(vlm, name, s)


# ---- what is learned

@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("form", ["prefix", "turn"])
def test_a_rollout_of_the_same_ids_stands_in_the_same_context(vlm, traced, form, words):
    """Ids and pixels before each turn, though the targets of a trace are no whole permille."""
    s = replace(TINY, loop=Loop(form=form, max_tokens=96), reasoning=words)
    for sample, trace in traced[:3]:
        assert any(v % 1 for b in trace["targets"] for v in b)
        said = [("", format_box(trace["box"]))]
        for t, b in zip(trace["texts"], trace["targets"]):
            said.append((f"{t}\n" if words else "", format_box(b)))
        spelt, asked = [(*encode(vlm, t), *encode(vlm, b)) for t, b in said], []

        def policy(episodes, memory=None):
            [e], k = episodes, len(episodes[0].turns)
            asked.append(go_on(vlm, s.loop, asked[-1], e) if asked else question(vlm, sample))
            return [Turn(spelt[k], (), "".join(said[k]), end="box")], None

        row = make_row(vlm, s, sample, trace)
        rollout(policy, [sample], s.loop)
        assert len(row.dialogue.ids) == len(row.mask) == len(asked[-1].ids) + len(spelt[-1])
        for k, (d, ids) in enumerate(zip(asked, spelt)):
            at = slice(len(d.ids), len(d.ids) + len(ids))
            assert d.ids == row.dialogue.ids[:at.start] and row.dialogue.ids[at] == ids
            assert set(row.mask[at]) == {int(k > 0)}
        pairs = zip(asked[-1].pictures, row.dialogue.pictures, strict=True)
        assert all(torch.equal(a.patches, b.patches) for a, b in pairs)
        assert sum(row.mask) == sum(map(len, spelt[1:]))


def test_what_the_model_itself_said_becomes_the_row_of_its_transcript(vlm):
    loop, same = Loop(), 0
    for e in rollout(model_policy(vlm, loop), split("train", 8), loop):
        if any(b is None for b in e.boxes): continue
        texts = [format_box(b) for b in e.boxes]
        if [tuple(encode(vlm, t)) for t in texts] != [t.ids for t in e.turns]: continue
        trace = dict(box=e.boxes[0], targets=e.boxes[1:], texts=["", ""])
        row = make_row(vlm, replace(TINY, loop=loop, reasoning=False), e.sample, trace)
        whole = transcript(vlm, loop, e)
        assert row.dialogue.ids == whole.dialogue.ids
        assert sum(row.mask) == sum(whole.mask) - len(e.turns[0].ids)
        same += 1
    assert same >= 4


SPECIAL = st.sampled_from(["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "{expression}", "a "])
WORDS = [st.lists(SPECIAL, min_size=1), st.lists(SPECIAL | st.text(), max_size=4)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(*WORDS)
def test_special_tokens_in_words_are_characters(vlm, traced, expression, text):
    (sample, trace), s = traced[0], replace(TINY, loop=Loop(max_tokens=400))
    asked = replace(sample, expression="".join(expression))
    told = dict(trace, texts=["".join(text)] * 2)
    try: row = make_row(vlm, s, asked, told)
    except ValueError: return       # refused, because the loop would stop in the middle
    ids = vlm.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|im_end|>"])
    assert [row.dialogue.ids.count(i) for i in ids] == [48, 3, 1]
    said = [i for i, m in zip(row.dialogue.ids, row.mask) if m]
    assert not set(said) & {i for i, t in vlm.tokenizer.added_tokens_decoder.items() if t.special}


@pytest.mark.parametrize("texts", [["[1, 2, 3, 4]", ""], ["bbox: 1, 2, 3, 4.", ""], ["``` Up.", ""],
                                   ["{", ""], ["word " * 99, ""]])
def test_a_text_that_the_loop_would_not_read_so_is_refused(vlm, traced, texts):
    sample, trace = traced[0]
    with pytest.raises(ValueError, match=f"{sample.id}: the loop would cut or misread"):
        make_row(vlm, TINY, sample, dict(trace, texts=texts))


# ---- the adapter and the loss

@pytest.mark.parametrize("bf16", [False, True])
def test_only_what_was_asked_for_moves(tmp_path, monkeypatch, bf16):
    s, seen = replace(TINY, bf16=bf16, steps=3), []     # three epochs
    vlm, params = fresh(s)
    before = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    inner = vlm.model.model.get_image_features

    def spy(patches, grids):
        out = inner(patches, grids)
        seen.extend([out.pooler_output[0].requires_grad] * len(grids))
        return out

    monkeypatch.setattr(vlm.model.model, "get_image_features", spy)
    assert not any("visual" in n for n in params)
    assert all(p.dtype == torch.float32 for p in params.values())
    train_sft(vlm, params, singles(3), s, tmp_path)
    assert seen == [False] * 9          # a frozen tower leaves no graph
    moved = {n for n, p in vlm.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(params)
    save_adapter(vlm, "x", tmp_path / "x", s.loop)
    ours, base = load(tmp_path / "x", device="cpu"), load(device="cpu")
    peft = PeftModel.from_pretrained(base.model, tmp_path / "x").base_model.model
    row = make_row(vlm, s, *singles(1)[0])
    with torch.no_grad():
        a, b, mine, none = (score(v, [row.dialogue], [row.mask]) for v in (
            ours, replace(base, model=peft), vlm, load(device="cpu")))
    assert torch.equal(a, b) and not torch.equal(a, none)
    assert (a - mine).abs().max() < .1 * (mine - none).abs().max()      # rounded to bf16


def test_the_first_weights_are_seeded_and_nobody_else_notices():
    states = [torch.get_rng_state()]
    sets = [fresh(replace(TINY, seed=k))[1] for k in (0, 0, 1)]
    states.append(torch.get_rng_state())
    assert torch.equal(*states)
    same = [all(map(torch.equal, sets[0].values(), p.values())) for p in sets]
    assert same == [True, True, False]
    assert all((p == 0).all() == ("lora_B" in n) for n, p in sets[0].items())


def test_a_second_adapter_leaves_the_first_alone():
    vlm, first = fresh(TINY, "layers")      # a name that stands in every weight's name
    second = add_lora(vlm, "two", TINY)
    assert len(first) == len(second) == 42 and not set(first) & set(second)
    assert not any(p.requires_grad for p in first.values())


def test_micro_batches_do_not_change_what_is_learned(tmp_path):
    """Two updates in double precision; rows of several lengths, with and without a trace."""
    ends = []
    for micro in (1, 2, 4):
        vlm, params = fresh(TINY)
        vlm.model.double()
        s = replace(TINY, batch=4, micro=micro, steps=2)
        train_sft(vlm, params, singles(4), s, tmp_path / str(micro))
        ends.append(torch.cat([p.flatten() for p in params.values()]))
    assert ends[0].dtype == torch.float64
    assert max((e - ends[0]).abs().max() for e in ends) <= 1e-9    # Adam divides by small numbers


def test_the_adapter_of_a_loaded_adapter_goes_back_to_the_same_base(tmp_path):
    vlm, _ = fresh(TINY)
    save_adapter(vlm, "x", tmp_path / "x", Loop(form="turn", prompt="Again: {expression}", steps=1))
    again = load(tmp_path / "x", device="cpu")
    add_lora(again, "two", TINY)
    save_adapter(again, "two", tmp_path / "two", Loop())
    assert [read_json(tmp_path / n / "ivt.json")["base"] for n in ("x", "two")] == [None, None]
    config = read_json(tmp_path / "two" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "tiny" and config["inference_mode"]
    assert not again.model.peft_config["two"].inference_mode    # the one in memory is as it was
    found = refine(split("train", 1)[0].image, "the star", str(tmp_path / "x"), steps=1)
    assert len(found.steps) == 2


# ---- NF4, for real

def test_nf4_learns_on_the_cpu_and_a_rollout_takes_no_gradient_away(tmp_path):
    vlm, s = load(nf4=True, device="cpu"), replace(TINY, nf4=True)
    params = add_lora(vlm, "x", s)
    assert "Linear4bit" in {type(m).__name__ for m in vlm.model.modules()}
    assert not any("visual" in n for n in params)
    rows = [make_row(vlm, s, *x) for x in singles(2)]
    with torch.no_grad():
        for p in params.values(): p.add_(.01)

    def gradient():
        vlm.model.zero_grad()
        sft.sft_loss(vlm, rows, sum(sum(r.mask) for r in rows)).backward()
        return {n: p.grad.clone() for n, p in params.items()}

    before = gradient()
    rollout(model_policy(vlm, s.loop), split("train", 2), s.loop)
    after = gradient()
    assert all(g.abs().sum() > 0 for g in before.values())
    assert all(torch.equal(after[n], g) for n, g in before.items())
    log = train_sft(vlm, params, singles(3), s, tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(ValueError): train_sft(vlm, params, singles(3), TINY, tmp_path / "full")


# ---- the run

def poison(monkeypatch, steps, with_loss):
    """Makes the loss, or nothing but its gradient, NaN in these updates of one micro-batch each."""
    inner, count = sft.sft_loss, iter(range(99))

    def loss(*args):
        bad, out = next(count) in steps, inner(*args)
        if bad and with_loss: return out * math.nan
        if bad: out.register_hook(lambda g: g * math.nan)
        return out

    monkeypatch.setattr(sft, "sft_loss", loss)


@pytest.mark.parametrize("with_loss", [True, False])
def test_poisoned_updates_are_skipped_and_counted(tmp_path, monkeypatch, with_loss):
    s, (vlm, params) = replace(TINY, batch=1, steps=6, every=3), fresh(TINY)
    poison(monkeypatch, {1, 2, 4}, with_loss)
    log = train_sft(vlm, params, singles(2), s, tmp_path)
    assert [r["loss"] is None for r in log] == [False, True, True, False, True, False]
    assert all((r["norm"] is None) == (r["loss"] is None) for r in log)
    assert all(p.isfinite().all() for p in params.values())
    digest = read_json(tmp_path / "000006" / "manifest.json")["settings_hash"]
    step, tensors, _ = last_checkpoint(tmp_path, digest)
    assert step == 6 and all(v.isfinite().all() for v in tensors.values())
    assert {int(v) for n, v in tensors.items() if n.startswith("step|")} == {3}


@pytest.mark.parametrize("with_loss", [True, False])
def test_three_in_a_row_stop_the_run_also_across_a_checkpoint(tmp_path, monkeypatch, with_loss):
    s, (vlm, params) = replace(TINY, batch=1, steps=6, every=1), fresh(TINY)
    poison(monkeypatch, {0, 1, 2}, with_loss)
    with pytest.raises(ValueError, match="update 2: loss .*, 3 in a row"):
        train_sft(vlm, params, singles(2), s, tmp_path)
    poison(monkeypatch, {0}, with_loss)     # gone on: two of the three stand in the checkpoint
    with pytest.raises(ValueError, match="update 2"):
        train_sft(vlm, params, singles(2), s, tmp_path)


def test_the_log_on_disk_may_be_torn(tmp_path):
    vlm, params = fresh(TINY)
    log = train_sft(vlm, params, singles(3), replace(TINY, steps=2), tmp_path / "a")
    path = tmp_path / "a" / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert train_sft(vlm, params, singles(3), replace(TINY, steps=2), tmp_path / "a") == log
    assert read_jsonl(path) == log


def test_another_run_does_not_go_on_from_it(tmp_path):
    vlm, params = fresh(TINY)
    train_sft(vlm, params, singles(3), TINY, tmp_path)
    shifted = [(replace(x, truth=(0., 0., 9., 9.)), t) for x, t in singles(3)]
    for lessons, s in ((shifted, TINY), (singles(2), TINY), (singles(3), replace(TINY, lr=1.)),
                       (singles(3), replace(TINY, loop=Loop(prompt=" ")))):
        with pytest.raises(ValueError, match="another run"):
            train_sft(vlm, params, lessons, s, tmp_path)
    with torch.no_grad(): vlm.model.model.language_model.norm.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another run"):
        train_sft(vlm, params, singles(3), TINY, tmp_path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["gone", "cut", "flipped"])
def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path, name, harm):
    for k in (1, 2, 3):
        tensors = dict(x=torch.full((9,), float(k)))
        train.save_checkpoint(tmp_path, k, tensors, dict(settings_hash="s"))
    path = tmp_path / "000003" / name
    data = path.read_bytes()
    path.unlink()
    if harm == "cut": path.write_bytes(data[:len(data) // 2])
    if harm == "flipped": path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    step, tensors, _ = last_checkpoint(tmp_path, "s")
    assert step == 2 and tensors["x"].tolist() == [2] * 9


# ---- an adapter of any weights

@pytest.fixture(scope="module")
def noisy():
    """A base with an adapter of random weights, bf16 values."""
    vlm, g = load(device="cpu"), torch.Generator().manual_seed(0)
    for p in add_lora(vlm, "noisy", TINY).values():
        p.data = (p.data + torch.randn(p.shape, generator=g) * .2).bfloat16().float()
    return vlm


def ids(vlm, samples, batch=8):
    loop = Loop(max_tokens=20)
    keys = [(k,) for k in range(len(samples))]
    eps = rollout(model_policy(vlm, loop), samples, loop, keys=keys, batch=batch, progress=False)
    return [[t.ids for t in e.turns] for e in eps], eps, loop


def test_an_adapter_is_scored_as_it_was_sampled(noisy):
    together, eps, loop = ids(noisy, [x for x in split("train", 4) for _ in range(2)])
    assert together == [a for x in split("train", 4) for a in ids(noisy, [x], batch=1)[0] * 2]
    rows = [transcript(noisy, loop, e) for e in eps]
    with torch.no_grad(): new = score(noisy, [r.dialogue for r in rows], [r.mask for r in rows])
    old = torch.tensor([p for r in rows for p in r.logps])
    assert (new - old).abs().max() <= 1e-4


def test_an_adapter_is_handed_on(noisy, tmp_path):
    few, loop = split("train", 3), Loop(fill=(0, 255, 0))
    save_adapter(noisy, "noisy", tmp_path / "noisy", loop)
    told = load(tmp_path / "noisy", device="cpu")
    assert Loop(**told.loop) == loop
    assert ids(told, few)[0] == ids(noisy, few)[0]


# ---- stopped, and called again in the same process

def stopped_at(monkeypatch, name, count):
    """A KeyboardInterrupt at the n-th call of a function that the training calls."""
    modules = [module for module in (train, sft) if hasattr(module, name)]
    inner, calls = getattr(modules[0], name), iter(range(10**6))

    def once(*args, **kw):
        if next(calls) == count: raise KeyboardInterrupt
        return inner(*args, **kw)
    for module in modules: monkeypatch.setattr(module, name, once)


TEN = [("make_row", 1), ("fingerprint", 0), ("unpack", 0), ("save_checkpoint", 0), ("sft_loss", 1), ("sft_loss", 5),
       ("_add_up", 20), ("_add_up", 160), ("append_jsonl", 2), ("save_checkpoint", 2), ("write_json", 1), ("rate", 4)]


def test_ctrl_c_in_the_same_process_changes_not_a_bit(tmp_path, monkeypatch):
    """Whether before the first checkpoint or after one, with a gradient half added up, or in a write."""
    s = replace(TINY, steps=6, every=2, batch=2, micro=1)
    vlm, params = fresh(s)
    log = train_sft(vlm, params, singles(5), s, tmp_path / "whole")
    whole = {n: p.detach().clone() for n, p in params.items()}
    for k, (name, count) in enumerate(TEN):
        vlm, params = fresh(s)
        for stop in ((name, count), ("sft_loss", 1)):   # the second time with half a gradient
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                stopped_at(m, *stop)
                train_sft(vlm, params, singles(5), s, tmp_path / str(k))
        assert train_sft(vlm, params, singles(5), s, tmp_path / str(k)) == log, name
        assert all(torch.equal(p, whole[n]) for n, p in params.items()), name
        assert all(p.grad is None for p in params.values())


def test_a_run_goes_on_from_what_it_began_with(tmp_path, monkeypatch):
    """Other first weights, or weights that a stopped run has moved and whose checkpoints are gone: refused."""
    s = replace(TINY, steps=4, every=2)
    vlm, params = fresh(s)
    first = {n: p.detach().clone() for n, p in params.items()}
    train_sft(vlm, params, singles(3), s, tmp_path / "a")
    train_sft(vlm, params, singles(3), s, tmp_path / "a")       # a finished run, again
    train_sft(vlm, params, singles(3), s, tmp_path / "b")       # a run that begins where that one ended
    other, params = fresh(s)
    with torch.no_grad(): next(iter(params.values())).add_(1e-3)
    with pytest.raises(ValueError, match="other weights"):
        train_sft(other, params, singles(3), s, tmp_path / "a")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stopped_at(m, "sft_loss", 3)
        train_sft(other, params, singles(3), s, tmp_path / "c")
    for again, folder in ((s, "d"), (replace(s, lr=1e-4), "c2")):     # the stopped run has moved them
        with pytest.raises(ValueError, match="other weights"):
            train_sft(other, params, singles(3), again, tmp_path / folder)
    again, params = fresh(s)
    assert all(torch.equal(p, first[n]) for n, p in params.items())
    assert len(train_sft(again, params, singles(3), s, tmp_path / "a")) == 4


def changes(vlm):
    """What a run depends on, changed one at a time: name -> a function that changes it and gives the lessons."""
    few = singles(3)
    dark = [(replace(x, image=x.image.point(lambda v: v // 2)), t) for x, t in few]
    def weight():
        with torch.no_grad(): vlm.model.model.visual.blocks[0].mlp.linear_fc1.weight[3, 39] += 1e-3
        return vlm, few
    def prompt(): return replace(vlm, prompt="Find: {expression}"), few
    def pixels():
        vlm.processor.size = dict(vlm.processor.size, longest_edge=9216)
        return vlm, few
    def mean():
        vlm.processor.image_mean = [.4, .5, .5]
        return vlm, few
    def template():
        vlm.tokenizer.chat_template += " "
        return vlm, few
    return dict(weight=weight, prompt=prompt, pixels=pixels, mean=mean, template=template,
                picture=lambda: (vlm, dark), words=lambda: (vlm, [(replace(x, expression="it"), t) for x, t in few]),
                order=lambda: (vlm, few[::-1]), id=lambda: (vlm, [(replace(x, id=x.id + "a"), t) for x, t in few]))


@pytest.mark.parametrize("what", changes(None))
def test_a_run_of_something_else_does_not_go_on(tmp_path, what):
    vlm, params = fresh(TINY)
    train_sft(vlm, params, singles(3), replace(TINY, steps=1), tmp_path)
    vlm, params = fresh(TINY)
    other, lessons = changes(vlm)[what]()
    with pytest.raises(ValueError, match="another run"):
        train_sft(other, params, lessons, replace(TINY, steps=1), tmp_path)


def test_what_is_not_its_own_stays(tmp_path):
    """Folders and files of the user in a run's folder, also inside an old checkpoint; seven digits count as a number."""
    for name in ("0-my-notes", "2024", "12 old", "000000", "20261126", "20261127"): (tmp_path / name).mkdir()
    for name in ("0-my-notes/a.txt", "notes.txt", "000000/mine.txt", ".hidden.tmp", ".draft.2024.tmp"): (tmp_path / name).write_text("mine")
    vlm, params = fresh(TINY)
    train_sft(vlm, params, singles(3), replace(TINY, steps=4, every=1), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"0-my-notes", "2024", "12 old", "notes.txt", ".hidden.tmp", ".draft.2024.tmp", "20261126", "000003", "000004"}
    assert (tmp_path / "000000" / "mine.txt").read_text() == "mine"
    for k in (999_998, 999_999, 1_000_000): train.save_checkpoint(tmp_path, k, {}, dict(settings_hash="s"))
    assert last_checkpoint(tmp_path, "s")[0] == 1_000_000


@pytest.mark.parametrize("change", [
    lambda m: m | dict(step=400), lambda m: {k: v for k, v in m.items() if k != "sha256"}, lambda m: m | dict(more=1),
    lambda m: {k: v for k, v in m.items() if k != "settings_hash"}, lambda m: m | dict(log=[]), lambda m: [m],
    lambda m: m | dict(sha256=5), lambda m: m | dict(whole=None), lambda m: {}, lambda m: None,
    lambda m: m | dict(given="0"), lambda m: m | dict(settings_hash=None)])
def test_a_manifest_that_was_changed_does_not_count(tmp_path, change):
    for k in (2, 4): train.save_checkpoint(tmp_path, k, dict(x=torch.ones(2)), dict(settings_hash="s", log=[k], given="g"))
    path = tmp_path / "000004" / "manifest.json"
    path.write_text(json.dumps(change(read_json(path))))
    assert last_checkpoint(tmp_path, "s")[0] == 2


def test_an_evaluation_leaves_the_training_as_it_was(tmp_path):
    """The same model asked between two calls: gradients go on, and the run is the same."""
    s = replace(TINY, steps=2, every=1)
    vlm, params = fresh(s)
    keep_answers(tmp_path / "asked", vlm, Loop(steps=0), dict(test=split("test", 2)))
    log = train_sft(vlm, params, singles(3), s, tmp_path / "run")
    keep_answers(tmp_path / "again", vlm, Loop(steps=0), dict(test=split("test", 2)))
    assert train_sft(vlm, params, singles(3), s, tmp_path / "run") == log


def test_another_scale_is_another_run(tmp_path):
    vlm, params = fresh(TINY)
    train_sft(vlm, params, singles(3), replace(TINY, steps=1), tmp_path)
    vlm, params = fresh(replace(TINY, alpha=32))
    with pytest.raises(ValueError, match="another run"):
        train_sft(vlm, params, singles(3), replace(TINY, steps=1), tmp_path)


# ---- two at once

TWICE = """
import sys, time
from pathlib import Path
from ivt_min.train import alone
with alone(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_two_programs_do_not_share_a_folder(tmp_path):
    """The second is told who has it; the lock of one that was killed is free, its torn files are gone."""
    first = subprocess.Popen([sys.executable, "-c", TWICE, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    torn = tmp_path / f".log.jsonl.{first.pid}.ivt.tmp"
    torn.write_text("half of a ro")
    vlm, params = fresh(TINY)
    with pytest.raises(ValueError, match=f"in use by process {first.pid} on "):
        train_sft(vlm, params, singles(3), TINY, tmp_path)
    assert torn.exists()
    first.kill()
    first.wait()
    train_sft(vlm, params, singles(3), replace(TINY, steps=1), tmp_path)
    assert not torn.exists()


# ---- killed

RUN = r"""
import os, random, select, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ivt_min import sft
from ivt_min.model import load
from ivt_min.scenes import split
from ivt_min.train import add_lora, save_adapter

home, vlm = Path(sys.argv[1]), load(device="cpu")
s = sft.SFT(rank=4, alpha=4, batch=3, micro=2, steps=10, warmup=2, every=2, lr=3e-3)
params, lessons = add_lora(vlm, "x", s), [(x, None) for x in split("train", 7)]
dice = random.Random(0)

def slow(pipe):
    "A checkpoint's writes stop before and after each renaming, say so, and may be killed there."
    def stop(stage): os.write(pipe, stage), time.sleep(.02)
    replace, remove = os.replace, os.unlink
    def rename(a, b):
        if Path(b).parent.parent == home: return replace(a, b)     # the log
        kind = b"t" if Path(b).name == "tensors.safetensors" else b"m"
        stop(kind); replace(a, b); stop(kind.upper())
    def unlink(path, **kw):
        if Path(path).parent.name.isdigit() and Path(path).name[0] != ".": stop(b"o")
        remove(path, **kw)
    os.replace, os.unlink = rename, unlink

def start(folder):
    "Train in a child; its id, and a pipe that tells the stages of its writes."
    out, pipe = os.pipe()
    child = os.fork()
    if child: os.close(pipe); return child, out
    status = 1
    try:
        os.close(out)
        if folder.name != "whole": slow(pipe)
        sft.train_sft(vlm, params, lessons, s, folder)
        save_adapter(vlm, "x", folder/"x", s.loop)
        status = 0
    except BaseException as e: print(repr(e), flush=True)
    finally: os._exit(status)

def end(child, out, after=None, stage=None):
    "Kill it after a time or a number of stages, or let it end; the stages told, and if it ended."
    told, until = "", time.time() + (after or 60)
    while (left := until - time.time()) > 0:
        new = os.read(out, 1) if select.select([out], [], [], left)[0] else b""
        told += new.decode()
        if not new: break
        if len(told) == stage: until = time.time() + dice.uniform(0, .02)
    if after or stage: os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(out)
    assert status in (0, signal.SIGKILL), status
    return told, status == 0

def files(folder):
    "What a run leaves."
    names = ["log.jsonl", "000010/tensors.safetensors", "000010/manifest.json"]
    names += ["x/" + p.name for p in sorted((home/"whole"/"x").iterdir())]
    return {n: (folder/n).read_bytes() for n in names}

t = time.time()
assert end(*start(home/"whole"))[1]
whole, took, kills, runs, stages = files(home/"whole"), time.time() - t, 0, 0, ""
assert len(whole) == 6
while True:
    how = dict(stage=dice.randint(1, 12)) if kills % 3 else dict(after=dice.uniform(.05, took))
    told, ended = end(*start(home/str(runs)), **(how if kills < 20 else {}))
    if ended:
        assert files(home/str(runs)) == whole, runs
        runs += 1
        if kills == 20: break
    else:
        kills += 1
        stages += told[-1] if "stage" in how else ""
print("done", runs, stages, f"{took:.1f}")
"""


def test_twenty_kills_and_not_a_bit_is_different(tmp_path):
    """Some at any moment, most inside the write of a checkpoint: before and after its tensors have
    their name (t, T), and its manifest (m, M), and while an old one is removed (o)."""
    done = subprocess.run([sys.executable, "-c", RUN, tmp_path], cwd=ROOT, text=True,
                          capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    word, runs, stages, _ = done.stdout.split()
    assert word == "done" and len(stages) >= 12 and len(set(stages)) >= 3
