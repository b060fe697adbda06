"The audit kit, as 23_audit.ipynb teaches it: edit it there. `ivt_min audit` runs it."


import json, os, sys
from base64 import b64encode
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
import numpy as np
from ivt_min.core import Sample, _dumps, data_path, from_row, read_jsonl, replace_file, unique
from ivt_min.boxes import iou, parse_box
from ivt_min.render import open_image, show
from ivt_min.evaluate import hits, ious, part_rows, result_row, table, target_size
from ivt_min.scenes import split
from ivt_min.columns import (COLUMNS, RULES, columns, compare, dynamics, holm, label_free,
                             single)
from ivt_min.evidence import placebo, power, reliability, risk_coverage
from ivt_min.datasets import (LAYOUTS, _SIZE, _at, _must, _picture, _read, _rows_of, _side,
                              missed, read_rows)

_CALLED = dict(     # what other programs call the fields of a row
    question='expression', problem='expression', normal_caption='expression',
    ground_truth='truth', solution='truth', image_path='image',
    model_output='texts', turn_responses='texts')

def _read_box(answer, mode, size):
    "What is read of a text, of four numbers, or of None."
    text = answer if type(answer) is str else json.dumps(answer)
    found = parse_box(text, mode, size)
    _must(found.raw or text in (answer, 'null'), f'box {text:.60}: not four numbers')
    return found

def _size(x):   # of a sample's picture, px, 0 unknown
    return [x.meta.get(side) or 0 for side in _SIZE]

def _asked(row, name, mode, images):
    "The sample that a row of answers tells of itself; `truth` in its meta: the numbers as written."
    image = None
    with suppress(ValueError): image = _picture(row.get('image'), images)
    size = [_read(row, side, _side) if side in row else None for side in _SIZE]
    if mode == 'abs' and None in size: size = open_image(image or 'neither size nor picture').size
    truth = _read_box(row.get('truth'), mode, size)
    _must(truth.box and 'ordered' not in truth.repairs, f'truth {row.get("truth")}: no {mode} box')
    return Sample(name, str(row.get('source', 'all')), str(row.get('expression', '')), truth.box,
                  image, dict(zip(_SIZE, size), truth=truth.raw))

def _answered(row, x, mode):
    "A row of answers to a sample as a trajectory, and the numbers of each."
    texts = row.get('texts', [])
    if type(texts) is str: texts = [texts]
    answers = row.get('boxes', texts)
    _must(type(answers) is list and answers, 'neither `boxes` nor `texts`, one a step')
    found = [_read_box(answer, mode, _size(x)) for answer in answers]
    heard = [_read_box(text, mode, _size(x)) for text in texts] or found
    notes = [[q.error, *q.repairs, 'text differs' if q.box != p.box else '']
             for p, q in zip(found, heard)]
    if 'single' in row: x.meta['single'] = _read_box(row['single'], mode, _size(x)).box
    _must(type(row.get('kept')) in (int, type(None)), 'kept: not the number of a box')
    more = {field: row[field] for field in ('confidences', 'verdicts', 'kept') if field in row}
    return from_row(more | dict(
        id=x.id, source=x.source, expression=x.expression, truth=x.truth, texts=texts,
        boxes=[p.box for p in found], notes=['; '.join(filter(None, note)) for note in notes])
        ), [p.raw for p in found if p.raw]

def _check_unit(seen, mode, what):
    "Refuse boxes of another unit, with a guess; `seen`: four numbers and the picture's size, each."
    far = np.array([(max(raw[::2]), max(raw[1::2])) for raw, _ in seen])    # (n, 2)
    ends = dict(rel1=1, rel1000=1000, abs=np.array([size for _, size in seen]))
    few = len(seen) < 20
    held = {unit: np.mean(end) for unit, end in ends.items()
            if (far <= end).mean() >= (.5 if few else .95)}
    guess = min(held, key=held.get, default='pixels of larger pictures')
    fine = mode in held and (guess == mode or few and guess != 'rel1')
    _must(fine, f'{what}: read as {mode}, but the numbers look like {guess}')

