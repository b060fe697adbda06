"""The `ivt_min` command: a model looks at its own boxes, without a network and without settings."""
import argparse, json, os, runpy, sys, tempfile, warnings
from pathlib import Path
from . import __version__
from .core import data_path, read_json
from .datasets import LAYOUTS, read_rows

RUNS = ('base', 'verdict', 'views-6', 'naive', 'naive_turn', 'sft_paper-s1', 'grpo_paper-s1',
        'sft_paper_single-s0')  # README's

def demo(args):     # of the command line
    "Show what the loop does to a few scenes, and the results."
    from .boxes import iou
    from .columns import four_columns
    from .model import load
    from .render import filmstrip, stack
    from .scenes import split
    from .verdict import free_cores, go_round, loop_of
    out = writable(args.out or 'ivt_min_demo.jpg')
    films = []
    with free_cores():
        vlm = load(args.model or 'single', args.device)
        done = go_round(vlm, split('test', 8 * args.n), loop_of(vlm, args.steps))
        done.sort(key=lambda e: not any(e.verdicts))    # first those whose answers dispute
        for e in done[:args.n]:
            texts = [f'IoU {iou(box, e.sample.truth):.2f}' for box in e.boxes]
            for k, odds in enumerate(e.verdicts):
                if odds is not None: texts[k] += f', verdict {odds:+.1f}'
                if k == e.kept: texts[k] += ', kept'
            films.append(filmstrip(e.image, e.boxes, e.sample.truth, texts, e.sample.expression,
                                   side=140))
    stack(films).save(out)
    print(f"wrote {out}: a row a scene; the truth is green, the model's box red\n")
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
    "Find what the words mean in one picture or many: print the steps, and write pictures of them."
    from .model import find_model
    from .verdict import check_pictures, refine
    model = args.model or 'single'
    find_model(model)
    check_pictures(args.image, args.expression)     # what is wrong is said before the work
    files = outputs(args)
    for k in range(0, len(files), args.batch):
        part = args.image[k:k + args.batch]
        found = refine(part, args.expression, model, args.steps, args.device)
        for image, one, file in zip(part, found, files[k:]):
            if file: one.save(file)
            line = dict(image=image, model=model, **one.to_dict())
            print(json.dumps(line) if args.json else said(image, one, file), flush=True)

def said(
    image,  # path of the picture
    found,  # Refinement
    file,   # where it was drawn
):          # text
    "A refinement in words."
    def px(box): return f'{[round(v, 1) for v in box]} px' if box else 'no box'
    lines = [f'{image}: {found.expression}']
    for t, step in enumerate(found.steps):
        line = f'  step {t}: {px(step.box)}'
        if step.confidence is not None: line += f', confidence {step.confidence:.3f}'
        if step.verdict is not None: line += f', verdict {step.verdict:+.1f}'
        if step.note: line += f' ({step.note})'
        lines.append(line)
    lines.append(f'  final: {px(found.final)}; wrote {file}')
    return '\n'.join(lines)

def answered(
    args,       # of the command line
    folder,     # where the answers are kept
):              # VLM, its loop, the samples and the answers of each split
    "What a model answers to the rows that are named, or else to the benchmark."
    from .lab import keep_answers
    from .model import load
    from .scenes import split
    from .verdict import loop_of, remind
    files = {name: path for name, path in (('test', args.data), ('val', args.val)) if path}
    samples = {name: read_rows(path, LAYOUTS[args.layout], args.images)
               for name, path in files.items()}
    if not args.data: samples = {name: split(name) for name in ('test', 'val')}
    shared = {x.id for x in samples['test']} & {x.id for x in samples.get('val', [])}
    if shared: raise ValueError(f'id {min(shared)} in test and in val; give each row an `id`')
    vlm = load(args.model, args.device, args.nf4 or None)
    remind(vlm)
    loop = loop_of(vlm, args.steps)
    return vlm, loop, samples, keep_answers(Path(folder), vlm, loop, samples, args.batch)

def kept_in(args):      # of the command line
    "Where the answers of a model are kept, unless it is said."
    return f'ivt_min_runs/{Path(args.model).name}-{Path(args.data or "benchmark").stem}'

def evaluate(args):     # of the command line
    "Ask a model every row (image, expression, box in px) of a file; print the four columns."
    from .columns import columns
    from .evaluate import table
    from .train import ranks
    from .verdict import free_cores
    folder = Path(args.out or kept_in(args))
    with free_cores(): *_, done = answered(args, folder)
    if ranks()[0]: return   # the first process speaks
    rows = columns(folder.name, done['test'], done.get('val', []),
                   rule=None if args.val else 'confident')     # where no rows choose it
    rule = next(row['rule'] for row in rows if 'rule' in row)
    how = f'chosen on {args.val}' if args.val else 'fixed beforehand; the rows of --val choose one'
    print(f'{table(rows)}\nlabel-free: the box by the rule {rule}, {how}\n'
          f'oracle: the best box by the labels, which is no method\nkept in {folder}')

