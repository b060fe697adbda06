"""GRPO: TRL's loss, a rollout that shares what it can and is exact, a run that survives kills."""
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Stub

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st

from ivt_min import grpo
from ivt_min.core import rng
from ivt_min.scenes import split
from ivt_min.model import Dialogue, load, use_adapter
from ivt_min.answer import log_probs, score
from ivt_min.loop import Loop, model_policy, rollout, transcript
from ivt_min.train import add_lora, copy_adapter
from ivt_min.sft import SFT
from ivt_min.grpo import GRPO, advantage, reference_logps, collect_rollouts, grpo_loss, logps, normaliser, train_grpo

torch.set_num_threads(1)
TINY = GRPO(Loop(steps=1, max_tokens=8, temperature=1.2), prompts=2, group=3, steps=1, every=1,
            warmup=1, micro=2, bf16=False, lr=1e-2)


@pytest.fixture(scope="module")
def vlm():
    return load(device="cpu")


def lesson(nudge=0.):
    """A model with an adapter that was taught (not really) and its twin, which may have moved."""
    vlm, g = load(device="cpu"), torch.Generator().manual_seed(0)
    noise = lambda p, size: torch.randn(p.shape, generator=g) * size
    for p in add_lora(vlm, "sft", SFT(rank=4, alpha=4)).values(): p.data = noise(p, .02)
    for p in (params := copy_adapter(vlm)).values(): p.data += noise(p, nudge)
    return vlm, params


def by_ids(episode, *how):
    """Stands in for `reward`: short answers without a box differ, too."""
    return sum(sum(t.ids) for t in episode.turns) % 7 / 7


def ids(episodes):
    return {e.key: [t.ids for t in e.turns] for e in episodes}


# ---- the loss

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per, loss_type", [
    ("sample", "grpo"), ("token", "bnpo"), ("token", "dapo"), ("constant", "dr_grpo")])
