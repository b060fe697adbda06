"""Rows and pictures that go wrong, through the reader and the scan; the project's drawn pictures;
and, where they lie beside the project, twenty real photographs."""
import io, json, math, socket, tracemalloc
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from bad_pictures import BLUE, RED, TRUTH, WHITE, red_box
from ivt_min.boxes import iou, to_permille, to_pixels
from ivt_min.core import data_path, from_row, read_json, read_jsonl, to_row, write_json, write_jsonl
from ivt_min.datasets import REF_ADV_S, coco_id, missed, read_rows, scan, true_box
from ivt_min.evaluate import ious, metrics
from ivt_min.render import draw_box, filmstrip, open_image

ROOT = Path(__file__).resolve().parent.parent
HOME, REAL = data_path('samples'), ROOT.parent/'shared'/'real_rec'
ROW = dict(file_name='a.png', normal_caption='the red one', solution=list(map(float, TRUTH)), width=80,
           height=60, image_source='coco_val2017', human_authored=True, use_negation=False, distractors='5')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kw): raise AssertionError('network')
    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def scene():
    image = Image.new('RGB', (80, 60), WHITE)
    image.paste(RED, TRUTH)
    return image


def read_adv(rows, images=None, n=None): return read_rows(rows, REF_ADV_S, images, n)


def read(folder, **changes): return read_adv([ROW | changes], folder)


def refused(rows, *parts, **kw):
    with pytest.raises(ValueError) as e: read_adv(rows, **{'images': '.', **kw})
    assert all(part in str(e.value) for part in parts), e.value
    assert len(str(e.value)) < 500


def unusable(folder, name, part, **changes):
    """A sample with such a picture stops a training, and is a miss in an evaluation."""
    samples = read_adv([ROW | {'file_name': name, **changes}, ROW], folder)
    with pytest.raises(ValueError, match='1 of 2 samples') as e: scan(samples)
    assert part in str(e.value) and samples[0].id in str(e.value)
    usable, reasons = scan(samples, skip=True)
    assert usable == samples[1:] and part in reasons[samples[0].id]


@pytest.fixture
def folder(tmp_path, scene):
    scene.save(tmp_path/'a.png')
    return tmp_path


# ---- what a good row becomes

def test_sample(folder):
    sample, = read(folder, file_name='000000547144.jpg', distractors=['a', 'b'])
    assert sample.id == 'ref-adv-s-0000' and sample.source == 'ref-adv-s'
    assert sample.expression == 'the red one' and sample.image == folder/'000000547144.jpg'
    assert sample.truth == to_permille(TRUTH, 80, 60) == (125, 1000 / 3, 375, 2500 / 3)
    assert sample.meta == dict(
        file_name='000000547144.jpg', width=80, height=60, image_source='coco_val2017',
        human_authored=True, use_negation=False, distractors=['a', 'b'], box=list(map(float, TRUTH)),
        convention='xyxy px', cut=False, coco_id=547144)
    json.dumps(sample.meta, allow_nan=False)


@pytest.mark.parametrize('value', ['5', 5, 0, ['x'] * 3, []])
def test_facts_are_kept_as_they_are(folder, value):
    assert read(folder, distractors=value)[0].meta['distractors'] == value


def test_coco_id_is_that_of_the_file_name(folder):
    assert read(folder, file_name='000cd41f9963a38c.jpg', image_source='openimages')[0].meta['coco_id'] is None
    assert read(folder, file_name='000000547144.jpg', image_source='drawn')[0].meta['coco_id'] == 547144
    assert read(folder, file_name='0000.jpg')[0].meta['coco_id'] is None
    assert coco_id('COCO_train2014_000000296747_0.jpg') == coco_id('x/000000296747.jpg') == 296747


def test_picture_in_the_row(scene):
    rows = [ROW | dict(image=scene, file_name='../anything.jpg')] * 2
    samples = read_adv(rows)
    assert [s.image is scene for s in samples] == [True, True]
    assert scan(samples) == (samples, {})
    assert draw_box(samples[0].image, samples[0].truth).size == (80, 60)


