"""The evaluator against a second one: plain loops, and scipy's bootstrap."""
import json, random
import numpy as np
import pytest
from scipy import stats
from ivt_min.core import Trajectory, to_row, write_jsonl
from ivt_min.evaluate import (METRICS, bootstrap, hits, ious, metrics, read_run, table, target_size)

SOURCES = ('g', 'adv', 'l4')


def overlap(a, b):
    """IoU of boxes with whole corners, counted cell by cell."""
    cells = lambda box: {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    return len(cells(a) & cells(b)) / len(cells(a) | cells(b))


def some_boxes(n, seed=0):
    """Trajectories of two steps whose corners are whole and small, one in ten without a box."""
    draw, made = random.Random(seed), []
    for i in range(n):
        x, y = draw.randrange(20), draw.randrange(20)
        truth = (x, y, x + draw.randint(2, 12), y + draw.randint(2, 12))
        near = [tuple(max(0, v + draw.randint(-1, 1)) for v in truth) for _ in range(2)]
        steps = [b if b[0] < b[2] and b[1] < b[3] and draw.random() > .1 else None for b in near]
        made.append(Trajectory(f's{i}', SOURCES[i % 3], 'x', truth, steps, [], []))
    return made


def slow_metrics(trajectories, step):
    """{metric: (value, n)} in plain loops."""
    groups = {'': trajectories}
    for t in trajectories:
        groups.setdefault('/' + t.source, []).append(t)
        groups.setdefault('/' + target_size(t), []).append(t)
    found = {}
    for part, members in groups.items():
        total = dict.fromkeys(METRICS, 0)
        for t in members:
            box = t.boxes[step]
            value = overlap(box, t.truth) if box else 0
            for name, level in (('acc50', 50), ('acc70', 70), ('acc90', 90)):
                total[name] += round(value * 100, 6) >= level
            total['miou'] += value
            total['parse'] += box is not None
        found |= {name + part: (total[name] / len(members), len(members)) for name in METRICS}
    return found


@pytest.mark.parametrize('step', [0, 1])
def test_metrics_equal_plain_loops(step):
    made = some_boxes(200)
    rows = metrics('run', made, step, f'step {step}')
    assert {r['metric'] for r in rows} == slow_metrics(made, step).keys()
    for r in rows:
        value, n = slow_metrics(made, step)[r['metric']]
        assert r['value'] == pytest.approx(value, abs=1e-6) and r['n'] == n
        assert r['low'] <= r['value'] <= r['high'] and (r['run'], r['column']) == ('run', f'step {step}')


def test_order_changes_nothing():
    made = some_boxes(60)
    assert metrics('run', random.Random(1).sample(made, 60)) == metrics('run', made)


def test_a_missing_box_stays_in_n():
    made = some_boxes(50)
    lost = [Trajectory(**{**vars(t), 'boxes': [None, None]}) for t in made]
    rows = metrics('run', lost)
    assert {r['value'] for r in rows} == {0} and rows[0]['n'] == 50


def test_a_missing_step_is_an_error():
    with pytest.raises(ValueError, match='no step 2 in s0, s1, s2'):
        ious(some_boxes(5), 2)


@pytest.mark.parametrize('level', range(50, 100, 5))
def test_the_threshold_itself(level):
    """A box of `level` of 100 columns, in pictures of any width, is on the threshold."""
    for width in range(100, 1000, 7):
        columns = lambda n: (7 * 1000 / width, 0, (7 + n) * 1000 / width, 250)
        on = ious([Trajectory('a', 'g', 'x', columns(100), [columns(level)], [], [])])
        assert hits(on, level / 100) and not hits(on, level / 100, strict=True)


@pytest.mark.parametrize('k', range(10, 20))
def test_the_tolerance_lets_no_miss_through(k):
    """The nearest fractions below and above k/20 with a union as large as the picture allows."""
    union = 256_000_000   # cells of (1/16 permille)^2
    both = union * k // 20
    assert hits([(both - 1) / union, both / union, (both + 1) / union], k / 20).tolist() == [False, True, True]
    assert hits([both / union, (both + 1) / union], k / 20, strict=True).tolist() == [False, True]
    close = (k * (union - 1) // 20) / (union - 1)
    assert hits([close], k / 20)[0] == (20 * (k * (union - 1) // 20) >= k * (union - 1))


@pytest.mark.parametrize('kind', ['share', 'skewed', 'signed'])
def test_bootstrap_agrees_with_scipy(kind):
    draw = np.random.default_rng(3)
    values = {'share': draw.random(505) < .8, 'skewed': draw.beta(.5, .2, 300), 'signed': draw.normal(0, 1, 80)}[kind]
    mean, low, high = bootstrap(values, n_boot=20_000)
    other = stats.bootstrap((np.asarray(values, float),), np.mean, n_resamples=20_000, method='percentile', rng=4)
    wide = other.confidence_interval.high - other.confidence_interval.low
    assert mean == pytest.approx(np.mean(values))
    assert abs(low - other.confidence_interval.low) < .04 * wide
    assert abs(high - other.confidence_interval.high) < .04 * wide


def test_bootstrap_of_any_number_of_resamples():
    values = np.arange(10)
    for n_boot in (1, 99, 100, 101):
        mean, low, high = bootstrap(values, n_boot=n_boot)
        assert mean == 4.5 and 0 <= low <= high <= 9
    assert bootstrap(values) == bootstrap(values) == bootstrap(values[::-1]) != bootstrap(values, seed=1)
    for bad in ([], [float('nan')], [1, float('inf')]):
        with pytest.raises(ValueError):
            bootstrap(bad)


def test_run_there_and_back(tmp_path):
    made = some_boxes(20)
    write_jsonl(tmp_path / 'run/val.jsonl', map(to_row, made))
    assert metrics('x', read_run(tmp_path / 'run', 'val', made)) == metrics('x', made)


@pytest.mark.parametrize('change, message', [
    (lambda rows: rows[:-1], '19 samples, not 20'),
    (lambda rows: rows[:-1] + rows[:1], 'asked was s19'),
    (lambda rows: rows[:-1] + [{**rows[-1], 'truth': None}], 'finite numbers'),
    (lambda rows: rows[:-1] + [{'id': 'alone'}], 'not a trajectory'),
    (lambda rows: [], '0 samples'),
])
def test_a_wrong_run_is_refused(tmp_path, change, message):
    write_jsonl(tmp_path / 'test.jsonl', map(to_row, some_boxes(20)))
    rows = [json.loads(line) for line in (tmp_path / 'test.jsonl').read_text().splitlines()]
    (tmp_path / 'test.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in change(rows)))
    with pytest.raises(ValueError, match=message) as e:
        read_run(tmp_path, asked=some_boxes(20))
    assert str(tmp_path / 'test.jsonl') in str(e.value)


def test_table_shows_every_row_once():
    rows = metrics('a', some_boxes(30)) + metrics('b', some_boxes(12, seed=1))
    short, long = table(rows), table(rows, parts=True)
    assert [line[0] for line in short.body] == ['a', 'b'] and [line[-1] for line in short.body] == ['30', '12']
    assert sum(len([c for c in line if '[' in c]) for line in long.body) == len(rows)
    assert short.body[0][2] == '{value:.3f} [{low:.3f}, {high:.3f}]'.format(**rows[0])