def test_value_and_gradient_are_those_of_trl(per, loss_type, seed):
    """Checked against TRL 1.16.0; ours is summed over two micro-batches."""
    trl = pytest.importorskip("trl")
    s, g = replace(TINY, loss_mean=per, low=.15, high=.3), torch.Generator().manual_seed(seed)
    noise = lambda size, *n: torch.randn(n, generator=g, dtype=torch.float64) * size
    logp = (noise(1., 7, 16) - 3).requires_grad_()
    old, ref, a = logp.detach() + noise(.4, 7, 16), logp.detach() + noise(.5, 7, 16), noise(1., 7)
    lengths = torch.randint(1, 17, (7,), generator=g)
    mask = (torch.arange(16) < lengths[:, None]).double()
    stub = Stub(
        _get_per_token_logps_and_entropies=lambda *args, **kw: (logp, torch.zeros(7, 16), None),
        loss_type=loss_type, beta=s.beta, epsilon_low=s.low, epsilon_high=s.high,
        importance_sampling_level="token", max_completion_length=16, top_entropy_quantile=1.,
        off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        args=Stub(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=Stub(training=True), _metrics=dict(train=defaultdict(list)),
        accelerator=Stub(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x))
    theirs = trl.GRPOTrainer._compute_loss(stub, None, dict(
        prompt_ids=mask, prompt_mask=mask, completion_ids=mask, completion_mask=mask, advantages=a,
        old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum()))
    [want] = torch.autograd.grad(theirs, logp)
    n = normaliser(s, lengths.tolist())
    both = [grpo_loss(logp[k], old[k], ref[k], a[k], mask[k], s, n)
            for k in (slice(0, 3), slice(3, 7))]
    ours = sum(loss for loss, _ in both)
    [got] = torch.autograd.grad(ours, logp)
    assert abs(ours.item() - theirs.item()) < 1e-12 and (got - want).abs().max() < 1e-12
    k3, clipped = (sum(x[k] for _, x in both) / mask.sum().item() for k in ("k3", "clipped"))
    told = {k: v[0] for k, v in stub._metrics["train"].items()}
    assert k3 == pytest.approx(told["kl"]) and clipped > 0
    assert loss_type == "dapo" or clipped == pytest.approx(told["clip_ratio/region_mean"])


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.floats(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
       st.floats(-100, 100), st.floats(1, 50), st.booleans())
@example([[.1] * 6, [1 / 3] * 6, [0, 0, 0, 0, 0, 1]], .7, 3., True)
def test_an_advantage_is_of_its_group_alone(rows, more, times, std):
    r = np.array(rows)
    a, mine, narrow = advantage(r, std), r - r.mean(1, keepdims=True), r.std(1) < .05
    assert np.abs(a.mean(1)).max() < 1e-9
    assert all((x == 0).all() for x, y in zip(a, r) if np.ptp(y) == 0)
    assert np.allclose(advantage(r + more, std), a, atol=1e-9)
    assert np.array_equal(np.concatenate([advantage([y], std) for y in r]), a)
    assert np.allclose(a[narrow] * (.05 if std else 1), mine[narrow], atol=1e-9)
    assume(not narrow.all())
    assert not std or np.allclose(a[~narrow].std(1), 1)
    assert np.allclose(advantage(r * times, std)[~narrow], a[~narrow] * (1 if std else times))


# ---- the rollout

@pytest.mark.parametrize("temperature", [0., 2.])
@pytest.mark.parametrize("form", ["prefix", "turn"])
def test_log_probs_of_a_group_are_those_of_a_plain_forward(vlm, form, temperature):
    """Transformers' own forward, of one whole dialogue with its pixels, and its own `generate`."""
    loop = Loop(form=form, max_tokens=40, temperature=temperature)
    episodes, rows = collect_rollouts(vlm, split("train", 3), GRPO(loop, group=3), 0)
    assert len({r.mask.index(1) for r in rows}) == 3
    assert not temperature or len({len(e.turns[0].ids) for e in episodes}) > 1

    def pixels(said, pictures):
        x, pics = torch.tensor([said]), [(p.patches, torch.tensor([p.grid])) for p in pictures]
        patches, grids = map(torch.cat, zip(*pics))
        return dict(input_ids=x, pixel_values=patches, image_grid_thw=grids,
                    mm_token_type_ids=(x == vlm.model.config.image_token_id).int())

    for m, (e, r) in enumerate(zip(episodes, rows)):
        new = transcript(vlm, loop, e)
        d, at = new.dialogue, torch.tensor(new.mask[1:]) > 0
        assert (d.ids, new.mask, new.logps) == (r.dialogue.ids, r.mask, r.logps)
        with torch.no_grad(): logits = vlm.model(**pixels(d.ids, d.pictures)).logits[0, :-1][at]
        logp, kept = log_probs(vlm, logits, temperature), torch.tensor(r.logps)
        mine = logp.gather(1, torch.tensor(d.ids)[1:][at][:, None])[:, 0]
        cut = sum(t.end == "stop" for t in e.turns[:-1])
        assert len(kept) == len(mine) == sum(len(t.ids) for t in e.turns) - cut
        assert (mine - kept).abs().max() <= 1e-4
        if temperature: continue
        assert (logp.amax(1) - kept).max() <= 1e-4
        start, first = r.mask.index(1), e.turns[0].ids
        if m % 3 == 0:
            out = vlm.model.generate(**pixels(d.ids[:start], d.pictures[:1]), do_sample=False,
                                     max_new_tokens=len(first))
            assert tuple(out[0, start:].tolist()) == first


def test_trajectories_are_their_keys_alone():
    """Fp64: any prompts a batch, in any order, groups cut in two; and no group of one answer."""
    s, few = replace(TINY, loop=replace(TINY.loop, steps=2)), split("train", 3)
    vlm = load(device="cpu")
    vlm.model.double()
    episodes, _ = collect_rollouts(vlm, few, s, 5)
    want = ids(episodes)
    assert len(want) == 9
    assert all(len({str(want[e.key]) for e in episodes if e.sample is x}) > 1 for x in few)
    assert ids(collect_rollouts(vlm, few[::-1], s, 5)[0]) == want
    assert {k: v for x in few for k, v in ids(collect_rollouts(vlm, [x], s, 5)[0]).items()} == want
    assert want == ids(rollout(model_policy(vlm, s.loop), [e.sample for e in episodes], s.loop,
                               keys=[e.key for e in episodes], batch=2, progress=False))
    others = [ids(collect_rollouts(vlm, few, x, k)[0]) for x, k in ((s, 6), (replace(s, seed=1), 5))]
    assert all(list(o.values()) != list(want.values()) for o in others)


def test_a_prompt_is_read_once_for_its_whole_group(vlm, monkeypatch):
    """Pictures of each look of the vision tower; (rows, ids) of the language model's forwards."""
    looks, read, inner, few = [], [], vlm.model.model.get_image_features, split("train", 2)
    monkeypatch.setattr(vlm.model.model, "get_image_features",
                        lambda x, grids: [looks.append(len(grids)), inner(x, grids)][1])
    hook = vlm.model.model.language_model.register_forward_pre_hook(
        lambda m, args, kw: read.append(tuple(kw["inputs_embeds"].shape[:2])), with_kwargs=True)
    s = replace(TINY, group=4)
    try: episodes, rows = collect_rollouts(vlm, few, s, 0)
    finally: hook.remove()
    starts = [r.mask.index(1) for r in rows]
    first, *rest = read
    unlike = len({(e.sample.id, e.turns[0].ids, e.drawn) for e in episodes})
    assert 2 < unlike < 8 and looks == [2, unlike]  # members that said the same share what is read
    assert first == (2, max(starts))
    [(every, new)] = [x for x in rest if x[1] > 1]
    assert every == unlike and new < max(starts) + 8 and max(x[0] for x in rest) == 8
    logps(vlm, rows, s)
    assert looks == [2, unlike]     # nothing is seen again
    logps(vlm, [transcript(vlm, s.loop, e) for e in episodes], replace(s, micro=8))
    assert looks == [2, unlike, 16]


@pytest.mark.parametrize("learn", [False, True])
def test_the_head_needs_the_same_memory_for_any_length(monkeypatch, learn):
    """Peak of a loss over 512 and over 4,096 ids, of a head with 50,000 words."""
    vlm, head = load(device="cpu"), torch.nn.Linear(16, 50_000, bias=False)
    monkeypatch.setattr(vlm.model, "lm_head", head.requires_grad_(False))

    def peak(n):
        hidden = torch.randn(1, n + 1, 16, requires_grad=learn)
        monkeypatch.setattr(vlm.model.model, "forward", lambda **kw: (hidden,))
        with torch.profiler.profile(profile_memory=True) as p:
            loss = score(vlm, [Dialogue((5,) * (n + 1))], [(0,) + (1,) * n]).sum()
            if learn: loss.backward()
        told = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(told, key=lambda e: e.start_ns())]
        return max(np.cumsum(sizes)) - 2 * hidden.nbytes

    few, many = peak(512), peak(4096)
    logits = 128 * 50_000 * 4   # bytes of one chunk
    assert logits <= few < 5 * logits and many < 1.1 * few


