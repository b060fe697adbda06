"""What is damaged, exchanged or of another model is refused in one line; nothing answers under a wrong name."""
import inspect
import os
import pickle
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import torch as safe
from transformers.utils import logging

from ivt_min.core import data_path, read_json, write_json
from ivt_min.loop import Loop, record
from ivt_min.model import folder_hash, load, signature
from ivt_min.scenes import split
from ivt_min.train import add_lora, save_adapter
from ivt_min.verdict import go_round, loop_of

torch.set_num_threads(1)
ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


def copy_of(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(data_path("tiny" if name == "tiny" else f"adapters/{name}"), folder)
    return folder


def weights(change, sign=True, file=ADAPTER):
    """A mutation of the tensors; signed again, so that not the hash alone tells."""
    def mutate(folder):
        tensors = safe.load_file(folder / file)
        changed = change(tensors)
        safe.save_file(tensors if changed is None else changed, folder / file, metadata=dict(format="pt"))
        if sign: signed(folder)
    return mutate


def signed(folder):
    about = read_json(folder / "ivt.json")
    write_json(folder / "ivt.json", about | dict(sha256=signature(folder, about)))


def fields(file="ivt.json", drop=(), sign=False, **new):
    """A mutation of a JSON file's fields."""
    def mutate(folder):
        said = {k: v for k, v in read_json(folder / file).items() if k not in drop} | new
        write_json(folder / file, said)
        if sign or file == "ivt.json": signed(folder)
    return mutate


def text(file, data, sign=False):
    def mutate(folder):
        (folder / file).write_text(data)
        if sign: signed(folder)
    return mutate


def first(tensors): return sorted(tensors)[0]


def half(tensors): return {k: tensors[k] for k in sorted(tensors)[::2]}


def without(part):
    def change(tensors): return {k: v for k, v in tensors.items() if part not in k}
    return change


def renamed(old, new):
    def change(tensors): return {k.replace(old, new): v for k, v in tensors.items()}
    return change


def value(number):
    def change(tensors):
        tensors[first(tensors)].flatten()[3] = number
    return change


def flipped(file, at=-9):
    def mutate(folder):
        data = bytearray((folder / file).read_bytes())
        data[at] ^= 1
        (folder / file).write_bytes(data)
    return mutate


def text_of(file, old, new):
    def mutate(folder):
        data = (folder / file).read_text()
        assert old in data
        (folder / file).write_text(data.replace(old, new))
    return mutate


def cut(file, share=.5, sign=False):
    def mutate(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:int(share * len(data))])
        if sign: signed(folder)
    return mutate


def gone(file):
    def mutate(folder): (folder / file).unlink()
    return mutate


def pickled(file, into):
    def mutate(folder):
        class Evil:
            def __reduce__(self): return os.mkdir, (str(folder / "ran"),)
        (folder / file).unlink()
        (folder / into).write_bytes(pickle.dumps(Evil()))
    return mutate


def itself(folder): fields(base=str(folder))(folder)


def circle(folder):
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    fields(base=str(folder), drop=["base_sha256"])(other)
    fields(base=str(other), drop=["base_sha256"])(folder)
    sys.setrecursionlimit(len(inspect.stack()) + 150)   # so that it ends soon


def another_base(folder):
    """The base that it names is another one: a tiny model with one weight changed."""
    base = folder.with_name("base")
    shutil.copytree(data_path("tiny"), base)
    weights(value(.5), file=MODEL)(base)
    fields(base=str(base))(folder)


