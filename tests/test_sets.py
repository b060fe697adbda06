"""The three sets and VLM-R1's files as they are published, on rows made up in their shape; the mix of sets;
rows that go out and come back; the figures of Ref-L4's own evaluator."""
import io, json, math, subprocess, sys
from collections import Counter
from dataclasses import replace
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pyarrow import parquet
from ivt_min.boxes import to_permille, to_pixels
from ivt_min.core import Sample, Trajectory, read_jsonl, write_json, write_jsonl
from ivt_min.datasets import (
    LAYOUTS, OWN, REF_L4, REFCOCOG, REFCOCOG_LMMS, VLM_R1, read_rows, scan)
from ivt_min.evaluate import hits, ious
from test_project import ROOT, sources

PAGE = {}   # what the page about scale does with the three sets
for source in sources(ROOT/'nbs/lab/45_scale.ipynb'):
    if 'import Counter' in source or 'from ivt_min.core' in source or 'def picture_key' in source \
            or 'def facts_of' in source or 'def mix(' in source or 'def write_rows(' in source: exec(source, PAGE)
mix, picture_key, write_rows = PAGE['mix'], PAGE['picture_key'], PAGE['write_rows']

LADY = [103.93, 299.99, 238.15, 477.41]     # COCO's box of annotation 1719310, as corners
NAME = 'COCO_train2014_000000581857'


def picture(width=427, height=640, colour='white'):
    data = io.BytesIO()
    Image.new('RGB', (width, height), colour).save(data, 'PNG')
    return data.getvalue()


ADV_ROW = dict(file_name='000000547144.jpg', normal_caption='the computer screen', solution=[297., 345., 427., 440.],
               width=640, height=480, image_source='coco_val2017', human_authored=True, use_negation=False,
               distractors='5')
L4_ROW = dict(id=1, caption='Within the central picture frame, an antique camera is present.',
              bbox=[580.6163330048, 179.4965209869, 93.59924316159993, 112.1013793848], bbox_id='o365_527361',
              ori_category_id='o365_64', image_id='o365_922765', height=741, width=1024, bbox_area=10492.6,
              file_name='objects365_v2_00922765.jpg', is_rewrite=True, split='val')
G_ROW = dict(
    sent_ids=[0, 1, 2], file_name=f'{NAME}_16.jpg', ann_id=1719310, ref_id=7, image_id=581857, split='train',
    sentences=[dict(raw='THE LADY WITH THE BLUE SHIRT', sent='the lady with the blue shirt', sent_id=0, tokens=[])],
    category_id=1, raw_anns=json.dumps(dict(bbox=[103.93, 299.99, 134.22, 177.42], image_id=581857, id=1719310)),
    raw_image_info=json.dumps(dict(id=581857, file_name=f'{NAME}.jpg', width=427, height=640, flickr_url='x' * 2000)),
    raw_sentences='[]', image_path=f'coco/train2014/{NAME}.jpg', bbox=LADY, anns_id='1719310',
    captions=['the lady with the blue shirt', 'lady with back to us', 'blue shirt'], global_image_id='coco.581857')
LMMS_ROW = dict(
    question_id='1719310', image=dict(bytes=picture(), path=None), segmentation=[1., 2.], iscrowd=0,
    question='Please carefully observe the area circled in the image and come up with a caption for the area.',
    answer=['the lady with the blue shirt', 'blue shirt'], bbox=[103.93, 299.99, 134.22, 177.42],
    file_name=f'{NAME}_0.jpg')
R1_ROW = dict(height=640, width=427, bbox_list=[[103.93, 299.99, 237.15, 476.41]], image=f'train2014/{NAME}.jpg',
              normal_caption='the lady with the blue shirt', solution=LADY)
ROWS = {'ref-adv-s': ADV_ROW, 'ref-l4': L4_ROW, 'refcocog': G_ROW, 'refcocog-lmms': LMMS_ROW, 'vlm-r1': R1_ROW}


def refused(read, *parts):
    with pytest.raises(ValueError) as e: read()
    assert all(part in str(e.value) for part in parts), e.value
    assert len(str(e.value)) < 500