# ---- the run

def test_a_twin_says_what_its_model_says():
    vlm, _ = lesson()
    _, rows = collect_rollouts(vlm, split("train", 1), TINY, 0)
    taught, same = (torch.cat(reference_logps(vlm, rows, TINY, n)) for n in ("sft", "grpo"))
    assert torch.equal(taught, same)
    with torch.no_grad(): base = torch.cat(logps(load(device="cpu"), rows, TINY))
    n, gap = len(rows[0].logps) // 2, (taught - base).abs()
    assert gap[n:2 * n].max() > 1e-3 and gap[:n].max() > 1e-3


@pytest.mark.parametrize("per", ["sample", "token", "constant"])
def test_a_step_is_its_formula_and_touches_one_adapter(tmp_path, monkeypatch, per):
    """Loss and gradient's norm, whole and without a ratio, of a twin that has left its leash."""
    monkeypatch.setattr(grpo, "reward", by_ids)
    loop = replace(TINY.loop, max_tokens=20, steps=1)
    s = replace(TINY, loop=loop, loss_mean=per, beta=.5)
    few, (vlm, params) = split("train", 5), lesson(.1)
    vlm.model.double()      # the head's log-probabilities stay in fp32
    episodes, _ = collect_rollouts(vlm, [few[i] for i in rng("grpo", 0, 0).permutation(5)[:2]], s, 0)
    A = advantage(np.reshape([by_ids(e) for e in episodes], (2, 3))).ravel()
    rows, loss = [transcript(vlm, s.loop, e) for e in episodes], 0.
    masks = [r.mask for r in rows]
    lengths = [*map(sum, masks)]
    assert len(set(lengths)) > 1
    many = dict(sample=6, token=sum(lengths), constant=6 * 40)[per]
    for a, r, mask, n in zip(A, rows, masks, lengths):
        both = []
        for name in ("sft", "grpo"):
            use_adapter(vlm, name)
            both.append(score(vlm, [r.dialogue], [mask], s.loop.temperature))
        gap = both[0].detach() - both[1]
        each = s.beta * (gap.exp() - gap - 1) - a * (1 + both[1] - both[1].detach())
        loss = loss + each.sum() / many / (n if per == "sample" else 1)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, params.values())]).norm()
    before = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    [row] = train_grpo(vlm, params, few, s, tmp_path)
    assert abs(row["loss"] - loss.item()) < 1e-6 and abs(row["norm"] / norm.item() - 1) < 1e-5
    assert abs(row["loss"]) > 1e-4 and norm > 1e-3 and row["k3"] > 1e-3
    after = dict(vlm.model.named_parameters())
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == set(params)
    assert {n for n, p in after.items() if p.requires_grad} == set(params)


