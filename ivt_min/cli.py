"""The `ivt_min` command: a model looks at its own boxes, without a network and without settings."""
import argparse, sys
from .core import data_path, read_json

def demo(out, n, model):
    "Refine boxes in `n` scenes outside the model's training, write a picture, print the results."
    from .boxes import iou
    from .evaluate import table
    from .loop import Loop, model_policy, rollout
    from .model import load
    from .render import show
    from .scenes import draw_sample
    vlm, samples = load(model), [draw_sample(f'demo-{i}', i, 'demo') for i in range(n)]
    episodes = rollout(model_policy(vlm, loop := Loop(**vlm.loop or {})), samples, loop)
    for e in episodes:
        scores = ' -> '.join(f'{iou(b, e.sample.truth):.2f}' for b in e.boxes)
        print(f'IoU {scores}  {e.sample.expression}')
    steps = [(e, t) for e in episodes for t in range(len(e.boxes))]
    texts = [f'step {t}' if t else e.sample.expression for e, t in steps]
    show([e.image for e, _ in steps], texts, [e.sample.truth for e, _ in steps],
         [e.boxes[t] for e, t in steps], loop.steps + 1, 256 * max(loop.steps + 1, n)).save(out)
    print(f"wrote {out}: a row a scene; the truth is green, the model's box red")
    runs = 'base naive sft-s1 sft_errors grpo-s1 grpo_errors look-s0 look_single'.split()
    rows = [r for r in read_json(data_path('runs/results.json')) if r['run'] in runs
            and r['column'] in ('step 0', 'last', 'label-free', 'oracle')]
    print(f'\n{table(rows)}\nAll runs: nbs/12_results.ipynb')

def refine(args):
    "Refine one box, print every step in pixels, write a picture."
    from .loop import refine
    try: found = refine(args.image, args.expression, args.model, args.steps)
    except (ValueError, OSError) as e: return f'ivt_min: {e}'
    px = lambda box: box and [round(v, 1) for v in box]
    for t, step in enumerate(found.steps):
        sure = '' if step.confidence is None else f', confidence {step.confidence:.3f}'
        print(f'step {t}: {px(step.box)} px{sure}{step.note and f" ({step.note})"}')
    found.picture.save(args.out)
    print(f'final: {px(found.final)} px; wrote {args.out}')

def main(argv=None):
    "Entry point; without arguments the demo and the results table."
    parser = argparse.ArgumentParser(prog='ivt_min', description=__doc__)
    one = parser.add_subparsers(dest='command').add_parser('refine', help='refine one box')
    for p, out in ((parser, 'ivt_min_demo.jpg'), (one, 'film.png')):
        p.add_argument('--out', default=out, help='picture to write')
        p.add_argument('--model', default='sft', help='adapter, folder or hub name; by default sft')
    parser.add_argument('-n', type=int, default=4, help='number of scenes')
    one.add_argument('image', help='path of a picture')
    one.add_argument('expression', help='what to look for, in words')
    one.add_argument('--steps', type=int, help='refinements after the first answer')
    args = parser.parse_args(argv)
    if args.command: return refine(args)
    if args.n < 1: parser.error('-n must be at least 1')
    demo(args.out, args.n, args.model)

if __name__ == '__main__': sys.exit(main())
