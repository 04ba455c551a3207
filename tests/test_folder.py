"""Your own images and masks: every layout and encoding that works, and every mistake named with its remedy."""

import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from segjax.config import SOURCES
from segjax.input_pipeline import DataError, images, masks, scan, sources
from segjax.input_pipeline.sources import datasets
from segjax.input_pipeline.sources.folder import FolderSource
from segjax.input_pipeline.sources.holdout import HoldOut

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
MASK = np.tile(np.array([0, 1, 2, 255], np.uint8), (6, 2))


def write(path, array, mode=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(path)


def make(root, names=("a", "b"), split="train", mask=MASK):
  for name in names:
    rng = np.random.default_rng(list(os.fsencode(f"{split}/{name}")))
    write(root / "images" / split / f"{name}.jpg", rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    write(root / "masks" / split / f"{name}.png", mask)


def source(root, split="train", **options):
  options = dict(SOURCES["folder"], classes=("ground", "road", "car")) | options
  return FolderSource(split=split, **sources.arguments(FolderSource, options | dict(dir=str(root))))


def test_pairs_by_name_whatever_the_extension(tmp_path):
  make(tmp_path)
  write(tmp_path / "images" / "train" / "sub" / "c.PNG", IMAGE)
  write(tmp_path / "masks" / "train" / "sub" / "c.tif", MASK)
  data = source(tmp_path)
  assert [data.describe(i) for i in range(len(data))] == ["images/train/a", "images/train/b", "images/train/sub/c"]
  image, label = data[2]
  np.testing.assert_array_equal(image, IMAGE)
  np.testing.assert_array_equal(label, MASK)
  assert data.canvas_size == (6, 8) and label.dtype == image.dtype == np.uint8


def test_mask_suffix(tmp_path):
  make(tmp_path, names=("a",))
  (tmp_path / "masks/train/a.png").rename(tmp_path / "masks/train/a_mask.png")
  assert len(source(tmp_path, mask_suffix="_mask")) == 1


def test_list_of_names(tmp_path):
  make(tmp_path, names=("a", "b", "c"))
  (tmp_path / "train.txt").write_text("c\na.jpg\n\n")
  data = source(tmp_path, list="{split}.txt")
  assert [data.describe(i)[-1] for i in range(len(data))] == ["c", "a"]


def test_segnets_list_of_pairs_with_its_authors_leading_folders(tmp_path):
  write(tmp_path / "train" / "x.png", IMAGE)
  write(tmp_path / "trainannot" / "x.png", MASK)
  (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/x.png /SegNet/CamVid/trainannot/x.png\n")
  assert source(tmp_path, list="train.txt", images="{split}")[0][1].shape == (6, 8)


def test_holdout_splits_all_images_once_and_stays_when_more_come(tmp_path):
  layout = dict(images="images", masks="masks", holdout=0.3)

  def names(split):
    data = source(tmp_path, split, **layout)
    return {data.describe(i) for i in range(len(data))}

  for i in range(40):
    write(tmp_path / "images" / f"{i}.png", IMAGE)
    write(tmp_path / "masks" / f"{i}.png", MASK)
  train, val = names("train"), names("val")
  assert not train & val and len(train | val) == 40 and 5 <= len(val) <= 20
  write(tmp_path / "images" / "new.png", IMAGE)
  write(tmp_path / "masks" / "new.png", MASK)
  assert val <= names("val") and train <= names("train")
  with pytest.raises(DataError, match="there are only train and val"):
    source(tmp_path, "test", **layout)


def split(names, group="", **options):
  return HoldOut(**options).choose(names, group)


def test_a_holdout_from_1_on_is_a_number_of_images():
  names = [f"{i:03d}" for i in range(97)]
  first = split(names, holdout=20.0)
  assert len(first) == 20 and first == split(names[::-1], holdout=20.0) != split(names, holdout=20.0, split_seed=1)
  assert first > split(names, holdout=7.0) and len(split(names, holdout=1.0)) == 1
  with pytest.raises(DataError, match="data.holdout = 97 holds out all of the 97 images.*Hold out fewer"):
    split(names, holdout=97.0)


@pytest.mark.parametrize(
  "options, share", [(dict(holdout=4.0), 4), (dict(folds=5, fold=2), 4), (dict(holdout=0.3), None)]
)
def test_groups_are_never_torn_apart(options, share):
  names = [f"car{i}_{angle:02d}" for i in range(20) for angle in range(1, 17)]
  held = split(names, group="^[^_]+", **options)
  cars = {name.split("_")[0] for name in held}
  assert len(held) == 16 * len(cars) and 0 < len(cars) < 20 and (share is None or len(cars) == share)


@pytest.mark.parametrize(
  "group, message",
  [
    ("[", r"data.group = '\[': no regular expression"),
    ("_", "finds nothing in 1 of 3 names: b. Correct it, or rename"),
  ],
)
def test_groups_that_cannot_be_told_are_refused(group, message):
  with pytest.raises(DataError, match=message):
    split(["a_1", "a_2", "b"], group=group)


def test_palette_masks_are_read_as_indices(tmp_path):
  make(tmp_path, names=("a",))
  palette = Image.new("P", (8, 6))
  palette.putdata(MASK.reshape(-1).tolist())
  palette.putpalette(datasets.palette(256).reshape(-1).tolist())
  palette.save(tmp_path / "masks/train/a.png")
  np.testing.assert_array_equal(source(tmp_path)[0][1], MASK)


def test_16_bit_masks_with_a_label_map(tmp_path):
  make(tmp_path, names=("a",), mask=np.full((6, 8), 65535, np.uint16))
  assert (source(tmp_path, label_map="65535:2")[0][1] == 2).all()


def test_rgb_masks_by_colour(tmp_path):
  colors = ("FF0000", "00FF00", "0000FF")
  rgb = datasets.parse_colors((*colors, "000000"))[[0, 1, 2, 3] * 2]
  make(tmp_path, names=("a",), mask=np.tile(rgb, (6, 1, 1)))
  label = source(tmp_path, colors=colors, void_colors=("#000000",))[0][1]
  np.testing.assert_array_equal(label, MASK)


def test_grey_and_transparent_images_become_rgb(tmp_path):
  write(tmp_path / "a.png", IMAGE[..., 0])
  np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), IMAGE[..., :1].repeat(3, -1))
  write(tmp_path / "b.png", np.dstack([IMAGE, IMAGE[..., :1]]))
  np.testing.assert_array_equal(images.read_image(tmp_path / "b.png"), IMAGE)


def test_classes_from_a_file(tmp_path):
  make(tmp_path)
  (tmp_path / "classes.txt").write_text("ground\nroad\ncar\n")
  assert source(tmp_path, classes=()).classes == ("ground", "road", "car")


@pytest.mark.parametrize(
  "mask, options, message",
  [
    (
      np.full((6, 8), 7, np.uint8),
      {},
      r"a\.png: label values outside the 3 classes .* 7 \(48 px\).* data.label_map, e.g. 7:255",
    ),
    (np.array([[0, 200]] * 3, np.uint8).repeat(2, 0).repeat(4, 1), dict(classes=("no", "yes")), "e.g. 200:1"),
    (np.array([[1, 2, 3]] * 6, np.uint8), {}, "e.g. 1:0,2:1,3:2"),
    (np.full((6, 8), -1, np.int32), {}, r"-1 \(48 px\)"),
    (np.tile(np.uint8([9, 8, 7]), (6, 8, 1)), {}, r"an RGB mask with colours that no class has: 090807 \(48 px\)"),
  ],
)
def test_wrong_label_values_are_named_with_counts_and_remedy(tmp_path, mask, options, message):
  write(tmp_path / "images/train/a.png", np.zeros((*mask.shape[:2], 3), np.uint8))
  path = tmp_path / "masks/train/a.png"
  if mask.dtype == np.int32:
    path = path.with_suffix(".tif")
  write(path, mask)
  with pytest.raises(DataError, match=message.replace(r"a\.png", r"a\.\w+")):
    source(tmp_path, **options)[0]


def test_masks_of_0_and_255_are_not_silently_void(tmp_path):
  make(tmp_path, mask=np.tile(np.array([0, 255], np.uint8), (6, 4)))
  with pytest.raises(DataError, match="class 'cell' never occurs.*--config.data.label_map=255:1"):
    scan.probe(source(tmp_path, classes=("ground", "cell")))
  fixed = source(tmp_path, classes=("ground", "cell"), label_map="255:1")
  assert "cell" in scan.probe(fixed)


def spoil(path):
  path.write_bytes(path.read_bytes()[:-25])  # Ends within the pixels.


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda r: (r / "masks/train/a.png").unlink(), "1 files are missing: mask a"),
    (lambda r: write(r / "masks/train/a.png", MASK[:3]), r"a\.png is 3x8, but .*a\.jpg is 6x8 .*never resize"),
    (lambda r: spoil(r / "masks/train/a.png"), r"a\.png: damaged or truncated.*Replace the file"),
    (lambda r: (r / "images/train/a.jpg").write_text("no image"), r"a\.jpg: not a readable image"),
    (lambda r: (r / "masks/train/a.png").rename(r / "masks/train/x.png"), "mask a"),
    (lambda r: write(r / "images/train/a.png", IMAGE), "have the same name"),
  ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
  make(tmp_path)
  damage(tmp_path)
  with pytest.raises(DataError, match=message):
    data = source(tmp_path)
    _ = data.canvas_size  # As training does first.
    data[0]


