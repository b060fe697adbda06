"""The `ivt_min` command: a model looks at its own boxes, without a network and without settings."""
import argparse, json, os, runpy, sys, tempfile, warnings
from pathlib import Path
from . import __version__
from .core import data_path, read_json
from .datasets import LAYOUTS, read_rows

RULE = 'confident'  # the label-free one where no rows choose it
RUNS = ('base', 'verdict', 'views-6', 'naive', 'naive_turn', 'sft_paper-s1', 'grpo_paper-s1',
        'sft_paper_single-s0')  # README's

def demo(args):     # of the command line
    "Show what the loop does to test scenes, and the results."
    from .boxes import iou
    from .columns import four_columns
    from .model import load
    from .render import filmstrip, stack
    from .scenes import split
    from .verdict import free_cores, go_round, loop_of
    writable(args.out)
    films = []
    with free_cores():
        vlm = load(args.model, args.device)
        done = go_round(vlm, split('test', 8 * args.n), loop_of(vlm, args.steps))
        done.sort(key=lambda e: not any(e.verdicts))    # first those whose answers dispute
        for e in done[:args.n]:
            texts = [f'IoU {iou(box, e.sample.truth):.2f}' for box in e.boxes]
            for k, odds in enumerate(e.verdicts):
                if odds is not None: texts[k] += f', verdict {odds:+.1f}'
                if k == e.kept: texts[k] += ', kept'
            films.append(filmstrip(e.image, e.boxes, e.sample.truth, texts, e.sample.expression,
                                   side=140))
    stack(films).save(args.out)
    print(f"wrote {args.out}: a row a scene; the truth is green, the model's box red\n")
    print('mean IoU on the test scenes; oracle picks the best step with the labels: no method')
    rows = read_json(data_path('runs/results.json'))
    print(f'{four_columns(rows, RUNS, "miou")}\nAll runs: nbs/lab/40_results.ipynb')

def outputs(args):      # of the command line
    "A file for each picture of `refine`, or None where none is wanted; its folder is made."
    if args.json and not args.out: return [None] * len(args.image)
    if len(args.image) == 1: return [writable(args.out or 'ivt_min_refined.jpg')]
    folder = Path(args.out or 'ivt_min_refined')
    return [writable(folder/f'{k}-{Path(path).stem}.jpg') for k, path in enumerate(args.image)]

def refine(args):       # of the command line
    "Find what the words mean in each picture; print the steps, and write pictures of them."
    from .verdict import check_pictures, refine
    check_pictures(args.image, args.expression)     # what is wrong is said before the work
    files = outputs(args)
    for k in range(0, len(files), args.batch):
        part = args.image[k:k + args.batch]
        found = refine(part, args.expression, args.model, args.steps, args.device)
        for image, one, file in zip(part, found, files[k:]):
            if file: one.save(file)
            line = dict(image=image, model=args.model, **one.to_dict())
            print(json.dumps(line) if args.json else said(image, one, file), flush=True)

def said(
    image,  # path of the picture
    found,  # Refinement
    file,   # where it was drawn
):          # text
    "A refinement in words."
    def px(box): return 'no box' if box is None else f'{[round(v, 1) for v in box]} px'
    lines = [f'{image}: {found.expression}']
    for t, step in enumerate(found.steps):
        line = f'  step {t}: {px(step.box)}'
        if step.confidence is not None: line += f', confidence {step.confidence:.3f}'
        if step.verdict is not None: line += f', verdict {step.verdict:+.1f}'
        if step.note: line += f' ({step.note})'
        lines.append(line)
    lines.append(f'  final: {px(found.final)}; wrote {file}')
    return '\n'.join(lines)

def evaluate(args):     # of the command line
    "Ask a model every row of a file, keep what it says in a folder, print the four columns."
    from .columns import columns
    from .evaluate import table
    from .lab import keep_answers
    from .model import load
    from .train import ranks
    from .verdict import free_cores, loop_of, remind
    data = dict(test=args.data)
    if args.val: data['val'] = args.val
    samples = {split: read_rows(path, LAYOUTS[args.layout], args.images)
               for split, path in data.items()}
    shared = {x.id for x in samples['test']} & {x.id for x in samples.get('val', [])}
    if shared: raise ValueError(f'id {min(shared)} in test and in val; give each row an `id`')
    folder = Path(args.out or f'ivt_min_runs/{Path(args.model).name}-{Path(args.data).stem}')
    with free_cores():
        vlm = load(args.model, args.device, args.nf4 or None)
        remind(vlm)
        done = keep_answers(folder, vlm, loop_of(vlm, args.steps), samples, args.batch)
    if ranks()[0]: return   # the first process speaks
    rows = columns(folder.name, done['test'], done.get('val', []), rule=None if args.val else RULE)
    rule = next(row['rule'] for row in rows if 'rule' in row)
    how = f'chosen on {args.val}' if args.val else 'fixed beforehand; the rows of --val choose one'
    print(f'{table(rows)}\nlabel-free: the box by the rule {rule}, {how}\n'
          f'oracle: the best box by the labels, which is no method\nkept in {folder}')