# ---- every layout

def test_there_is_a_row_for_every_layout(): assert {*ROWS, 'own', 'own-xywh'} == {*LAYOUTS}


@pytest.mark.parametrize('name', ROWS)
def test_every_field_that_is_needed(name, tmp_path):
    layout, row = LAYOUTS[name], ROWS[name]
    read_rows([row], layout, tmp_path)
    for field in {layout.expression, layout.box, layout.file, *layout.facts}:
        lacking = {k: v for k, v in row.items() if k != field}
        refused(lambda: read_rows([lacking], layout, tmp_path), 'rows, row 1: ', field)
    for bad in (None, [], 'a', [1, 2, 3], [9e9] * 4, [math.nan] * 4):
        refused(lambda: read_rows([row, row | {layout.box: bad}], layout, tmp_path), 'rows, row ')


@pytest.mark.parametrize('name', ROWS)
@pytest.mark.parametrize('kind', ['json', 'jsonl', 'jsonl.gz', 'memory', 'parquet'])
def test_every_way_of_reading_is_the_same(name, kind, tmp_path):
    layout, path = LAYOUTS[name], tmp_path/f'rows.{kind}'
    row = {k: v for k, v in ROWS[name].items() if k != 'image' or name == 'vlm-r1'}
    if name == 'refcocog-lmms': row |= dict(width=427, height=640)
    if kind == 'memory': path = (row for _ in range(1))
    elif kind == 'json': write_json(path, [row])
    elif kind == 'parquet':
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else: write_jsonl(path, [row])
    assert read_rows(path, layout, tmp_path, n=1) == read_rows([row], layout, tmp_path)


def test_ref_l4():
    x, = read_rows([L4_ROW], REF_L4, '.')
    assert (x.id, x.source, x.expression) == ('1', 'ref-l4', L4_ROW['caption'])
    assert np.allclose(x.truth, (567.008, 242.235, 658.414, 393.519), atol=.001)    # by hand
    assert x.meta['is_rewrite'] is True and x.meta['split'] == 'val' and x.meta['coco_id'] is None
    refused(lambda: read_rows([L4_ROW | dict(is_rewrite=float('nan'))], REF_L4, '.'), 'row 1: ')
    coco, = read_rows([L4_ROW | dict(file_name=f'{NAME}.jpg')], REF_L4, '.')
    assert coco.meta['coco_id'] == 581857


def test_one_box_in_three_sets(tmp_path):
    """The same box of COCO: corners, corner and size, VLM-R1's `solution`."""
    found = [x for name in ('refcocog', 'refcocog-lmms', 'vlm-r1')
             for x in read_rows([ROWS[name]], LAYOUTS[name], tmp_path)]
    for x in found: assert np.allclose(x.truth, to_permille(LADY, 427, 640), atol=1e-9)
    assert {picture_key(x) for x in found} == {'coco/581857'}
    assert [x.id for x in found] == ['7-0', '7-1', '7-2', '1719310-0', '1719310-1', 'vlm-r1-0000']
    assert [x.expression for x in found[:3]] == G_ROW['captions']
    assert found[0].image == tmp_path/f'{NAME}.jpg' and found[-1].image == tmp_path/'train2014'/f'{NAME}.jpg'


def test_refcocog_reads_no_other_box():
    """`raw_anns` has another box in another convention: what it says makes no difference."""
    other = G_ROW | dict(raw_anns='{"bbox": [1, 2, 3, 4]}')
    assert read_rows([other], REFCOCOG, '.') == read_rows([G_ROW], REFCOCOG, '.')
    refused(lambda: read_rows([G_ROW | dict(bbox=[103.93, 299.99, 50, 60])], REFCOCOG, '.'), 'row 1: bbox')
    for info in ('', '{', '[]', '{"width": 427}', None, 7, '[' * 100_000):
        refused(lambda: read_rows([G_ROW | dict(raw_image_info=info)], REFCOCOG, '.'), 'rows, row 1')


