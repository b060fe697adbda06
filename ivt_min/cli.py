"""The `ivt_min` command: a look at the embedded model, without a network and without settings."""
import argparse
import sys

from ivt_min.core import data_path, read_json, rng


def demo(out='ivt_min_demo.jpg', n=6):
    """Ground `n` scenes outside the model's training, print box and IoU, and write a picture."""
    from ivt_min.answer import ground
    from ivt_min.boxes import iou, to_permille
    from ivt_min.core import Sample
    from ivt_min.model import load
    from ivt_min.render import show
    from ivt_min.scenes import DIALECTS, SIDE, draw_scene
    samples = []
    for i in range(n):
        image, things, [(text, k)] = draw_scene(DIALECTS[i % 3], rng('demo', i))
        truth = to_permille(things[k].box, SIDE, SIDE)
        samples.append(Sample(f'demo-{i}', DIALECTS[i % 3], text, truth, image))
    found = ground(load(), samples)
    for t in found:
        box = t.boxes[0] and [round(v) for v in t.boxes[0]]
        print(f'IoU {iou(t.boxes[0], t.truth):.2f}  box {box}  {t.expression}')
    truths, boxes = [s.truth for s in samples], [t.boxes[0] for t in found]
    texts = [s.expression for s in samples]
    show([s.image for s in samples], texts, truths, boxes, 3, 768).save(out)
    print(f'wrote {out}: the truth is green, the model\'s box red')


def results():
    """Print the stored results of the test split."""
    from ivt_min.evaluate import table
    path = data_path('runs/results.json')
    if path.exists(): print(f'\n{table(read_json(path))}')


def main(argv=None):
    """Entry point; without arguments the demo and the results table."""
    parser = argparse.ArgumentParser(prog='ivt_min', description=__doc__)
    parser.add_argument('--out', default='ivt_min_demo.jpg', help='picture to write')
    parser.add_argument('-n', type=int, default=6, help='number of scenes')
    args = parser.parse_args(argv)
    if args.n < 1: parser.error('-n must be at least 1')
    demo(args.out, args.n)
    results()


if __name__ == '__main__':
    sys.exit(main())