def test_jpeg_masks_are_refused(tmp_path):
  make(tmp_path, names=("a",))
  (tmp_path / "masks/train/a.png").unlink()
  write(tmp_path / "masks/train/a.jpg", MASK)
  with pytest.raises(DataError, match=r"a\.jpg: a JPEG cannot hold labels.*PNG"):
    source(tmp_path)[0]


def test_16_bit_images_are_refused(tmp_path):
  write(tmp_path / "a.png", np.zeros((4, 4), np.uint16))
  with pytest.raises(DataError, match="more than 8 bits"):
    images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(dir="/nowhere"), "data.dir = /nowhere: no such folder"),
    (dict(split="test"), r"images/test: no such folder. .* holds images, masks; set data.images"),
    (dict(list="{split}.lst"), r"train\.lst: no such list file"),
    (dict(classes=()), "The classes have no names"),
    (dict(classes=("a",)), "one class has nothing to be told from"),
    (dict(classes=("a", "a")), "needs 2 to 254 different names"),
    (dict(colors=("FF0000",)), "names 1 colours for 3 classes"),
    (dict(colors=("red", "b", "c")), "'red' is not a colour"),
    (dict(label_map="a:b"), "'a:b' is not of the form VALUE:CLASS"),
    (dict(label_map="5:9"), "sends 5 to 9, but there are only 3 classes"),
    (dict(label_map="5:1,5:2"), "names the value 5 twice"),
  ],
)
def test_wrong_options_say_so(tmp_path, options, message):
  make(tmp_path)
  options = dict(options)
  with pytest.raises(DataError, match=message):
    source(options.pop("dir", tmp_path), **options)


