"""A second reader of the drawn scenes. It shares no code with the generator: it takes a sentence apart by a
grammar of its own and looks for what fits, from attributes and visible boxes. It knows no "too close to
call" but draws every line hard; `shift`, a fraction of the side, moves the lines."""
import math
import re
import numpy as np

GRAMMAR = re.compile(r'''the
    (?:\ (?P<most>leftmost|rightmost|top|bottom|largest|smallest|second))?
    \ (?P<name>[a-z]+(?:\ [a-z]+){0,3}?)
    (?:\ (?:on|at|in)\ the\ (?P<place>[a-z ]+?))?
    (?:\ from\ the\ (?P<side>left|right|top|bottom))?
    (?:\ that\ is\ (?:not|neither)\ (?:a\ )?(?P<deny>[a-z]+(?:\ nor\ [a-z]+)?))?
    (?:(?:\ that\ is(?P<flip>\ not)?)?\ (?P<relation>left\ of|right\ of|above|below|closest\ to)
        \ the\ (?P<mark>[a-z ]+))?''', re.X)


def read(text, things, shift=0.):
    """All things that a sentence is true of; raises on a sentence that it cannot make sense of."""
    said = GRAMMAR.fullmatch(text).groupdict()
    found = [t for t in things if fits(t, said['name'])]
    for word in (said['deny'] or '').replace(' nor ', ' ').split():
        found = [t for t in found if not fits(t, word)]
    if said['place']:
        found = [t for t in found if lies(t, said['place'], shift)]
    if said['relation']:
        mark, = [t for t in things if fits(t, said['mark'])]  # a landmark has one bearer, too
        found = [t for t in found if t is not mark]           # and is never what is meant
        if said['relation'] == 'closest to':
            found = least(found, lambda t: math.dist(middle(t), middle(mark)))
        else:
            found = [t for t in found if stands(t, said['relation'], mark, shift) != bool(said['flip'])]
    if said['most']:
        key = ORDERS[said['side'] or said['most'].removesuffix('most')]
        found = least(found, key, 1 if said['most'] == 'second' else 0)
    return found


def fits(thing, words):
    return set(words.split()) <= {thing.size, thing.pattern, thing.color, thing.kind, 'object'}


def middle(thing):
    x0, y0, x1, y1 = (v / 128 for v in thing.box)
    return (x0 + x1) / 2, (y0 + y1) / 2


def extent(thing):
    x0, y0, x1, y1 = thing.box
    return (x1 - x0) * (y1 - y0)


ORDERS = {'left': lambda t: middle(t)[0], 'right': lambda t: -middle(t)[0], 'top': lambda t: middle(t)[1],
          'bottom': lambda t: -middle(t)[1], 'smallest': extent, 'largest': lambda t: -extent(t)}


def least(things, key, rank=0):
    values = sorted(map(key, things))
    return [t for t in things if key(t) == values[rank]] if len(values) > rank else []


def lies(thing, place, shift):
    x, y = middle(thing)
    fine = {'left': x < .44 + shift, 'right': x > .56 - shift, 'top': y < .44 + shift, 'bottom': y > .56 - shift,
            'middle': max(abs(x - .5), abs(y - .5)) < .17 + shift}
    return all(fine[word] for word in place.split() if word != 'corner')


def stands(a, relation, b, shift):
    (ax, ay), (bx, by) = middle(a), middle(b)
    gap = {'left of': bx - ax, 'right of': ax - bx, 'above': by - ay, 'below': ay - by}[relation]
    return gap + shift > 0


def complaints(owner, things, asked):
    """Boxes that are not those of the pixels, and sentences that do not mean exactly their thing wherever
    within 5 % of the side the lines are drawn."""
    wrong = []
    for i, thing in enumerate(things):
        rows, cols = np.where(owner == i)
        if thing.box != (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1):
            wrong.append(thing.box)
    return wrong + [text for text, i in asked for shift in (-.05, 0., .05)
                    if [id(t) for t in read(text, things, shift)] != [id(things[i])]]
