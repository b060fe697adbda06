"""The columns against a second implementation in exact fractions and plain loops, and against scipy."""
import random
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from ivt_min.boxes import iou
from ivt_min.core import Trajectory, read_json, write_json
from ivt_min.columns import (RULES, choose_rule, columns, compare, dynamics, mcnemar, oracle, paired, per_sample, pick,
                             single)
from ivt_min.evaluate import bootstrap, hits, ious, metrics

CHOICES = ('step 0', 'oracle', *RULES)
FUZZ, SLOW = (settings(max_examples=n, deadline=None) for n in (100, 25))   # slow: where intervals are drawn


# ---- the second implementation: boxes with whole corners, nothing rounded

def overlap(a, b):
    if a is None or b is None:
        return F(0)
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = sum((F(c[2]) - F(c[0])) * (F(c[3]) - F(c[1])) for c in (a, b))
    return F(w) * F(h) / (area - F(w) * F(h))


def first_best(options, value):
    best = options[0]
    for option in options[1:]:
        if value(option) > value(best):
            best = option
    return best


def slow_pick(t, choice):
    boxes = [tuple(map(int, b)) if b else None for b in t.boxes]
    there = [i for i, b in enumerate(boxes) if b]
    if choice in ('step 0', 'first'):
        return boxes[0]
    if choice == 'oracle':
        return first_best([boxes[i] for i in there] or [None], lambda b: overlap(b, t.truth))
    if choice == 'last' or not there:
        return boxes[-1]
    if choice == 'confident':
        said = [i for i in there if t.confidences and t.confidences[i] is not None]
        return boxes[first_best(said or there, lambda i: t.confidences[i] if said else 0)]
    if choice == 'mean':
        return tuple(F(sum(boxes[i][k] for i in there), len(there)) for k in range(4))
    if choice == 'medoid':
        return boxes[first_best(there, lambda i: sum(overlap(boxes[i], boxes[j]) for j in there if j != i))]
    if choice.startswith('agree'):
        for t in range(1, len(boxes)):
            if overlap(boxes[t - 1], boxes[t]) >= F(int(choice[-2:]), 100):
                return boxes[t]
    return boxes[there[-1]]


def slow_score(trajectories, choice):
    return [overlap(slow_pick(t, choice), t.truth) for t in trajectories]


def mean(values):
    return sum(values, F(0)) / len(values)


def slow_dynamics(trajectories):
    """{metric: (value, n)} in plain loops."""
    groups, found = {'': trajectories}, {}
    for t in trajectories:
        groups.setdefault('/' + t.source, []).append(t)
    for part, members in groups.items():
        lists = {}
        for t in members:
            u = [overlap(b, t.truth) for b in t.boxes]
            steps = range(1, len(u))
            new = dict(
                D=sum(u[i - 1] - u[i] for i in steps if u[i] < u[i - 1]) / F(len(steps)),
                signed=(u[-1] - u[0]) / len(steps),
                degrade=u[-1] < u[0] - F(1, 100), improve=u[-1] > u[0] + F(1, 100),
                copies=F(sum(overlap(t.boxes[i - 1], t.boxes[i]) > F(99, 100) for i in steps), len(steps)))
            new['stagnate'] = not new['degrade'] and not new['improve']
            kind = 'hard' if u[0] < F(1, 2) else 'easy'
            new |= {f'{kind}_first': u[0], f'{kind}_last': u[-1]}
            new |= {f'miou_step{i}': v for i, v in enumerate(u)}
            for k, v in new.items():
                lists.setdefault(k, []).append(F(v))
        found |= {k + part: (float(mean(v)), len(v)) for k, v in lists.items()}
    return found


# ---- what is tried

def a_box(side):
    corner = st.integers(0, side - 1)
    pair = st.tuples(corner, st.integers(1, side)).map(lambda p: (p[0], min(side, p[0] + p[1])))
    return st.tuples(pair, pair).map(lambda p: tuple(map(float, (p[0][0], p[1][0], p[0][1], p[1][1]))))


