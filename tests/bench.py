"""The project's benchmarks: ours and what others do, on the same weights, prompts and lengths.

    python tests/bench.py                               # all of them, a table
    python tests/bench.py --quick --json                # smaller, < 5 minutes; a JSON line each
    python tests/bench.py --only rollout_one decode --repeats 9
    python tests/bench.py --list

First comes the gate: both sides must give the same ids, texts, log-probabilities or gradients,
else the line says what differs and the exit code is 1. Then the clock, after two warm-ups (the
gate's run is one; quick has no other): pairs (ours, peer, ours, peer ...) on one thread. `ratio` is
the peer's CPU time over ours, the median of the pairs, `low` and `high` the least and the largest;
`ratio_wall` is that of the wall clock; `ours` and `peer` are median CPU seconds. `counts` (ours,
peer) know no clock: forwards of the language model, positions and patches that went through it and
the vision tower, padding included, rows of the head, GFLOP. A line without a peer has `value` and
`unit` instead.

The lines against TRL want `pip install trl==1.16.0`, best in an environment of its own that holds
this one's torch, transformers and peft; without it they are skipped.
"""
import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace as Stub

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LogitsProcessor, StoppingCriteria
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.utils import logging

from ivt_min import answer as answers
from ivt_min.boxes import iou, parse_box
from ivt_min.core import data_path, read_json, read_jsonl
from ivt_min.scenes import split
from ivt_min.model import load, question
from ivt_min.answer import Turn, answer, choose, closed, log_probs, stops, uniforms
from ivt_min.loop import Loop, go_on, model_policy, rollout
from ivt_min.verdict import loop_of
from ivt_min.train import (TARGETS, add_lora, copy_adapter, last_checkpoint, pack,
                           save_checkpoint, unpack)
from ivt_min.sft import SFT, make_row, sft_loss, train_sft
from ivt_min.grpo import (GRPO, advantage, collect_rollouts, grpo_loss, logps, normaliser, reward,
                          train_grpo)

torch.set_num_threads(1)
logging.disable_progress_bar()
ATEN = torch.ops.aten


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    repeats: int = 5        # pairs
    warm: int = 2           # runs before them, the gate's included
    evaluated: int = 505    # samples of an evaluation
    alone: int = 64         # of them, and of a rollout, those that `generate` answers one by one
    prompts: int = 8        # of a rollout or a step
    group: int = 8          # trajectories a prompt
    dialogues: int = 32     # of an SFT update
    timed: int = 512        # rows of the loss whose time is measured,
    filled: tuple = (512, 1024, 2048, 4096)     # and whose memory
    decoded: tuple = (1, 8, 16, 32, 64, 128)    # dialogues at once

    @property
    def runs(self): return self.warm + self.repeats


QUICK = Size(3, 1, evaluated=32, alone=8, prompts=4, dialogues=16, timed=128, filled=(512,),
             decoded=(1, 64))


# ---- gate, counts, clock

def check_same(what, ours, peer):
    """Two lists must be equal."""
    unlike = sum(a != b for a, b in zip(ours, peer)) + abs(len(ours) - len(peer))
    assert not unlike, f"{what}: {unlike} of {len(ours)} differ"


def check_close(what, ours, peer, bound):
    """No number may differ by more than the bound; of a large one, by more than a share of it."""
    off = ((ours - peer).abs() / peer.abs().clamp(min=1)).max().item()
    assert off <= bound, f"{what} differ by {off:.1e}, allowed {bound:.0e}"


class Shapes(TorchDispatchMode):
    """Counts what goes through the network, by the shapes of what torch does."""
    def __init__(self, config):
        super().__init__()
        text, eye = config.text_config, config.vision_config
        self.vocab, self.head = text.vocab_size, (text.hidden_size, text.vocab_size)
        patch = eye.in_channels * eye.temporal_patch_size * eye.patch_size**2
        self.patch = patch, eye.hidden_size
        self.forwards = self.positions = self.patches = self.head_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.overloadpacket
        if op is ATEN.embedding and len(args[0]) == self.vocab:
            self.forwards += 1
            self.positions += args[1].numel()
        if op is ATEN.convolution: self.patches += len(args[0])
        if op in (ATEN.mm, ATEN.addmm):
            left, right = args[-2:]
            self.patches += len(left) * (tuple(right.shape) == self.patch)
            self.head_rows += len(left) * (tuple(right.shape) == self.head)
        return func(*args, **kwargs or {})


# torch's counter knows attention on a CPU neither forward (2 products) nor backward (5)
FUSED = {ATEN._scaled_dot_product_flash_attention_for_cpu:
         lambda q, k, *rest, **more: 4 * math.prod(q) * k[-2],
         ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
         lambda grad, q, k, *rest, **more: 10 * math.prod(q) * k[-2]}


def counted(vlm, f):
    """What a call returns, and what it did as a dict of counts."""
    with Shapes(vlm.model.config) as seen:
        with FlopCounterMode(display=False, custom_mapping=FUSED) as flops: out = f()
    return out, dict(forwards=seen.forwards, positions=seen.positions, patches=seen.patches,
                     head_rows=seen.head_rows, gflop=round(flops.get_total_flops() / 1e9, 2))


def clock(f, *args):
    """CPU seconds and wall seconds of a call."""
    gc.collect()    # what others left is not this call's to sweep
    cpu, wall = time.process_time(), time.perf_counter()
    f(*args)
    return time.process_time() - cpu, time.perf_counter() - wall