def test_without_a_leash_flat_groups_cost_and_change_nothing(tmp_path, monkeypatch):
    few, (vlm, params), inner, sizes = split("train", 2), lesson(), grpo.logps, []
    flat, free = {few[0].id}, replace(TINY, beta=0.)
    monkeypatch.setattr(grpo, "reward", lambda e, *how: 1. if e.sample.id in flat else by_ids(e))
    monkeypatch.setattr(grpo, "logps", lambda v, r, s: [sizes.append(len(r)), inner(v, r, s)][1])
    copy = lambda: [p.detach().clone() for p in params.values()]
    same = lambda old: all(map(torch.equal, old, params.values()))
    before = copy()
    [row] = train_grpo(vlm, params, few, free, tmp_path / "half")
    assert sum(sizes) == 3 and row["flat"] == .5 and row["norm"] > 0 and not same(before)
    flat.add(few[1].id)
    vlm, params = lesson()
    before = copy()
    [row] = train_grpo(vlm, params, few, free, tmp_path / "flat")
    assert sum(sizes) == 3 and (row["loss"], row["norm"]) == (0, 0) and same(before)
    train_grpo(vlm, params, few, TINY, tmp_path / "leash")
    assert sum(sizes) == 3 + 12     # all six by the reference, and with a gradient


def test_settings_that_teach_nothing():
    with pytest.raises(ValueError, match="reward 'best': not of final"): replace(TINY, reward="best")
    with pytest.raises(KeyError, match="word"): normaliser(replace(TINY, loss_mean="word"), [1])


def test_fewer_samples_than_prompts(tmp_path):
    with pytest.raises(ValueError, match="2 prompts a step, 1 samples"):
        train_grpo(None, {}, split("train", 1), TINY, tmp_path)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """Settings, samples, and the weights of a training by them that nothing stops."""
    s, few = replace(TINY, loop=replace(TINY.loop, max_tokens=4), steps=3, every=2), split("train", 5)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grpo, "reward", by_ids)
        vlm, params = lesson(.1)
        train_grpo(vlm, params, few, s, tmp_path_factory.mktemp("uncut") / "whole")
    return s, few, {n: p.detach().clone() for n, p in params.items()}


@pytest.mark.parametrize("name, count", [
    ("collect_rollouts", 0), ("collect_rollouts", 2), ("logps", 0), ("logps", 1), ("logps", 5), ("grpo_loss", 4),
    ("rollout_stats", 1), ("advantage", 2)])
def test_ctrl_c_in_the_same_process_changes_not_a_bit(tmp_path, monkeypatch, uncut, name, count):
    """Also while the reference acts in place of the adapter that is trained."""
    s, few, whole = uncut
    monkeypatch.setattr(grpo, "reward", by_ids)
    vlm, params = lesson(.1)
    inner, calls = getattr(grpo, name), iter(range(10**6))

    def once(*args, **kw):
        if next(calls) == count: raise KeyboardInterrupt
        return inner(*args, **kw)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(grpo, name, once)
        train_grpo(vlm, params, few, s, tmp_path / "cut")
    train_grpo(vlm, params, few, s, tmp_path / "cut")
    assert all(torch.equal(p, whole[n]) for n, p in params.items())


RUN = r"""
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import test_grpo as here
from ivt_min import grpo
from ivt_min.core import read_jsonl

home, few = Path(sys.argv[1]), here.split("train", 5)
loop = here.replace(here.TINY.loop, max_tokens=4)
s = here.replace(here.TINY, loop=loop, steps=4, micro=3)
(vlm, params), dice, grpo.reward = here.lesson(), random.Random(0), here.by_ids

def start(folder):
    if child := os.fork(): return child
    status = 1
    try: status = 4 - len(grpo.train_grpo(vlm, params, few, s, folder))
    finally: os._exit(status)

def files(folder):
    "What a run leaves: tensors, and the log but for its times."
    log = [{**r, "seconds": 0, "tokens_s": 0} for r in read_jsonl(folder/"log.jsonl")]
    return (folder/"000004"/"tensors.safetensors").read_bytes(), log

t, kills, runs, gone_on = time.time(), 0, 0, 0
assert os.waitpid(start(home/"whole"), 0)[1] == 0
whole, took = files(home/"whole"), time.time() - t
assert all(r["norm"] > 1e-4 for r in whole[1])
while kills < 8 or not runs:
    gone_on += any((home/str(runs)).glob("0*"))
    child, took = start(home/str(runs)), took * 1.05    # so that a busy machine gets on, too
    if kills < 8 or not gone_on:
        time.sleep(dice.uniform(.05, took / 2))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kills += status == signal.SIGKILL
    if status == 0:
        assert files(home/str(runs)) == whole, runs
        runs += 1
assert gone_on
"""


def test_eight_kills_and_not_a_bit_is_different(tmp_path):
    """A step's trajectories, too, come out the same when it is begun again."""
    done = subprocess.run([sys.executable, "-c", RUN, tmp_path], text=True, capture_output=True,
                          cwd=Path(__file__).parents[1], timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
