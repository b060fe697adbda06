"""A model of the real structure goes through every stage; see real_shape.py."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import real_shape
import torch
from PIL import Image
from peft import PeftModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from ivt_min.answer import Turn, answer, closed, score
from ivt_min.boxes import format_box, parse_box
from ivt_min.core import Sample, Trajectory, read_json
from ivt_min.evaluate import metrics
from ivt_min.grpo import GRPO, collect_rollouts, train_grpo
from ivt_min.loop import Episode, Loop, go_on, model_policy, record, rollout, transcript
from ivt_min.model import OFFICIAL, adapter_weights, ask, load, question
from ivt_min.render import draw_box
from ivt_min.scenes import split
from ivt_min.sft import SFT, make_row, sft_loss, train_sft
from ivt_min.traces import scripted_teacher, write_traces
from ivt_min.train import add_lora, copy_adapter, save_adapter

SIZES = [(640, 480), (427, 640), (4000, 3000), (6000, 400), (32, 32), (128, 128)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real_shape.write(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def vlm(folder):
    return load(folder, device="cpu")


def picture(size, seed=0):
    """Coloured noise, smooth enough to be a photograph's."""
    g = np.random.default_rng(seed)
    small = Image.fromarray(g.integers(0, 255, (12, 16, 3)).astype(np.uint8))
    return small.resize(size, Image.BICUBIC)


class Processor(Qwen3VLProcessor):
    """transformers' own, without its video half, which wants torchvision."""
    def check_argument_for_proper_class(self, name, value): return type(value)


def theirs(vlm):
    """transformers' processor for the same model and pixel budget."""
    return Processor(vlm.processor, vlm.tokenizer, None, chat_template=vlm.tokenizer.chat_template)


def user(text): return dict(role="user", content=[dict(type="image"), dict(type="text", text=text)])


@pytest.mark.parametrize("size", SIZES)
def test_ids_and_patches_are_the_processors(vlm, size):
    image, words = picture(size), "the red cup, 2nd from the left"
    ours = question(vlm, Sample("x", "", words, (0, 0, 1, 1), image))
    messages = [user(OFFICIAL.replace("{expression}", words))]
    processor = theirs(vlm)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    out = processor(text=[text], images=[image], return_tensors="pt")
    assert list(ours.ids) == out["input_ids"][0].tolist()
    assert ours.pictures[0].grid == tuple(out["image_grid_thw"][0].tolist())
    assert torch.equal(ours.pictures[0].patches, out["pixel_values"])