def race(name, against, gate, ours, peer, size, vlm, times=1.):
    """A line: the peer's time over ours. Both are given the number of their run; the gate gets
    what they return in the first, which is counted; the peer does 1 / `times` of the work."""
    row = dict(name=name, against=against)
    (mine, done), (other, did) = (counted(vlm, lambda: f(0)) if vlm else (f(0), None)
                                  for f in (ours, peer))
    try: gate(mine, other)
    except AssertionError as e: return row | dict(gate=f"failed: {e}")
    for k in range(1, size.warm): ours(k), peer(k)
    pairs = [(clock(ours, k), clock(peer, k)) for k in range(size.warm, size.runs)]
    cpu, wall = ([times * b[k] / a[k] for a, b in pairs] for k in (0, 1))
    mine, theirs = (statistics.median(pair[k][0] for pair in pairs) for k in (0, 1))
    return row | dict(gate="held", ratio=statistics.median(cpu), low=min(cpu), high=max(cpu),
                      ratio_wall=statistics.median(wall), n=size.repeats, ours=mine, peer=theirs,
                      counts=[done, did])


def values(name, unit, found, **more):
    """A line without a peer: the median of what was found."""
    return dict(name=name, value=statistics.median(found), unit=unit, low=min(found),
                high=max(found), n=len(found), **more)


def seconds(f, size):
    """CPU seconds of some calls, after the warm-ups."""
    return [clock(f)[0] for _ in range(size.runs)][size.warm:]


# ---- the peer: transformers' `generate`, from scratch in each step

class Drawn(LogitsProcessor):
    """Samples as we do, from the same random numbers: leaves the drawn token alone."""
    def __init__(self, banned, temperature, u):
        self.banned, self.temperature, self.u, self.logps = banned, temperature, u, []

    def __call__(self, ids, scores):
        logp = scores.index_fill(1, self.banned, -torch.inf).div_(self.temperature).log_softmax(1)
        drawn = choose(logp, self.u[:, len(self.logps)])[:, None]
        self.logps.append(logp.gather(1, drawn)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.)


class Closed(StoppingCriteria):
    """Ends a row that said a stop token or closed its box; a text is read where it may end."""
    def __init__(self, peer, start, rows):
        self.peer, self.start, self.ended = peer, start, [None] * rows

    def __call__(self, ids, scores, **options):
        for row, last in enumerate(ids[:, -1].tolist()):
            if self.ended[row]: continue
            if last in self.peer.stops: self.ended[row] = ids.shape[1], "stop"
            elif last in self.peer.closing and closed(self.peer.decode(ids[row, self.start:])):
                self.ended[row] = ids.shape[1], "box"
        return torch.tensor([end is not None for end in self.ended])


class Peer:
    """What a sensible person writes with transformers alone: in each step `generate` gets the
    dialogues so far, padded on the left, with all their pictures. It has a cache within a step,
    ends when all rows have, and reads a text only where a bracket closes. The dialogues and the
    pictures' patches it gets from our `go_on`, each picture drawn and cut up once."""
    def __init__(self, vlm, loop, rows, model=None):
        self.vlm, self.loop, self.rows, self.decode = vlm, loop, rows, vlm.tokenizer.decode
        self.model = model or plain_model()
        self.stops = stops(vlm)
        self.banned = [i for i, token in vlm.tokenizer.added_tokens_decoder.items()
                       if token.special and i not in self.stops]
        self.closing = {i for i in range(vlm.model.config.text_config.vocab_size)
                        if self.decode([i]).endswith((*"])}>`",))}

    def batch(self, dialogues, side="left"):
        """The arguments of transformers' forward."""
        rows = [torch.tensor(d.ids) for d in dialogues]
        ids = pad_sequence(rows, True, self.vlm.tokenizer.pad_token_id, side)
        pictures = [p for d in dialogues for p in d.pictures]
        return dict(input_ids=ids,
                    attention_mask=pad_sequence([torch.ones_like(r) for r in rows], True, 0, side),
                    mm_token_type_ids=(ids == self.vlm.model.config.image_token_id).int(),
                    pixel_values=torch.cat([p.patches for p in pictures]),
                    image_grid_thw=torch.tensor([p.grid for p in pictures]))

    def generate(self, inputs, budget, **options):
        """Greedy but for a `logits_processor`; tokens that we never say are left out."""
        return self.model.generate(**inputs, **options, max_new_tokens=budget, do_sample=False)

    def answer(self, dialogues, keys):
        """The turns of a batch."""
        inputs, loop, draw = self.batch(dialogues), self.loop, None
        start, options = inputs["input_ids"].shape[1], dict(suppress_tokens=self.banned)
        if loop.temperature:
            u = uniforms(keys, loop.max_tokens)
            draw = Drawn(torch.tensor(self.banned), loop.temperature, u)
            options = dict(logits_processor=[draw])
        end = Closed(self, start, len(dialogues))
        out = self.generate(inputs, loop.max_tokens, stopping_criteria=[end], **options)
        logp = torch.stack(draw.logps, 1).tolist() if draw else [()] * len(dialogues)
        turns = []
        for ids, how, values in zip(out[:, start:].tolist(), end.ended, logp):
            length, how = how or (start + len(ids), "")
            ids = ids[:length - start]      # the rest is padding
            text = self.decode(ids[:-1] if how == "stop" else ids)
            turns.append(Turn(tuple(ids), tuple(values[:len(ids)]), text, end=how))
        return turns

    def policy(self, episodes, dialogues=None):
        """As `model_policy`."""
        if dialogues is None: dialogues = questions(self.vlm, [e.sample for e in episodes])
        else: dialogues = [go_on(self.vlm, self.loop, *pair) for pair in zip(dialogues, episodes)]
        keys, turns = [(*e.key, len(e.turns)) for e in episodes], []
        for k in range(0, len(episodes), self.rows):
            turns += self.answer(dialogues[k:k + self.rows], keys[k:k + self.rows])
        return turns, dialogues


