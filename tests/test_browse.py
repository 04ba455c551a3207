"""The page of the training data: what it shows is what the training step and the data check see, and it needs nothing else."""

import base64
import html.parser
import io
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from segjax import input_pipeline
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, images
from segjax.run import pictures
from segjax.tools import browse, check_data
from tests import command, experiment
from tests.folder_of_images import folder_of_images


class Page(html.parser.HTMLParser):
  """The text of a page, its pictures by their captions, and whatever it would fetch."""

  def __init__(self, text):
    super().__init__()
    self.words, self.pictures, self.fetched, self.tags = [], [], [], set()
    self.feed(text)
    self.text = " ".join(" ".join(self.words).split())

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.add(tag)
    links = [attributes[name] for name in ("src", "href", "srcset", "data", "action") if attributes.get(name)]
    self.fetched += [link for link in links if not link.startswith(("data:", "#"))]
    if tag == "img":
      content = attributes["src"].partition("base64,")[2]
      pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
      self.pictures.append((attributes["alt"], pixels))

  def handle_data(self, data):
    self.words.append(data)

  def of(self, caption):
    return [pixels for alt, pixels in self.pictures if alt.startswith(caption)]


@pytest.fixture
def config(tiny_config, tmp_path):
  config = folder_of_images(tiny_config, tmp_path / "DATA")
  config.data.loader = "grain"
  return config


def page(config, count=3, **options):
  text, problems, _ = browse.page(config, count, **options)
  return Page(text), problems


