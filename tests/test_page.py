"""report.html: what it says, that a browser shows it as it should, and that no run depends on it."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import types

import jax
import numpy as np
import pytest

from segjax import config as config_lib
from segjax import metrics, sharding
from segjax import train as train_lib
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.input_pipeline.sources import datasets
from segjax.run import evaluation, page, record, report
from segjax.run.page import charts
from tests import command, fake_run
from tests.marks import full

WRITE_PAGE = report.Writer.page  # Which fake runs replace.
ODD = "a</p><script>alert(1)</script>\udcdf.png"


def make_totals(num_classes, seed=0):
  """Of some images with random predictions that are mostly right."""
  rng, totals = np.random.default_rng(seed), metrics.Totals(num_classes, 2)
  label = rng.integers(0, num_classes, (6, 60, 50))
  prediction = np.where(rng.random(label.shape) < 0.7, label, rng.integers(0, num_classes, label.shape))
  size, confidence = np.tile(np.array([60, 50], np.int32), (6, 1)), rng.random(label.shape) ** 0.2
  counts = jax.jit(metrics.image_counts, static_argnums=3)(label, prediction, size, num_classes)
  counts["reliability"] = metrics.reliability_counts(label, prediction, confidence.astype("f4"), num_classes)
  totals.add(counts | dict(id=np.arange(6)))
  return totals


def make_run(folder, num_classes=4, seed=0, steps=(50, 100), **fields):
  """A workdir as training leaves it, with curves, evaluations and pictures of no network."""
  classes = tuple(f"class {n}" for n in range(num_classes - 1)) + (f"road & <{'long ' * 4}name>",)
  source = types.SimpleNamespace(classes=classes, palette=datasets.palette(num_classes))
  config = default_config(data="synthetic")
  config.update(num_steps=100, **fields)
  config_lib.save(config, folder.mkdir(parents=True) or folder)
  writer, rng = report.Writer(folder), np.random.default_rng(seed)
  names = "train/loss", "train/learning_rate", "train/images_per_s"
  for step in range(5, 101, 5):
    writer.scalars(step, {name: float(rng.random() + 10 / step) for name in names})
    if step in steps:
      totals = make_totals(num_classes, seed + step)
      shapes = dict(worst=(90, 4 * 300, 3), median=(40, 4 * 30, 3))
      examples = [
        evaluation.Example(rank, ODD, 0.25, rng.integers(0, 255, shapes[rank], dtype=np.uint8))
        for rank in ("worst", "worst", "median")
      ]
      scalars = report.score_scalars("val", classes, totals)
      record.write(writer, step, evaluation.Evaluation(totals, scalars, "", {}, examples, source, config))
  return folder


def text_of(path):
  return html.unescape(path.read_text())


def test_the_page_has_the_numbers_of_the_newest_evaluation_and_every_cell_of_its_matrix(tmp_path):
  run = make_run(tmp_path / "run")
  found, totals = text_of(page.write(run)), make_totals(4, 100)
  saved = json.loads((run / "evaluations/step_000100.json").read_text())
  np.testing.assert_array_equal(saved["confusion"], totals.confusion)
  np.testing.assert_array_equal(saved["boundary"], totals.boundary)
  scores = metrics.scores(totals.confusion) | totals.images.scores() | metrics.boundary_scores(totals.boundary)
  scores |= metrics.calibration(totals.reliability)
  for name in ("mean_iou", "image_iou", "image_dice", "boundary_iou", "calibration_error", "pixel_accuracy"):
    assert f"<b>{100 * scores[name]:.2f}<small>" in found, name
  cells = re.findall(r'title="(.*?) as (.*?): ([\d,]+) pixels, ([\d.–]+) %"', found)
  classes = saved["classes"]
  counts = np.zeros((4, 4), int)
  for label, predicted, count, share in cells:
    row, column = classes.index(label), classes.index(predicted)
    counts[row, column] = int(count.replace(",", ""))
    assert share == f"{100 * counts[row, column] / totals.confusion[row].sum():.2f}"
  np.testing.assert_array_equal(counts, totals.confusion)
  assert saved["command"] in found and saved["commit"] in found and f"jax\xa0{jax.__version__}" in found


def test_config_shows_what_differs_from_the_defaults_and_all_of_it(tmp_path):
  found = text_of(page.write(make_run(tmp_path / "run", batch_size=6)))
  changed, everything = found.split("What differs")[1].split("<details>")
  rows = re.findall(r'<td class="mono">([\w.]+)</td>', changed)
  assert sorted(rows) == ["batch_size", "num_steps"]
  defaults = config_lib.fields(default_config(data="synthetic"))
  assert set(re.findall(r'<td class="mono">([\w.]+)</td>', everything)) == defaults.keys()


def test_the_page_needs_nothing_from_elsewhere_and_names_from_outside_stay_text(tmp_path):
  raw = page.write(make_run(tmp_path / "run")).read_text()
  assert "<script" not in raw and r"</p><script>" in html.unescape(raw)
  assert not re.findall(r'(?:src|href|srcset)="(?!data:image/|#)', raw) and "url(" not in re.sub(r"url\(#", "", raw)
  assert "@import" not in raw and "#1e00" not in raw and "#5e00" not in raw  # Colours that stand for others.


def test_a_later_evaluation_of_another_split_takes_its_place_and_keeps_the_curves(tmp_path):
  run = make_run(tmp_path / "run")
  first = text_of(page.write(run))
  other = make_run(tmp_path / "other", seed=7)
  shutil.copytree(other / "evaluations", run / "eval_test/evaluations", ignore=shutil.ignore_patterns("worst_2.png"))
  (run / "eval_test/evaluations/step_000100.json").touch()
  second = text_of(page.write(run))
  iou = metrics.scores(make_totals(4, 107).confusion)["mean_iou"]
  assert f"<b>{100 * iou:.2f}<small>" in second and f"<b>{100 * iou:.2f}<small>" not in first
  assert "<b>loss</b>" in second and second.count("no longer in the workdir") == 1


def test_runs_beside_each_other_show_their_scores_and_only_the_fields_that_differ(tmp_path):
  runs = [make_run(tmp_path / name / "run", seed=n, batch_size=2 + n) for n, name in enumerate("ab")]
  found = text_of(page.compare(runs, tmp_path / "both.html"))
  ious = [metrics.scores(make_totals(4, 100 + n).confusion)["mean_iou"] for n in range(2)]
  row = re.search(r"<td>mean IoU</td>(.*?)</tr>", found)[1]
  cells = [f"<td{' class=best' if iou == max(ious) else ''}>{100 * iou:.2f}</td>" for iou in ious]
  assert row.replace('"', "") == "".join(cells)
  assert re.findall(r'<td class="mono">(.*?)</td>', found) == ["batch_size", "2", "3"]
  assert f"{tmp_path}/a/run" in found  # Their folders have the same name.
  with pytest.raises(ConfigError, match="11 runs"):
    page.compare(runs[:1] * 11, tmp_path / "many.html")


def test_the_verb_makes_the_page_again_and_names_a_folder_that_is_no_run(tmp_path):
  run = make_run(tmp_path / "run")
  code, out, _ = command.run("segjax.report", run, cwd=tmp_path)
  assert code == 0 and out == f"report: {run / 'report.html'}\n" and (run / "report.html").exists()
  code, out, _ = command.run("segjax.report", run, "--out=x.html", run, cwd=tmp_path)
  assert code == 0 and "2 runs" in (tmp_path / "x.html").read_text()
  code, _, err = command.run("segjax.report", tmp_path, cwd=tmp_path)
  assert code == 2 and "no workdir of a run" in err
  (run / "metrics.jsonl").write_text("{")
  code, _, err = command.run("segjax.report", run, cwd=tmp_path)
  assert code == 2 and "its report cannot be made" in err


def test_a_report_that_fails_stops_no_run_and_is_said_once(tmp_path, monkeypatch, capsys, tiny_config):
  fake = fake_run.install(monkeypatch)
  fake.scores = [0.5, 0.6]
  monkeypatch.setattr(report.Writer, "page", WRITE_PAGE)
  monkeypatch.setattr(page, "write", lambda run: 1 / 0)
  assert train_lib.train(tiny_config, tmp_path / "run")["val/mean_iou"] == 0.6
  out = capsys.readouterr().out
  assert out.count("note: no report.html (ZeroDivisionError: division by zero)") == 1 and "  report  " not in out


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  run = make_run(tmp_path / "run")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  writer = report.Writer(run)
  assert writer.page() is None and not (run / "report.html").exists()


@pytest.mark.parametrize("mesh", [(4, 2), *full(((1, 1),))])
def test_the_worst_and_the_median_images_are_those_that_single_predictions_tell(tiny_config, mesh):
  tiny_config.data.update(num_val=11, loader="grain", workers=1)
  experiment = Experiment(tiny_config, mesh=sharding.make_mesh(*mesh, devices=jax.devices()[: mesh[0] * mesh[1]]))
  variables, source = experiment.init_state().eval_variables(), experiment.eval_source
  found = experiment.evaluator(variables)
  batches = evaluation.make_batches(tiny_config, source, experiment.mesh)
  ious, predicted = {}, {}
  for index, out in evaluation.predictions(experiment.eval_step, variables, batches, experiment.mesh):
    (_, label), prediction = source[index], out["prediction"]
    valid = label < 255
    classes = set(label[valid]) | set(prediction[valid])
    pairs = [((label == k)[valid], (prediction == k)[valid]) for k in classes]
    ious[index], predicted[index] = np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]), prediction
  order = sorted(ious, key=ious.get)
  want = [("worst", n) for n in order[:2]] + [("median", n) for n in sorted(order[4:6], key=ious.get)]
  assert [(e.rank, e.name) for e in found.examples if e.rank == "worst"] == [
    (rank, source.describe(n)) for rank, n in want[:2]
  ]
  assert found.examples[2].rank == "median" and source.describe(order[5]) in [e.name for e in found.examples[2:]]
  assert found.scalars["val/image_iou"] == pytest.approx(np.mean(list(ious.values())))
  (image, label), worst = source[order[0]], found.examples[0]
  assert worst.iou == pytest.approx(ious[order[0]])
  panels = np.split(worst.picture, 4, axis=1)
  np.testing.assert_array_equal(panels[0], image)
  wrong = (panels[3] == evaluation.pictures_lib.MISTAKE_COLOR).all(-1)
  np.testing.assert_array_equal(wrong, (predicted[order[0]] != label) & (label < 255))


def test_curves_of_any_length_are_thinned_and_charts_take_the_colours_of_the_page():
  long = charts.lines([charts.Curve(np.arange(100_000), np.random.default_rng(0).random(100_000), 3, True)])
  assert len(long) < 60_000 and "var(--s3)" in long and "var(--muted)" in long and " id=" not in long.split("<path")[1]
  ticks = re.findall(
    r">([\d.]+[kM]?)</text>", charts.lines([charts.Curve(np.array([0, 20_000]), np.array([0.25, 0.5]), 0)])
  )
  assert [tick for tick in ticks if tick[-1] == "k"] == ["5k", "10k", "15k", "20k"]


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, paper = getComputedStyle(document.body).backgroundColor;
  const blank = [...document.images].filter(image => !image.naturalWidth).length;
  parent.postMessage({wide: root.scrollWidth, window: innerWidth, paper, blank,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, charts: document.querySelectorAll("svg.chart").length}, "*");
})</script>"""
# A frame: windows of the browser itself are no narrower than 500 pixels.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<script>addEventListener("message", said => document.body.dataset.found = JSON.stringify(said.data))</script>
<iframe src="inner.html" style="border: 0; width: %dpx; height: 2400px"></iframe>"""


def in_browser(path, width, dark, screenshot):
  """What the page says of itself at that width, and its messages on the console; and a picture of it."""
  folder = path.parent / "browser"
  folder.mkdir(exist_ok=True)
  (folder / "inner.html").write_text(path.read_text() + PROBE)
  (folder / "outer.html").write_text(FRAME % width)
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2400"]
  options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--log-level=0"]
  options += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
  outputs = []
  for action, page_shown in (("--dump-dom", folder / "outer.html"), (f"--screenshot={screenshot}", path)):
    arguments = [CHROMIUM, *options, action, f"file://{page_shown}"]
    outputs.append(subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True))
  found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', outputs[0].stdout)[1]))
  return found, [line for out in outputs for line in out.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("num_classes", [4, 21, 90])
def test_a_browser_shows_the_page_without_errors_or_overflow_light_and_dark_narrow_and_wide(tmp_path, num_classes):
  runs = [make_run(tmp_path / f"a-run-with-a-rather-long-name-{n}-{'x' * 40}", num_classes, n) for n in range(3)]
  pages = dict(run=page.write(runs[0])) | (
    {} if num_classes > 21 else dict(compare=page.compare(runs, tmp_path / "c.html"))
  )
  for name, path in pages.items():
    papers = {}
    for width in (390, 1400):
      for dark in (False, True):
        shot = tmp_path / f"{name}_{width}_{dark}.png"
        found, console = in_browser(path, width, dark, shot)
        assert console == [] and found["blank"] == 0 and found["dark"] == dark, (found, console)
        assert found["window"] == width and found["wide"] <= width, found
        assert found["charts"] >= 4 and shot.stat().st_size > 10_000
        papers[dark] = found["paper"]
    assert papers[True] != papers[False]


def test_the_template_is_part_of_what_is_installed():
  files = {path.suffix for path in pathlib.Path(page.__file__).parent.iterdir()}
  assert {".html", ".css"} <= files and '"segjax.run.page": ["*.html", "*.css"]' in (
    pathlib.Path(__file__).parents[1] / "setup.py"
  ).read_text()