ADAPTERS = {    # what was done to a folder -> the mutation, what the error names
    "half the tensors": (weights(half), "lora"),
    "no tensor": (weights(lambda t: {}), ADAPTER),
    "one tensor missing": (weights(lambda t: without(first(t))(t)), "lora"),
    "a tensor too many": (weights(lambda t: t | {"more": torch.zeros(3)}), "more"),
    "names of another model": (weights(renamed("language_model", "text_model")), "84 tensors"),
    "other layers": (weights(renamed("layers.0", "layers.7")), "layers.0"),
    "A under another name": (weights(renamed("lora_A", "lora_C")), "lora_A"),
    "another shape": (weights(lambda t: t | {first(t): t[first(t)][:, :1].contiguous()}), "lora"),
    "NaN": (weights(value(torch.nan)), "lora"),
    "inf": (weights(value(torch.inf)), "lora"),
    "whole numbers": (weights(lambda t: {k: v.int() for k, v in t.items()}), "lora"),
    "another value": (weights(value(.5), sign=False), "ivt.json"),
    "all zeros": (weights(lambda t: {k: v * 0 for k, v in t.items()}, sign=False), "ivt.json"),
    "a flipped bit": (flipped(ADAPTER), "ivt.json"),
    "a flipped bit in the header": (flipped(ADAPTER, 12), "adapter"),
    "cut in half": (cut(ADAPTER), ADAPTER),
    "empty": (cut(ADAPTER, 0), ADAPTER),
    "gone": (gone(ADAPTER), "safetensors"),
    "pickled": (pickled(ADAPTER, "adapter_model.bin"), "safetensors"),
    "another alpha": (fields("adapter_config.json", lora_alpha=999), "ivt.json"),
    "another rank": (fields("adapter_config.json", r=8, sign=True), "lora"),
    "other targets": (fields("adapter_config.json", target_modules=["q_proj"], sign=True), "lora"),
    "targets that are not there": (fields("adapter_config.json", target_modules=["nobody"], sign=True), "adapter_config"),
    "rank pattern": (fields("adapter_config.json", alpha_pattern={"q_proj": 3}), "ivt.json"),
    "another kind": (fields("adapter_config.json", peft_type="IA3", sign=True), "adapter"),
    "no kind": (fields("adapter_config.json", drop=["peft_type"], sign=True), "adapter_config"),
    "config torn": (cut("adapter_config.json", sign=True), "adapter_config.json"),
    "config a list": (text("adapter_config.json", "[]", sign=True), "adapter_config.json"),
    "ivt.json a list": (text("ivt.json", "[1]"), "ivt.json"),
    "ivt.json torn": (cut("ivt.json"), "ivt.json"),
    "an unknown field": (fields(promt="x"), "promt"),
    "a prompt without the words": (fields(prompt="where?"), "prompt"),
    "a prompt that is none": (fields(prompt=["{expression}"]), "prompt"),
    "a loop that is none": (fields(loop=[2]), "loop"),
    "an unknown field of the loop": (fields(loop=dict(steps=2, laps=3)), "laps"),
    "a loop of -1 steps": (fields(loop=dict(steps=-1)), "steps"),
    "a form that is none": (fields(loop=dict(form="spiral")), "form"),
    "pixels of a word": (fields(pixels=["few", "many"]), "tiny"),
    "nf4 of a word": (fields(nf4="yes"), "nf4"),
    "its own base": (itself, "another base"),
    "a circle of bases": (circle, "base"),
    "another base": (another_base, "another base"),
    "a field of ivt.json": (text_of("ivt.json", '"steps": 2', '"steps": 1'), "signed"),
    "a base that is nowhere": (fields(base="/nowhere"), "nowhere"),
    "a base on the hub": (fields(base="owner/model"), "owner/model"),
}
MODELS = {
    "a weight missing": (weights(lambda t: without(first(t))(t), file=MODEL), "missing"),
    "no vision weights": (weights(without("visual"), file=MODEL), "visual"),
    "a tensor too many": (weights(lambda t: t | {"more": torch.zeros(3)}, file=MODEL), "more"),
    "another shape": (weights(lambda t: t | {first(t): torch.zeros(2, 2)}, file=MODEL), "misshapen"),
    "names of another model": (weights(renamed("language_model", "text_model"), file=MODEL), "71 tensors"),
    "NaN": (weights(value(torch.nan), file=MODEL), MODEL),
    "another value": (weights(value(.5), sign=False, file=MODEL), "ivt.json"),
    "a flipped bit": (flipped(MODEL), "ivt.json"),
    "cut in half": (cut(MODEL), MODEL),
    "empty": (cut(MODEL, 0), MODEL),
    "gone": (gone(MODEL), "safetensors"),
    "pickled": (pickled(MODEL, "pytorch_model.bin"), "safetensors"),
    "custom code": (fields("config.json", model_type="mine", auto_map={"AutoConfig": "mine.C",
                    "AutoModelForImageTextToText": "mine.M"}, sign=True), "tiny"),
    "no tokenizer": (gone("tokenizer.json"), "tiny"),
    "another template": (text("chat_template.jinja", "{{ messages }}"), "ivt.json"),
    "no config": (gone("config.json"), "tiny"),
    "config torn": (cut("config.json", sign=True), "tiny"),
    "another config": (fields("config.json", drop=["text_config"]), "ivt.json"),
    "no image processor": (gone("preprocessor_config.json"), "tiny"),
    "another image processor": (fields("preprocessor_config.json", image_mean=[0, 0, 0]), "ivt.json"),
    "other settings of the tokenizer": (fields("tokenizer_config.json", pad_token="<|im_end|>"), "ivt.json"),
    "another end of an answer": (fields("generation_config.json", eos_token_id=3), "ivt.json"),
    "one more file that transformers reads": (text("special_tokens_map.json", "{}"), "ivt.json"),
    "an unknown field": (fields(promt="x"), "promt"),
    "a prompt without the words": (fields(prompt="where?"), "prompt"),
}


