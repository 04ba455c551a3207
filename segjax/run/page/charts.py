"""Curves and the reliability diagram of a report, as SVG that takes its colours and letters from the page around it."""

import io
import re
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

_POINTS = 400  # Of a curve at most: more are averaged in groups.
_INK, _GRID, _MUTED = "#1e0001", "#1e0002", "#1e0003"  # Stand for the page's colours, which differ in the dark.
_VARIABLES = {_INK: "ink", _GRID: "line", _MUTED: "muted"} | {f"#5e00{n:02x}": f"s{n}" for n in range(10)}
_STYLE = {
  "svg.fonttype": "none",  # Text stays text.
  "svg.hashsalt": "segjax",  # The same run is the same page.
  "font.size": 9,
  "axes.edgecolor": _GRID,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.labelcolor": _MUTED,
  "axes.axisbelow": True,
  "axes.xmargin": 0.02,
  "grid.color": _GRID,
  "grid.linewidth": 0.8,
  "lines.linewidth": 1.6,
  "lines.solid_capstyle": "round",
  "text.color": _INK,
  "xtick.color": _GRID,
  "ytick.color": _GRID,
  "xtick.labelcolor": _MUTED,
  "ytick.labelcolor": _MUTED,
  "ytick.major.size": 0,
  "xtick.major.size": 3,
}


class Curve(NamedTuple):
  """One line of a chart.

  Attributes:
    x, y: of its points; y may be NaN.
    color: a number of the page's series colours, 0 to 9.
    smooth: whether to draw the mean of neighbours over the faint points.
  """

  x: np.ndarray
  y: np.ndarray
  color: int
  smooth: bool = False


def lines(curves: list[Curve], *, log: bool = False, percent: bool = False) -> str:
  """A chart of curves over steps, as SVG."""
  with matplotlib.rc_context(_STYLE):
    figure, axes = _figure()
    for curve in curves:
      x, y = (_thinned(np.asarray(values, float)) for values in curve[:2])
      color, dots = f"#5e00{curve.color:02x}", "o" if percent and len(y) < 40 else ""
      if curve.smooth and len(y) > 20:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=1)
        y = _smoothed(y)
      axes.plot(x, y, color=color, marker=dots, markersize=3.2)
    if log:
      axes.set_yscale("log")
    else:
      axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    if percent:
      axes.yaxis.set_major_formatter(ticker.FuncFormatter(_percent))
    elif not log:
      axes.yaxis.set_major_formatter(_short(axes.get_ylim()[1]))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(_short(axes.get_xlim()[1]))
    return _svg(figure)


def reliability(count: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray) -> str:
  """The reliability diagram of `metrics.calibration`, and below it the share of the pixels in each bin, as SVG."""
  edges, width = np.linspace(0, 1, len(count) + 1)[:-1], 1 / len(count)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    options = dict(width=0.86 * width, align="edge")
    upper.bar(edges + 0.07 * width, np.nan_to_num(accuracy), color="#5e0000", **options)
    upper.hlines(confidence, edges, edges + width, color="#5e0001", linewidth=2)
    upper.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    lower.bar(edges + 0.07 * width, count / max(count.sum(), 1), color=_MUTED, **options)
    for axes, label in ((upper, "accuracy"), (lower, "pixels")):
      axes.set_ylabel(label)
      axes.yaxis.set_major_locator(ticker.MaxNLocator(4 if axes is upper else 2))
      axes.yaxis.set_major_formatter(ticker.FuncFormatter(_percent))
    upper.set(xlim=(0, 1), ylim=(0, 1))
    upper.tick_params(bottom=False)
    lower.set_xlabel("confidence")
    lower.xaxis.set_major_formatter(ticker.FuncFormatter(_percent))
    figure.align_ylabels()
    return _svg(figure)


def _figure():
  figure = Figure(figsize=(4.4, 2.4), layout="constrained")
  return figure, figure.subplots()


def _thinned(values: np.ndarray) -> np.ndarray:
  groups = -(-len(values) // _POINTS)
  if groups <= 1:
    return values
  starts = np.arange(0, len(values), groups)
  return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def _smoothed(values: np.ndarray) -> np.ndarray:
  """The mean over a twentieth of the curve, centred, of what there is at its ends."""
  window = np.ones(max(len(values) // 20, 3) | 1)
  return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _short(most: float) -> ticker.Formatter:
  """Of an axis up to `most`: 12000 as '12k' from 10000 on."""
  size, letter = next(((size, letter) for size, letter in ((1e6, "M"), (1e3, "k")) if most >= 10 * size), (1, ""))
  return ticker.FuncFormatter(lambda value, _: f"{value / size:.6g}{letter if value else ''}")


def _percent(share: float, _=None) -> str:
  return f"{100 * share:.6g} %"


def _svg(figure: Figure) -> str:
  """Without prolog and size, names that would be there twice, and colours and letters of its own."""
  out = io.StringIO()
  figure.savefig(out, format="svg", transparent=True, metadata=dict(Date=None, Creator=None, Format=None, Type=None))
  text = out.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
  text = re.sub(r' id="[\w.]+_\d+"', "", text)
  text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="chart" \1 role="img">', text, count=1)
  text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
  return re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", text)
