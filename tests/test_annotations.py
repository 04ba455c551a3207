"""COCO's and LabelMe's JSON become trees of images and masks that the folder source reads, whole or not at all."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segjax.config import default_config
from segjax.input_pipeline import DataError, make_source
from segjax.tools import coco, labelme
from tests import command

SIZE = (20, 30)


def png(pixels, kind="PNG"):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def photo(seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def box(x, y, right, below):
  return [x, y, right, y, right, below, x, below]


def inside(x, y, right, below):
  found = np.zeros(SIZE, bool)
  found[y:below, x:right] = True
  return found


def rle(pixels, compressed):
  if compressed:
    encoded = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return dict(size=list(SIZE), counts=encoded["counts"].decode())
  flat = pixels.T.reshape(-1)
  ends = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
  return dict(size=list(SIZE), counts=[0] * int(flat[0]) + np.diff(ends).tolist())


def coco_content():
  """Two images; a large and a small instance that overlap, one of each kind of RLE, a crowd with an instance in it."""
  crowd = inside(20, 0, 30, 10)
  annotations = [
    dict(id=1, image_id=7, category_id=4, segmentation=[box(2, 2, 6, 6)]),
    dict(id=2, image_id=7, category_id=9, segmentation=[box(0, 0, 12, 12), box(14, 14, 18, 18)], iscrowd=0),
    dict(id=3, image_id=7, category_id=9, segmentation=rle(crowd, False), iscrowd=1),
    dict(id=4, image_id=7, category_id=4, segmentation=rle(inside(22, 2, 25, 5), True), iscrowd=0),
  ]
  return dict(
    images=[dict(id=n, file_name=name, height=20, width=30) for n, name in ((7, "a.png"), (3, "sub/b.jpg"))],
    categories=[dict(id=9, name="dog"), dict(id=4, name="cat")],
    annotations=annotations,
  )


def coco_folder(root, content):
  (root / "photos/sub").mkdir(parents=True)
  (root / "photos/a.png").write_bytes(png(photo()))
  (root / "photos/sub/b.jpg").write_bytes(png(photo(1), "JPEG"))
  (root / "photos/unused.png").write_bytes(png(photo(2)))
  (root / "instances.json").write_text(json.dumps(content))
  return root / "instances.json", root / "photos", root / "out"


def read(path):
  with Image.open(path) as file:
    return np.asarray(file)


def source_of(out, split, **options):
  config = default_config(data="folder")
  config.data.update(dir=str(out), **options)
  return make_source(config.data, split)


def test_coco_classes_follow_ids_small_instances_lie_on_top_and_crowds_are_void(tmp_path):
  annotations, photos, out = coco_folder(tmp_path, coco_content())
  arguments = f"--annotations={annotations}", f"--images={photos}", f"--out={out}", "--split=train"
  code, printed, err = command.run("segjax.prepare", "coco", *arguments)
  assert code == 0, err
  assert "2 images, 4 instances (1 crowds, void), 3 classes" in printed and f"--config.data.dir={out}\n" in printed
  assert "1 images without annotations" in printed and "unused.png" in printed
  want = np.zeros(SIZE, np.uint8)
  want[inside(20, 0, 30, 10)] = 255
  want[inside(0, 0, 12, 12) | inside(14, 14, 18, 18)] = 2
  want[inside(2, 2, 6, 6) | inside(22, 2, 25, 5)] = 1
  source = source_of(out, "train")
  assert source.classes == ("background", "cat", "dog")
  names = [source.describe(i) for i in range(2)]
  assert names == ["images/train/a", "images/train/sub/b"]
  image, label = source[0]
  np.testing.assert_array_equal(label, want)
  np.testing.assert_array_equal(image, photo())
  assert not source[1][1].any() and sorted(p.name for p in out.iterdir()) == ["classes.txt", "images", "masks"]


def test_another_split_takes_the_classes_of_the_first_and_refuses_unknown_ones(tmp_path):
  content = coco_content()
  annotations, photos, out = coco_folder(tmp_path, content)
  coco.prepare(annotations, photos, out, "train", False)
  content["categories"] = [dict(id=1, name="dog")]
  content["annotations"] = [dict(id=1, image_id=7, category_id=1, segmentation=[box(0, 0, 4, 4)])]
  annotations.write_text(json.dumps(content))
  coco.prepare(annotations, photos, out, "val", False)
  np.testing.assert_array_equal(source_of(out, "val")[0][1], 2 * inside(0, 0, 4, 4))
  content["categories"][0]["name"] = "wolf"
  annotations.write_text(json.dumps(content))
  with pytest.raises(DataError, match="classes.txt names other classes.*lacks wolf"):
    coco.prepare(annotations, photos, out, "test", False)
  with pytest.raises(DataError, match="images/val is there already. Remove it"):
    content["categories"][0]["name"] = "dog"
    annotations.write_text(json.dumps(content))
    coco.prepare(annotations, photos, out, "val", False)


def alter(change):
  def altered(content):
    change(content)
    return content

  return altered


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda c: c["images"][0].update(file_name="gone.png"), "image 7.*gone.png is missing.*correct --images"),
    (lambda c: c["images"][0].update(file_name="../a.png"), "leads elsewhere"),
    (lambda c: c["images"][0].update(file_name="sub/b.png"), "would share the mask sub/b.png"),
    (lambda c: c["images"][0].update(height=21), "says that .*a.png is 21x30, but it is 20x30"),
    (lambda c: c["images"][0].pop("width"), r"no COCO annotations of instances \(KeyError: 'width'\)"),
    (lambda c: c["images"][0].update(id=3), "2 images, of which 1 repeat"),
    (lambda c: c["categories"][0].update(id=4), "2 categories, of which 1 repeat"),
    (lambda c: c["categories"][0].update(name="cat "), "2 names of categories, of which 1 repeat"),
    (lambda c: c["annotations"][0].update(category_id=5), "annotation 1 names .*lacks the category"),
    (lambda c: c["annotations"][0].update(image_id=5), "annotation 1 names .*lacks the image"),
    (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 1 has no segmentation, and a box is no mask"),
    (
      lambda c: c["annotations"][0].update(segmentation=[[1, 1, 5, 5]]),
      "annotation 1: a polygon needs x and y of three",
    ),
    (
      lambda c: c["annotations"][0].update(segmentation=[box(2, 2, 36, 6)]),
      r"reaches from \(2, 2\) to \(36, 6\), outside",
    ),
    (
      lambda c: c["annotations"][0].update(segmentation=[[0, 0, 9, float("nan"), 9, 9]]),
      "coordinates that are no numbers",
    ),
    (
      lambda c: c["annotations"][0].update(segmentation=[box(0, 0, 1e300, 9)]),
      "coordinates that are no numbers, or far from",
    ),
    (lambda c: c["annotations"][0].update(category_id=[4]), "no COCO annotations of instances"),
    (lambda c: c["categories"][0].update(name="a\ud800"), "cannot be the name of a class"),
    (lambda c: c["annotations"][3]["segmentation"].update(counts=""), "annotation 4: its RLE .* damaged"),
    (
      lambda c: c["annotations"][2]["segmentation"].update(size=[30, 20]),
      r"annotation 3: its RLE is of size \[30, 20\]",
    ),
    (lambda c: c["annotations"][2]["segmentation"]["counts"].append(1), "annotation 3: its RLE"),
  ],
)
def test_coco_annotations_that_cannot_be_meant_are_refused_and_nothing_is_written(tmp_path, change, message):
  annotations, photos, out = coco_folder(tmp_path, alter(change)(coco_content()))
  with pytest.raises(DataError, match=f"(?s){message}"):
    coco.prepare(annotations, photos, out, "train", False)
  assert not out.exists() or not list(out.iterdir())


def test_all_images_that_cannot_be_used_are_named_at_once(tmp_path):
  content = coco_content()
  for image in content["images"]:
    image["file_name"] = f"gone/{image['file_name']}"
  annotations, photos, out = coco_folder(tmp_path, content)
  with pytest.raises(DataError, match=r"(?s)2 of 2 annotated images.*gone/a.png.*gone/sub/b.jpg.*Nothing was written"):
    coco.prepare(annotations, photos, out, "", False)


def test_clip_cuts_polygons_off_at_the_border(tmp_path):
  content = coco_content()
  content["annotations"] = [dict(image_id=7, category_id=4, segmentation=[box(25, -9, 99, 5)])]
  annotations, photos, out = coco_folder(tmp_path, content)
  coco.prepare(annotations, photos, out, "", True)
  np.testing.assert_array_equal(read(out / "masks/a.png"), inside(25, 0, 30, 5))


def test_compressed_run_lengths_are_those_of_pycocotools():
  rng = np.random.default_rng(0)
  for _ in range(20):
    pixels = rng.random((50, 70)) < rng.random() ** 3
    counts = coco._run_lengths(coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode())
    decoded = np.repeat(np.arange(len(counts)) % 2, counts).reshape(70, 50).T
    np.testing.assert_array_equal(decoded, pixels)


def labelme_content(**changes):
  bitmap = png(np.eye(4, dtype=np.uint8) * 255)
  shapes = [
    dict(label="leaf", points=[[1, 1], [11, 1], [11, 9], [1, 9]], shape_type="polygon"),
    dict(label="bug", points=[[14, 12], [8, 5]], shape_type="rectangle"),
    dict(label="__ignore__", points=[[24, 10], [27, 10]], shape_type="circle"),
    dict(label="leaf", points=[[0, 15], [3, 18]], shape_type="mask", mask=base64.b64encode(bitmap).decode()),
    dict(label="_background_", points=[[2, 2], [3, 2], [3, 3], [2, 3]]),
  ]
  return (
    dict(version="5.5.0", shapes=shapes, imagePath="a.png", imageData=None, imageHeight=20, imageWidth=30) | changes
  )


def labelme_folder(root, content):
  (root / "in").mkdir()
  (root / "in/a.png").write_bytes(png(photo()))
  (root / "in/a.json").write_text(json.dumps(content) if isinstance(content, dict) else content)
  return root / "in", root / "out"


def test_labelme_shapes_of_every_kind_are_drawn_in_their_order(tmp_path):
  annotations, out = labelme_folder(tmp_path, labelme_content())
  (annotations / "later.png").write_bytes(png(photo(2)))
  code, printed, err = command.run("segjax.prepare", "labelme", f"--annotations={annotations}", f"--out={out}")
  assert code == 0 and "1 images, 5 shapes, 3 classes" in printed and "data.images=images" in printed, err
  assert "later.png" in printed
  rows, cols = np.mgrid[: SIZE[0], : SIZE[1]]
  want = np.zeros(SIZE, np.uint8)
  want[1:10, 1:12] = 2
  want[5:13, 8:15] = 1
  want[(rows - 10) ** 2 + (cols - 24) ** 2 <= 9.5] = 255
  want[15:19, 0:4][np.eye(4, dtype=bool)] = 2
  want[2:4, 2:4] = 0
  stored = read(out / "masks/a.png")
  apart = stored != want
  assert (np.abs(np.hypot(rows - 10, cols - 24) - 3)[apart] < 1).all()  # The circle's rim.
  assert (out / "classes.txt").read_text() == "background\nbug\nleaf\n"
  assert (out / "images/a.png").read_bytes() == (annotations / "a.png").read_bytes()


def test_labelme_takes_the_image_inside_the_json_where_the_file_is_missing(tmp_path):
  data = base64.b64encode(png(photo(3), "JPEG")).decode()
  annotations, out = labelme_folder(tmp_path, labelme_content(imagePath="..\\else\\b.bmp", imageData=data))
  labelme.prepare(annotations, None, out, "train", False)
  assert base64.b64decode(data) == (out / "images/train/a.jpg").read_bytes()
  assert len(source_of(out, "train")) == 1


@pytest.mark.parametrize(
  "content, message",
  [
    ('{"shapes": [', "a.json: not readable as JSON.*export the annotations again"),
    ({"images": []}, "a.json: no file of LabelMe, it has no list `shapes`"),
    (labelme_content(imagePath="b.png"), "a.json: its image .*b.png is missing"),
    (labelme_content(imageWidth=31), "says that .*a.png is 20x31, but it is 20x30"),
    (labelme_content(imagePath="b.png", imageData="!"), "imageData"),
    ((0, dict(shape_type="point")), r"shape 1 \('leaf'\) is a point, which has no area"),
    ((0, dict(points=[[1, 1], [2, 2]])), "shape 1 .*a polygon of 2 points"),
    ((0, dict(points=[[1, 1], [2, 2], [40, 3]])), r"shape 1 .*to \(40, 3\), outside of an image of width 30"),
    ((0, dict(label=None)), "shape 1 has no label or points"),
    ((3, dict(mask="AAAA")), "shape 4.*damaged or truncated"),
    ((3, dict(points=[[0, 15], [9, 18]])), "shape 4.*its mask is"),
  ],
)
def test_labelme_files_that_cannot_be_meant_are_refused_and_nothing_is_written(tmp_path, content, message):
  if isinstance(content, tuple):
    number, changes = content
    content = labelme_content()
    content["shapes"][number].update(changes)
  annotations, out = labelme_folder(tmp_path, content)
  with pytest.raises(DataError, match=f"(?s){message}"):
    labelme.prepare(annotations, None, out, "train", False)
  assert not out.exists() or not list(out.iterdir())


def test_labelme_images_may_lie_in_a_folder_of_their_own(tmp_path):
  annotations, out = labelme_folder(tmp_path, labelme_content(imagePath="../elsewhere/a.png"))
  (tmp_path / "photos").mkdir()
  (annotations / "a.png").rename(tmp_path / "photos/a.png")
  labelme.prepare(annotations, tmp_path / "photos", out, "train", False)
  assert (out / "images/train/a.png").samefile(tmp_path / "photos/a.png")  # A hard link.


def test_the_command_says_which_flags_are_missing(tmp_path):
  code, _, err = command.run("segjax.prepare", "coco", f"--out={tmp_path}")
  assert code == 2 and "Give --annotations and --out, and for coco --images" in err
  code, _, err = command.run("segjax.prepare", "labelme", "--annotations=x", f"--out={tmp_path}", "--split=../x")
  assert code == 2 and "a split's name" in err