@st.composite
def a_run(draw, least=1, side=6):
    """Trajectories of one length; a small side makes ties and copies likely."""
    steps, made = draw(st.integers(least, 4)), []
    logp = st.sampled_from((None, -2., -1., -.5))
    for i in range(draw(st.integers(1, 6))):
        boxes = draw(st.lists(st.none() | a_box(side), min_size=steps, max_size=steps))
        logps = draw(st.just([]) | st.lists(logp, min_size=steps, max_size=steps))
        source = draw(st.sampled_from(('g', 'adv', 'l4')))
        made.append(Trajectory(f's{i}', source, 'x', draw(a_box(side)), boxes, logps, []))
    return made


def many(n, seed=0, steps=3, name='s'):
    """Trajectories near the truth, of whole corners, one box in ten missing."""
    draw, made = random.Random(seed), []
    for i in range(n):
        x, y = draw.randrange(20), draw.randrange(20)
        truth = (x, y, x + draw.randint(4, 14), y + draw.randint(4, 14))
        boxes = [tuple(float(max(0, v + draw.choice((-1, 0, 0, 1)))) for v in truth) for _ in range(steps)]
        boxes = [b if draw.random() > .1 else None for b in boxes]
        logps = [b and -draw.random() for b in boxes]
        made.append(Trajectory(f'{name}{i}', ('g', 'adv', 'l4')[i % 3], 'x', tuple(map(float, truth)), boxes, logps, []))
    return made


def shuffled(values, seed=0):
    return random.Random(seed).sample(values, len(values))


def with_other(t, **fields):
    return Trajectory(**{**vars(t), **fields})


# ---- rules

@FUZZ
@given(a_run())
def test_rules_equal_exact_fractions(made):
    for choice in CHOICES:
        for t, one in zip(made, single(made, choice)):
            expected, found = slow_pick(t, choice), one.boxes[0]
            assert (found is None) == (expected is None)
            assert found is None or found == pytest.approx(tuple(map(float, expected)), abs=1e-9)
            assert (one.id, one.truth, len(one.boxes)) == (t.id, t.truth, 1)


@FUZZ
@given(a_run(), st.integers(0, 99))
def test_a_rule_never_looks_at_the_truth(made, seed):
    for t in made:
        for rule in RULES:
            for garbage in ((0., 0., 1., 1.), (float('nan'),) * 4, None, 'truth'):
                assert pick(with_other(t, truth=garbage, id='?', source='?', expression='?'), rule) == pick(t, rule)


@FUZZ
@given(a_run())
def test_nothing_beats_the_oracle_but_a_box_of_no_step(made):
    best = ious(single(made, 'oracle'))
    for choice in set(CHOICES) - {'mean'}:
        assert (ious(single(made, choice)) <= best).all()
    for t in made:
        for rule in set(RULES) - {'mean'}:
            assert pick(t, rule) in t.boxes
        assert oracle(t) in t.boxes and (oracle(t) is None) == (set(t.boxes) == {None})


@FUZZ
@given(a_run())
def test_held_is_last_where_every_box_is_there(made):
    for t in made:
        if t.boxes[-1] is not None:
            assert pick(t, 'held') == pick(t, 'last') == t.boxes[-1]
        if len(set(t.boxes)) == 1:
            assert {pick(t, rule) for rule in RULES} == {t.boxes[0]}


@pytest.mark.parametrize('before, agrees', [(49, ()), (50, (50,)), (69, (50,)), (70, (50, 70)), (90, (50, 70, 90))])
def test_agreement_on_the_threshold(before, agrees):
    """Boxes that share `before` of 100 columns, in pictures of any width."""
    for width in range(110, 1000, 41):
        box = lambda n: (7 * 1000 / width, 0, (7 + n) * 1000 / width, 250)
        t = Trajectory('a', 'g', 'x', box(100), [box(before), box(100), box(3)], [], [])
        assert [pick(t, f'agree{x}') == box(100) for x in (50, 70, 90)] == [x in agrees for x in (50, 70, 90)]


def test_a_tie_of_sums_goes_to_the_earliest():
    """Sums of fractions that are equal, in floats only nearly."""
    draw, close = random.Random(0), 0
    for _ in range(2000):
        corners = [(draw.randrange(4), draw.randrange(4)) for _ in range(4)]
        boxes = [(x, y, x + draw.randint(1, 3), y + draw.randint(1, 3)) for x, y in corners]
        t = Trajectory('a', 'g', 'x', (0, 0, 1, 1), boxes, [], [])
        floats = first_best(boxes, lambda b: sum(iou(b, c) for c in boxes))
        if floats != slow_pick(t, 'medoid'):
            close += 1
            assert pick(t, 'medoid') == slow_pick(t, 'medoid')
    assert close