def test_empty_split(tmp_path):
  make(tmp_path)
  (tmp_path / "train.txt").write_text("\n")
  with pytest.raises(DataError, match="is empty"):
    source(tmp_path, list="train.txt")


def test_camvid_is_read_with_the_published_pixel_shares(shared):
  options = dict(SOURCES["folder"], **datasets.CAMVID)
  data = source(shared / "data/camvid", **options)
  assert len(data) == 367 and data.canvas_size == (360, 480)
  counts, _, problems = scan.scan(data, range(0, 367))
  shares = 100 * counts.sum(0) / counts.sum()
  want = [16.845, 23.259, 0.983, 31.658, 4.486, 9.724, 1.173, 1.127, 5.866, 0.639, 0.292]
  np.testing.assert_allclose(shares[:11], want, atol=6e-4)
  assert shares[255] == pytest.approx(3.948, abs=6e-4) and not problems


def png_that_claims(height, width):
  """A PNG of 100 bytes with a sound header."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(300))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60000, 60000), (16385, 16384), (1, 2**31 - 1)])
def test_an_image_that_claims_too_many_pixels_is_refused_before_it_takes_memory(tmp_path, size):
  path = tmp_path / "bomb.png"
  path.write_bytes(png_that_claims(*size))
  for read in (images.read_size, images.read_image, masks.read_mask):
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb.png: (claims \d+x\d+ pixels, more than|not a readable|damaged)"):
      read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_masks_of_other_colour_modes_are_refused(tmp_path):
  Image.new("CMYK", (4, 4)).save(tmp_path / "m.tif")
  with pytest.raises(DataError, match="m.tif: CMYK pixels are no labels"):
    masks.read_mask(tmp_path / "m.tif")
