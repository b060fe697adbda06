"""A model folder with the structure of Qwen3-VL-4B-Instruct and few, random weights.

As in the original: a byte-level BPE of 151,643 tokens in front of the special ones, at their ids; an
embedding of 151,936 rows; heads of 128; M-RoPE of 24, 20, 20 that takes turns; three DeepStack layers;
patches of 16 px; pictures up to 16,384 visual tokens; a chat template of the same form, in its
`Thinking` form, too. What is not: the sizes, the weights, and which tokens the BPE merges (letters in
the order of the alphabet: every pair, then as many triples as are needed).
"""
import json
from itertools import product
from pathlib import Path
from string import ascii_letters

import torch
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from tokenizers.pre_tokenizers import ByteLevel

FIRST_SPECIAL = 151_643
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
         "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
         "<think>", "</think>"]     # added tokens that are not special
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}THINK{%- endif %}"""


def merges(n):
    """n merges of a byte-level BPE: bytes to pairs, pairs and a letter to triples."""
    letters = [*ascii_letters, "\u0120"]    # the last one is a space
    alphabet = sorted(ByteLevel.alphabet())
    pairs = [(a, b) for a, b in product(letters, letters)]
    pairs += [(a, b) for a, b in product(alphabet, alphabet) if not {a, b} <= {*letters}]
    pairs = [(a, b) for a, b in pairs if not (a + b).isdigit()]
    triples = [(a + b, c) for a, b in pairs for c in letters]
    return (pairs + triples)[:n]


def tokenizer(thinking=False):
    """Of the real size, with its special tokens at their ids."""
    alphabet = sorted(ByteLevel.alphabet())
    rules = merges(FIRST_SPECIAL - len(alphabet))
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, rules)])}
    assert len(vocab) == FIRST_SPECIAL
    vocab |= {token: FIRST_SPECIAL + i for i, token in enumerate([*SPECIAL, *PLAIN])}
    made = Qwen2Tokenizer(
        vocab, rules, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=TEMPLATE.replace("THINK", "{{- '<think>\\n' }}" * thinking),
        model_max_length=262_144)
    made.add_tokens(SPECIAL, special_tokens=True)
    made.add_tokens(PLAIN)
    return made


def config(layers=3, width=128):
    """Of the real kind; the sizes are small."""
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20],
                mrope_interleaved=True)
    text = dict(vocab_size=151_936, hidden_size=width, intermediate_size=2 * width,
                num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
                max_position_embeddings=262_144, tie_word_embeddings=True, rope_parameters=rope,
                bos_token_id=151_643, eos_token_id=151_645)
    vision = dict(depth=4, hidden_size=64, intermediate_size=96, num_heads=4, patch_size=16,
                  spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=width,
                  num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2])
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=151_655,
        video_token_id=151_656, vision_start_token_id=151_652, vision_end_token_id=151_653)


def write(folder, thinking=False, layers=3, seed=0):
    """The folder as it would come from the hub: no file of ours in it."""
    folder = Path(folder)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config(layers))
    model.generation_config.update(eos_token_id=[151_645, 151_643], pad_token_id=151_643)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer(thinking).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[.5] * 3, image_std=[.5] * 3,
        size=dict(shortest_edge=65_536, longest_edge=16_777_216)).save_pretrained(folder)
    about = json.loads((folder/"preprocessor_config.json").read_text())
    about["image_processor_type"] = "Qwen2VLImageProcessorFast"     # as the real folder says
    (folder/"preprocessor_config.json").write_text(json.dumps(about))
    return folder