def read_answers(
    path,           # rows, .jsonl, .json or .parquet; in JSON they may stand under 'results'
    samples=None,   # list of Sample that were asked; by default the rows tell what was asked
    mode='rel1000', # unit of the answers: 'rel1000' permille, 'rel1' fractions, 'abs' px
    truth_mode=None,    # unit of the true boxes in the rows, where it is another
    images=None,    # folder of the pictures; by default that of the file
):                  # list of Trajectory, in the order of the samples; the samples
    "Answers of any program; what nobody answered has no box. ValueError names file and row."
    path = Path(path)
    asked = {x.id: x for x in samples or []}
    done, seen = {}, []
    for i, row in enumerate(_rows_of(path)):
        with _at(f'{path}, row {i + 1}'):
            _must(type(row) is dict, 'not a dict')
            row = {_CALLED.get(field, field): value for field, value in row.items()}
            name = str(row.get('id', f'{path.stem}-{i:04d}'))
            _must(name not in done, f'id {name!r} is there twice')
            if samples is None:
                asked[name] = _asked(row, name, truth_mode or mode, images or path.parent)
            _must(name in asked, f'id {name!r}: nobody asked')
            done[name], raws = _answered(row, asked[name], mode)
            seen += [(raw, _size(asked[name])) for raw in raws]
    _must(seen, f'{path}: no box in it')
    keeps = [t.kept is not None for t in done.values() if any(t.boxes)]
    _must(sum(keeps) in (0, len(keeps)), f'{path}: `kept` in {sum(keeps)} of {len(keeps)} rows')
    _check_unit(seen, mode, f'{path}: answers')
    if samples is None:
        truths = [(x.meta['truth'], _size(x)) for x in asked.values()]
        _check_unit(truths, truth_mode or mode, f'{path}: truths')
    steps = max(len(t.boxes) for t in done.values())
    answers = [done.get(x.id) or missed(x, 'nobody answered', steps) for x in asked.values()]
    whole = [replace(t, boxes=(t.boxes + t.boxes[-1:] * steps)[:steps],   # the last answer stands
                     notes=(t.notes + ['stopped before'] * steps)[:steps]) for t in answers]
    return whole, [*asked.values()]

def _differences(name, test, free, controls):
    "Rows of `compare`; p is corrected over all of them but the oracles'."
    first = single(test, 'step 0')
    tried = {'last': single(test, 'last'), 'label-free': free, 'oracle': single(test, 'oracle'),
             'placebo oracle': single(placebo(test), 'oracle')}
    pairs = {f'{new} vs step 0': (own, first) for new, own in tried.items()}
    pairs |= {'oracle vs placebo': (tried['oracle'], tried['placebo oracle'])}
    pairs |= {f'label-free vs {other}': (free, own) for other, own in controls.items()}
    rows = [row | dict(column=column) for column, (new, old) in pairs.items()
            for row in compare(name, column, new, old)]
    family = [row for row in rows if 'p' in row and 'oracle' not in row['column']]
    for row, p in zip(family, holm([row['p'] for row in family])): row['holm'] = p
    return rows

def _knows(name, test):
    "Rows of `reliability` and `risk_coverage`; none where the loop says nothing of its boxes."
    field = 'verdicts' if any(t.verdicts for t in test) else 'confidences'
    said = [[*getattr(t, field), *[None] * len(t.boxes)][t.kept or 0] for t in test]
    right = hits(ious(single(test, 'kept')), .5)
    said = np.array(said, float)    # None is NaN
    asked = np.isfinite(said)
    if not asked.any(): return []
    chance, others = np.exp(said), -np.inf
    if field == 'verdicts': chance, others = 1 / (1 + np.exp(-said)), np.inf    # undisputed: sure
    return reliability(name, chance[asked], right[asked]) + risk_coverage(
        name, np.where(asked, said, others), right)