def reproduce(args):    # of the command line
    "Make stored runs again, beside the old ones; what that costs is said before."
    runpy.run_path(str(data_path().parent/'tests/reproduce.py'))['main'](args.only, args.list)

# ---- the command line

def whole(least):   # number
    "A reader of whole numbers from `least` on."
    def number(text):
        if not text.lstrip('-').isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f'{text!r} is no whole number from {least} on')
        return int(text)
    return number

def writable(path):     # file
    "The path, once it is sure that a picture can be written there; ValueError or OSError."
    from .render import format_of
    path = Path(path)
    format_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent): return path
    except OSError as e: raise ValueError(f'{path}: cannot be written ({e.strerror})') from None

COMMANDS = dict(    # its function, what it is for, an example
    demo=(demo, 'what the loop does to a few scenes, and the results',
          'ivt_min demo -n 4 --out ivt_min_demo.jpg'),
    refine=(refine, 'find what the words mean in one picture or many',
            'ivt_min refine data/examples/scene-0.png "the large red star" --json'),
    evaluate=(evaluate, 'ask a model every row of a JSONL file: image, expression, box (px)',
              'ivt_min evaluate sft data/examples/rows.jsonl --out ivt_min_runs/example'),
    reproduce=(reproduce, 'make the stored runs again, from the shipped base',
               'ivt_min reproduce --only grpo_paper-s0 --list'))

def build_parser():
    "All commands and their options."
    parser = argparse.ArgumentParser(prog='ivt_min', description=__doc__)
    parser.add_argument('--version', action='version', version=f'ivt_min {__version__}')
    commands = parser.add_subparsers(dest='command', help='by default demo')
    show, one, all_of, again = [
        commands.add_parser(name, help=what, description=what, epilog=f'example: {example}')
        for name, (_, what, example) in COMMANDS.items()]
    for p in (show, one, all_of):
        p.add_argument('--steps', type=whole(0), help='answers after the first')
        p.add_argument('--device', help="'cpu', 'cuda' ...; by default a GPU if there is one")
    for p in (show, one):
        p.add_argument('--model', default='single',
                       help='what comes along, a folder, or a name on the hub; else single')
    show.add_argument('-n', type=whole(2), default=4, help='number of scenes')
    show.add_argument('--out', default='ivt_min_demo.jpg', help='picture to write')
    one.add_argument('image', nargs='+', help='path of a picture')
    one.add_argument('expression', help='what to look for, in words')
    one.add_argument('--json', action='store_true', help='a line of JSON a picture')
    one.add_argument('--out', help='picture to write; with several pictures, a folder of them')
    all_of.add_argument('model', help='what comes along, a folder, or a name on the hub')
    all_of.add_argument('data', help='rows, .jsonl, .json or .parquet; pictures lie beside them')
    all_of.add_argument('--val', help='rows of the same form that choose the label-free rule')
    all_of.add_argument('--layout', default='own', choices=LAYOUTS, help='how the rows are '
                        'written: own (a box is x0, y0, x1, y1), own-xywh, or as in a real set')
    all_of.add_argument('--images', help='folder of the pictures; by default that of the rows')
    all_of.add_argument('--nf4', action='store_true', help='hold the language model in 4 bits')
    all_of.add_argument('--out', help='folder of the run; asked again, it goes on from there')
    for p in (one, all_of):
        p.add_argument('--batch', type=whole(1), default=16, help='pictures at once')
    again.add_argument('--only', help='name of one run')
    again.add_argument('--list', action='store_true', help='only say what it costs')
    return parser

def note(
    message,    # a warning
    *where,     # what else `warnings.showwarning` is told
):
    "What a library warns of, in one line."
    print(f'note: {message}', file=sys.stderr)

def main(argv=None):    # words of the command line
    "Entry point; without a command, the demo. Exit code 2 for a mistake, 130 for Ctrl-C."
    words = list(sys.argv[1:] if argv is None else argv)
    if not {'-h', '--help', '--version'} & set(words[:1]):
        command = next((word for word in words if word in COMMANDS), 'demo')
        if command in words: words.remove(command)
        words.insert(0, command)
    args = build_parser().parse_args(words)
    try:
        with warnings.catch_warnings():     # what libraries say of each other stays unsaid
            warnings.simplefilter('ignore')
            warnings.filterwarnings('once', '.* is a model of ')
            warnings.showwarning = note
            COMMANDS[args.command][0](args)
        sys.stdout.flush()
    except BrokenPipeError: os._exit(141)   # who read the output has left; at exit it is flushed
    except (ValueError, TypeError, OSError) as e:
        print(f'ivt_min: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('ivt_min: stopped; what was finished is kept', file=sys.stderr)
        return 130

if __name__ == '__main__': sys.exit(main())
