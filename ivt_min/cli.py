"""The `ivt_min` command: a model looks at its own boxes, without a network and without settings."""
import argparse
import sys

from ivt_min.core import data_path, read_json


def demo(out, n, model):
    """Refine boxes in `n` scenes outside the model's training, print each IoU, write a picture."""
    from ivt_min.boxes import iou
    from ivt_min.loop import Loop, model_policy, rollout
    from ivt_min.model import load
    from ivt_min.render import show
    from ivt_min.scenes import draw_sample
    vlm = load(model or 'sft')
    loop = Loop(**vlm.loop or {})
    samples = [draw_sample(f'demo-{i}', i, 'demo') for i in range(n)]
    episodes = rollout(model_policy(vlm, loop), samples, loop)
    for e in episodes:
        scores = ' -> '.join(f'{iou(b, e.sample.truth):.2f}' for b in e.boxes)
        print(f'IoU {scores}  {e.sample.expression}')
    steps = [(e, t) for e in episodes for t in range(len(e.boxes))]
    texts = [f'step {t}' if t else e.sample.expression for e, t in steps]
    show([e.image for e, _ in steps], texts, [e.sample.truth for e, _ in steps],
         [e.boxes[t] for e, t in steps], 3, 256 * max(3, n)).save(out)
    print(f"wrote {out}: a row a scene; the truth is green, the model's box red")


def results():
    """Print the stored results of the test split."""
    from ivt_min.evaluate import table
    path = data_path('runs/results.json')
    if path.exists():
        shown = ('step 0', 'last', 'label-free', 'oracle')
        print(f'\n{table([r for r in read_json(path) if r["column"] in shown])}')


def refine(args):
    """Refine one box, print every step in pixels, write a picture."""
    from ivt_min.loop import refine
    try: found = refine(args.image, args.expression, args.model or 'sft', args.steps)
    except (ValueError, OSError) as e: return f'ivt_min: {e}'
    for t, step in enumerate(found.steps):
        box = step.box and [round(v, 1) for v in step.box]
        sure = '' if step.confidence is None else f', confidence {step.confidence:.3f}'
        print(f'step {t}: {box} px{sure}{step.note and f" ({step.note})"}')
    found.picture.save(args.out)
    print(f'final: {found.final and [round(v, 1) for v in found.final]} px; wrote {args.out}')


def main(argv=None):
    """Entry point; without arguments the demo and the results table."""
    parser = argparse.ArgumentParser(prog='ivt_min', description=__doc__)
    parser.add_argument('--out', default='ivt_min_demo.jpg', help='picture to write')
    parser.add_argument('--model', help='adapter, folder or hub name; by default sft')
    parser.add_argument('-n', type=int, default=4, help='number of scenes')
    commands = parser.add_subparsers(dest='command')
    one = commands.add_parser('refine', help='refine the box of one picture')
    one.add_argument('image', help='path of a picture')
    one.add_argument('expression', help='what to look for, in words')
    one.add_argument('--model', help='adapter, folder or hub name; by default sft')
    one.add_argument('--steps', type=int, default=2, help='refinements after the first answer')
    one.add_argument('--out', default='film.png', help='picture to write')
    args = parser.parse_args(argv)
    if args.command: return refine(args)
    if args.n < 1: parser.error('-n must be at least 1')
    demo(args.out, args.n, args.model)
    results()


if __name__ == '__main__':
    sys.exit(main())