def refused(folder, names):
    """The error is a ValueError or OSError of one line that names it; what was asked of others stays."""
    said, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with pytest.raises((ValueError, OSError)) as e: loop_of(load(folder, device="cpu"))
    assert names in str(e.value) and "\n" not in str(e.value).strip()
    assert (said, level) == (logging.is_progress_bar_enabled(), logging.get_verbosity())
    assert not (folder / "ran").exists()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever opens a connection fails the test."""
    def connect(*args): raise AssertionError("the network is asked")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("builtins.input", connect)


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused(what, tmp_path):
    mutate, names = ADAPTERS[what]
    folder = copy_of("sft", tmp_path)
    limit = sys.getrecursionlimit()
    try:
        mutate(folder)
        refused(folder, names)
    finally: sys.setrecursionlimit(limit)


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_is_not_whole_is_refused(what, tmp_path):
    mutate, names = MODELS[what]
    folder = copy_of("tiny", tmp_path)
    mutate(folder)
    refused(folder, names)


def test_a_copy_answers_as_the_original_does(tmp_path):
    """Also where it lies elsewhere, beside other files, or is a plain PEFT folder without `ivt.json`."""
    some = split("val", 3)
    loop = Loop(max_tokens=96)
    folder = copy_of("sft", tmp_path)
    (folder / "notes.txt").write_text("mine")
    def answers(where): return [record(e) for e in go_round(load(where, device="cpu"), some, loop)]
    same = [answers("sft"), answers(folder)]
    (folder / "ivt.json").unlink()
    same.append(answers(folder))
    assert same[0] == same[1] == same[2]


def test_dropout_of_an_adapter_does_not_act(tmp_path):
    """A plain PEFT folder, as other programs write it."""
    folder = copy_of("sft", tmp_path)
    (folder / "ivt.json").unlink()
    fields("adapter_config.json", lora_dropout=.5)(folder)
    vlm = load(folder, device="cpu")
    assert not any(part.training for part in vlm.model.modules())


def test_an_adapter_notices_another_base(tmp_path):
    """Of the base's files every one counts, whether it is signed or not; where it lies does not."""
    base = copy_of("tiny", tmp_path)
    (base / "ivt.json").unlink()
    vlm = load(base, device="cpu", prompt="Locate: {expression}")
    add_lora(vlm, "x", SimpleNamespace(rank=2, alpha=2, seed=0))
    save_adapter(vlm, "x", tmp_path / "x", Loop())
    moved = base.rename(tmp_path / "moved")
    about = read_json(tmp_path / "x" / "ivt.json")
    write_json(tmp_path / "x" / "ivt.json", about | dict(base=str(moved)))
    load(tmp_path / "x", device="cpu")
    fields("preprocessor_config.json", image_mean=[0, 0, 0])(moved)
    with pytest.raises(ValueError, match="another base"): load(tmp_path / "x", device="cpu")


def test_shipped_folders_are_signed():
    base = folder_hash(data_path("tiny"))
    for about in [data_path("tiny/ivt.json"), *data_path("adapters").glob("*/ivt.json")]:
        said = read_json(about)
        assert said["sha256"] == signature(about.parent, said)
        assert said.get("base_sha256", base) == base


def test_a_half_written_adapter_is_refused(tmp_path, monkeypatch):
    """Stopped at each of its writes, what is there is the old adapter, the new one, or refused."""
    import ivt_min.core as core
    vlm = load(device="cpu")
    for name, seed in (("old", 1), ("new", 2)):
        add_lora(vlm, name, SimpleNamespace(rank=2, alpha=2, seed=seed))
    replace, count = os.replace, iter(range(99))
    for stop in range(4):
        folder = tmp_path / str(stop)
        save_adapter(vlm, "old", folder, Loop())
        left = iter(range(stop))

        def once(a, b):
            if next(left, None) is None: raise KeyboardInterrupt
            replace(a, b)
        monkeypatch.setattr(core.os, "replace", once)
        with pytest.raises(KeyboardInterrupt): save_adapter(vlm, "new", folder, Loop())
        monkeypatch.setattr(core.os, "replace", replace)
        if stop == 0: load(folder, device="cpu")    # the old one, whole
        else:
            with pytest.raises(ValueError): load(folder, device="cpu")
        save_adapter(vlm, "new", folder, Loop())
        load(folder, device="cpu")
        assert len(list(folder.iterdir())) == 3