def questions(vlm, samples):
    """The first dialogue of each; a sample's picture is made ready once."""
    asked = {name: question(vlm, x) for name, x in {x.id: x for x in samples}.items()}
    return [asked[x.id] for x in samples]


def plain_model(adapter=None):
    """The embedded model as transformers alone loads it, an adapter as peft does."""
    model = AutoModelForImageTextToText.from_pretrained(data_path("tiny"), dtype=torch.float32)
    if adapter: model = PeftModel.from_pretrained(model, data_path("adapters")/adapter)
    return model.eval()


# ---- rollouts and evaluations

def ids_of(episodes): return [turn.ids for e in episodes for turn in e.turns]


def logps_of(episodes): return torch.tensor([v for e in episodes for t in e.turns for v in t.logps])


def against_generate(name, vlm, loop, many, size, rows, alone=None, adapter=None):
    """Our rollout of some (sample, key) against `generate`, `rows` at once; the peer may get only
    the first `alone` of them, and counts as so much slower."""
    peer, few = Peer(vlm, loop, rows, plain_model(adapter)), many[:alone]
    def go(policy, asked):
        samples, keys = zip(*asked)
        return rollout(policy, samples, loop, keys=keys, batch=64, progress=False)
    def gate(mine, other):
        mine = mine[:len(few)]
        check_same("ids", ids_of(mine), ids_of(other))
        check_same("texts", [t.text for e in mine for t in e.turns],
                   [t.text for e in other for t in e.turns])
        if loop.temperature: check_close("log-probabilities", logps_of(mine), logps_of(other), 3e-5)
    how = f"generate, {min(rows, len(few))} at once"
    if len(few) < len(many): how += f" ({len(few)} of {len(many)})"
    return race(name, how, gate, lambda k: go(model_policy(vlm, loop), many),
                lambda k: go(peer.policy, few), size, vlm, len(many) / len(few))


def sampled(name, size, rows, alone=None):
    """A step's rollout by the base: P x G trajectories of 3 boxes."""
    many = [(x, ("bench", x.id, m))
            for x in split("train", size.prompts) for m in range(size.group)]
    return against_generate(name, load(device="cpu"), Loop(temperature=1.), many, size, rows, alone)


def greedy(name, size, rows, alone=None, adapter=None):
    """An evaluation: 3 boxes for each sample of the test split."""
    vlm = load(adapter, device="cpu")
    many = [(x, (x.id,)) for x in split("test", size.evaluated)]
    loop = replace(loop_of(vlm), steps=2)
    return against_generate(name, vlm, loop, many, size, rows, alone, adapter)


def rollout_one(size):
    """P x G sampled trajectories of 3 boxes against `generate` one by one."""
    yield sampled("rollout_one", size, 1, size.alone)


def rollout_batched(size):
    """The same against `generate` of all at once."""
    yield sampled("rollout_batched", size, size.prompts * size.group)


def eval_one(size):
    """3 greedy boxes for the test split against `generate` one by one."""
    yield greedy("eval_one", size, 1, size.alone)


def eval_batched(size):
    """The same against `generate`, 64 at once."""
    yield greedy("eval_batched", size, 64)


def eval_adapter(size):
    """The same with a shipped adapter."""
    yield greedy("eval_adapter", size, 64, adapter="sft")


# ---- SFT

def nudged(vlm, s):
    """A fresh adapter that is not zero, so that all of it has a gradient."""
    params, g = add_lora(vlm, "bench", s), torch.Generator().manual_seed(0)
    for p in params.values(): p.data += torch.randn(p.shape, generator=g) * .002
    return params


def stepping(backward, params, lr=1e-6):
    """A backward and what follows it: clip, Adam."""
    opt = torch.optim.Adam(params.values(), lr=lr, betas=(.9, .98))
    def whole(k):
        backward(k)
        torch.nn.utils.clip_grad_norm_(params.values(), 1.)
        opt.step()
        opt.zero_grad()
    return whole


def check_gradients(params, ours, others, theirs, bf16=False):
    """To a share of the largest, 1e-3. Not to 1e-6, as we leave special tokens out of the softmax,
    to which an adapter that was not trained gives up to 1e-2; and bf16 has three digits."""
    found = []
    for weights, backward in ((params, ours), (others, theirs)):
        backward(0)
        found.append(torch.cat([p.grad.flatten() for p in weights.values()]))
        for p in weights.values(): p.grad = None
    most = found[1].abs().max()
    check_close("gradients", found[0] / most, found[1] / most, .1 if bf16 else 1e-3)


