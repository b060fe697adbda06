"""The benchmark under fire: all three splits that may be looked at, and fresh scenes with many questions."""
import json
import pytest
from ivt_min.core import rng
from ivt_min.scenes import DIALECTS, SIZES, Thing, draw_scene, split
from scene_reader import complaints, read


@pytest.mark.parametrize('name', ['train', 'val', 'test'])
def test_every_sentence_means_its_thing(name):
    for i in range(SIZES[name]):
        _, owner, things, asked = draw_scene(DIALECTS[i % 3], rng('scene', name, i), owner=True)
        assert complaints(owner, things, asked) == [], (name, i)


@pytest.mark.parametrize('dialect', DIALECTS)
def test_fresh_scenes_with_four_questions(dialect):
    for i in range(400):
        _, owner, things, asked = draw_scene(dialect, rng('four questions', dialect, i), 4, owner=True)
        assert len({text for text, _ in asked}) == 4
        assert complaints(owner, things, asked) == [], (dialect, i)


@pytest.mark.parametrize('name', ['val', 'test'])
def test_a_sample_is_its_scene(name):
    for i, sample in enumerate(split(name, 60)):
        image, things, [(text, target)] = draw_scene(DIALECTS[i % 3], rng('scene', name, i))
        assert sample.image.tobytes() == image.tobytes() and sample.expression == text
        assert sample.truth == sample.meta['boxes'][target] == tuple(v * 1000 / 128 for v in things[target].box)
        assert json.loads(json.dumps(sample.meta))['target'] == target and sample.id == f'{name}-{i:04d}'
        assert sample.image.size == (128, 128) and sample.image.mode == 'RGB'


def thing(kind, color, box, size='medium', pattern='plain'): return Thing(kind, color, pattern, size, 0, 0, 0, 0, box)


ROW = [thing('star', 'red', (0, 0, 20, 20)), thing('star', 'blue', (40, 50, 60, 70)),
       thing('ring', 'red', (90, 90, 128, 128), 'large', 'dotted')]


@pytest.mark.parametrize('text, meant', [
    ('the star', [0, 1]), ('the red object', [0, 2]), ('the large dotted red ring', [2]), ('the green star', []), ('the star beside the ring', []),
    ('the leftmost object', [0]), ('the second object from the right', [1]), ('the largest red object', [2]),
    ('the second ring from the top', []), ('the object in the top left corner', [0]), ('the star in the middle', [1]),
    ('the star above the blue star', [0]), ('the star that is not below the red star', []),
    ('the object closest to the ring', [1]), ('the star that is not red', [1]), ('the red object that is not a ring', [0]),
    ('the object that is neither red nor green', [1]), ('the red star at the top that is left of the ring', [0]),
])
def test_the_reader(text, meant):
    assert read(text, ROW) == [ROW[i] for i in meant]


@pytest.mark.parametrize('text', ['a star', 'the ring above the star', ''])
def test_the_reader_can_refuse(text):
    with pytest.raises((AttributeError, ValueError)): read(text, ROW)


def test_complaints_are_possible():
    _, owner, things, [(text, i)] = draw_scene('adv', rng('complaint'), owner=True)
    assert complaints(owner, things, [(text, (i + 1) % len(things))]) == [text] * 3
    assert len(complaints(owner[::-1], things, [])) > 0
