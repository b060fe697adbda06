"""The charts of the notebooks: what an SVG holds, and that it is the same in every run."""
import math
import re
import runpy
import subprocess
import sys

import pytest
from test_project import ROOT

CHARTS = ROOT / "nbs/charts.py"
SEVEN = ["#0072b2", "#d55e00", "#009e73", "#aa3399", "#e6a000", "#222222", "#56b4e9"]


@pytest.fixture(scope="module")
def curve():
    return runpy.run_path(str(CHARTS))["curve"]


def paths(svg, colour):
    """Where the line of a colour goes in the plot, and not in the list of names."""
    return re.findall(f'<path d="([^"]*)" clip-path[^>]* stroke: {colour}', svg)


def dots(svg, colour):
    return svg.count(f'style="fill: {colour}"')


def test_lines_names_and_size(curve):
    steps = list(range(0, 1000, 20))
    decay = [math.exp(-s / 300) for s in steps]
    svg = curve({"loss": decay, "accuracy": [1 - v for v in decay]}, steps, ylabel="a run").data
    assert [(len(paths(svg, c)), dots(svg, c)) for c in SEVEN[:3]] == [(1, 0), (1, 0), (0, 0)]
    assert [svg.count(f">{text}<") for text in ("loss", "accuracy", "step", "a run")] == [1] * 4
    assert len(svg) < 12_000 and "<dc:date>" not in svg


def test_gaps_dots_and_shades(curve):
    means = {"first": [.2, .4, None, .45, .5], "second": [.3, .3, .35, .4, .4]}
    bands = {"second": ([.24, .24, .29, .34, .34], [.36, .36, .41, .46, .46])}
    svg = curve(means, bands=bands).data
    assert [paths(svg, c)[0].count("M") for c in SEVEN[:2]] == [2, 1]   # of two parts, and of one
    assert [dots(svg, c) for c in SEVEN[:2]] == [4 + 1, 5 + 1]          # and in the names
    assert svg.count("fill: #d55e00; fill-opacity: 0.15") == 1


def test_few_lines_and_many(curve):
    assert ">alone<" not in curve({"alone": [1, 2]}).data   # a single line needs no name
    assert ">&lt;b&gt;<" in curve({"<b>": [1, None, math.nan], "b": [2]}).data
    for series in ({}, {"flat": [.3, .3]}, {"none": [None]}): assert curve(series).data
    many = curve({f"run {i}": [i] * 20 for i in range(28)}).data
    assert [len(paths(many, c)) for c in SEVEN] == [4] * 7              # seven colours, again
    assert [many.count(f">run {i}<") for i in range(28)] == [1] * 28
    ticks = re.findall(">([0-9.]+)</text>", curve({"a": [.5, .6, .7]}).data)[:3]
    assert ticks == ["0", "1", "2"]     # there is no step one and a half


def test_another_process_makes_the_same_bytes(curve):
    code = "import runpy, sys; print(end=runpy.run_path(sys.argv[1])['curve']({'a': [1, 2]}).data)"
    done = subprocess.run([sys.executable, "-c", code, CHARTS], capture_output=True, text=True)
    assert done.stdout == curve({"a": [1, 2]}).data, done.stderr
