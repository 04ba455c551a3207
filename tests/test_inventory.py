"""What lies in the folders of a data set and is not used: nothing of it goes without a word."""

import os
import shutil

import numpy as np
import pytest

from segjax import input_pipeline
from segjax.config import default_config
from segjax.input_pipeline import DataError, images, inventory, masks, unlabelled
from segjax.input_pipeline.sources.cityscapes import CityscapesSource
from segjax.input_pipeline.sources.holdout import HoldOut
from segjax.input_pipeline.sources.kitti_road import KittiRoadSource
from segjax.input_pipeline.sources.voc import VocSource
from segjax.tools import check_data
from tests.test_folder import IMAGE, MASK, make, source, write


@pytest.fixture
def root(tmp_path):
  for split in ("train", "val"):
    make(tmp_path, names=("a", "b", "c"), split=split)
  return tmp_path


def findings(root, capsys, **options):
  """Number of problems of check_data, and what it prints."""
  config = default_config(data="folder")
  config.data.dir, config.data.classes = str(root), ("ground", "road", "car")
  config.data.update(options)
  return check_data.check(config), capsys.readouterr().out


def start_notes(root, **options):
  return "\n".join(inventory.notes({split: source(root, split, **options) for split in ("train", "val")}))


def test_a_sound_data_set_has_nothing_unused(root, capsys):
  assert findings(root, capsys)[0] == 0 and not start_notes(root)


@pytest.mark.parametrize(
  "path, add, line",
  [
    ("images/train/d.heic", lambda p: p.write_text(""), "PROBLEM: {} is not used: a .heic file. segjax reads .png"),
    ("images/train/d", lambda p: p.write_text(""), "PROBLEM: {} is not used: a file without an ending"),
    ("masks/val/d.png", lambda p: write(p, MASK), "PROBLEM: {} is not used: a mask without an image. Add the image"),
    ("images/train/sub", lambda p: p.symlink_to("../val"), "PROBLEM: {} is not used: a linked folder, which is not"),
    ("images/train/d.png", lambda p: p.mkdir(), "PROBLEM: {} is not used: a folder named like an image"),
    ("images/train/.ipynb_checkpoints", lambda p: write(p / "a.jpg", IMAGE), "note: {} is not used: a hidden entry"),
    ("images/train/._a.jpg", lambda p: p.write_text(""), "note: {} is not used: a hidden entry"),
    ("masks/train/.DS_Store", lambda p: p.write_text(""), "note: {} is not used: a hidden entry"),
    ("masks/train/Thumbs.db", lambda p: p.write_text(""), "note: {} is not used: a hidden entry"),
    ("images/train/notes.txt", lambda p: p.write_text(""), "note: {} is not used: a .txt file"),
  ],
)
def test_every_entry_that_is_not_used_is_named_and_counted_at_the_start(root, capsys, path, add, line):
  add(root / path)
  count, output = findings(root, capsys)
  assert line.format(root / path) in output and count == line.startswith("PROBLEM"), output
  assert "1 entries of the data folders are not used: a" in start_notes(root)


def test_what_another_split_uses_is_used(tmp_path, capsys):
  layout = dict(images="images", masks="masks")
  for i in range(20):
    write(tmp_path / "images" / f"{i}.png", np.full((6, 8, 3), i, np.uint8))
    write(tmp_path / "masks" / f"{i}.png", MASK)
  assert findings(tmp_path, capsys, **layout, holdout=0.3)[0] == 0 and not start_notes(tmp_path, **layout, holdout=0.3)
  for split, names in dict(train="0\n1\n", val="2\n3.png\n").items():
    (tmp_path / f"{split}.txt").write_text(names)
  count, output = findings(tmp_path, capsys, **layout, list="{split}.txt")
  assert count == 0 and output.count("is not used: in no split") == 2 * 16


def test_one_split_alone_tells_what_no_other_can_use_and_nothing_else(tmp_path):
  for split in ("train", "val"):
    for name in ("1.png", "2.png"):
      write(tmp_path / "images" / split / (split + name), IMAGE)
      write(tmp_path / "masks" / (split + name), MASK)
  val = source(tmp_path, "val", masks="masks")  # All masks in one folder.
  assert len(inventory.unused({"val": val})) == 2 and not inventory.notes({"val": val}, whole=False)
  (tmp_path / "images/val/d.heic").write_text("")
  notes = inventory.notes({"val": source(tmp_path, "val", masks="masks")}, whole=False)
  assert len(notes) == 1 and "1 entries of the data folders are not used: a .heic file (1)" in notes[0]


def test_lists_with_a_byte_order_mark_and_names_with_spaces_are_read(tmp_path):
  names = ("my image", "a", "b c d", "next\x85line")
  make(tmp_path, names=names)
  (tmp_path / "train.txt").write_text("\ufeff" + "\r\n".join((*names[:2], "b c d.jpg", names[3])), encoding="utf-8")
  data = source(tmp_path, list="train.txt")
  assert [data.describe(i).removeprefix("images/train/") for i in range(3)] == ["my image", "a", "b c d"]
  pairs = [f"images/train/{name}.jpg \t masks/train/{name}.png" for name in names]
  (tmp_path / "train.txt").write_text("\ufeff" + "\n".join(pairs), encoding="utf-8")
  data = source(tmp_path, list="train.txt")
  assert data.files()["mask"][2] == tmp_path / "masks/train/b c d.png" and len(data) == 4
  (tmp_path / "train.txt").write_text("\n".join([*pairs, "images/train/a.jpg masks/train/gone.png"]))
  with pytest.raises(DataError, match=r"train.txt: 'images/train/a.jpg masks/train/gone.png' is no pair of an image"):
    source(tmp_path, list="train.txt")