def test_torchvision_changes_no_ids(vlm, folder):
    """Where torchvision is, transformers takes another image processor: the same grids."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(folder)
    for size in SIZES:
        image = picture(size)
        ours = ask(vlm, "where?", [image])
        messages = [user("where?")]
        messages[0]["content"][0]["image"] = image
        out = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs=dict(size=vlm.processor.size))
        assert list(ours.ids) == out["input_ids"][0].tolist()
        assert (out["pixel_values"] - ours.pictures[0].patches).abs().max() < .05


def said(vlm, text): return Turn(tuple(vlm.tokenizer.encode(text)), (), text)


def test_the_turn_form_is_the_chat_template(vlm):
    loop = Loop(form="turn", prompt="Look again: {expression}")
    sample = Sample("x", "", "the red cup", (0, 0, 1, 1), picture((320, 256)))
    answer = format_box((100, 200, 300, 400))
    e = Episode(sample, sample.image, (), (said(vlm, answer),), (parse_box(answer).box,),
                (parse_box(answer).box,))
    ours = go_on(vlm, loop, question(vlm, sample), e)
    messages = [user(OFFICIAL.replace("{expression}", "the red cup")),
                dict(role="assistant", content=answer), user("Look again: the red cup")]
    processor = theirs(vlm)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    drawn = draw_box(sample.image, e.drawn[0])
    out = processor(text=[text], images=[sample.image, drawn], return_tensors="pt")
    assert list(ours.ids) == out["input_ids"][0].tolist()


def test_a_thinking_model(tmp_path):
    """Its template opens a thought: a box in it neither ends the answer nor is one."""
    vlm = load(real_shape.write(tmp_path, thinking=True), device="cpu")
    assert vlm.opens == "<think>\n"
    d = ask(vlm, "where?", [picture((64, 64))])
    text = vlm.tokenizer.apply_chat_template([user("where?")], tokenize=False,
                                             add_generation_prompt=True)
    assert vlm.tokenizer.decode(d.ids).replace("<|image_pad|>" * 64, "<|image_pad|>") == text
    thought = 'perhaps {"bbox_2d": [1, 2, 3, 4]}'
    assert not closed(vlm.opens + thought) and closed(thought)
    assert closed(f"{vlm.opens}{thought}</think>\n" + format_box((5, 6, 70, 80)))
    words = f"{thought}</think>\n{format_box((5, 6, 70, 80))}"
    ids = iter(vlm.tokenizer.encode(words) + [151_645])

    class Saying(torch.nn.Module):      # in place of the head: it says those words, whatever is read
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], 151_936)
            logits[..., next(ids)] = 50.
            return logits
    vlm.model.lm_head = Saying()
    [e] = rollout(model_policy(vlm, Loop(steps=0, max_tokens=99)), [
        Sample("x", "", "the cup", (0, 0, 1, 1), picture((64, 64)))], Loop(steps=0))
    assert e.turns[0].text == vlm.opens + words and e.turns[0].end == "box"
    assert e.boxes == ((5, 6, 70, 80),) and e.turns[0].confidence > -1e-3


def lessons(n=4):
    """Samples, and traces of made-up first boxes."""
    some = split("train", n)
    done = [Trajectory(x.id, x.source, x.expression, x.truth, [(100, 100, 500, 480)], [None], [""])
            for x in some]
    return [*zip(some, write_traces(done, some, scripted_teacher(), "scripted"))]


BRIEF = SFT(rank=4, alpha=4, first=True, batch=2, micro=2, steps=2, every=1, warmup=1,
            loop=Loop(max_tokens=128))
STEP = GRPO(Loop(max_tokens=6, temperature=1.), prompts=2, group=2, steps=2, every=1, micro=3)


@pytest.mark.parametrize("nf4", [False, True])
def test_every_stage(folder, tmp_path, nf4):
    """Loading, loop, traces, SFT, GRPO, an adapter to hand on, evaluation; resumed to the bit."""
    def taught(part):
        vlm = load(folder, device="cpu", nf4=nf4)
        s = replace(BRIEF, nf4=nf4, checkpointing=True)
        log = train_sft(vlm, add_lora(vlm, "sft", s), lessons(), s, tmp_path/part)
        return vlm, log
    vlm, log = taught("sft")
    assert len(log) == 2 and all(np.isfinite(row["norm"]) for row in log)
    shutil.copytree(tmp_path/"sft", tmp_path/"cut")
    shutil.rmtree(tmp_path/"cut"/"000002")
    again, _ = taught("cut")
    one, two = adapter_weights(vlm, "sft"), adapter_weights(again, "sft")
    assert all(torch.equal(one[key], two[key]) for key in one)
    save_adapter(vlm, "sft", tmp_path/"a-sft", BRIEF.loop)
    vlm = load(tmp_path/"a-sft", device="cpu", nf4=nf4)
    some = [x for x, _ in lessons()]
    log = train_grpo(vlm, copy_adapter(vlm, "a-sft"), some, replace(STEP, checkpointing=True),
                     tmp_path/"grpo", ref="a-sft")
    assert len(log) == 2 and log[0]["k3"] == pytest.approx(0, abs=1e-6)
    save_adapter(vlm, "grpo", tmp_path/"a-grpo", STEP.loop)
    ours = load(tmp_path/"a-grpo", device="cpu", nf4=nf4)
    done = [record(e) for e in rollout(model_policy(ours, STEP.loop), some, STEP.loop)]
    assert {row["n"] for row in metrics("run", done)} >= {4}
    if nf4: return
    base = load(folder, device="cpu")
    peft = PeftModel.from_pretrained(base.model, tmp_path/"a-grpo").base_model.model
    peft = replace(base, model=peft)
    row = make_row(base, BRIEF, *lessons(1)[0])
    with torch.no_grad():
        a, b = (score(v, [row.dialogue], [row.mask]) for v in (ours, peft))
    assert torch.equal(a, b)


def gradients(vlm, params, rows, **how):
    """Loss and gradients of two rows; how many bytes were kept for the backward pass."""
    for p in params.values(): p.grad = None
    kept = {}
    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = sft_loss(vlm, rows, 100, **how)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in params.values()], sum(kept.values())


def test_checkpointing_saves_memory_and_changes_nothing(folder):
    deep = load(real_shape.write(folder/"deep", layers=12), device="cpu")
    params = add_lora(deep, "a", BRIEF)
    with torch.no_grad():
        for p in params.values(): p += .01 * torch.randn(p.shape)
    rows = [make_row(deep, BRIEF, *one) for one in lessons(2)]
    loss, plain, before = gradients(deep, params, rows)
    loss_, again, after = gradients(deep, params, rows, checkpointing=True)
    assert loss == loss_ and all(map(torch.equal, plain, again))
    assert after < before / 4
    assert not deep.model.training
    [turn], _ = answer(deep, [question(deep, split("test", 1)[0])], max_tokens=4)
    assert len(turn.ids) == 4


def test_slices_change_no_rollout(folder):
    """Six trajectories in one batch, or four at a time: the same ids and log-probabilities."""
    vlm = load(folder, device="cpu")
    some = [x for x, _ in lessons(2)]
    s = replace(STEP, group=3)
    whole, _ = collect_rollouts(vlm, some, s, 0)
    parts, rows = collect_rollouts(vlm, some, replace(s, slice=4), 0)
    assert [t.ids for e in whole for t in e.turns] == [t.ids for e in parts for t in e.turns]
    assert [len(row.logps) for row in rows] == [sum(len(t.ids) for t in e.turns) for e in whole]


def test_a_trace_too_long_ends_training_before_it_begins(folder, tmp_path):
    vlm = load(folder, device="cpu")
    bad = lessons()
    bad[3] = bad[3][0], bad[3][1] | dict(texts=["Move the left edge left. " * 30] * 2)
    with pytest.raises(ValueError, match=bad[3][0].id):
        train_sft(vlm, add_lora(vlm, "a", BRIEF), bad, BRIEF, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_qwens_own_form_is_learned_and_read(vlm):
    s = replace(BRIEF, label=True, loop=Loop(max_tokens=300))
    sample, trace = lessons(1)[0]
    row = make_row(vlm, s, sample, trace)
    text = vlm.tokenizer.decode([i for i, m in zip(row.dialogue.ids, row.mask) if m])
    assert text.count('"label": ' + json.dumps(sample.expression)) == 3 and text.endswith("]\n```")
    named = format_box(sample.truth, sample.expression)
    assert json.loads(named.strip("`")[4:])[0]["label"] == sample.expression
    assert parse_box(named).box == parse_box(format_box(sample.truth)).box


def test_an_adapter_brings_its_pixel_budget_and_its_question(folder, tmp_path):
    vlm = load(folder, device="cpu", min_pixels=300_000, max_pixels=400_000,
               prompt="Where is {expression}?")
    assert vlm.processor.size == dict(shortest_edge=300_000, longest_edge=400_000)
    add_lora(vlm, "a", BRIEF)
    save_adapter(vlm, "a", tmp_path/"a", Loop())
    about = read_json(tmp_path/"a"/"ivt.json")
    assert (about["dtype"], about["attention"], about["nf4"]) == ("torch.float32", "sdpa_fp32", False)
    again = load(tmp_path/"a", device="cpu")
    assert (again.processor.size, again.prompt) == (vlm.processor.size, "Where is {expression}?")
    other = load(tmp_path/"a", device="cpu", max_pixels=70_000, prompt="Find {expression}.")
    assert (other.processor.size["longest_edge"], other.prompt) == (70_000, "Find {expression}.")
    assert load(folder, device="cpu", dtype="bfloat16", attention="eager").model.dtype == torch.bfloat16


def test_an_adapter_of_another_framework(folder, tmp_path):
    """A PEFT folder without our ivt.json: its base is the one that PEFT's own file names."""
    vlm = load(folder, device="cpu")
    add_lora(vlm, "a", BRIEF)
    save_adapter(vlm, "a", tmp_path/"foreign", Loop())
    (tmp_path/"foreign"/"ivt.json").unlink()
    again = load(tmp_path/"foreign", device="cpu")
    assert (again.name, again.loop, again.prompt) == ("foreign", None, OFFICIAL)


def hub(home, name, folder):
    """A folder as huggingface_hub keeps it in its cache."""
    at = home/"hub"/f"models--{name.replace('/', '--')}"
    (at/"refs").mkdir(parents=True)
    (at/"refs"/"main").write_text("0" * 40)
    shutil.copytree(folder, at/"snapshots"/("0" * 40))


def test_base_and_adapter_by_hub_name(folder, tmp_path):
    """Out of the cache, without a network; the adapter names its base by its hub name."""
    vlm = load(folder, device="cpu")
    add_lora(vlm, "a", BRIEF)
    vlm.model.name_or_path = "some/base"
    save_adapter(vlm, "a", tmp_path/"a", Loop())
    assert read_json(tmp_path/"a"/"ivt.json")["base"] == "some/base"
    base = tmp_path/"plain"
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns("deep"))
    hub(tmp_path, "some/base", base)
    hub(tmp_path, "some/adapter-1.5", tmp_path/"a")
    code = ("from ivt_min.model import load; v = load('some/adapter-1.5', device='cpu'); "
            "print(v.name, v.model.name_or_path)")
    env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["adapter-1_5", "some/base"], done.stderr[-900:]