def _warnings(test, val=None):
    "What must be said of the answers -> the ids of those samples."
    known = {(t.expression, t.truth) for t in val or []}
    twice = [t.id for t in test if (t.expression, t.truth) in known]
    found = {'the same question in val, by another name': twice} if twice else {}
    for t in test:
        above = ['log-probability above 0' for v in t.confidences if (v or 0) > 0]
        said = dict.fromkeys('; '.join([*t.notes, *above]).split('; '))
        for what in filter(None, said): found.setdefault(what, []).append(t.id)
    return found

def in_words(
    rows,   # dicts of `audit`
    rule,   # the label-free one
):          # text
    "What the rows say, in one sentence, by mean IoU."
    of = {row['column']: row for row in rows if row['metric'] == 'd_miou'}
    said = {column: '{:+.1f} points [{:+.1f}, {:+.1f}]'.format(
        *(100 * row[k] for k in ('value', 'low', 'high'))) for column, row in of.items()}
    gain = of['label-free vs step 0']
    rivals = [column for column in of if column.startswith('label-free vs')][1:]
    head = 'Loss' if gain['high'] < 0 else 'No gain shown'
    if gain['low'] > 0: head = 'Gain'
    if gain['low'] > 0 and any(of[rival]['low'] <= 0 for rival in rivals):
        head = 'Gain over the first answer, not shown over every control,'
    if gain['n'] < 20: head = 'Too few samples to tell of a gain'   # for an interval
    against = [f'{said[rival]} against {rival[14:]}' for rival in rivals]
    return (f'{head} without labels: {said["label-free vs step 0"]} of mean IoU, n = {gain["n"]} '
            f'(rule: {rule}); {"; ".join(against) or "no control of equal compute was given"}; '
            f'the last step shows {said["last vs step 0"]}, '
            f'the oracle column {100 * of["oracle vs step 0"]["value"]:+.1f}')

def audit(
    name,       # of the run
    test,       # list of Trajectory of two boxes or more, as of `read_answers`; else ValueError
    val=None,   # list of Trajectory that choose the label-free rule; by default cross-fitted
    controls=None,  # name -> list of Trajectory with one box each, of the same samples
    samples=(),     # list of core.Sample, in the same order; their `single` answers are a control
):              # dict, as JSON: verdict, rows, n, rule, least, needed, warnings
    "Everything that is to be said of a loop's answers, and the verdict first."
    if len(test) < 2: raise ValueError(f'{name}: {len(test)} sample; an audit takes some more')
    free, rule = label_free(test, val)
    controls = dict(controls or {})
    lacking = [x.id for x in samples if 'single' not in x.meta]
    if lacking and len(lacking) < len(samples):
        raise ValueError(f'{name}: {lacking[0]} has no `single`, others have: no fair control')
    if samples and not lacking:
        controls['single'] = [replace(t, boxes=[x.meta['single']])
                              for t, x in zip(free, samples)]
    gain = ious(free) - ious(test)
    parts = [[t.source for t in test], [*map(target_size, test)]]
    rows = [*columns(name, test, val), *dynamics(name, test),
            *_differences(name, test, free, controls),
            *part_rows(name, 'gain', dict(d_miou=gain), parts), *_knows(name, test)]
    for other in RULES:
        rows.append(result_row(name, f'rule {other}', 'd_miou',
                               ious(single(test, other)) - ious(test)))
    least, needed = power(gain if gain.any() else ious(test, -1) - ious(test))
    return dict(verdict=in_words(rows, rule), run=name, n=len(test), rule=rule, rows=rows,
                least=least, needed=needed, warnings=_warnings(test, val))

def gallery(
    test,       # list of Trajectory
    samples,    # list of core.Sample, in the same order; one whose picture does not open has none
    most=120,   # so many
    side=224,   # of a picture, px
):              # dicts, as JSON
    "The first samples with a wrong answer at any step, with all their steps and a small picture."
    cards = []
    for t, x in zip(test, samples, strict=True):
        scores = [iou(box, t.truth) for box in t.boxes]
        if min(scores) >= .5 or len(cards) == most: continue
        picture = None
        with suppress(ValueError):
            picture = b64encode(show(x.image, side=side)._repr_jpeg_()).decode()
        said = [(text or '')[:1000] for text in t.texts]
        cards.append(dict(vars(t), ious=scores, picture=picture, texts=said))
    return cards