def stored(stage, name, **changes):
    """The settings of a stored run; those that this version does not know are left out."""
    s = read_json(data_path(f"runs/{name}/config.json"))["settings"] | changes
    s = {k: tuple(v) if isinstance(v, list) else v for k, v in s.items()
         if k in stage.__dataclass_fields__}
    return stage(**s | dict(loop=Loop(**s["loop"] | dict(fill=tuple(s["loop"]["fill"])))))


@cache
def lessons(n):
    """Samples with their traces."""
    known = {x.id: x for x in split("train", 8 * n)}
    traces = read_jsonl(data_path("runs/traces.jsonl.gz"))
    return [(known[t["id"]], t) for t in traces if t["id"] in known][:n]


def sorted_rows(vlm, s, told):
    """Rows of an update as `train_sft` sorts them."""
    return sorted([make_row(vlm, s, *pair) for pair in told], key=lambda row: len(row.mask))


def with_lora(model, params, s):
    """A plain model with peft's adapter, of the weights of ours; its parameters."""
    model = get_peft_model(model, LoraConfig(
        r=s.rank, lora_alpha=s.alpha, target_modules=TARGETS)).eval()
    others = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p, other in zip(params.values(), others.values(), strict=True): other.data.copy_(p)
    return model, others


class Lessons:
    """Updates of 32 dialogues, forward and backward by 16, each run with its own, made ready
    beforehand: ours, and a peer's loss of (model, inputs with labels, learned ids)."""
    def __init__(self, size, s, model, peer_loss):
        self.s, self.vlm, self.size, self.peer_loss = s, load(device="cpu"), size, peer_loss
        self.params, told = nudged(self.vlm, s), lessons(s.batch * size.runs)
        self.batches = [sorted_rows(self.vlm, s, told[k:k + s.batch])
                        for k in range(0, len(told), s.batch)]
        self.model, self.others = with_lora(model, self.params, s)
        self.peer, self.bf16 = Peer(self.vlm, s.loop, s.micro, self.model), rounded(s)

    def forwards(self, k):
        """The rows of each forward, and the learned ids of the whole update."""
        n = sum(sum(row.mask) for row in self.batches[k])
        for at in range(0, self.s.batch, self.s.micro):
            yield self.batches[k][at:at + self.s.micro], n

    def ours(self, k):
        options = dict(bf16=True) if self.bf16 else {}
        for rows, n in self.forwards(k): sft_loss(self.vlm, rows, n, **options).backward()

    def theirs(self, k):
        """Rows padded on the right, all positions' logits or what the peer has for them."""
        for rows, n in self.forwards(k):
            inputs = self.peer.batch([row.dialogue for row in rows], "right")
            learned = pad_sequence([torch.tensor(row.mask) for row in rows], True)
            inputs["labels"] = inputs["input_ids"].where(learned > 0, -100)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.peer_loss(self.model, inputs, n)
            loss.backward()

    def race(self, name, against):
        def gate(*_): check_gradients(self.params, self.ours, self.others, self.theirs, self.bf16)
        return race(name, against, gate, stepping(self.ours, self.params),
                    stepping(self.theirs, self.others), self.size, self.vlm)


def rounded(s):
    """Whether products are in bf16, which an older version cannot."""
    return getattr(s, "bf16", False)


def sft_update(size):
    """SFT updates against `model(..., labels).loss`: fp32 and bf16 (the peer under autocast)."""
    def loss(model, inputs, n):
        return model(**inputs, num_items_in_batch=n, use_cache=False).loss
    for bf16 in (False, True)[:2 if size.warm > 1 else 1]:
        s = stored(SFT, "sft_paper-s0", bf16=bf16, batch=size.dialogues)
        if bf16 and not rounded(s): continue
        name = "sft_update" + "_bf16" * bf16
        yield Lessons(size, s, plain_model(), loss).race(name, "model(..., labels).loss")


def sft_update_trl(size):
    """The first against the forward of TRL's SFTTrainer, as they are."""
    from trl.trainer.utils import add_fused_lm_head
    model = plain_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))   # as the trainer has it
    def loss(model, inputs, n): return -model(**inputs, fused_lm_head=True).log_probs.sum() / n
    s = stored(SFT, "sft_paper-s0", bf16=False, batch=size.dialogues)
    yield Lessons(size, s, model, loss).race("sft_update_trl", "TRL's SFT forward")


