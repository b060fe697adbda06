"""What `tests/test_ranks.py` starts several times: python tests/rank_job.py WHAT FOLDER [STEPS]."""
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from ivt_min.core import Trajectory
from ivt_min.grpo import GRPO, train_grpo
from ivt_min.loop import Loop
from ivt_min.model import load
from ivt_min.scenes import split
from ivt_min.sft import SFT, train_sft
from ivt_min.traces import scripted_teacher, write_traces
from ivt_min.train import add_lora, copy_adapter, ranks, total

torch.set_num_threads(1)
BRIEF = SFT(rank=4, alpha=4, first=True, batch=4, micro=2, steps=4, every=1, warmup=1)
STEP = GRPO(Loop(max_tokens=24, temperature=1.), prompts=2, group=3, steps=2, every=1, micro=3,
            lr=1e-3, warmup=1)


def lessons(n=6):
    some = split("train", n)
    done = [Trajectory(x.id, x.source, x.expression, x.truth, [(100, 100, 500, 480)], [None], [""])
            for x in some]
    return [*zip(some, write_traces(done, some, scripted_teacher(), "scripted"))]


def doubled(vlm):
    """All in fp64, so that the order of a sum hardly shows."""
    vlm.model.double()
    return vlm


def job(what, folder, die_at=None):
    if what == "leave":     # the second process leaves without a word
        if ranks()[0] == 1: os._exit(0)
        total(0)
    vlm = load(device="cpu")
    params = add_lora(vlm, "sft", BRIEF)
    doubled(vlm)
    if die_at is not None and ranks()[0] == 1:      # the second process is killed in that step
        old = sys.modules["ivt_min.train"].rate
        def rate(step, s):
            if step == die_at: os._exit(9)
            return old(step, s)
        sys.modules["ivt_min.train"].rate = rate
    if what == "sft": train_sft(vlm, params, lessons(), BRIEF, folder)
    if what == "grpo":
        for p in params.values(): p.data += .01 * torch.ones_like(p)
        new = copy_adapter(vlm)
        doubled(vlm)
        train_grpo(vlm, new, split("train", 4), STEP, folder)
    if what == "apart":     # each writes into a folder of its own, as on nodes that share none
        train_sft(vlm, params, lessons(), BRIEF, folder / str(ranks()[0]))
    if what == "micro": train_sft(vlm, params, lessons(), replace(BRIEF, micro=1, checkpointing=True), folder)
    if what == "three": train_grpo(vlm, params, split("train", 4), replace(STEP, prompts=3), folder)


if __name__ == "__main__":
    try: job(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
    except (OSError, ValueError) as e:
        print(f"rank_job: {e}", file=sys.stderr)
        sys.exit(2)
