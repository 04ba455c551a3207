"""Pictures as they are stored: what is read exactly, and what is refused because it would arrive as something else."""

import io
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from segjax import config as config_lib
from segjax import predict
from segjax.input_pipeline import DataError, images, masks, unlabelled
from segjax.input_pipeline.sources import datasets
from segjax.run import prediction_info
from segjax.tools import check_data
from tests.test_folder import IMAGE, MASK, make, source, write

RNG = np.random.default_rng(1)
NOISE = RNG.integers(0, 256, (256, 400, 3), dtype=np.uint8)  # Its JPEGs are longer than Pillow's buffer of 64 KiB.
SMOOTH = np.asarray(Image.fromarray(IMAGE).resize((96, 64), Image.Resampling.BICUBIC))


def png(samples, depth, color_type, *chunks):
  """A PNG of [H, W(, C)] samples of `depth` bits, packed; `chunks` are (name, content) before the pixels."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  height, width = samples.shape[:2]
  rows = samples.reshape(height, -1)
  if depth == 16:
    packed = rows.astype(">u2").view(np.uint8)
  else:
    bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    packed = np.packbits(bits.reshape(height, -1), axis=-1)
  header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
  data = b"".join(b"\0" + row.tobytes() for row in packed)
  middle = b"".join(chunk(name, content) for name, content in chunks)
  return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(samples, bits, photometric):
  """An uncompressed TIFF of [H, W(, C)] samples, as its baseline wants it."""
  height, width, *channels = samples.shape
  count = channels[0] if channels else 1
  data = samples.tobytes()
  tags = [
    (256, 4, width),
    (257, 4, height),
    (258, 3, bits),
    (259, 3, 1),
    (262, 3, photometric),
    (273, 4, 8),
    (277, 3, count),
    (278, 4, height),
    (279, 4, len(data)),
  ]
  body, extra = b"", b""
  start = 8 + len(data)
  for tag, kind, value in tags:
    if tag == 258 and count > 1:
      body += struct.pack("<HHII", tag, 3, count, start + 2 + 12 * len(tags) + 4)
      extra = struct.pack(f"<{count}H", *[bits] * count)
    else:
      body += struct.pack("<HHII", tag, kind, 1, value)
  directory = struct.pack("<H", len(tags)) + body + struct.pack("<I", 0) + extra
  return b"II*\0" + struct.pack("<I", start) + data + directory


def saved(image, format, **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def jpeg(pixels=SMOOTH, mode="RGB", **options):
  return saved(Image.fromarray(pixels).convert(mode), "JPEG", quality=90, **options)


def half_zero(content):
  return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def frames(format):
  first, second = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[::-1].copy())
  return saved(first, format, save_all=True, append_images=[second])


DEEP = RNG.integers(0, 3520, (6, 8, 3), dtype=np.uint16)


@pytest.mark.parametrize(
  "content, message",
  [
    (png(DEEP, 16, 2), "more than 8 bits per channel. Convert"),
    (png(DEEP.repeat(2, -1)[..., :4], 16, 6), "more than 8 bits"),
    (png(DEEP[..., :2], 16, 4), "more than 8 bits"),
    (tiff(DEEP, 16, 2), "more than 8 bits"),
    (b"P6 8 6 65535\n" + DEEP.astype(">u2").tobytes(), "more than 8 bits"),
    (b"P3 1 1 1000\n 1 2 3\n", "more than 8 bits"),
    (frames("GIF"), "several frames or pages.*Store each in a file of its own"),
    (frames("TIFF"), "several frames or pages"),
    (frames("PNG"), "several frames or pages"),
    (frames("WEBP"), "several frames or pages"),
    (half_zero(jpeg(NOISE)), "damaged or truncated .Premature end of JPEG file"),
    (half_zero(jpeg(NOISE, mode="L")), "damaged or truncated"),
    (half_zero(jpeg(NOISE, mode="CMYK", subsampling=0)), "damaged or truncated"),
    (half_zero(jpeg(NOISE, mode="CMYK", subsampling=2)), "damaged or truncated"),  # Which simplejpeg does not read.
    (half_zero(saved(Image.fromarray(NOISE), "WEBP")), "damaged or truncated .its end was never written"),
    (half_zero(saved(Image.fromarray(SMOOTH), "WEBP", lossless=True)), "its end was never written"),
    (half_zero(jpeg(NOISE, progressive=True)), "damaged or truncated"),
    (jpeg(NOISE)[:70000] + b"\xff\xd9", "damaged or truncated"),
    (jpeg()[:900] + bytes(200) + jpeg()[1100:], "damaged or truncated"),
  ],
)
def test_an_image_that_would_arrive_as_another_is_refused(content, message):
  with pytest.raises(DataError, match=f"name: .*{message}"):
    images.read_image("name", io.BytesIO(content))


@pytest.mark.parametrize("depth, numbers", [(1, [0, 1]), (2, [0, 1, 2, 3]), (4, [0, 3, 9, 15])])
def test_grey_masks_of_few_bits_give_the_stored_numbers(depth, numbers):
  mask = np.resize(np.uint8(numbers), (5, 8))
  np.testing.assert_array_equal(masks.read_mask("m", io.BytesIO(png(mask, depth, 0))), mask)
  np.testing.assert_array_equal(masks.read_mask("m", io.BytesIO(png(mask, depth, 3, (b"PLTE", bytes(48))))), mask)


def test_a_pgm_gives_the_stored_numbers_whatever_it_calls_white():
  mask = np.resize(np.uint8([0, 1, 2, 3]), (5, 8))
  np.testing.assert_array_equal(masks.read_mask("m", io.BytesIO(b"P5 8 5 3\n" + mask.tobytes())), mask)
  plain = b"P2 8 5 1000\n" + " ".join(map(str, 300 * mask.reshape(-1).astype(int))).encode()
  np.testing.assert_array_equal(masks.read_mask("m", io.BytesIO(plain)), 300 * mask.astype(int))


PAINTED = np.dstack([np.tile(np.uint8([255, 0, 0]), (6, 8, 1)), np.full((6, 8), 255, np.uint8)])
CLEAR = np.where(np.arange(8)[:, None] < 3, 0, PAINTED)
PALETTE = (b"PLTE", datasets.palette(256).tobytes())


@pytest.mark.parametrize(
  "content, message",
  [
    (saved(Image.fromarray(CLEAR), "PNG"), "18 of the mask's pixels are transparent.*Fill them.*void"),
    (saved(Image.fromarray(CLEAR), "WEBP", lossless=True, exact=True), "18 of the mask's pixels"),
    (saved(Image.fromarray(CLEAR[..., 2:]), "PNG"), "18 of the mask's pixels"),
    (png(MASK, 8, 3, PALETTE, (b"tRNS", b"\xff\0")), "12 of the mask's pixels"),
    (png(MASK, 8, 3, PALETTE, (b"tRNS", b"\xff\xff\x80")), "12 of the mask's pixels"),
    (png(MASK, 8, 0, (b"tRNS", b"\0\x02")), "12 of the mask's pixels"),
    (png(MASK % 4, 2, 0, (b"tRNS", b"\0\x03")), "12 of the mask's pixels"),
    (png(PAINTED[..., :3], 8, 2, (b"tRNS", b"\0\xff\0\0\0\0")), "48 of the mask's pixels"),
    (saved(Image.fromarray(MASK), "GIF", transparency=2), "12 of the mask's pixels"),
    (png(DEEP, 16, 2), "more than 8 bits per channel"),
    (tiff(MASK, 8, 0), "counts from white to black"),
    (b"P4 8 6\n" + bytes(6), "counts from white to black"),
    (saved(Image.fromarray(MASK), "TIFF", compression="jpeg"), "a JPEG cannot hold labels"),
    (saved(Image.fromarray(MASK), "MPO", save_all=True, append_images=[Image.fromarray(MASK)]), "a JPEG cannot hold"),
    (frames("PNG"), "several frames"),
  ],
)
def test_a_mask_that_would_arrive_as_another_is_refused(content, message):
  with pytest.raises(DataError, match=f"name: .*{message}"):
    masks.read_mask("name", io.BytesIO(content))


def test_transparency_that_hides_no_pixel_is_allowed():
  for content in (saved(Image.fromarray(PAINTED), "PNG"), png(PAINTED[..., :3], 8, 2, (b"tRNS", bytes(6)))):
    np.testing.assert_array_equal(masks.read_mask("m", io.BytesIO(content)), PAINTED[..., :3])
  content = png(MASK, 8, 3, PALETTE, (b"tRNS", b"\xff\xff\xff\0"))
  np.testing.assert_array_equal(masks.read_mask("m", io.BytesIO(content)), MASK)


def test_an_optimised_mask_of_one_bit_among_masks_of_eight_is_refused(tmp_path):
  make(tmp_path)
  (tmp_path / "masks/train/b.png").write_bytes(png(MASK // 255, 1, 0))  # 255 as 1, as pngcrush writes it.
  with pytest.raises(DataError, match=r"b\.png stores fewer than 8 bits a pixel, .*a\.png does not.*Export all masks"):
    source(tmp_path).canvas_size  # noqa: B018
  (tmp_path / "masks/train/a.png").write_bytes(png(MASK // 255, 1, 0))
  data = source(tmp_path)
  assert data.canvas_size == (6, 8) and set(np.unique(data[0][1])) == {0, 1}  # Numbers of a binary mask.


COLORS = ("FF0000", "00FF00", "0000FF")


def palette_masks(root):
  """Masks a and b of the same picture, whose palettes have another order."""
  make(root, names=("a", "b"))
  order = np.array([0, 2, 1])
  rgb = datasets.parse_colors(COLORS)
  label = np.tile(np.uint8([0, 1, 2, 2]), (6, 2))
  (root / "masks/train/a.png").write_bytes(png(label, 8, 3, (b"PLTE", rgb.tobytes())))
  (root / "masks/train/b.png").write_bytes(png(order[label].astype(np.uint8), 8, 3, (b"PLTE", rgb[order].tobytes())))
  return label


def test_palette_masks_mean_their_colours_where_colours_are_named(tmp_path):
  label = palette_masks(tmp_path)
  data = source(tmp_path, colors=COLORS)
  assert data.canvas_size == (6, 8)
  for i in range(2):
    np.testing.assert_array_equal(data[i][1], label)
  with pytest.raises(DataError, match=r"colours that no class has: 0000FF \(24 px\)"):
    source(tmp_path, colors=(*COLORS[:2], "000001"))[0]


def test_palettes_that_contradict_each_other_are_refused_by_training_and_the_check(tmp_path, capsys):
  palette_masks(tmp_path)
  with pytest.raises(
    DataError, match=r"b\.png and .*a\.png: palettes that contradict.* 1 is 0000FF.*00FF00.*data.colors"
  ):
    source(tmp_path).canvas_size  # noqa: B018 - As training does first.
  config = config_lib.default_config(data="folder")
  config.data.dir, config.data.classes, config.data.eval_split = str(tmp_path), ("x", "y", "z"), "train"
  assert check_data.check(config) == 1 and "palettes that contradict" in capsys.readouterr().out


def test_palettes_may_differ_in_numbers_that_mean_no_class(tmp_path):
  make(tmp_path)
  palettes = datasets.palette(256).copy(), datasets.palette(256)[:7]
  palettes[0][3:] = 9
  for name, palette in zip("ab", palettes):
    (tmp_path / f"masks/train/{name}.png").write_bytes(png(MASK % 3, 8, 3, (b"PLTE", palette.tobytes())))
  assert source(tmp_path).canvas_size == (6, 8)
  with pytest.raises(DataError, match="palettes that contradict each other. 5 is"):
    source(tmp_path, label_map="5:1").canvas_size  # noqa: B018


def with_exif(pixels, orientation, format="JPEG"):
  exif = Image.Exif()
  exif[274] = orientation
  return saved(Image.fromarray(pixels), format, exif=exif)


def test_exif_turns_pixels_as_pillow_does_and_the_header_says_so():
  for orientation in range(1, 9):
    for format in ("JPEG", "PNG", "WEBP"):
      content = with_exif(SMOOTH, orientation, format)
      want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
      np.testing.assert_array_equal(images.read_image("x", io.BytesIO(content), exif="apply"), want)
      assert images.read_header("x", io.BytesIO(content)).size_by("apply") == want.shape[:2]
      stored = images.read_image("x", io.BytesIO(content), exif="ignore")
      assert stored.shape == SMOOTH.shape and images.read_size("x", io.BytesIO(content)) == stored.shape[:2]


def exif_folder(root, orientation, mask_size):
  for split in ("train", "val"):
    make(root, ("a",), split)
    (root / f"images/{split}/a.jpg").write_bytes(with_exif(IMAGE, orientation))
    write(root / f"masks/{split}/a.png", np.zeros(mask_size, np.uint8))


@pytest.mark.parametrize("mask_size, rule, shape", [((8, 6), "apply", (8, 6)), ((6, 8), "ignore", (6, 8))])
def test_the_masks_size_tells_whether_exif_turns_the_image(tmp_path, mask_size, rule, shape):
  exif_folder(tmp_path, 6, mask_size)
  other = dict(apply="ignore", ignore="apply")[rule]
  for data in (source(tmp_path), source(tmp_path, exif=other)):  # The option is for what masks do not tell.
    image, label = data[0]
    assert image.shape[:2] == label.shape == data.canvas_size == shape and data.exif == rule


@pytest.mark.parametrize("orientation, size", [(3, (6, 8)), (2, (6, 8))])
def test_where_sizes_tell_nothing_exif_is_refused_or_an_option_decides(tmp_path, orientation, size):
  exif_folder(tmp_path, orientation, size)
  for read in (lambda data: data.canvas_size, lambda data: data[0]):
    with pytest.raises(DataError, match=r"a\.jpg: EXIF gives it orientation \d.*data.exif=apply.*data.exif=ignore"):
      read(source(tmp_path))
  applied, ignored = (source(tmp_path, exif=rule)[0][0] for rule in ("apply", "ignore"))
  np.testing.assert_array_equal(applied, images.UPRIGHT[orientation](ignored))


def test_a_mask_that_exif_turns_is_refused():
  with pytest.raises(DataError, match="EXIF gives the mask orientation 3"):
    masks.read_mask("m", io.BytesIO(with_exif(MASK, 3, "PNG")))


def test_prediction_turns_images_as_the_runs_masks_told(tmp_path):
  exif_folder(tmp_path, 6, (8, 6))
  config = config_lib.default_config(data="folder")
  config.data.dir, config.data.classes = str(tmp_path), ("x", "y", "z")
  photo = str(tmp_path / "images/val/a.jpg")
  seen, problems = unlabelled.find_photos([photo], [], prediction_info.exif_rule(config, None))
  assert not seen and "a.jpg: EXIF gives it orientation 6" in problems[0] and "no mask tells" in problems[0]
  run = tmp_path / "run"
  run.mkdir()
  config_lib.save(config, run)
  prediction_info.of_split(source(tmp_path, "val"), config.data).save(run)
  (seen,), problems = unlabelled.find_photos([photo], [], prediction_info.exif_rule(config, run))
  ((_, pixels),) = unlabelled.read_ahead([seen], 1, prediction_info.exif_rule(config, run))
  assert seen.size == pixels.shape[:2] == (8, 6) and not problems
  np.testing.assert_array_equal(pixels, source(tmp_path, "val")[0][0])
  config.data.exif = "ignore"  # Said for this prediction.
  assert unlabelled.find_photos([photo], [], prediction_info.of_run(config, run).exif)[0][0].size == (6, 8)
  saved_task = json.loads((run / prediction_info.INFO_FILE).read_text())
  (run / prediction_info.INFO_FILE).write_text(json.dumps(saved_task | dict(exif="perhaps")))
  with pytest.raises(config_lib.ConfigError, match="exif 'perhaps'"):
    predict.predict(config, run, [photo], tmp_path / "out")


@pytest.mark.parametrize("read", [images.read_header, images.read_image, masks.read_mask])
def test_pillow_offers_a_file_to_no_other_reader_than_those_of_our_formats(tmp_path, read):
  Image.init()
  eps, tga = tmp_path / "eps.png", tmp_path / "tga.png"
  eps.write_bytes(saved(Image.fromarray(IMAGE), "EPS"))
  tga.write_bytes(saved(Image.fromarray(IMAGE), "TGA"))
  for path in (eps, tga):
    for file in (None, io.BytesIO(path.read_bytes())):  # As TFDS holds it.
      with pytest.raises(DataError, match=r"(eps|tga)\.png: (not a readable image|damaged)"):
        read(path, file)
  for extension in ("png", "jpg", "bmp", "tif", "gif", "webp", "ppm"):
    write(tmp_path / f"a.{extension}", IMAGE)
    assert images.read_image(tmp_path / f"a.{extension}").shape == IMAGE.shape


def test_pictures_are_opened_in_one_place():
  package = pathlib.Path(images.__file__).parents[1]
  calls = {path: path.read_text().count("Image.open(") for path in package.rglob("*.py")}
  assert {path.name: count for path, count in calls.items() if count} == {"images.py": 1}


@pytest.mark.parametrize("folder", ["voc_samples", "voc_part", "camvid", "kitti_road", "nuclei", "salt"])
def test_real_files_are_decoded_to_pillows_bits(shared, folder):
  paths = sorted(p for p in (shared / "data" / folder).rglob("*") if p.suffix in (".jpg", ".png"))
  for path in paths[:: max(len(paths) // 60, 1)]:
    with Image.open(path) as file:
      stored = np.asarray(file)
      if not file.mode.startswith("I"):
        np.testing.assert_array_equal(images.read_image(path), np.asarray(file.convert("RGB")))
      if path.suffix == ".png":
        np.testing.assert_array_equal(masks.read_mask(path), stored)


@pytest.mark.parametrize("options", [dict(), dict(progressive=True), dict(optimize=True), dict(restart_marker_rows=1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_is_decoded_to_pillows_bits(mode, options):
  for pixels, subsampling in ((SMOOTH, 0), (SMOOTH[:61, :93], 1), (SMOOTH[:33, :35], 2), (SMOOTH[:1, :1], 2)):
    content = jpeg(np.ascontiguousarray(pixels), mode, subsampling=subsampling, **options)
    want = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(images.read_image("x", io.BytesIO(content)), want)


def test_the_first_picture_of_an_mpo_is_the_photograph():
  first, second = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[::-1].copy())
  content = saved(first, "MPO", save_all=True, append_images=[second])
  want = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
  np.testing.assert_array_equal(images.read_image("x", io.BytesIO(content)), want)


def test_a_tiff_is_turned_as_its_format_says():
  tags = TiffImagePlugin.ImageFileDirectory_v2()
  tags[274] = 6
  content = saved(Image.fromarray(IMAGE), "TIFF", tiffinfo=tags)
  np.testing.assert_array_equal(images.read_image("x", io.BytesIO(content)), np.rot90(IMAGE, -1))
  assert images.read_size("x", io.BytesIO(content)) == (8, 6)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_pngs_come_out_the_same_without_the_optional_decoder_and_damage_is_told_by_both(monkeypatch, channels):
  pytest.importorskip("imagecodecs")
  sound = saved(Image.fromarray(RNG.integers(0, 256, (40, 50, *channels), dtype=np.uint8)), "PNG")
  flipped = bytearray(sound)
  flipped[len(sound) // 2] ^= 4
  files = [
    io.BytesIO(sound),
    io.BytesIO(png(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8), 8, 2, (b"gAMA", b"\0\0\xb1\x8f"))),
  ]

  def read():
    for file in (io.BytesIO(flipped), io.BytesIO(sound[: len(sound) // 2]), io.BytesIO(half_zero(sound))):
      for reader in (images.read_image, masks.read_mask):
        with pytest.raises(DataError, match="damaged or truncated"):
          reader("x", file)
    return [reader("x", file).tobytes() for file in files for reader in (images.read_image, masks.read_mask)]

  fast = read()
  monkeypatch.setattr(images, "imagecodecs", None)
  assert fast == read()