def test_unknown_choices_are_refused():
    for bad in ('step 0', 'oracle', 'best', ''):
        with pytest.raises(ValueError, match='no rule'):
            pick(many(1)[0], bad)
    with pytest.raises(ValueError, match='no rule'):
        single(many(1), 'best')


# ---- the choice of a rule, and the columns

@FUZZ
@given(a_run(), st.integers(0, 99))
def test_the_rule_is_the_best_on_average_and_the_first_of_equals(made, seed):
    means = {rule: round(mean(slow_score(made, rule)), 9) for rule in RULES}    # ties are ties
    assert choose_rule(made) == first_best(list(RULES), means.get)
    assert choose_rule(shuffled(made, seed)) == choose_rule(made)


def test_a_tie_of_means_goes_to_the_first_rule():
    """The last boxes have the IoUs of the confident ones, in another order; their sums of floats differ."""
    draw, close = random.Random(0), 0
    for _ in range(60):
        widths = [draw.randint(1, 12) for _ in range(7)]
        box = lambda width: (0., 0., float(width), 1.)
        made = [Trajectory(f's{i}', 'g', 'x', box(12), [box(a), (0., 20., 1., 21.), box(b)], [-1., -2., -3.], [])
                for i, (a, b) in enumerate(zip(widths, shuffled(widths, draw.random())))]
        last, sure = (ious(single(made, rule)).mean() for rule in ('last', 'confident'))
        close += sure > last
        assert choose_rule(made) == 'first' and mean(slow_score(made, 'first')) == mean(slow_score(made, 'confident'))
    assert close


def test_columns_equal_plain_loops():
    test, val = many(150), many(90, 1, name='v')
    rule, rows = first_best(list(RULES), lambda r: mean(slow_score(val, r))), columns('run', test, val, seed=3)
    assert list(dict.fromkeys(r['column'] for r in rows)) == ['step 0', 'last', 'label-free', 'oracle']
    for column in ('step 0', 'last', 'label-free', 'oracle'):
        own, choice = [r for r in rows if r['column'] == column], rule if column == 'label-free' else column
        boxes = [slow_pick(t, choice) for t in test]
        made = [with_other(t, boxes=[b and tuple(map(float, b))], confidences=[]) for t, b in zip(test, boxes)]
        plain = metrics('run', made, 0, column, 3)
        for a, b in zip(own, plain, strict=True):
            assert {k: a[k] for k in b} == pytest.approx(b)
        assert {r.get('rule') for r in own} == {rule if column == 'label-free' else None}
        at = {r['metric']: r['value'] for r in own}
        u = [overlap(b, t.truth) for t, b in zip(test, boxes)]
        for metric, level in (('acc50', F(1, 2)), ('acc70', F(7, 10)), ('acc90', F(9, 10))):
            assert at[metric] == pytest.approx(sum(v >= level for v in u) / len(u), abs=1e-6)
        assert at['miou'] == pytest.approx(float(mean(u)), abs=1e-6)


def test_columns_of_any_order_are_the_same():
    test, val = many(60), many(60, 1, name='v')
    assert columns('run', shuffled(test), shuffled(val)) == columns('run', test, val)


def test_the_test_does_not_choose():
    test, val = many(60), many(60, 1, name='v')
    rule = {r.get('rule') for r in columns('run', test, val)}
    garbage = [with_other(t, truth=(0., 0., 1., 1.)) for t in test]
    assert {r.get('rule') for r in columns('run', garbage, val)} == rule
    with pytest.raises(ValueError, match='run: s59 in test and in val'):
        columns('run', test, val + test[59:])


def test_one_step_has_four_equal_columns():
    rows = columns('run', many(40, steps=1), many(40, 1, 1, 'v'))
    of = lambda c: [{k: v for k, v in r.items() if k not in ('column', 'rule')} for r in rows if r['column'] == c]
    assert of('step 0') == of('last') == of('label-free') == of('oracle')
    assert {r.get('rule') for r in rows} == {None, 'first'}


# ---- dynamics