def test_lmms(tmp_path):
    x, y = read_rows([LMMS_ROW], REFCOCOG_LMMS)
    assert x.image == LMMS_ROW['image']['bytes'] and (x.meta['width'], x.meta['height']) == (427, 640)
    assert scan([x, y]) == ([x, y], {}) and 'Please' not in x.expression + y.expression
    torn = read_rows([LMMS_ROW | dict(image=dict(bytes=b'x'), width=427, height=640)], REFCOCOG_LMMS)
    assert list(scan(torn, skip=True)[1]) == ['1719310-0', '1719310-1']
    write_jsonl(tmp_path/'test-eval.jsonl', [R1_ROW | {k: v for k, v in LMMS_ROW.items() if k != 'image'}])
    assert len(read_rows(tmp_path/'test-eval.jsonl', replace(REFCOCOG_LMMS, file='image'))) == 2


@pytest.mark.parametrize('name', ['images.tar.gz', 'images.tar', 'train2014.zip'])
def test_archive(tmp_path, name):
    (tmp_path/name).write_bytes(b'')
    refused(lambda: read_rows([L4_ROW], REF_L4, tmp_path/name), name, 'unpack it first')


def test_rows_of_ones_own_with_their_picture_and_source(tmp_path):
    row = dict(image=Image.open(io.BytesIO(picture(80, 60))), expression='x', box=[8, 6, 40, 30])
    a, = read_rows([row])
    assert (a.id, a.source, a.truth) == ('rows-0000', 'rows', (100, 100, 500, 500))
    b, = read_rows([row | dict(box=[8, 6, 32, 24], source='s', image=picture(80, 60))], replace(OWN, convention='xywh px'))
    assert (b.truth, b.source) == (a.truth, 's')
    two = read_rows([row | dict(expression=['x', 'y'])])
    assert [(x.id, x.expression) for x in two] == [('rows-0000-0', 'x'), ('rows-0000-1', 'y')]
    refused(lambda: read_rows([row | dict(expression=[])]), 'row 1: expression []')
    refused(lambda: read_rows([row | dict(source=7)]), 'row 1: source 7')