@pytest.mark.parametrize("folder, name", [("images", "b.jpg"), ("masks", "b.png")])
@pytest.mark.parametrize("special", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_named_and_never_waited_for(root, capsys, folder, name, special):
  path = root / folder / "train" / name
  path.unlink()
  special(path)
  count, output = findings(root, capsys)
  assert count == 1 and f"{path}: no regular file" in output
  for read in (images.read_size, images.read_image, masks.read_mask, images.read_lines):
    with pytest.raises(DataError, match="no regular file"):
      read(path)
  found, problems = unlabelled.find_photos([str(path.parent)], [], "refuse")
  assert len(found) == 2 and "no regular file" in problems[0]


def test_the_same_image_in_both_splits_or_twice_in_one_is_a_problem(root, capsys):
  shutil.copy(root / "images/train/a.jpg", root / "images/val/b.jpg")
  write(root / "images/train/x.png", images.read_image(root / "images/train/c.jpg"))  # Other bytes, the same pixels.
  shutil.copy(root / "masks/train/c.png", root / "masks/train/x.png")
  count, output = findings(root, capsys)
  assert count == 2, output
  assert "the same image in train and val: images/train/a, images/val/b. Scores would be of images that" in output
  assert "the same image 2 times in train: images/train/c, images/train/x. Remove all but one" in output
  for split in ("train", "val"):
    (root / f"{split}.txt").write_text("a\na\n")
  count, output = findings(root, capsys, list="{split}.txt", images="images/train", masks="masks/train")
  assert count == 1 and "the same image in train and val: images/train/a." in output
  layout = dict(list="{split}.txt", images="images/train", masks="masks/train")
  assert "3 images are named twice, within a split or in both" in start_notes(root, **layout)


def test_predict_names_what_it_does_not_look_at(tmp_path):
  write(tmp_path / "a.png", IMAGE)
  (tmp_path / "b.heic").write_text("")
  (tmp_path / ".hidden.png").write_text("")
  (tmp_path / "link").symlink_to("..")
  found, problems = unlabelled.find_photos([str(tmp_path)], [], "refuse")
  assert [photo.name for photo in found] == ["a"] and len(problems) == 2
  assert "b.heic: a .heic file" in problems[0] and "link: a linked folder" in problems[1]


def litter(*folders):
  for folder in folders:
    (folder / "._junk.png").write_text("")
    (folder / "photo.heic").write_text("")


def test_voc_leaves_nothing_unused_without_a_word(tmp_path):
  for name in ("a b", "c"):
    write(tmp_path / "JPEGImages" / f"{name}.jpg", IMAGE)
    write(tmp_path / "SegmentationClass" / f"{name}.png", MASK)
  write(tmp_path / "JPEGImages" / "detection.jpg", IMAGE)
  (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
  (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\ufeffa b\nc\n", encoding="utf-8")
  data = VocSource(dir=str(tmp_path), split="train", format="tree")
  assert [data.describe(i) for i in range(2)] == ["a b", "c"] and not inventory.unused({"train": data})
  litter(tmp_path / "JPEGImages", tmp_path / "SegmentationClass")
  write(tmp_path / "SegmentationClass/lost.png", MASK)
  found = inventory.unused({"train": VocSource(dir=str(tmp_path), split="train", format="tree")})
  assert len(found) == 5 and found[tmp_path / "SegmentationClass/lost.png"] is inventory.NO_IMAGE


def test_cityscapes_leaves_nothing_unused_without_a_word(tmp_path):
  city, labels = tmp_path / "leftImg8bit/train/ulm", tmp_path / "gtFine/train/ulm"
  for name in ("ulm_000000_000019", "ulm_000001_000019"):
    write(city / f"{name}_leftImg8bit.png", IMAGE)
    for form in ("labelIds", "color"):
      write(labels / f"{name}_gtFine_{form}.png", MASK % 34)
    (labels / f"{name}_gtFine_polygons.json").write_text("{}")

  def open_source():
    return CityscapesSource(dir=str(tmp_path), split="train", format="tree", labels="gtFine")

  assert not inventory.unused({"train": open_source()})
  litter(city, labels)
  write(labels / "ulm_000002_000019_gtFine_labelIds.png", MASK)
  write(city / "._ulm_000003_000019_leftImg8bit.png", IMAGE)
  (tmp_path / "elsewhere").mkdir()
  shutil.move(city, tmp_path / "elsewhere/ulm")
  city.symlink_to(tmp_path / "elsewhere/ulm")  # A linked city is searched.
  data = open_source()
  found = inventory.unused({"train": data})
  assert len(data) == 2 and len(found) == 6, found
  assert found[labels / "ulm_000002_000019_gtFine_labelIds.png"] is inventory.NO_IMAGE


def test_kitti_leaves_nothing_unused_without_a_word(tmp_path):
  photos, masks = tmp_path / "training/image_2", tmp_path / "training/gt_image_2"
  for number in range(4):
    write(photos / f"um_00000{number}.png", IMAGE)
    for kind in ("road", "lane"):
      write(masks / f"um_{kind}_00000{number}.png", np.zeros((6, 8, 3), np.uint8))

  def open_sources():
    options = dict(dir=str(tmp_path), hold_out=HoldOut(holdout=1.0))
    return {split: KittiRoadSource(split=split, **options) for split in ("train", "val")}

  assert not inventory.unused(open_sources())
  litter(photos, masks)
  write(masks / "um_road_000009.png", MASK)
  found = inventory.unused(open_sources())
  assert len(found) == 5 and found[masks / "um_road_000009.png"] is inventory.NO_IMAGE


def test_a_synthetic_data_set_has_no_files():
  data = default_config(data="synthetic").data
  assert not inventory.notes({"train": input_pipeline.make_source(data, "train")})