@SLOW
@given(a_run(least=2))
def test_dynamics_equal_exact_fractions(made):
    rows, slow = dynamics('run', made), slow_dynamics(made)
    assert {r['metric'] for r in rows} == slow.keys() and len(rows) == len(slow)
    for r in rows:
        value, n = slow[r['metric']]
        assert r['value'] == pytest.approx(value, abs=1.1e-6) and r['n'] == n
        assert r['low'] - 1e-9 <= r['value'] <= r['high'] + 1e-9
        assert (r['run'], r['column']) == ('run', 'dynamics')


@SLOW
@given(a_run(least=2), st.integers(0, 99))
def test_laws_of_the_dynamics(made, seed):
    way, n = per_sample(made), len(made)
    assert {len(v) for v in way.values()} == {n}
    assert (way['D'] >= 0).all() and (way['D'] + way['signed'] >= -1e-12).all()
    assert (sum(way[k].astype(int) for k in ('degrade', 'stagnate', 'improve')) == 1).all()
    backwards = per_sample([with_other(t, boxes=t.boxes[::-1]) for t in made])
    assert backwards['degrade'].tolist() == way['improve'].tolist()
    assert backwards['signed'] == pytest.approx(-way['signed'])
    assert backwards['D'] - way['D'] == pytest.approx(way['signed'])   # rises less falls is the change
    assert backwards['copies'] == pytest.approx(way['copies'])
    first = np.where(np.isnan(way['hard_first']), way['easy_first'], way['hard_first'])
    assert (first == ious(made, 0)).all() and (np.isnan(way['hard_last']) != np.isnan(way['easy_last'])).all()
    assert dynamics('run', shuffled(made, seed)) == dynamics('run', made)


def test_on_the_margins():
    """A change of .01 stagnates and an IoU of .99 with the box before is no copy, in any unit."""
    for width in range(110, 1000, 41):
        box = lambda n: (7 * 1000 / width, 0, (7 + n) * 1000 / width, 250)
        made = [Trajectory(f's{a}-{b}', 'g', 'x', box(100), [box(a), box(b)], [], [])
                for a in range(2, 99, 7) for b in (a - 1, a + 1)]
        assert per_sample(made)['stagnate'].all()
        pair = [Trajectory('a', 'g', 'x', box(100), [box(99), box(100)], [], []),
                Trajectory('b', 'g', 'x', box(50), [box(25), box(25)], [], [])]
        assert per_sample(pair)['copies'].tolist() == [0, 1] and not np.isnan(per_sample(pair)['easy_last'][1])


@pytest.mark.parametrize('made', [[], many(3, steps=1), many(3, steps=2) + many(3, steps=3, name='v')])
def test_trajectories_of_other_lengths_are_refused(made):
    with pytest.raises(ValueError, match='boxes a trajectory'):
        dynamics('run', made)


def test_intervals_are_those_of_the_bootstrap():
    made = many(120)
    way = per_sample(made)
    for r in dynamics('run', made, seed=5):
        name, _, part = r['metric'].partition('/')
        v = np.array([x for x, t in zip(way[name], made) if part in ('', t.source) and not np.isnan(x)], float)
        assert (r['value'], r['low'], r['high']) == tuple(round(x, 6) for x in bootstrap(v, 5))


# ---- pairs

@pytest.mark.parametrize('wins', range(0, 41, 4))
def test_mcnemar_is_the_binomial_test(wins):
    for losses in range(41):
        old = [0] * wins + [1] * losses + [0, 1] * 3
        new = [1] * wins + [0] * losses + [0, 1] * 3
        p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
        assert mcnemar(old, new) == mcnemar(new, old) == pytest.approx(p, rel=1e-9)
        assert mcnemar(np.array(old, bool), np.array(new, bool)) == mcnemar(old, new)


def test_the_p_of_a_mcnemar_test_is_honest():
    """Where neither is better, p < .05 happens in at most 5 % of cases."""
    draw = np.random.default_rng(0)
    p = [mcnemar(*(draw.random((2, 100)) < .7)) for _ in range(1000)]
    assert .01 < np.mean(np.array(p) < .05) < .055