def spoil(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


@pytest.mark.full
def test_crops_are_those_that_the_training_step_computes_its_loss_of(tiny_config):
  config, seen = experiment.of_smallest_network(tiny_config), []
  config.augment.update(class_mix=0.7, foreground=0.5, flip_vertical=True, brightness=0.2)
  config.data.loader = "grain"
  run = Experiment(config, mesh=experiment.mesh_of(1))

  def recorded(key, batch):
    crops = run.augment_batch(key, batch)
    jax.debug.callback(lambda *arrays: seen.append([np.array(x) for x in arrays]), *crops[:2], ordered=True)
    return crops

  step, state = run.make_train_step(augment_batch=recorded), run.init_state()
  for batch in run.device_batches(0, 2):
    state, _ = step(state, batch)
  jax.effects_barrier()
  found = browse.samples(run, 11)
  assert [(sample.step, sample.row) for sample in found] == [(1, n) for n in range(8)] + [(2, n) for n in range(3)]
  for sample in found:
    image, label = (arrays[sample.row] for arrays in seen[sample.step - 1])
    np.testing.assert_array_equal(sample.label, label)
    np.testing.assert_allclose(sample.image, image, atol=0.01)
  assert len({sample.image.tobytes() for sample in found}) == 11


def test_small_pictures_have_the_pixels_of_files_and_crops_and_labels_are_painted_over_them(config):
  shown, _ = page(config, 5)
  run = Experiment(config, mesh=experiment.mesh_of(1))
  source, found = run.train_source, browse.samples(run, 5)
  raw, labels = shown.of("image, 24 x 32"), shown.of("its label")
  crops, crop_labels = shown.of("crop, 16 x 24"), shown.of("the crop's label")
  for n, sample in enumerate(found):
    image, label = source[sample.index]
    np.testing.assert_array_equal(raw[n], image)
    np.testing.assert_array_equal(labels[n], pictures.paint(image, label, source.palette))
    np.testing.assert_array_equal(crops[n], np.round(sample.image))
    np.testing.assert_array_equal(crop_labels[n], pictures.paint(crops[n], sample.label, source.palette))
    assert f"{source.describe(sample.index)} step 1, row {n}" in shown.text


def test_what_surrounds_an_unpadded_networks_crop_is_shown_without_a_label(config):
  config.model.padding = "valid"
  shown, _ = page(config, 1)
  (crop,), (label,) = shown.of("crop, 16 x 24"), shown.of("the crop's label")
  margin = Experiment(config).network.margin
  assert margin > 0 and crop.shape == label.shape == (16 + 2 * margin, 24 + 2 * margin, 3)
  painted = (crop != label).any(-1)
  assert painted[margin:-margin, margin:-margin].mean() > 0.9
  painted[margin:-margin, margin:-margin] = False
  assert not painted.any()


def test_the_table_counts_pixels_and_images_of_both_splits_and_of_the_crops(config, tmp_path):
  lonely = tmp_path / "DATA/masks/train/03.png"
  Image.fromarray(np.full((24, 32), 255, np.uint8)).save(lonely)
  shown, _ = page(config, 4)
  crops = [sample.label for sample in browse.samples(Experiment(config, mesh=experiment.mesh_of(1)), 4)]
  table = shown.text.partition(" Problems No problems")[0]
  for value, name in ((0, "ground"), (1, "cell"), (2, "rim"), (255, "void")):
    row = re.escape(name)
    for split in ("train", "val"):
      source = input_pipeline.make_source(config.data, split)
      labels = np.stack([source[i][1] for i in range(len(source))])
      hits = labels == value
      row += rf" {100 * hits.mean():.2f} % {hits.any((1, 2)).sum()}"
    hits = np.stack(crops) == value
    row += rf" {100 * hits.mean():.2f} % {hits.any((1, 2)).sum()}"
    assert re.search(rf"\b{row}\b", table), (row, table)


def test_every_problem_of_the_data_check_stands_there_in_its_words_with_the_image_if_that_can_be_read(config, tmp_path):
  root = tmp_path / "DATA"
  spoil(root / "masks/train/03.png")
  spoil(root / "images/val/01.png")
  Image.fromarray(np.full((24, 32), 9, np.uint8)).save(root / "masks/train/05.png")
  shutil.copy(root / "images/train/07.png", root / "images/val/zz.png")
  shutil.copy(root / "masks/train/07.png", root / "masks/val/zz.png")
  (root / "images/train/<b>&.psd").write_bytes(b"")
  shown, problems = page(config, 12)
  found = check_data.examine(config)
  texts = [text for split in found.splits.values() for _, text in split.problems] + found.others
  assert problems == len(texts) == 5 and f"Problems ({problems})" in shown.text
  for text in texts:
    assert " ".join(text.split()) in shown.text
  for name, there in (("images/train/03", True), ("images/train/05", True), ("images/val/01", False)):
    pixels = [pixels for alt, pixels in shown.pictures if alt == name]
    assert len(pixels) == there
    if there:
      np.testing.assert_array_equal(pixels[0], images.read_image(root / f"{name}.png"))
  bad = [sample for sample in browse.samples(Experiment(config, mesh=experiment.mesh_of(1)), 12) if sample.problem]
  assert {sample.index for sample in bad} == {3, 5} and all((sample.label == 255).all() for sample in bad)
  assert all(f"data.max_bad_examples allows it. {' '.join(sample.problem.split())}" in shown.text for sample in bad)


def test_of_many_problems_the_first_are_listed_and_the_others_counted(config, monkeypatch, tmp_path):
  monkeypatch.setattr(browse, "_MOST_PROBLEMS", 2)
  for name in ("00", "01", "02", "03"):
    spoil(tmp_path / f"DATA/masks/train/{name}.png")
  shown, problems = page(config)
  assert problems == 4 and "And 2 more: segjax check lists all." in shown.text
  assert "01.png: damaged" in shown.text.partition("What the network gets")[0]
  assert "02.png: damaged" not in shown.text.partition("What the network gets")[0]


def test_data_of_which_no_step_can_be_made_still_have_a_page_that_says_why(config, tmp_path):
  (tmp_path / "DATA/images/train/02.png").write_text("no image")
  shown, problems = page(config)
  assert problems and re.search("No crops can be made yet: .*02.png: not a readable image", shown.text)
  assert "ground" in shown.text and not shown.of("crop")


@pytest.mark.parametrize(
  "changes, error",
  [
    (dict(dir="/no/such/folder"), DataError),
    (dict(train_split="tain"), DataError),
    (dict(sampling="class_balanced", classes=("ground", "cell", "rim", "ghost")), ConfigError),
  ],
)
def test_what_no_page_can_show_is_an_error_that_names_it(config, changes, error):
  config.data.update(changes)
  with pytest.raises(error, match="no such folder|tain|holds ghost"):
    browse.page(config, 2)


def test_pages_fetch_nothing_run_nothing_and_escape_names(config, tmp_path):
  config.data.classes = ("<script>x</script>", "cell & wall", "rim")
  shown, _ = page(config)
  assert shown.fetched == [] and "script" not in shown.tags
  assert "<script>x</script>" in shown.text and "cell & wall" in shown.text


def test_many_channels_are_shown_as_pictures_show_them(tmp_path):
  tifffile = pytest.importorskip("tifffile")
  from tests import test_rasters

  layout = "four of 8 bits"
  config, stored = test_rasters.make(tmp_path, layout)
  config.crop_size = (12, 16)
  shown, problems = page(config, 2)
  assert problems == 0 and "4 channels of uint8" in shown.text and tifffile
  found = browse.samples(Experiment(config, mesh=experiment.mesh_of(1)), 2)
  for sample, raw in zip(found, shown.of("image, ")):
    np.testing.assert_array_equal(raw, pictures.visible(stored["train"][sample.index]))
  assert [crop.shape for crop in shown.of("crop, 12 x 16")] == [(12, 16, 3)] * 2


def test_generated_data_have_a_page_and_without_the_check_nothing_but_the_crops_is_read(tiny_config, monkeypatch):
  tiny_config.data.update(loader="grain", num_val=40)
  assert page(tiny_config)[1] == 0
  monkeypatch.setattr(check_data, "examine", lambda config: pytest.fail("was read"))
  shown, _ = page(tiny_config, 9, check=False)
  assert "Problems" not in shown.text and len(shown.of("crop, ")) == 9 and "crops of 9" in shown.text


def test_the_command_writes_the_page_and_says_what_it_holds(config, tmp_path):
  options = f"--config.data.dir={config.data.dir}", "--config.data.classes=ground,cell,rim", "--config.crop_size=16,24"
  spoil(tmp_path / "DATA/masks/train/03.png")
  code, out, err = command.run("segjax.browse", "--config=folder", *options, "--samples=2", cwd=tmp_path)
  assert code == 0 and re.search(r"^browse.html: \d+\.\d MB; 1 problem\(s\) found, listed there$", out, re.M), (
    out,
    err,
  )
  assert len(Page((tmp_path / "browse.html").read_text()).of("crop, ")) == 2
  (tmp_path / "DATA/images/train/02.png").write_text("no image")
  code, out, _ = command.run("segjax.browse", "--config=folder", *options, "--nocheck", cwd=tmp_path)
  assert code == 0 and "not checked\nNo crops can be made yet: " in out and "02.png: not a readable image" in out
  code, _, err = command.run("segjax.browse", "--config=folder", *options, "--out=no/such/a.html", cwd=tmp_path)
  assert code == 2 and "--out=no/such/a.html: no file can be written there" in err
  code, _, err = command.run("segjax.browse", "--config=folder", *options, "--samples=0", cwd=tmp_path)
  assert code == 2 and "samples" in err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser_nothing_is_wider_than_the_window_and_nothing_is_complained_about(width, config, tmp_path):
  config.data.classes = ("ground", "a_class_with_a_name_that_is_longer_than_any_column_of_a_phone_would_ever_be", "rim")
  spoil(tmp_path / "DATA/masks/train/03.png")
  text = browse.page(config, 12)[0]
  seen = "[innerWidth, document.documentElement.scrollWidth, [...document.images].every(i => i.naturalWidth)]"
  (tmp_path / "page.html").write_text(f"{text}<script>onload = () => parent.postMessage({seen}, '*')</script>")
  frame = f'<iframe src="page.html" width={width} height=20000 style="border: 0"></iframe>'
  (tmp_path / "frame.html").write_text(f"<script>onmessage = e => document.title = e.data</script>{frame}")
  options = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-logging=stderr",
    "--dump-dom",
    "--window-size=1500,900",
  )
  options += "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}"
  command_line = [CHROMIUM, *options, f"file://{tmp_path}/frame.html"]
  result = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=True)
  assert re.search("<title>(.*)</title>", result.stdout)[1] == f"{width},{width},true"
  assert "CONSOLE" not in result.stderr
