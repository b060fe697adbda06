"""The parser under fire: known forms of answers, random texts, and texts made to be slow."""
import json, math, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from ivt_min.boxes import format_box, iou, parse_box

CASES = [json.loads(line) for line in (Path(__file__).parent/'parser_cases.jsonl').open(encoding='utf-8')]
PIECES = ['```', 'json', '<think>', '</think>', '<answer>', '</answer>', '<|im_end|>', '{', '}', '[', ']', '(', ')',
          ',', ':', ' ', '\n', '"', "'", '"bbox_2d"', '"label"', '12', '-5', '.5', '1e9', '1e999', '999', 'NaN', 'null',
          'true', '[1, 2, 3, 4]', '{"bbox_2d": [10, 20, 30, 40]}', '\\', '\x00', '\ud800', '\u0663', '9' * 50]


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['text'][:30])
def test_known_forms(case):
    raw = parse_box(case['text']).raw
    assert (raw if raw is None else list(raw)) == case['raw']


def check(text, **kw):
    p = parse_box(text, **kw)
    assert (p.box is None) == (p.error is not None)
    assert set(p.repairs) <= {'json', 'ordered', 'clipped'} and p.n_boxes >= (p.raw is not None)
    if p.raw is not None: assert len(p.raw) == 4 and all(math.isfinite(v) and abs(v) <= 10_000 for v in p.raw)
    if p.box is not None:
        x0, y0, x1, y1 = p.box
        assert 0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000 and all(type(v) is float for v in p.box)
        assert iou(p.box, p.box) == 1


@settings(max_examples=400, deadline=None)
@given(st.text())
def test_any_text(text): check(text)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map(''.join), st.sampled_from(['rel1000', 'rel1', 'abs']))
def test_any_pieces(text, mode): check(text, mode=mode, size=(640, 428))


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda s: st.lists(s, max_size=5) | st.dictionaries(st.sampled_from(['bbox', 'x', 'boxes']), s)))
def test_any_json(value): check(json.dumps(value))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-10_000, 10_000), min_size=4, max_size=4))
def test_every_list_of_four_is_read(numbers):
    p = parse_box(json.dumps(numbers))
    assert list(p.raw) == numbers and 'json' not in p.repairs
    assert list(parse_box(f'here: {numbers} (1 of 2)').raw) == numbers


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 999), st.integers(0, 999), st.integers(1, 1000), st.integers(1, 1000))
def test_round_trip(x0, y0, w, h):
    box = (x0, y0, min(x0 + w, 1000), min(y0 + h, 1000))
    p = parse_box(format_box(box))
    assert (p.raw, p.box, p.n_boxes, p.repairs, p.error) == (box, box, 1, (), None)


@pytest.mark.parametrize('text', ['[' * 10_000, '[' * 10_000 + '1, 2, 3, 4' + ']' * 10_000, '{"a":' * 10_000,
                                  '[' + '1' * 4000 + ', 1, 2, 3]', '1' * 4000 + ' 1 2 3', '[0.' + '1' * 4000 + ', 1, 2, 3]'])
def test_deep_and_long(text):
    start = time.process_time()
    check(text)
    assert time.process_time() - start < .5


UNITS = ['[', '(', '{', '1', '1 ', '1   ', '1,', '1.', '.1', '-', '1e', '(1', '(1,2),', '(1,2)  ', '[1,1,1,1],', '1,1,1,1]',
         '(1,1,1,1)', '"a":[1,2,3,4],', '{"a":', '"1",', '"[1,2,3,4]",', ' ', '\n', '"', '\\', '```', '<think>', '</think>',
         '<answer>', '<|', '<|a', 'x=', 'bbox: ', 'a']


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('ends', [('', ''), ('[', ']'), ('[[1,', ''), ('"', '"')])
def test_a_megabyte(unit, ends):
    text = ends[0] + unit * (10**6 // len(unit)) + ends[1]
    start = time.process_time()
    check(text)
    assert time.process_time() - start < 3   # about .5 on an idle core; a quadratic search takes hours
