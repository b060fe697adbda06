"""Charts for the notebooks: `%run charts.py` in one of them gives it `curve`.

matplotlib draws them. What a notebook stores is about ten kilobytes of text, the same bytes in
every run. For a figure of another kind there are `styled` and `svg`: lab/40_results has one.
"""
import io
from IPython.display import SVG
from matplotlib import style
from matplotlib.figure import Figure

styled = style.context(['default', 'seaborn-v0_8-whitegrid', 'seaborn-v0_8-paper', {
    'axes.prop_cycle':  # these seven differ for the colour-blind, too
        "cycler(color=['0072b2', 'd55e00', '009e73', 'aa3399', 'e6a000', '222222', '56b4e9'])",
    'axes.titlelocation': 'left', 'legend.loc': 'upper left', 'savefig.bbox': 'tight',
    'font.sans-serif': 'DejaVu Sans',   # matplotlib's own, and as wide as any: no text is cut
    'svg.fonttype': 'none', 'svg.hashsalt': 'ivt_min'}])    # text stays text; ids stay the same


def svg(figure):
    "A figure as a notebook shows and stores it."
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None})
    return SVG(file.getvalue())


@styled
def curve(
    series,         # dict of name -> values; None is a gap
    x=None,         # their x, one a value, by default 0, 1, 2 ...
    xlabel='step',  # below the axis
    ylabel='',      # above the axis
    bands=None,     # dict of name -> (lows, highs), one a value: a shade around that line
):                  # SVG; about 384 x 240 px; right of that the names of two lines or more
    "Named lines over a common x; one of up to 12 values has a dot a value."
    axes = Figure((4, 2.5)).add_subplot(title=ylabel, xlabel=xlabel, frameon=False)
    for name, values in series.items():
        at = range(len(values)) if x is None else x
        line, = axes.plot(at, values, 'o-' if len(values) <= 12 else '-', label=name)
        if bands and name in bands:
            axes.fill_between(at, *bands[name], color=line.get_color(), alpha=.15)
    axes.locator_params('x', integer=True, min_n_ticks=3)   # no step one and a half
    if len(series) > 1: axes.legend(bbox_to_anchor=(1, 1))
    return svg(axes.figure)