def write_page(
    path,   # HTML file
    found,  # dict of `audit`, perhaps with `cards` of `gallery`
):          # nothing
    "Write an audit as a page that needs nothing else: no network, no other file."
    page = data_path('audit.html').read_text('utf-8')
    lessons, home = data_path().parent/'nbs', Path(path).resolve().parent
    lessons = os.path.relpath(lessons, home) if home.is_relative_to(lessons.parent) else ''
    # no text can end the script that holds it
    data = _dumps(dict(found, lessons=lessons)).replace('<', '\\u003c')
    replace_file(path, page.replace('"FOUND"', data).encode())

def answers(
    args,       # of the command line
    run,        # folder of a run, or file of any program's answers
    name='test',    # which part of a run
    samples=None,   # that were asked; by default the benchmark's, or what the rows say
):              # list of Trajectory; list of core.Sample
    "What was answered, and to what."
    path = Path(run)
    if path.is_dir():
        path = next(path.glob(f'{name}.jsonl*'), path/f'{name}.jsonl')
        [ours], rows = split(name, 1), read_jsonl(path)
        if samples is None and rows[:1] and rows[0].get('expression') == ours.expression:
            samples = split(name)
    return read_answers(path, samples, args.mode, args.truth_mode, args.images)

def summary(found):     # dict of `audit`; text
    "An audit in words: the verdict, the columns, what is compared, what must be said."
    values = [row for row in found['rows'] if row['column'] in COLUMNS]
    compared = [row for row in found['rows'] if ' vs ' in row['column']]
    metrics = 'd_acc50', 'd_acc70', 'd_acc90', 'd_miou'
    swapped = [row for row in found['rows'] if row['column'].startswith('swap')]
    shares = [x for x in ('truth', 'drawn', 'said', 'yes') if x in {r['metric'] for r in swapped}]
    swaps = swapped and table(swapped, shares)
    said = [f'{what}: {len(ids)} samples, such as {ids[0]}'
            for what, ids in found['warnings'].items()]
    parts = found['verdict'], table(values), table(compared, metrics), swaps, '\n'.join(said)
    return '\n\n'.join(map(str, filter(str, parts)))

def main(
    args,       # of the command line: of `ivt_min audit` or `ivt_min gallery`
    ask,        # the command's function that asks a model
    kept_in,    # its function that names the folder of the answers
    writable,   # its function that refuses a file that cannot be written
):              # nothing
    "Read or ask, audit, print, and write the page."
    if not (args.run or args.model): raise ValueError('a RUN, or a --model that is asked')
    page = writable(args.out or f'ivt_min_{args.command}.html')
    if page.suffix != '.html': raise ValueError(f'--out {page}: a page ends in .html')
    if args.model and args.steps == 0: raise ValueError('--steps 0: one answer is no loop')
    run = Path(args.run or kept_in(args))
    samples = read_rows(args.truth, LAYOUTS[args.layout], args.images) if args.truth else None
    swaps, val = [], None
    if args.model: samples, swaps = ask(args, run)
    test, samples = answers(args, run, samples=samples)
    found = dict(run=run.stem, n=len(test))
    if args.command == 'audit':
        chosen_on = None if args.model else args.val    # a model's are kept beside the others
        if chosen_on or [*run.glob('val.jsonl*')]: val, _ = answers(args, chosen_on or run, 'val')
        controls = {}
        unique(['step 0', 'single', *(Path(other).stem for other in args.baseline)])
        for other in args.baseline:     # each with its own label-free answer
            done, _ = answers(args, other, samples=samples)
            lost = [t.id for t in done if 'nobody answered' in t.notes]
            if lost: raise ValueError(f'{other}: {lost[0]} is not answered: no fair control')
            controls[Path(other).stem], _ = label_free(done)
        found = audit(run.stem, test, val, controls, samples)
        found['rows'] += swaps
        print(json.dumps(found) if args.json else summary(found))
    write_page(page, found | dict(cards=gallery(test, samples)))
    print(f'wrote {page}', file=sys.stderr if args.json else sys.stdout)
