"""The embedded model: an ordinary folder, any picture, any words, a batch like its rows."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ivt_min.boxes import iou, parse_box
from ivt_min.core import Sample, data_path, settings_hash
from ivt_min.loop import Loop, model_policy, record, rollout
from ivt_min.model import ask, encode, load, to_patches
from ivt_min.scenes import split

torch.set_num_threads(2)
FOLDER = data_path("tiny")


@pytest.fixture(scope="module")
def vlm():
    return load()


def ground(vlm, samples):
    """One box a sample: the loop without refinements."""
    once = Loop(steps=0)
    return [record(e) for e in rollout(model_policy(vlm, once), samples, once)]


def sample(image, text="the red square", name="s"):
    return Sample(name, "own", text, (0, 0, 1000, 1000), image)


def test_folder_is_an_ordinary_one():
    """Transformers alone loads and runs it, in a process that cannot import our code."""
    code = f"""
import sys; sys.modules['ivt_min'] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
folder = {str(FOLDER)!r}
model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
tok = AutoTokenizer.from_pretrained(folder, local_files_only=True)
pix = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[Image.new('RGB', (128, 128), 'white')], return_tensors='pt')
turn = [dict(role='user', content=[dict(type='image'), dict(type='text', text='Locate: the red square')])]
text = tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).replace('<|image_pad|>', '<|image_pad|>' * 16)
ids = torch.tensor([tok.encode(text, add_special_tokens=False)])
out = model.generate(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), max_new_tokens=30, do_sample=False, **pix)
print(type(model).__name__, tok.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
"""
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith('Qwen3VLForConditionalGeneration {"bbox_2d": [')


def test_folder_is_small_and_in_bf16():
    from safetensors import safe_open
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 12_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["vision_config"]["patch_size"] == 16
    assert config["vision_config"]["spatial_merge_size"] == 2
    assert config["vision_config"]["deepstack_visual_indexes"]
    assert config["text_config"]["rope_parameters"]["mrope_section"]


def test_batched_equals_one_by_one_in_fp64(vlm):
    from dataclasses import replace
    model = load().model.double()
    wide = replace(vlm, model=model)
    samples = split("val", 12)
    together = ground(wide, samples)
    alone = [ground(wide, [s])[0] for s in samples]
    assert [t.texts for t in together] == [t.texts for t in alone]
    assert np.allclose([t.confidences[0] for t in together], [t.confidences[0] for t in alone], atol=1e-9)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode(vlm, mode):
    """Every mode goes in; one that holds the same colours gets the same answer."""
    image = split("val", 1)[0].image
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(grey)
    else:
        image = image.convert(mode)
    same, found = ground(vlm, [sample(split("val", 1)[0].image), sample(image, name=mode)])
    if mode == "RGBA":
        assert found.texts == same.texts and found.boxes[0] is not None
    if mode in ("L", "LA"):
        [grey] = ground(vlm, [sample(split("val", 1)[0].image.convert("L").convert("RGB"))])
        assert found.texts == grey.texts


@pytest.mark.parametrize("size", [(1, 1), (15, 640), (640, 15), (128, 128), (333, 500), (2000, 1500)])
def test_pictures_of_any_size(vlm, size):
    """Nothing raises, and the grid of patches has the picture's shape and the size that was taught."""
    image = Image.new("RGB", size, (200, 30, 30))
    ground(vlm, [sample(image)])
    _, rows, columns = to_patches(vlm, image).grid
    assert rows % 2 == columns % 2 == 0 and 36 <= rows * columns <= 140
    assert (rows > columns) == (size[1] > size[0])


def test_turned_picture_is_put_upright(vlm, tmp_path):
    """A file that is stored on its side, with the EXIF tag that says so, gets the upright answer."""
    upright = split("val", 1)[0]
    path, exif = tmp_path / "side.png", Image.Exif()
    exif[0x0112] = 6                                    # to be turned a quarter to the right
    upright.image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    a, b = ground(vlm, [upright, sample(path, upright.expression)])
    assert iou(a.boxes[0], b.boxes[0]) == 1


@pytest.mark.parametrize("text", ["zyxwv quux", "das rote Quadrat", "🦊", "الكرسي الأحمر", "a" * 400,
                                  "<|im_end|><|image_pad|>", "{expression} {0} %s", "\n\n"])
def test_unknown_words_give_a_box_or_a_clear_failure(vlm, text):
    if not text.strip():
        with pytest.raises(ValueError, match="s: expression of 0 characters"):
            ground(vlm, [sample(split("val", 1)[0].image, text)])
        return
    [found] = ground(vlm, [sample(split("val", 1)[0].image, text)])
    parsed = parse_box(found.texts[0])
    assert (found.boxes[0], found.confidences[0] is None) == (parsed.box, parsed.box is None)
    assert parsed.box or parsed.error


def test_no_words_become_special_tokens(vlm):
    special = [t.content for t in vlm.tokenizer.added_tokens_decoder.values()]
    ids = encode(vlm, " ".join(special) + "".join(special))
    assert not set(ids) & set(vlm.tokenizer.added_tokens_decoder)
    image = split("val", 1)[0].image
    assert ask(vlm, "<|image_pad|>" * 9, [image]).ids.count(vlm.model.config.image_token_id) == 16


def test_bad_picture_names_its_sample(vlm, tmp_path):
    bad = tmp_path / "page.jpg"
    bad.write_text("<html>")
    with pytest.raises(ValueError, match="s-9.*page.jpg"):
        ground(vlm, [sample(bad, name="s-9")])


def test_stored_runs_are_of_the_shipped_model():
    """What data/runs says of the model's weights is true of the file."""
    import hashlib
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:12]
    runs = {p.parent.name: json.loads(p.read_text()) for p in data_path("runs").glob("*/config.json")}
    models = {name: config["model"] for name, config in runs.items() if config.get("model")}
    assert {"base", "no_image", "naive", "naive_turn"} < models.keys() and set(models.values()) == {digest}
    tiny = {p.stem: json.loads(p.read_text()).get("settings_hash") for p in data_path("runs/tiny").glob("*.json")}
    assert tiny["skills"] == settings_hash(digest)
    assert tiny["curve"] == tiny["config"]


def test_nf4_quantises_the_language_model_alone():
    """The 4-bit option runs on a CPU, and leaves the vision tower and the head as they are."""
    four = load(device="cpu", nf4=True)
    small = {n for n, m in four.model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(small) == 3 * 7 and all(n.startswith("model.language_model.layers") for n in small)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for n, m in four.model.named_modules() if n in small)
    samples = split("val", 6)
    whole, quantised = ground(load(device="cpu"), samples), ground(four, samples)
    assert np.mean([iou(a.boxes[0], b.boxes[0]) for a, b in zip(whole, quantised)]) > 0.3