def training(size):
    """A step of `train_sft` (of 2 epochs) and of `train_grpo` as the stored runs, and in bf16."""
    found = {}
    for _ in range(max(1, size.repeats // 2)):
        for kind, stage, run in ("sft", SFT, "sft_paper-s0"), ("grpo", GRPO, "grpo_paper-s1"):
            for bf16 in (False, True)[:1 + hasattr(stage(), "bf16")]:
                more = dict(bf16=bf16) if hasattr(stage(), "bf16") else {}
                s = stored(stage, run, steps=4, every=99, **more)
                vlm = load(None if kind == "sft" else "sft", device="cpu")
                if kind == "sft":
                    work = train_sft, vlm, add_lora(vlm, "sft", s), lessons(2 * s.batch)
                else: work = train_grpo, vlm, copy_adapter(vlm), split("train", s.prompts * s.steps)
                took, _ = clock(*work, s, tempfile.mkdtemp())
                found.setdefault(kind + "_bf16" * bf16, []).append(took / s.steps)
    for name, some in found.items(): yield values(f"training_{name}", "s a step", some)


# ---- GRPO against TRL, K = 1

class Processor(Qwen3VLProcessor):
    """The tiny model's; it wants no torchvision, as there are no videos."""
    def check_argument_for_proper_class(self, name, value): return type(value)


class Trl:
    """TRL's GRPOTrainer on the embedded model, driven by hand: without its data loader, log and
    callbacks, which only cost. Settings: no gradient checkpoints, fp32, no KL, on-policy (no old
    log-probabilities), 32 trajectories a forward, the fastest of 8, 16, 32 and 64. The token that
    closes a box counts as a stop token, so that its answers end where ours do."""
    def __init__(self, size):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        self.vlm, self.group = load(device="cpu"), size.group
        model, tokenizer, n = plain_model(), self.vlm.tokenizer, size.prompts * size.group
        model.generation_config.eos_token_id += tokenizer.encode("]}")
        tokenizer.padding_side = "left"     # as the trainer has it where it loads one itself
        template = (data_path("tiny")/"chat_template.jinja").read_text()
        config = GRPOConfig(
            tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.,
            num_generations=size.group, per_device_train_batch_size=32, report_to="none",
            gradient_accumulation_steps=n // 32, loss_type="grpo", max_completion_length=32)
        self.trainer = GRPOTrainer(
            model, self.reward, config, Dataset.from_dict(dict(prompt=["-"] * n)),
            processing_class=Processor(self.vlm.processor, tokenizer, None, chat_template=template),
            peft_config=LoraConfig(r=64, lora_alpha=64, target_modules=TARGETS))
        self.parts = self.trainer.current_gradient_accumulation_steps = n // 32
        self.model = self.trainer.model.train()
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def reward(self, completions, truth, **others):
        """Ours: the box's IoU, and a tenth for being readable."""
        boxes = [parse_box(said[0]["content"]).box for said in completions]
        return [iou(box, true) + .1 * (box is not None) for box, true in zip(boxes, truth)]

    def generate(self, samples):
        """The ids that its generation gives."""
        from trl.data_utils import prepare_multimodal_messages
        rows = self.asked(samples)
        return self.trainer._generate([prepare_multimodal_messages(
            row["prompt"], images=[row["image"]]) for row in rows])[1]

    def asked(self, samples):
        """A batch of the data loader."""
        return [dict(image=x.image, truth=x.truth,
                     prompt=[dict(role="user", content=f"Locate: {x.expression}")])
                for x in samples for _ in range(self.group)]

    def backward(self, batches):
        """The gradient of its own batches."""
        for batch in batches: self.trainer._compute_loss(self.model, batch).backward()

    def step(self, samples):
        """Its rollout and its batches' gradient."""
        for self.trainer._step in range(self.parts):
            self.backward([self.trainer._prepare_inputs(self.asked(samples))])
        self.trainer._step = 0

    def batches(self, episodes, rows, A):
        """Our trajectories as its own batches."""
        starts = [row.mask.index(1) for row in rows]
        def pad(parts, side): return pad_sequence([torch.tensor(x) for x in parts], True, 751, side)
        for k in range(0, len(rows), 32):
            cut = list(zip(rows, starts))[k:k + 32]
            ids = pad([row.dialogue.ids[:start] for row, start in cut], "left")
            said = pad([row.dialogue.ids[start:] for row, start in cut], "right")
            pictures = [d.pictures[0] for d in
                        questions(self.vlm, [e.sample for e in episodes[k:k + 32]])]
            yield dict(
                prompt_ids=ids, prompt_mask=(ids != 751).long(), completion_ids=said,
                completion_mask=(said != 751).long(), advantages=A[k:k + 32].float(),
                pixel_values=torch.cat([p.patches for p in pictures]), num_images=[1] * 32,
                image_grid_thw=torch.tensor([p.grid for p in pictures]),
                mm_token_type_ids=(torch.cat([ids, said], 1) == 763).int())


class Own:
    """Our GRPO as `train_grpo` has it, and a Trl of the same weights."""
    def __init__(self, size):
        self.trl, self.vlm = Trl(size), load(device="cpu")
        samples = split("train", size.prompts * size.runs)
        self.s = GRPO(Loop(steps=0, max_tokens=32, temperature=1.), prompts=size.prompts,
                      group=size.group, beta=0.)
        if rounded(self.s): self.s = replace(self.s, bf16=False)
        self.prompts = [samples[k * size.prompts:(k + 1) * size.prompts] for k in range(size.runs)]
        self.params = nudged(self.vlm, SFT(rank=64, alpha=64))
        for p, other in zip(self.params.values(), self.trl.params.values()): other.data.copy_(p)

    def rollout(self, k):
        """Trajectories and their advantages."""
        episodes, rows = collect_rollouts(self.vlm, self.prompts[k], self.s, k)
        R = np.reshape([reward(e) for e in episodes], (-1, self.s.group))
        return episodes, rows, torch.tensor(advantage(R).ravel())

    def backward(self, rows, A):
        """The gradient of a step; what has no advantage has none."""
        old = [torch.tensor(row.logps) for row in rows]
        n, live = normaliser(self.s, [len(x) for x in old]), A.nonzero()[:, 0].tolist()
        live.sort(key=lambda i: len(rows[i].mask))
        for at in range(0, len(live), self.s.micro):
            part = live[at:at + self.s.micro]
            logp = logps(self.vlm, [rows[i] for i in part], self.s)
            mask = pad_sequence([torch.ones_like(x) for x in logp], True)
            was = pad_sequence([old[i] for i in part], True)
            grpo_loss(pad_sequence(logp, True), was, was, A[part], mask, self.s, n)[0].backward()

    def race(self, name, against, ours, peer, alike, size):
        """Both with what follows their backward; the gate is the gradient of what is alike."""
        def gate(*_): check_gradients(self.params, alike[0], self.trl.params, alike[1])
        return race(name, against, gate, stepping(ours, self.params),
                    stepping(peer, self.trl.params), size, self.vlm)

    def updates(self, runs):
        """Ours and TRL's backward on the same trajectories, ours, all of which have an advantage:
        made up, as most of the base's groups agree."""
        ready, g = [], torch.Generator().manual_seed(0)
        for k in range(runs):
            episodes, rows, A = self.rollout(k)
            A = torch.randn(len(A), generator=g)
            ready.append((rows, A, list(self.trl.batches(episodes, rows, A))))
        return lambda k: self.backward(*ready[k][:2]), lambda k: self.trl.backward(ready[k][2])


def rollout_trl(size):
    """One box a trajectory, against the generation of TRL's GRPOTrainer."""
    own = Own(size)
    def gate(mine, other):      # drawn by other numbers: about as long; the same where greedy
        mean, peers = (np.mean([len(ids) for ids in said]) for said in (ids_of(mine), other))
        assert abs(mean - peers) < .05 * mean, f"{mean:.1f} tokens an answer, and {peers:.1f}"
        own.trl.trainer.generation_config.do_sample = False
        likeliest = replace(own.s.loop, temperature=0.)
        alike = rollout(model_policy(own.vlm, likeliest), [e.sample for e in mine], likeliest,
                        progress=False)
        check_same("greedy ids", [list(x) for x in ids_of(alike)], own.trl.generate(own.prompts[0]))
        own.trl.trainer.generation_config.do_sample = True
    yield race("rollout_trl", "TRL's generation", gate, lambda k: own.rollout(k)[0],
               lambda k: own.trl.generate(own.prompts[k]), size, own.vlm)


def grpo_update_trl(size):
    """The update of a step: LoRA of rank 64, no KL, all trajectories have an advantage."""
    own = Own(size)
    ours, peer = own.updates(size.runs)
    yield own.race("grpo_update_trl", "TRL's update", ours, peer, (ours, peer), size)


def grpo_step_trl(size):
    """The whole step: rollout, reward, advantage, update."""
    own = Own(size)
    yield own.race("grpo_step_trl", "TRL's step", lambda k: own.backward(*own.rollout(k)[1:]),
                   lambda k: own.trl.step(own.prompts[k]), own.updates(1), size)


# ---- the loss at a vocabulary of 151,936

VOCAB, WIDTH = 151_936, 256


def ours_logps(hidden, weight, ids):
    """Ours: the one place that knows how they are called. The first token is never said."""
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False, device="meta")
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    vlm = Stub(tokenizer=Stub(added_tokens_decoder={0: Stub(special=True)}), model=Stub(
        device="cpu", lm_head=head, generation_config=Stub(eos_token_id=1)))
    if hasattr(answers, "chosen_logps"): return answers.chosen_logps(vlm, hidden, ids, 1.)
    def part(h, i): return log_probs(vlm, head(h), 1.).gather(1, i[:, None])[:, 0]
    return torch.cat([checkpoint(part, h, i, use_reentrant=False)
                      for h, i in zip(hidden.split(1024), ids.split(1024))])


def plain_logps(hidden, weight, ids):
    """As one writes it first."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def trl_logps(hidden, weight, ids):
    """TRL's fused head, in its tiles of 32,768 tokens, on these rows alone (on a CPU its trainers
    send all positions through it)."""
    from trl.kernels import ChunkedLogProbFunction
    return ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1., 32768, None, 1., ())[0]


WAYS = dict(ours=ours_logps, plain=plain_logps, trl=trl_logps)


def loss_inputs(n):
    """Hidden states, a frozen head whose first token has no chance, ids."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=g).mul_(.1)
    hidden = torch.randn(n, WIDTH, generator=g)
    weight[:, 0], weight[0], hidden[:, 0] = 0., 0., 1.
    weight[0, 0] = -99.
    return hidden.requires_grad_(), weight, torch.randint(1, VOCAB, (n,), generator=g)


def loss_backward(how, hidden, weight, ids):
    """Log-probabilities and the gradient of their weighted sum."""
    logp = WAYS[how](hidden, weight, ids)
    [grad] = torch.autograd.grad((logp * torch.linspace(-1, 1, len(ids))).sum(), hidden)
    return logp.detach(), grad


def loss_time(size):
    """Log-probabilities and their gradient, against `log_softmax` and TRL's fused head."""
    inputs = loss_inputs(size.timed)
    def gate(mine, other):
        check_close("log-probabilities", mine[0], other[0], 1e-5)
        check_close("gradients", mine[1], other[1], 1e-5)
    for how in list(WAYS)[1:2 + has_trl()]:
        yield race(f"loss_time_{how}", how, gate, lambda k: loss_backward("ours", *inputs),
                   lambda k: loss_backward(how, *inputs), size, None)


def most_memory():
    """Of this process so far, MB. (ru_maxrss counts the parent's, too.)"""
    [told] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(told.split()[1]) / 1024


def peak(how, n):
    """Most memory above the inputs, MB; in a process of its own."""
    if how == "trl": import trl.kernels     # its code is no memory of the loss
    inputs = loss_inputs(n)
    before = most_memory()
    loss_backward(how, *inputs)
    return most_memory() - before


def loss_memory(size):
    """Peak memory of the same above head and hidden states, by the number of rows."""
    for n in size.filled:
        found = {}
        for how in list(WAYS)[:2 + has_trl()]:
            command = [sys.executable, __file__, "--peak", how, str(n)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[how] = round(float(done.stdout.split()[-1]), 1)
        yield dict(name=f"loss_memory_{n}", value=found["ours"], unit="MB", n=1, peers=found)


# ---- what the machine can do, and how cost grows

def endless():
    """A VLM and a plain model that never stop, so that all answers are equally long."""
    vlm, model = load(device="cpu"), plain_model()
    for each in (vlm.model, model):
        each.generation_config.eos_token_id = [0]       # "!", which they never say
    return vlm, model


def decode(size):
    """A decoding step by the number of dialogues at once: 33 tokens less 1, over 32."""
    vlm, model = endless()
    peer = Peer(vlm, Loop(), 0, model)
    for n in size.decoded:
        asked = questions(vlm, split("test", n))
        inputs = peer.batch(asked)
        def ours(tokens): return answer(vlm, asked, max_tokens=tokens)[0]
        def theirs(tokens): return peer.generate(inputs, tokens, suppress_tokens=peer.banned)
        same = [list(turn.ids) for turn in ours(33)] == theirs(33)[:, -33:].tolist()
        found = {ours: [], theirs: []}
        for k in range(size.runs):
            for f in found: found[f].append((clock(f, 33)[0] - clock(f, 1)[0]) / 32 * 1000)
        mine, other = (some[size.warm:] for some in found.values())
        yield values(f"decode_{n}", "ms a step", mine, generate=statistics.median(other),
                     gate="held" if same else "failed: ids differ")


def peaks(size):
    """Products and copies of one thread: GFLOP/s in fp32 and bf16, GB/s."""
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 1024, 1024).to(kind)
        took = seconds(lambda: [a @ b for _ in range(8)], size)
        found[kind] = [2 * 1.024**3 * 8 / t for t in took]
    a = torch.zeros(2, 32 * 2**20)      # 128 MiB each
    copied = [2 * 2**27 / 1e9 / t for t in seconds(lambda: a[0].copy_(a[1]), size)]
    return found[torch.float32], found[torch.bfloat16], copied


def roofline(size):
    """One thread's peaks, and what share of the fp32 one decoding, prefill and SFT reach."""
    fp32, bf16, copied = peaks(size)
    yield values("gemm_fp32", "GFLOP/s", fp32)
    yield values("gemm_bf16", "GFLOP/s", bf16)
    yield values("bandwidth", "GB/s", copied)
    vlm, s = endless()[0], stored(SFT, "sft_paper-s0", bf16=False)
    asked = questions(vlm, split("test", 64))
    weights = sum(p.numel() for p in vlm.model.model.language_model.parameters()) * 4 / 1e9
    def prefill(): answer(vlm, asked, max_tokens=1)
    def decoding(): answer(vlm, asked, max_tokens=33)
    work = {f: (counted(vlm, f)[1]["gflop"], statistics.median(seconds(f, size)))
            for f in (prefill, decoding)}
    flops, took = (b - a for a, b in zip(work[prefill], work[decoding]))
    top = statistics.median(fp32)
    share = work[prefill][0] / work[prefill][1] / top
    yield dict(name="share_prefill", value=share, unit="of peak")
    yield dict(name="share_decode", value=flops / took / top, unit="of peak",
               read_gb_s=32 * weights / took)
    params, rows = nudged(vlm, s), sorted_rows(vlm, s, lessons(s.batch))
    def update(k=0):
        for at in range(0, s.batch, s.micro): sft_loss(vlm, rows[at:at + s.micro], 1).backward()
    whole = stepping(update, params)
    flops = counted(vlm, lambda: whole(0))[1]["gflop"]
    took = statistics.median(seconds(lambda: whole(0), size))
    yield dict(name="share_sft", value=flops / took / top, unit="of peak")


def curve(name, unit, points, size):
    """What one more of x costs: slope of the line through x -> ms, and how much it explains."""
    found = {x: statistics.median(seconds(f, size)) * 1000 for x, f in points.items()}
    x, y = np.array(list(found)), np.array(list(found.values()))
    slope, start = np.polyfit(x, y, 1)
    r2 = 1 - ((y - slope * x - start)**2).sum() / ((y - y.mean())**2).sum()
    return dict(name=f"curve_{name}", value=slope, unit=unit, r2=r2, start=start, n=size.repeats,
                points={int(k): round(v, 1) for k, v in found.items()})


def curves(size):
    """What a rollout costs by boxes, trajectories, side of the pictures, tokens of an answer."""
    base, small = load(device="cpu"), replace(size, repeats=size.repeats // 2, warm=size.warm - 1)
    def rolls(vlm, loop, group=4):
        samples = [x for x in split("train", 2) for _ in range(group)]
        keys = [(k,) for k in range(len(samples))]
        return lambda: rollout(model_policy(vlm, loop), samples, loop, keys=keys, progress=False)
    def seen(side):
        processor = copy.copy(base.processor)
        processor.size = dict(shortest_edge=side**2, longest_edge=side**2)
        return replace(base, processor=processor)
    loop = Loop(temperature=1.)
    yield curve("K", "ms a box", {k: rolls(base, replace(loop, steps=k - 1)) for k in range(1, 9)},
                small)
    yield curve("G", "ms a trajectory", {2 * g: rolls(base, loop, g)
                                         for g in (2, 4, 8, 16, 32)}, small)
    yield curve("side", "ms a visual token", {(side // 32)**2: rolls(seen(side), loop)
                                              for side in (128, 192, 256, 384)}, small)
    vlm = endless()[0]
    asked = questions(vlm, split("test", 8))
    yield curve("length", "ms a token", {n: lambda n=n: answer(vlm, asked, max_tokens=n)
                                         for n in (8, 16, 32, 64, 128)}, small)


def restart(size):
    """A checkpoint of LoRA and Adam: write, read with its hash, put back."""
    vlm, s = load(device="cpu"), SFT()
    params = nudged(vlm, s)
    opt, folder = torch.optim.Adam(params.values(), lr=s.lr, betas=(.9, .98)), tempfile.mkdtemp()
    for p in params.values(): p.grad = torch.ones_like(p)
    opt.step()
    def save(): save_checkpoint(folder, 1, pack(params, opt), dict(settings_hash="-", log=[]))
    def read(): return last_checkpoint(folder, "-")[1]
    def put(): unpack(params, opt, tensors)
    save()
    tensors = read()
    same = all(torch.equal(tensors[key], v) for key, v in pack(params, opt).items())
    parts = {f.__name__: statistics.median(seconds(f, size)) * 1000 for f in (save, read, put)}
    yield dict(name="restart", value=sum(parts.values()), unit="ms", n=size.repeats, parts=parts,
               mb=sum(v.numel() * 4 for v in tensors.values()) / 1e6,
               gate="held" if same else "failed: tensors differ")


def drift(size):
    """How far the log-probabilities of sampling lie from those of training, at most."""
    for model in ("tiny", "sft", "grpo"):
        vlm = load(model, device="cpu")
        s = stored(GRPO, "grpo_paper-s1", prompts=size.prompts, group=size.group, bf16=False)
        s = replace(s, loop=replace(loop_of(vlm, 2), temperature=1.))
        rows = collect_rollouts(vlm, split("train", size.prompts), s, 0)[1]
        with torch.no_grad(): again = torch.cat(logps(vlm, rows, s))
        off = (again - torch.tensor([v for row in rows for v in row.logps])).abs().max().item()
        yield dict(name=f"drift_{model}", value=off, unit="nats", n=len(again),
                   gate="held" if off <= 1e-4 else "failed: over 1e-4")


# ---- the command

ALL = [rollout_one, rollout_batched, rollout_trl, grpo_step_trl, grpo_update_trl, eval_one,
       eval_batched, eval_adapter, sft_update, sft_update_trl, training, loss_time, loss_memory,
       decode, roofline, curves, restart, drift]
BENCHES = {f.__name__: f for f in ALL}


def has_trl(): return find_spec("trl") is not None


def rows_of(name, size):
    """The lines of a benchmark; an exception is one, too."""
    try: yield from BENCHES[name](size)
    except Exception as e: yield dict(name=name, gate=f"failed: {type(e).__name__}: {e}"[:300])


def line(row):
    """A row of the table."""
    def short(v): return f"{v:.3g}" if isinstance(v, float) else str(v)
    known = {"name", "ratio", "value", "unit", "low", "high", "against", "gate", "counts", "n"}
    figure = short(row.get("ratio", row.get("value", "-")))
    spread = f"{short(row['low'])}..{short(row['high'])}" if "low" in row else ""
    what = row.get("unit") or f"x {row.get('against')}"
    more = [f"{key} {short(v)}" for key, v in row.items() if key not in known]
    if row.get("counts") and row["counts"][0]:
        done, did = row["counts"]
        more.append(", ".join(f"{key} {done[key]} / {did[key]}" for key in done))
    if row.get("gate", "held") != "held": more = [row["gate"]]
    return f"{row['name']:16} {figure:>8} {spread:13} {what:28} {'; '.join(more)}"


def main():
    parser = argparse.ArgumentParser(description="Benchmarks: ours against peers, gates first.")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, 3 repeats")
    parser.add_argument("--json", action="store_true", help="a JSON line each on stdout")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--repeats", type=int, help="pairs, by default 5")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # our own child, of loss_memory
    args = parser.parse_args()
    if args.peak: return print(peak(args.peak[0], int(args.peak[1])))
    if args.list: return print("\n".join(f"{k:16} {f.__doc__}" for k, f in BENCHES.items()))
    size, failed = QUICK if args.quick else Size(), False
    if args.repeats: size = replace(size, repeats=args.repeats)
    if not has_trl(): print("no TRL here (pip install trl==1.16.0): its lines are skipped",
                            file=sys.stderr)
    for name in args.only:
        if name.endswith("_trl") and not has_trl(): continue
        for row in rows_of(name, size):
            failed |= row.get("gate", "held") != "held"
            print(json.dumps(row) if args.json else line(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