def test_parquet_without_pyarrow(tmp_path):
    code = ("import sys; sys.modules['pyarrow'] = sys.modules['pyarrow.parquet'] = None\n"
            "from ivt_min.datasets import read_rows\n"
            "try: read_rows('a.parquet')\nexcept ValueError as e: print(e)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'a.parquet: to read it, pip install pyarrow\n', done.stderr


def test_bad_parquet(tmp_path):
    pytest.importorskip('pyarrow')
    (tmp_path/'a.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(ValueError): read_rows(tmp_path/'a.parquet')


def test_embedded_pictures_stay_bytes(tmp_path):
    """A `datasets.Dataset` and its Parquet file, chosen and reordered; no picture is decoded."""
    datasets = pytest.importorskip('datasets')
    rows = [LMMS_ROW | dict(question_id=str(k)) for k in range(4)]
    hub = datasets.Dataset.from_list(rows).cast_column('image', datasets.Image()).select([3, 1])
    samples = read_rows(hub, REFCOCOG_LMMS, n=2)
    assert [x.id for x in samples] == ['3-0', '3-1', '1-0', '1-1']
    assert all(x.image == LMMS_ROW['image']['bytes'] for x in samples)
    hub.to_parquet(tmp_path/'test-0.parquet')
    assert read_rows(tmp_path/'test-0.parquet', REFCOCOG_LMMS, n=2) == samples


def test_embedded_pictures_of_parquet_stay_bytes(tmp_path):
    rows = [LMMS_ROW | dict(question_id=str(k)) for k in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path/'test-0.parquet')
    samples = read_rows(tmp_path/'test-0.parquet', REFCOCOG_LMMS, n=2)
    assert [x.id for x in samples] == ['0-0', '0-1', '1-0', '1-1']
    assert all(x.image == LMMS_ROW['image']['bytes'] for x in samples)


# ---- the mix

def photos(source, numbers, file_name=None):
    """Samples that share photographs of COCO, or pictures of the set's own."""
    return [Sample(f'{source}-{k}', source, f'thing {k}', (0, 0, 9, 9 + k % 90), 'x.jpg',
                   dict(coco_id=None if file_name else n, file_name=file_name and f'{n}{file_name}'))
            for k, n in enumerate(numbers)]


def overlapping(seed=0):
    """Three sets that show the same photographs."""
    rng = np.random.default_rng(seed)
    draw = lambda n, most: [int(v) for v in rng.integers(most, size=n)]
    return {'ref-adv': photos('ref-adv', draw(300, 900)), 'refcocog': photos('refcocog', draw(900, 400)),
            'ref-l4': photos('ref-l4', draw(900, 300))}


@given(st.integers(0, 10**6), st.integers(3, 120), st.integers(3, 60), st.integers(3, 60))
@settings(max_examples=60, deadline=None)
def test_mix(seed, train, val, test):
    sets, sizes = overlapping(seed), dict(train=train, val=val, test=test)
    splits, manifest = mix(sets, sizes, seed)
    assert {k: len(v) for k, v in splits.items()} == sizes and list(splits) == list(sizes)
    for split, part in splits.items():
        count = Counter(x.source for x in part)
        assert max(count.values()) - min(count[name] for name in sets) <= 1
        assert count['ref-adv'] >= count['refcocog'] >= count['ref-l4']     # what is left: to the first
        assert {x.id for x in part} == {*manifest['ids'][split]} and len({x.id for x in part}) == len(part)
    pictures = {split: {x.meta['coco_id'] for x in part} for split, part in splits.items()}
    for a, b in (('train', 'val'), ('train', 'test'), ('val', 'test')): assert not pictures[a] & pictures[b]
    assert json.loads(json.dumps(manifest)) == manifest == mix(sets, sizes, seed)[1]
    assert mix(sets, sizes, seed + 1)[1]['ids'] != manifest['ids']


def test_the_papers_sizes():
    splits, manifest = mix({'a': photos('a', range(1142)), 'b': photos('b', range(5000, 9000)),
                            'c': photos('c', range(1500), '.png')})
    assert {k: Counter(x.source for x in v) for k, v in splits.items()} == {
        'train': dict(a=800, b=800, c=800), 'val': dict(a=170, b=170, c=170), 'test': dict(a=169, b=168, c=168)}
    assert {k: v['n'] for k, v in manifest['facts'].items()} == dict(a=1142, b=4000, c=1500, train=2400, val=510, test=505)


def test_manifest_knows_its_sets():
    sets = overlapping()
    facts = mix(sets, dict(train=9))[1]['facts']
    for change in (dict(truth=(0, 0, 9, 8)), dict(expression='other'), dict(id='other')):
        changed = sets | {'ref-adv': [replace(sets['ref-adv'][0], **change), *sets['ref-adv'][1:]]}
        other = mix(changed, dict(train=9))[1]['facts']
        assert other['ref-adv'] != facts['ref-adv'] and other['ref-l4'] == facts['ref-l4']


def test_mix_refuses():
    sets = overlapping()
    refused(lambda: mix(sets), 'too few samples', 'ref-adv')
    same = photos('ref-adv', range(10_000, 10_900))
    refused(lambda: mix(sets | dict(more=same), dict(train=9)), "twice: ['ref-adv-0'")
    whole = {name: photos(name, [1] * 9) for name in 'ab'}     # one picture cannot be in two splits
    refused(lambda: mix(whole, dict(train=2, test=2)), 'too few')


def test_pictures_are_told_apart():
    a, b = photos('a', [1], '.jpg')[0], photos('b', [1], '.jpg')[0]
    assert picture_key(a) != picture_key(b) and picture_key(a) == 'a/1.jpg'
    assert picture_key(photos('a', [1])[0]) == picture_key(photos('b', [1])[0]) == 'coco/1'


# ---- out and in again

@given(st.lists(st.tuples(st.integers(4, 3000), st.integers(4, 3000), st.floats(0, 1), st.floats(0, 1)),
                min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_rows_round_trip(tmp_path_factory, shapes):
    root = tmp_path_factory.mktemp('root')
    rows = []
    for k, (w, h, a, b) in enumerate(shapes):
        x, y = a * (w - 2), b * (h - 2)
        rows.append(L4_ROW | dict(id=k, width=w, height=h, bbox=[x, y, (w - x) / 2 + .5, (h - y) / 2 + .5],
                                  file_name=f'COCO_train2014_{k:012d}.jpg'))
    samples = read_rows(rows, REF_L4, root/'l4') + read_rows([R1_ROW], VLM_R1, root/'coco')
    write_rows(root/'test.jsonl', samples)
    again = read_rows(root/'test.jsonl', n=len(samples))
    for x, y in zip(samples, again):
        assert (x.id, x.source, x.expression, x.image, x.meta['coco_id']) == (
            y.id, y.source, y.expression, y.image, y.meta['coco_id'])
        assert np.allclose(x.truth, y.truth, rtol=0, atol=1e-9)
    write_rows(root/'again.jsonl', again)
    for one, two in zip(read_jsonl(root/'test.jsonl'), read_jsonl(root/'again.jsonl')):
        assert np.allclose(one.pop('box'), two.pop('box'), rtol=0, atol=1e-9) and one == two


def test_written_rows_keep_bytes_and_refuse_what_lies_elsewhere(tmp_path):
    samples = read_rows([LMMS_ROW, LMMS_ROW | dict(question_id='2', file_name='../COCO_train2014_000000000002_9.jpg')],
                        REFCOCOG_LMMS)
    write_rows(tmp_path/'rows.jsonl', samples)
    again = read_rows(tmp_path/'rows.jsonl')
    assert scan(again) == (again, {}) and {x.source for x in again} == {'refcocog'}
    assert [x.meta['coco_id'] for x in again] == [581857] * 2 + [2] * 2
    assert len([*(tmp_path/'pictures'/'refcocog').iterdir()]) == 2
    outside = read_rows([L4_ROW], REF_L4, tmp_path)
    refused(lambda: write_rows(tmp_path/'below'/'rows.jsonl', outside), '1: ', 'is not below')
    assert not (tmp_path/'below').exists()


# a true box of 100 x 100 px; the guess keeps so many px of its width
KEPT = [100, 99, 96, 95, 93, 91, 90, 87, 85, 82, 80, 77, 75, 71, 66, 60, 55, 50, 49, 20, None]
# what the evaluation code of Ref-L4 (JierunChen/Ref-L4, ref_l4/evaluation.py) says of these rows and guesses in px:
# its Acc@.5, .75, .9 and its mAcc, percent
THEIRS = [80.9524, 57.1429, 28.5714, 55.2381]


def test_figures_are_those_of_ref_l4s_evaluator():
    rows, boxes = [], []
    for k, kept in enumerate(KEPT):
        w, h, x, y = 640 + 16 * k, 480 + 8 * k, 3 * k, 2 * k
        rows.append(L4_ROW | dict(id=100 + k, bbox=[x, y, 100., 100.], width=w, height=h))
        boxes.append(kept and to_permille((x, y, x + kept, y + 100), w, h))
    samples = read_rows(rows, REF_L4, '.')
    done = [Trajectory(x.id, x.source, x.expression, x.truth, [box], [], []) for x, box in zip(samples, boxes)]
    for row, t, kept in zip(rows, done, KEPT):      # as they are sent to that evaluator
        x, y = row['bbox'][:2]
        sent = to_pixels(t.boxes[0], row['width'], row['height']) if kept else (0, 0, 0, 0)
        assert np.allclose(sent, (x, y, x + kept, y + 100) if kept else [0] * 4, atol=1e-9)
    score = ious(done, -1)
    acc = [hits(score, at, strict=True).mean() for at in (.5, .75, .9)]
    macc = np.mean([hits(score, at / 100, strict=True).mean() for at in range(50, 100, 5)])
    assert [round(100 * float(v), 4) for v in (*acc, macc)] == THEIRS
    assert hits(score, .5).mean() > acc[0]      # ours counts an IoU that is equal