def test_hugging_face_rows(scene):
    datasets = pytest.importorskip('datasets')
    scene.save(data := io.BytesIO(), 'PNG')
    features = datasets.Features.from_dict({k: {'dtype': d, '_type': 'Value'} for k, d in dict(
        file_name='string', normal_caption='string', width='int64', height='int64',
        image_source='string', human_authored='bool', use_negation='bool', distractors='string').items()})
    features |= dict(image=datasets.Image(), solution=datasets.Sequence(datasets.Value('float64')))
    columns = {k: [v] * 3 for k, v in ROW.items()} | dict(image=[{'bytes': data.getvalue(), 'path': None}] * 3)
    hub = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    samples = read_adv(hub, n=3)
    assert {s.image for s in samples} == {data.getvalue()}     # never decoded
    assert samples[0].truth == to_permille(TRUTH, 80, 60) and scan(samples)[1] == {}


# ---- 1-15: pictures


def test_no_picture(folder, scene):
    (folder/'zero.png').write_bytes(b'')
    (folder/'page.jpg').write_text('<!DOCTYPE html><html><body>404</body></html>')
    noise = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data := io.BytesIO(), 'JPEG')
    (folder/'cut.jpg').write_bytes(data.getvalue()[:len(data.getvalue()) // 2])
    Image.fromarray(np.ones((60, 80), np.float32)).save(folder/'float.tiff')
    for name in ('zero.png', 'page.jpg', 'cut.jpg', 'float.tiff'): unusable(folder, name, name)
    unusable(folder, '.', str(folder))


@pytest.mark.parametrize('tag, turn', [(1, None), (2, 0), (3, 3), (4, 1), (5, 5), (6, 2), (7, 6), (8, 4)])
def test_orientation(folder, scene, tag, turn):
    exif = Image.Exif()
    exif[274] = tag
    stored = scene if turn is None else scene.transpose(turn)
    stored.save(folder/'turned.jpg', exif=exif, quality=100, subsampling=0)
    (sample,), _ = scan(read(folder, file_name='turned.jpg'))
    assert iou(to_permille(red_box(open_image(sample.image)), 80, 60), sample.truth) == 1


def test_orientation_of_the_row(folder, scene):
    """A row whose size is that of the stored picture, not of the upright one."""
    exif = Image.Exif()
    exif[274] = 6
    scene.transpose(2).save(folder/'turned.jpg', exif=exif)
    unusable(folder, 'turned.jpg', '80 x 60 px, but 60 x 80 in its row', width=60, height=80)


@pytest.mark.parametrize('name', ['rgba', 'palette', 'la', 'l', '1', 'cmyk', 'deep', 'gif', 'webp'])
def test_modes(folder, scene, name):
    path = folder/(name + {'cmyk': '.jpg', 'gif': '.gif', 'webp': '.webp'}.get(name, '.png'))
    clear = Image.new('RGBA', (80, 60), (*BLUE, 0))
    clear.paste((*RED, 255), TRUTH)
    palette = Image.new('P', (80, 60), 0)
    palette.putpalette([*BLUE, *RED])
    palette.paste(1, TRUTH)
    deep = Image.fromarray(np.asarray(scene.convert('L')).astype(np.uint16) * 257)
    stored = {'rgba': clear, 'palette': palette, 'la': clear.convert('LA'), 'l': scene.convert('L'),
              '1': scene.convert('1', dither=0), 'cmyk': scene.convert('CMYK'), 'deep': deep}.get(name, scene)
    more = {'palette': dict(transparency=0), 'cmyk': dict(quality=100, subsampling=0)}.get(name, {})
    if name in ('gif', 'webp'):
        more = dict(save_all=True, append_images=[Image.new('RGB', (80, 60), BLUE)])
        more |= dict(lossless=True) if name == 'webp' else {}
    stored.save(path, **more)
    (sample,), reasons = scan(read(folder, file_name=path.name))
    seen = np.asarray(open_image(sample.image)).astype(int)
    ground = np.abs(seen - 255).max(-1) < 20
    assert reasons == {} and seen.shape == (60, 80, 3)
    assert ground.sum() == 80 * 60 - 20 * 30 and not ground[20:50, 10:30].any()


def test_one_opening_each(folder, monkeypatch):
    opened = []
    count = lambda path: opened.append(path) or open_image(path)
    monkeypatch.setattr('ivt_min.datasets.open_image', count)
    samples = read_adv([ROW] * 5, folder)
    assert scan(samples) == (samples, {}) and opened == [folder/'a.png']


# ---- 16, 17: names

@pytest.mark.parametrize('name', [
    '../a.png', 'sub/../../a.png', '/etc/passwd', 'https://example.org/a.png', 'file:///etc/passwd',
    'ftp://a/b.png', 'link.png', 'dir/a.png', '', ' ', 'a\0.png', None, 7, ['a.png'], 'a' * 3000])
def test_outside(tmp_path, name):
    inside = tmp_path/'in'
    inside.mkdir()
    (tmp_path/'a.png').touch()
    (inside/'link.png').symlink_to(tmp_path/'a.png')
    (inside/'dir').symlink_to(tmp_path)
    refused([ROW | dict(file_name=name)], 'rows, row 1: file_name', images=inside)


def test_absolute_path_inside_and_links(folder):
    refused([ROW | dict(file_name=str(folder/'a.png'))], 'outside the folder', images=folder)
    (folder/'loop.png').symlink_to(folder/'loop.png')
    unusable(folder, 'loop.png', 'loop.png')
    (folder/'same.png').symlink_to('a.png')
    assert scan(read(folder, file_name='same.png'))[1] == {}


@pytest.mark.parametrize('image', ['https://example.org/a.png', '/etc/passwd', b'', {'bytes': b''}, 7, [1]])
def test_picture_of_another_kind(image):
    refused([ROW | dict(image=image)], 'rows, row 1: image', 'PIL')
    refused([ROW], 'no folder', images=None)


def test_missing(folder):
    rows = [ROW | dict(file_name=f'{i}.png') for i in range(20)] + [ROW]
    samples = read_adv(rows, folder)
    with pytest.raises(ValueError, match='20 of 21 samples') as e: scan(samples)
    assert all(f'{i}.png' in str(e.value) for i in range(9))
    usable, reasons = scan(samples, skip=True)
    assert len(reasons) == 20 and [s.id for s in usable] == ['ref-adv-s-0020']


def test_skipped_samples_stay_in_n(folder):
    samples = read_adv([ROW, ROW | dict(file_name='gone.png')], folder)
    usable, reasons = scan(samples, skip=True)
    done = [missed(s, reasons[s.id], 3) if s.id in reasons else
            from_row(to_row(missed(s, '', 3)) | dict(boxes=[s.truth] * 3)) for s in samples]
    assert [t.id for t in done] == [s.id for s in samples]
    assert [ious(done, k).tolist() for k in (0, 2, -1)] == [[1, 0]] * 3
    values = {r['metric']: (r['value'], r['n']) for r in metrics('run', done, -1)}
    assert values['acc50'] == values['miou'] == values['parse'] == (.5, 2)
    assert from_row(to_row(done[1])) == done[1] and 'gone.png' in done[1].notes[2]


# ---- 18-20: boxes

@pytest.mark.parametrize('box', [
    [30, 20, 10, 50], [10, 50, 30, 20], [10, 20, 10, 50], [10, 20, 10.5, 50], [10, 20, 82, 50], [10, 20, 30, 62],
    [-2, 20, 30, 50], [10, -1.5, 30, 50], [90, 20, 120, 50], [80.5, 20, 81, 50], [math.nan, 20, 30, 50],
    [10, 20, math.inf, 50], [10, 20, '30', 50], [True, 20, 30, 50], [10, 20, None, 50], [10, 20, 30],
    [10, 20, 30, 50, 60], [[10, 20, 30, 50]], '10,20,30,50', {'x': 1}, None, 7, [], [10, 20, 10**400, 50]])
def test_bad_box(box):
    refused([ROW, ROW | dict(solution=box)], 'rows, row 2: solution')
    if isinstance(box, list):
        with pytest.raises(ValueError): true_box(box, 80, 60, 'xyxy px')


def test_bad_box_in_a_file_has_its_line(tmp_path):
    write_jsonl(tmp_path/'rows.jsonl', [ROW, ROW, ROW | dict(solution=[30, 20, 10, 50])])
    refused(tmp_path/'rows.jsonl', f'{tmp_path/"rows.jsonl"}, row 3: solution [30, 20, 10, 50]: reversed')


def test_other_conventions():
    real = ROW | dict(width=640, height=480, solution=[297, 345, 427, 440])
    assert read_adv([real], '.')[0].truth[2] == 427 / .64
    refused([real | dict(solution=[297, 345, 130, 95])], 'reversed')         # its xywh
    refused([real | dict(solution=[464, 719, 667, 917])], 'leaves')          # its permille
    refused([real | dict(solution=[.464, .719, .667, .917])], 'under 1 px')  # its fractions
    with pytest.raises(ValueError, match='leaves'): true_box([297, 345, 427, 440], 640, 480, 'xywh px')
    with pytest.raises(KeyError): true_box([297, 345, 427, 440], 640, 480, 'xyxy')


def test_rim():
    """At most 1 px outside is cut off; what the source said is kept, and that it was cut."""
    vlm_r1 = ROW | dict(solution=[60, 20, 81, 61])
    sample, = read_adv([vlm_r1], '.')
    assert sample.truth == (750, 1000 / 3, 1000, 1000)
    assert sample.meta['cut'] is True and sample.meta['box'] == [60, 20, 81, 61]
    assert read_adv([ROW | dict(solution=[0, 0, 80, 60])], '.')[0].meta['cut'] is False


@given(st.integers(1, 2000), st.integers(1, 2000), st.data())
def test_box_round_trip(w, h, data):
    x0, y0 = (data.draw(st.floats(0, side - 1)) for side in (w, h))
    x1, y1 = (data.draw(st.floats(v + 1, side)) for v, side in ((x0, w), (y0, h)))
    box, cut = true_box([x0, y0, x1, y1], w, h, 'xyxy px')
    assert not cut and all(0 <= v <= 1000 for v in box)
    assert np.allclose(to_pixels(box, w, h), (x0, y0, x1, y1), atol=1e-6)
    same, _ = true_box([x0, y0, x1 - x0, y1 - y0], w, h, 'xywh px')
    assert np.allclose(same, box, atol=1e-6)


# ---- 21-24: rows

def test_ids(folder):
    assert [s.id for s in read_adv([ROW] * 3, folder)] == [f'ref-adv-s-000{i}' for i in range(3)]
    assert [s.id for s in read_adv([ROW | dict(id=7), ROW | dict(id='b')], folder)] == ['7', 'b']
    refused([ROW | dict(id='b'), ROW, ROW | dict(id='b')], "row 3: id 'b' is there twice")
    refused([ROW | dict(id='ref-adv-s-0001'), ROW], 'row 2', 'twice')
    refused([ROW | dict(id=7), ROW | dict(id='7')], 'twice')
    for bad in (None, '', True, 1.5, [], {}): refused([ROW | dict(id=bad)], 'rows, row 1: id')


def test_counts(tmp_path):
    refused([], 'rows: 0 rows')
    refused([ROW] * 504, '504 rows, not 505', n=505)
    assert len(read_adv((ROW for _ in range(505)), '.', n=505)) == 505
    (tmp_path/'empty.jsonl').write_text('\n\n')
    refused(tmp_path/'empty.jsonl', 'empty.jsonl: 0 rows')
    write_json(tmp_path/'empty.json', [])
    refused(tmp_path/'empty.json', 'empty.json: 0 rows')


def test_files(tmp_path):
    line = json.dumps(ROW).encode()
    (tmp_path/'bom.jsonl').write_bytes(b'\xef\xbb\xbf' + line + b'\r\n\r\n' + line + b'\r\n')
    assert len(read_adv(tmp_path/'bom.jsonl', '.')) == 2
    (tmp_path/'bom.json').write_bytes(b'\xef\xbb\xbf[' + line + b',\r\n' + line + b']')
    assert len(read_adv(str(tmp_path/'bom.json'), '.')) == 2
    (tmp_path/'torn.jsonl').write_bytes(line + b'\n' + line[:40])
    refused(tmp_path/'torn.jsonl', 'torn.jsonl, line 2')
    (tmp_path/'nan.jsonl').write_text(json.dumps(ROW | dict(solution=[0, 0, math.nan, 9])))
    refused(tmp_path/'nan.jsonl', 'nan.jsonl, line 1')
    for name, text in (('dict.json', json.dumps(ROW)), ('text.json', '"rows"'), ('null.json', 'null')):
        (tmp_path/name).write_text(text)
        refused(tmp_path/name, name, 'not a list')
    (tmp_path/'torn.json').write_bytes(b'[' + line)
    refused(tmp_path/'torn.json', 'torn.json')
    with pytest.raises(FileNotFoundError, match='gone'): read_adv(tmp_path/'gone.jsonl')
    with pytest.raises(OSError): read_adv('https://example.org/rows.jsonl')


def test_endless_line(tmp_path):
    with open(tmp_path/'long.jsonl', 'wb') as f:
        f.write(json.dumps(ROW).encode() + b'\n')
        f.truncate(100_000_000)
    tracemalloc.start()
    refused(tmp_path/'long.jsonl', 'long.jsonl, line 2: over 10 MB', images='.')
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()


@pytest.mark.parametrize('text', [
    'the <|image_pad|> that is not <|im_end|>', '\u0627\u0644\u0643\u0644\u0628 \u0639\u0644\u0649 \u0627\u0644\u064a\u0645\u064a\u0646',
    '\U0001f600 the dog', ' two  spaces ', 'a\nb', 'x' * 2000, '{"bbox_2d": [0, 0, 1, 1]} {expression}'])
def test_expression_is_kept(folder, text):
    write_jsonl(folder/'rows.jsonl', [ROW | dict(normal_caption=text)])
    sample, = read_adv(folder/'rows.jsonl', folder)
    assert sample.expression == text
    assert from_row(json.loads(json.dumps(to_row(missed(sample, ''))))).expression == text


@pytest.mark.parametrize('text', ['', ' ', '\n\t', 'x' * 50_000, None, 7, True, ['a', ''], [7], {}, '\ud800'])
def test_expression_is_refused(text): refused([ROW | dict(normal_caption=text)], 'rows, row 1: normal_caption')


@pytest.mark.parametrize('field, values', [
    ('width', [0, -1, 80., '80', True, None, 10**6, 10**400]), ('height', [0, 60.5, None])])
def test_other_fields(field, values):
    for v in values: refused([ROW | {field: v}], f'rows, row 1: {field}')


def test_schema():
    for field in ROW:
        refused([{k: v for k, v in ROW.items() if k != field}], f'rows, row 1: fields that are missing: {field}')
    refused([ROW, {}], 'row 2: fields that are missing: normal_caption, solution, file_name')
    for bad in (None, 'row', 7, [ROW], list(ROW)): refused([bad], 'row 1: not a dict')
    akula = dict(raw_str='the left cat', img_file_name='COCO_train2014_000000000025.jpg',
                 bbox_candidates_map='{"1": [1, 2, 3, 4]}')
    refused([akula], 'row 1', 'the other Ref-Adv', 'Akula et al. 2020')
    vlm_r1 = dict(height=640, width=427, bbox_list=[[103.93, 299.99, 237.15, 476.41]],
                  image='train2014/COCO_train2014_000000581857.jpg', normal_caption='the lady with the blue shirt',
                  solution=[103.93, 299.99, 238.15, 477.41])
    refused([vlm_r1], 'row 1: fields that are missing: file_name, image_source')


# ---- anything at all

TEXT = st.text(max_size=12) | st.sampled_from(['../a', '/a', 'a://b', 'a\0', '\ud800', 'a.png', 'x' * 5000, '5'])
NUMBER = st.integers() | st.floats() | st.sampled_from([0, 1, 80, 60, 1e308, -0., 10**400])
JSON = st.recursive(st.none() | st.booleans() | NUMBER | TEXT, lambda v: st.lists(v, max_size=4)
                    | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)
BOX = st.lists(NUMBER | st.floats(-2, 82), min_size=4, max_size=4)
FIELDS = st.dictionaries(st.sampled_from([*ROW, 'id', 'image', 'raw_str']), JSON | BOX, min_size=1, max_size=3)


@given(FIELDS)
@settings(max_examples=400, deadline=None)
def test_any_field(changes):
    try: found = read_adv([ROW | changes], HOME)
    except ValueError as e: assert str(e).startswith('rows, row 1: '); return
    for sample in found:    # one an expression, where the row has a list of them
        assert all(0 <= v <= 1000 for v in sample.truth) and sample.truth[0] < sample.truth[2]
        assert sample.truth[1] < sample.truth[3] and sample.expression.strip()
        assert Path(sample.image).resolve().is_relative_to(HOME.resolve())
        json.dumps(sample.meta, allow_nan=False)
        usable, reasons = scan([sample], skip=True)
        assert len(usable) + len(reasons) == 1
        assert from_row(to_row(missed(sample, str(reasons)))).boxes == [None]


@given(st.lists(JSON, max_size=3) | JSON, st.sampled_from(['rows.json', 'rows.jsonl']))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file(tmp_path, value, name):
    lines = value if name == 'rows.jsonl' and isinstance(value, list) else [value]
    (tmp_path/name).write_text('\n'.join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match='rows.json'): read_adv(tmp_path/name, tmp_path)


@pytest.mark.parametrize('depth', [500, 900, 5_000, 100_000])
def test_nesting(tmp_path, depth):
    deep = '[' * depth + ']' * depth
    (tmp_path/'rows.jsonl').write_text(json.dumps(ROW | dict(solution=0)).replace('"solution": 0', f'"solution": {deep}'))
    refused(tmp_path/'rows.jsonl', 'rows.jsonl')


# ---- the project's own drawn pictures

KEPT = {'plain.jpg': ('RGB', None), 'exif6.jpg': ('RGB', 6), 'exif7.jpg': ('RGB', 7), 'cmyk.jpg': ('CMYK', None),
        'palette.png': ('P', None), 'clear.png': ('RGBA', None), 'grey.png': ('L', None), 'grey16.png': ('I;16', None)}


@pytest.fixture
def drawn():
    samples, reasons = scan(read_adv(HOME/'samples.jsonl', HOME, n=8))
    assert reasons == {}
    return {s.image.name: s for s in samples}


def test_drawn_files_are_what_they_should_be(drawn):
    assert {p.name for p in HOME.iterdir()} == {*KEPT, 'samples.jsonl'} and drawn.keys() == KEPT.keys()
    assert sum(p.stat().st_size for p in HOME.iterdir()) < 100_000
    assert all({*r} == {*ROW, 'id'} for r in read_jsonl(HOME/'samples.jsonl'))
    for name, (mode, tag) in KEPT.items():
        with Image.open(HOME/name) as file:
            assert (file.mode, file.getexif().get(274)) == (mode, tag)
            assert file.size == ((128, 160) if tag else (160, 128))
            assert (name in ('palette.png', 'clear.png')) == file.has_transparency_data
    assert np.unique(np.asarray(Image.open(HOME/'grey16.png')) // 257).size > 3
    assert b'Adobe' in (HOME/'cmyk.jpg').read_bytes()


# what the thing is made of, as a test of red, green, blue; and its box, read off by eye
LOOKS = {'exif6.jpg': (lambda r, g, b: g - np.maximum(r, b) > 50, (62, 93, 93, 125)),
         'exif7.jpg': (lambda r, g, b: np.minimum(np.minimum(r, g), b) > 215, (39, 47, 81, 83)),
         'palette.png': (lambda r, g, b: (g - np.maximum(r, b) > 60) & (r > 20), (51, 32, 106, 78)),
         'plain.jpg': (lambda r, g, b: (b - r > 80) & (b > 150), (45, 3, 76, 34)),
         'clear.png': (lambda r, g, b: (r - b > 60) & (g > r * .7), (26, 41, 80, 92))}


@pytest.mark.parametrize('name', LOOKS)
def test_drawn_things_are_where_their_box_says(drawn, name):
    sample, (look, by_hand) = drawn[name], LOOKS[name]
    ys, xs = look(*np.moveaxis(np.asarray(open_image(sample.image)).astype(int), -1, 0)).nonzero()
    seen = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    assert iou(to_permille(seen, 160, 128), sample.truth) == 1
    assert iou(to_permille(by_hand, 160, 128), sample.truth) == 1


def test_drawn_ground_is_white(drawn):
    for name in ('palette.png', 'clear.png'):
        assert open_image(HOME/name).getpixel((0, 0)) == (255,) * 3


# ---- real photographs

@pytest.mark.skipif(not REAL.exists(), reason='no real photographs beside the project')
def test_real_photographs():
    samples = read_adv(REAL/'samples.json', REAL/'images', n=20)
    rows = read_json(REAL/'samples.json')
    assert scan(samples) == (samples, {})
    assert [s.meta['distractors'] for s in samples] == [r['distractors'] for r in rows]
    for s, row in zip(samples, rows):
        size = row['width'], row['height']
        assert np.allclose(to_pixels(s.truth, *size), row['solution'])
        plain, marked = open_image(s.image), draw_box(s.image, s.truth)
        ys, xs = (np.asarray(plain) != np.asarray(marked)).any(-1).nonzero()
        seen = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        assert plain.size == size and np.abs(np.subtract(seen, row['solution'])).max() <= 1.5
        strip = filmstrip(s.image, [s.truth, None, (0, 0, 1000, 1000)], s.truth)
        assert 3 * 96 <= strip.image.width <= 3 * 192 + 8 and len(strip._repr_jpeg_()) < 60_000