@pytest.mark.parametrize('kind', ['shares', 'scores'])
def test_paired_agrees_with_scipy(kind):
    draw = np.random.default_rng(3)
    old = draw.beta(2, 1, 400)
    new = np.clip(old + draw.normal(.02, .1, 400), 0, 1)
    if kind == 'shares':
        old, new = old > .5, new > .5
    value, low, high = paired(old, new)
    old, new = np.asarray(old, float), np.asarray(new, float)
    other = stats.bootstrap((old, new), lambda a, b, axis=-1: b.mean(axis) - a.mean(axis), paired=True,
                            vectorized=True, n_resamples=20_000, method='percentile', rng=4).confidence_interval
    assert value == pytest.approx(new.mean() - old.mean())
    wide = other.high - other.low
    assert abs(low - other.low) < .08 * wide and abs(high - other.high) < .08 * wide


def test_pairing_matters():
    draw = np.random.default_rng(1)
    old = draw.random(300)
    new = old + .02 + draw.normal(0, .01, 300)
    assert paired(old, new)[1] > 0 > paired(old, shuffled(new.tolist()))[1]
    assert paired(old, old) == (0, 0, 0)
    assert paired(old, new, 7) == bootstrap(new - old, 7) != paired(old, new)
    with pytest.raises(ValueError, match='3 values against 2'):
        paired([1, 2, 3], [1, 2])


@SLOW
@given(a_run())
def test_compare_equals_plain_loops(made):
    for a, b in (('step 0', 'last'), ('last', 'oracle'), ('medoid', 'held')):
        rows = compare('b', 'a', single(made, b), single(made, a))
        back = compare('a', 'b', single(made, a), single(made, b))
        u, v = slow_score(made, a), slow_score(made, b)
        for row, other, level in zip(rows, back, (F(1, 2), F(7, 10), F(9, 10), None), strict=True):
            x, y = ([F(s >= level) for s in w] if level else w for w in (u, v))
            assert row['value'] == pytest.approx(float(mean(y) - mean(x)), abs=1.1e-6)
            assert row['value'] == -other['value'] and row['n'] == len(made)
            if level:
                assert row['wins'] == sum(q > p for p, q in zip(x, y)) == other['losses']
                assert row['losses'] == sum(q < p for p, q in zip(x, y)) == other['wins']
                assert row['p'] == other['p'] == mcnemar(x, y)
        assert [r['metric'] for r in rows] == ['d_acc50', 'd_acc70', 'd_acc90', 'd_miou']
        assert {(r['run'], r['column']) for r in rows} == {('b', 'vs a')} and 'p' not in rows[-1]


def test_intervals_of_a_comparison_are_paired():
    made = many(150)
    old, new = single(made, 'step 0'), single(made, 'held')
    rows = compare('x', 'y', new, old, seed=7)
    for row, level in zip(rows, (.5, .7, .9)):
        expected = paired(hits(ious(old), level), hits(ious(new), level), 7)
        assert (row['value'], row['low'], row['high']) == tuple(round(x, 6) for x in expected)
    assert rows[-1]['low'] == round(paired(ious(old), ious(new), 7)[1], 6)


@pytest.mark.parametrize('change, why', [
    (lambda new: new[::-1], 's9: asked was s0'), (lambda new: new[:4], '4 samples, not 10'),
    (lambda new: new[:4] + new[5:] + new[4:5], 's5: asked was s4'),
    (lambda new: new + many(11)[10:], '11 samples, not 10'), (lambda new: [], '0 samples, not 10'),
    (lambda new: new[:3] + [with_other(new[3], truth=(0., 0., 1., 2.))] + new[4:], 's3: asked was s3'),
])
def test_other_questions_are_refused(change, why):
    old = single(many(10), 'step 0')
    with pytest.raises(ValueError, match=f'^{why}'):
        compare('a', 'b', change(old), old)
    with pytest.raises(ValueError, match='s0: 3 answers, not 1'):
        compare('a', 'b', many(10), many(10))


def test_rows_go_through_json(tmp_path):
    test, val = many(30), many(30, 1, name='v')
    rows = columns('run', test, val) + dynamics('run', test)
    rows += compare('run', 'step 0', single(test, 'held'), single(test, 'step 0'))
    write_json(tmp_path / 'rows.json', rows)
    assert read_json(tmp_path / 'rows.json') == rows
    assert {type(v) for r in rows for v in r.values()} == {str, int, float}
