"""What the studies repeat: `%run studies.py` in one of them gives it `answers`, `keep_run`, `run_of`, `rule_of`.

[30_lab](30_lab.ipynb) shows what each of them does.
"""
import hashlib
import os
import time
from functools import cache
from pathlib import Path
from ivt_min.columns import choose_rule
from ivt_min.core import data_path, read_json, settings_hash, write_json, write_jsonl
from ivt_min.evaluate import read_run
from ivt_min.loop import record
from ivt_min.scenes import split
from ivt_min.verdict import go_round

CACHE = Path.home()/'.cache/ivt_min'    # checkpoints, adapters, whatever is too large to be kept


def answers(
    vlm,            # VLM
    samples,        # list of core.Sample
    loop,           # Loop or Views
    batch=128,      # samples at once
):                  # list of Trajectory
    "What a model answers in the loop."
    return [record(e) for e in go_round(vlm, samples, loop, batch)]


def model_hash():
    "A fingerprint of the shipped model's weights, 12 hex digits."
    weights = (data_path('tiny')/'model.safetensors').read_bytes()
    return hashlib.sha256(weights).hexdigest()[:12]


def stored(
    path,       # JSON file with a "settings_hash"; may be missing
    settings,   # dataclass or dict
):              # False also where IVT_RERUN=1
    "Whether a file holds the result of these settings."
    if os.environ.get('IVT_RERUN', '0') != '0' or not Path(path).exists(): return False
    return read_json(path).get('settings_hash') == settings_hash(settings)


def keep_run(
    folder, # of the run; its name is the run's
    about,  # dict, for JSON: all that the answers depend on, but for the shipped model
    make,   # function without arguments -> dict of file name -> dicts; called where it is needed
):
    "Make a run and store it, unless its folder holds the run of the same settings."
    about = dict(run=folder.name, model=model_hash(), **about)
    if stored(folder/'config.json', about): return
    if os.environ.get('IVT_ONLY', folder.name) != folder.name: return   # `reproduce` wants another
    began = time.time()
    for part, rows in make().items():
        write_jsonl(folder/f'{part}.jsonl.gz', rows)
    found = dict(minutes=round((time.time() - began) / 60, 1), **about)
    write_json(folder/'config.json', dict(settings_hash=settings_hash(about), **found))


_asked = cache(split)


@cache
def run_of(
    name,           # of a run below data/runs
    part='test',    # or 'val', 'confirm'
):                  # list of Trajectory; raises ValueError unless they answer the whole split
    "The stored answers of a run to a split."
    return read_run(data_path(f'runs/{name}'), part, _asked(part))


@cache
def rule_of(name):
    "The label-free rule of a run: the one that its loop has, or that its validation split chooses."
    return 'kept' if run_of(name)[0].kept is not None else choose_rule(run_of(name, 'val'))