def ask(
    args,       # of the command line
    folder,     # where the answers are kept
):              # list of core.Sample; rows of `keep_swaps`
    "Ask a model for an audit: its answers, and what it says where something else is drawn."
    from .lab import keep_swaps
    from .verdict import free_cores
    with free_cores():
        vlm, loop, samples, done = answered(args, folder)
        swaps = keep_swaps(folder, vlm, loop, samples['test'], done['test'], args.batch)
    return samples['test'], swaps

def audit(args):        # of the command line
    "Say whether a loop gains without labels: of a run, of any program's answers, or of a model."
    kit = runpy.run_path(str(data_path().parent/'nbs/audit.py'))
    kit['main'](args, ask, kept_in, writable)

def reproduce(args):    # of the command line
    "Make the stored runs again, from the shipped base; what that costs is said before."
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
    "The path, once it is sure that a picture or page can be written there; ValueError, OSError."
    from .render import format_of
    path = Path(path)
    if path.suffix != '.html': format_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent): return path
    except OSError as e: raise ValueError(f'{path}: cannot be written ({e.strerror})') from None

FLAG = dict(action='store_true')
OPTIONS = {     # of any command
    'image': dict(nargs='+', help='path of a picture'),
    'expression': dict(help='what to look for, in words'),
    'model': dict(help='what comes along, a folder, or a name on the hub'),
    'data': dict(help='rows, .jsonl, .json or .parquet; pictures lie beside them'),
    'run': dict(nargs='?', help='folder of a run, or rows of any program: id, expression, truth, '
                                'boxes or texts, one a step; also confidences, image, single'),
    '--model': dict(help='what comes along, a folder, or a name on the hub'),
    '--data': dict(help='rows that a --model is asked; by default the benchmark'),
    '--truth': dict(help='rows that have the true boxes, with --layout; by default RUN has them'),
    '--val': dict(help='rows of the same form that choose the label-free rule'),
    '--baseline': dict(action='append', default=[],
                       help='answers with as much compute; may come again'),
    '--mode': dict(default='rel1000', choices=('rel1000', 'rel1', 'abs'),
                   help='unit of the answers: permille, fractions, or px'),
    '--truth-mode': dict(choices=('rel1000', 'rel1', 'abs'),
                         help='unit of true boxes in RUN, where it is another'),
    '--layout': dict(default='own', choices=LAYOUTS, help='how rows are written: own (a box is '
                     'x0, y0, x1, y1), own-xywh, or as in a real set'),
    '--images': dict(help='folder of the pictures; by default that of the rows'),
    '--steps': dict(type=whole(0), help='answers after the first'),
    '--device': dict(help="'cpu', 'cuda' ...; by default a GPU if there is one"),
    '--nf4': FLAG | dict(help='hold the language model in 4 bits'),
    '--batch': dict(type=whole(1), default=16, help='pictures at once'),
    '-n': dict(type=whole(2), default=4, help='number of scenes'),
    '--json': FLAG | dict(help='JSON in place of words'),
    '--out': dict(help='what is written: a picture or a page; of many pictures or a run, a folder'),
    '--only': dict(help='name of one run'),
    '--list': FLAG | dict(help='only say what it costs')}
ASKED = ('--truth --val --baseline --mode --truth-mode --layout --images --out '
         '--model --data --steps --device --nf4 --batch --json')   # of an audit
COMMANDS = dict(    # its function, what it takes, an example
    demo=(demo, '-n --model --steps --device --out', 'ivt_min demo -n 4 --out ivt_min_demo.jpg'),
    refine=(refine, 'image expression --model --steps --device --batch --json --out',
            'ivt_min refine data/examples/scene-0.png "the large red star" --json'),
    evaluate=(evaluate, 'model data --val --layout --images --steps --device --nf4 --batch --out',
              'ivt_min evaluate sft data/examples/rows.jsonl --out ivt_min_runs/example'),
    audit=(audit, f'run {ASKED}', 'ivt_min audit data/runs/naive --baseline data/runs/base'),
    gallery=(audit, f'run {ASKED}', 'ivt_min gallery data/runs/naive'),
    reproduce=(reproduce, '--only --list', 'ivt_min reproduce --only grpo_paper-s0 --list'))

def build_parser():
    "All commands and their options."
    parser = argparse.ArgumentParser(prog='ivt_min', description=__doc__)
    parser.add_argument('--version', action='version', version=f'ivt_min {__version__}')
    commands = parser.add_subparsers(dest='command', help='by default demo')
    for name, (run, options, example) in COMMANDS.items():
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__,
                                  epilog=f'example: {example}')
        for option in options.split(): one.add_argument(option, **OPTIONS[option])
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
