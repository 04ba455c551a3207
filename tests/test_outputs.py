"""Names of examples that are not those of plain files: what is written under them, and where."""

import os
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from segjax import predict
from segjax.config import ConfigError, default_config
from segjax.input_pipeline import DataError, borders, images, scan, unlabelled
from segjax.input_pipeline.sources import datasets
from segjax.input_pipeline.sources.base import Source
from segjax.run import examples, outputs, report
from segjax.tools import submission
from tests.test_examples import start
from tests.test_folder import IMAGE, MASK, make, source, split, write
from tests.test_inventory import findings

ODD = os.fsdecode(b"stra\xdfe"), "two\nlines", "bell\x07", "sep\u2028"


def named(*names):
  """A source whose examples have these names."""
  store = types.SimpleNamespace(names=list(names))
  return Source(store, ("ground", "road"), datasets.palette(2), None)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a/..", "..", "", ".", "a\0"])
def test_no_name_leads_out_of_the_output_folder(tmp_path, name):
  with pytest.raises(DataError, match="names no file below"):
    outputs.output_path(tmp_path, name)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../../x"])
def test_every_writer_stays_in_its_folder_whatever_an_id_says(tmp_path, monkeypatch, name):
  with pytest.raises(DataError, match="names no file below"):
    submission.result_path(named(name), 0)
  out = tmp_path / "run/out"
  with pytest.raises(DataError, match="names no file below"):
    predict._check_outputs(out, [unlabelled.Photo(tmp_path / "a.png", name, (6, 8))])
  writer = report.Writer(out)
  written = []
  monkeypatch.setattr(Image.Image, "save", lambda self, path: written.append(path))
  folder = writer.pictures(1, {named(name).describe(0): IMAGE})
  assert len(written) == 1 and written[0].parent == folder and ".." not in written[0].parts


@pytest.mark.parametrize(
  "names, message",
  [
    (["../x"], "names no file below"),
    (["a" * 250, "b" * 252], r"^b{252}.png: too long for a file's name \(256 bytes of"),
    (["ä" * 126], "256 bytes"),
    (["/".join(["d" * 250] * 17)], "the whole path of 4095"),
    (["a", "b", "a"], "Several examples would be written as .*a.png. Rename"),
  ],
)
def test_predictions_with_impossible_names_are_refused_before_the_work(tmp_path, monkeypatch, names, message):
  config = default_config(data="folder")
  config.data.eval_split = "val"
  monkeypatch.setattr(submission.warm_start, "load_unless_run", lambda *_: None)
  monkeypatch.setattr(submission.input_pipeline, "make_source", lambda *_, **__: named(*names))
  with pytest.raises(DataError, match=message):
    submission.submit(config, tmp_path)
  assert not list(tmp_path.iterdir())
  config.data.eval_split = "../../x"
  with pytest.raises(DataError, match="names no file below"):
    submission.submit(config, tmp_path)


def test_predict_refuses_names_that_become_too_long_before_the_work(tmp_path):
  write(tmp_path / "image.png", IMAGE)
  long = tmp_path / ("n" * 253)  # Without an ending; with ".png" it has 257 bytes.
  (tmp_path / "image.png").rename(long)
  with pytest.raises(DataError, match=r"n{253}.png: too long for a file's name \(257 bytes"):
    predict.predict(default_config(data="folder"), tmp_path, [str(long)], tmp_path / "out")


def test_pictures_of_long_and_clashing_names_are_all_written(tmp_path):
  long = "images/val/" + "n" * 250
  names = (long + "1", long + "2", "a/b", "a_b", "ä" * 120, "plain")
  folder = report.Writer(tmp_path).pictures(3, {name: IMAGE for name in names})
  written = {path.name for path in folder.iterdir()}
  assert len(written) == 6 and {"a_b.png", "plain.png"} < written
  assert all(len(os.fsencode(name)) <= 143 for name in written)


@pytest.mark.parametrize("name", ODD)
def test_names_that_are_no_text_go_through_check_start_and_resume(tmp_path, capsys, name):
  root = tmp_path / "data"
  for part in ("train", "val"):
    make(root, names=(name, "a"), split=part)
  write(root / f"masks/val/lost{name}.png", MASK)
  (root / f"images/val/x.{name}").write_text("")
  count, output = findings(root, capsys)
  assert count == 2 and images.printable(f"masks/val/lost{name}.png is not used: a mask without") in output
  data = source(root)
  shown = next(shown for shown in map(data.describe, range(2)) if shown != "images/train/a")
  assert shown.isprintable() and shown.encode() and shown == images.printable(f"images/train/{name}")
  for _ in range(2):
    start(root, tmp_path)
  path = root / f"masks/train/{name}.png"
  path.write_bytes(path.read_bytes() + b"!")
  with pytest.raises(ConfigError) as error:
    start(root, tmp_path)
  assert images.printable(str(path)) in str(error.value)
  path.write_bytes(b"")
  with pytest.raises(DataError) as error:
    scan.label_statistics(source(root))
  assert str(error.value).encode() and images.printable(str(path)).rpartition("/")[2][:4] in str(error.value)
  assert split([name, "b"], holdout=1.0)


@pytest.mark.parametrize("name", ODD)
def test_images_and_maps_of_such_names_are_read(tmp_path, monkeypatch, name):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path = tmp_path / "photos" / f"{name}.png"
  write(path, MASK)
  assert borders.cached_border_map(path, "", lambda: np.zeros((6, 8), int), 5.0).shape == (6, 8)
  (photo,), problems = unlabelled.find_photos([str(path.parent)], [], "refuse")
  assert photo.name == name and not problems
  assert pathlib.Path(outputs.output_path(path.parent, f"{photo.name}.png")) == path


def test_images_outside_the_root_are_named_without_the_way_there(tmp_path):
  make(tmp_path / "elsewhere")
  (tmp_path / "root").mkdir()
  for images_folder in ("../elsewhere/images/train", str(tmp_path / "elsewhere/images/train")):
    data = source(tmp_path / "root", images=images_folder, masks="../elsewhere/masks/train")
    name = data.describe(0)
    assert name.endswith("elsewhere/images/train/a") and not name.startswith("/") and ".." not in name
    outputs.check_outputs(tmp_path, [name])
  assert examples._checksum(data.files()["image"][0])
