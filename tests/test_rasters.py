"""Images of any number of channels, of 8 or 16 bits or floating point, in every part of a run."""

import functools

import jax
import numpy as np
import pytest
import tifffile
from flax import nnx, traverse_util
from PIL import Image

from segjax import config as config_lib
from segjax import input_pipeline, models, sharding
from segjax.config import ConfigError, default_config
from segjax.config import rules as config_rules
from segjax.evaluate import evaluate
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, images, rasters, scan
from segjax.predict import predict
from segjax.run import device_cache, image_statistics, pictures, warm_start
from segjax.tools import check_data
from segjax.tools.dry_run import dry_run
from segjax.train import train
from tests.experiment import mesh_of
from tests.marks import full

imagecodecs = pytest.importorskip("imagecodecs")

# Name: channels, depth, ending, how an array [H, W, C] is written.
LAYOUTS = {
  "grey of 16 bits": (1, "uint16", "png", lambda path, x: path.write_bytes(imagecodecs.png_encode(x[..., 0]))),
  "RGB of 16 bits": (3, "uint16", "png", lambda path, x: path.write_bytes(imagecodecs.png_encode(x))),
  "four of 8 bits": (
    4,
    "uint8",
    "tif",
    lambda path, x: tifffile.imwrite(path, x, photometric="rgb", compression="zlib"),
  ),
  "six of float": (
    6,
    "float32",
    "tif",
    lambda path, x: tifffile.imwrite(path, np.moveaxis(x, -1, 0), photometric="minisblack"),
  ),
  "array": (5, "float32", "npy", lambda path, x: np.save(path, x.astype(np.float64))),
  "array, channels first": (2, "uint16", "npy", lambda path, x: np.save(path, np.moveaxis(x, -1, 0).astype(">u2"))),
}


FIRST_LAYERS = [
  ("unet", dict(width=2, depth=2), "down0/conv1/kernel"),
  ("unet", dict(encoder="resnet_18"), "backbone/conv1/conv/kernel"),
  ("fcn", dict(width=2), "backbone/conv1_1/kernel"),
  ("dilated_fcn", dict(backbone="resnet_50"), "backbone/conv1/conv/kernel"),
  ("dilated_fcn", dict(backbone="vgg16_bn", output_stride=16), "backbone/conv1_1/conv/kernel"),
  ("deeplab_v3plus", dict(backbone="xception_41"), "backbone/conv1_1/conv/kernel"),
  ("deeplab_v3plus", dict(backbone="mobilenet_v2"), "backbone/layer_1/conv/kernel"),
]


def pixels_of(channels, depth, label, rng):
  """[h, w, C] that follow from the label, with noise, on the scale of the depth."""
  scale = dict(uint8=200, uint16=50000, float32=3.0)[depth]
  tone = 0.2 + 0.3 * label[..., None] + 0.1 * rng.random((*label.shape, channels)) + 0.02 * np.arange(channels)
  return (tone * scale).astype(depth)


def make(root, layout, sizes=((24, 32), (20, 30))):
  """A data set of three classes in that layout, and the config of a tiny run on it; and {split: [images]}."""
  channels, depth, ending, write = LAYOUTS[layout]
  rng, stored = np.random.default_rng(0), {"train": [], "val": []}
  for split, count in (("train", 6), ("val", 3)):
    for kind in ("images", "masks"):
      (root / kind / split).mkdir(parents=True)
    for n in range(count):
      h, w = sizes[n % len(sizes)]
      label = np.kron(rng.integers(0, 3, (h // 4 + 1, w // 4 + 1), dtype=np.uint8), np.ones((4, 4), np.uint8))[:h, :w]
      stored[split].append(pixels_of(channels, depth, label, rng))
      write(root / f"images/{split}/{n}.{ending}", stored[split][-1])
      Image.fromarray(label).save(root / f"masks/{split}/{n}.png")
  config = default_config(data="folder")
  config.data.update(dir=str(root), classes=("a", "b", "c"), channels=channels, depth=depth, loader="grain", workers=1)
  config.update(num_steps=2, batch_size=2, crop_size=(16, 16), log_every=1, eval_every=2, checkpoint_every=1)
  config.model.update(width=2, depth=1)
  config.mesh.data, config.eval.batch_size = 1, 2
  return config, stored


def params_of(config, workdir):
  variables, step, _ = Experiment(config).trained_variables(workdir, None)
  return variables, step


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_loaders_and_every_cache_give_the_stored_numbers_bit_for_bit(layout, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config, stored = make(tmp_path, layout)
  source = input_pipeline.make_source(config.data, "val")
  for (pixels, _), want in zip(map(source.__getitem__, range(3)), stored["val"]):
    assert pixels.dtype == want.dtype and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, want)
  assert source.sizes == [want.shape[:2] for want in stored["val"]]
  for loader in ("tf_data", "grain"):
    for cache in ("none", "memory", "disk", "disk"):
      config.data.update(loader=loader, cache=cache)
      (first, last) = input_pipeline.eval_batches(source, config.data, batch_size=2, rows=[0, 1])
      assert first["image"].dtype == stored["val"][0].dtype and last["id"].tolist() == [2, -1]
      for row, want in zip((first["image"][0], first["image"][1], last["image"][0]), stored["val"]):
        np.testing.assert_array_equal(row[: want.shape[0], : want.shape[1]], want)
      assert not last["image"][1].any()


@pytest.mark.parametrize("layout", ["grey of 16 bits", "six of float"])
def test_the_devices_cache_gives_the_loaders_batches(layout, tmp_path):
  config, stored = make(tmp_path, layout)
  if layout == "six of float":
    for n, pixels in enumerate(stored["train"]):
      pixels[:, :, 1] = -0.0
      LAYOUTS[layout][3](tmp_path / f"images/train/{n}.tif", pixels)
  mesh = mesh_of(2)
  want = list(Experiment(config, mesh=mesh).train_batches(0, 2, rows=[0, 1]))
  config.data.cache = "device"
  experiment = Experiment(config, mesh=mesh)
  fetch = sharding.on(mesh)(lambda batch: device_cache.fetch(batch, mesh, experiment.train_canvas))
  for batch, other in zip(experiment.device_batches(0, 2), want):
    found = jax.jit(fetch)(batch)
    assert found["image"].dtype == other["image"].dtype
    assert np.asarray(found["image"]).tobytes() == other["image"].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_and_deviation_are_those_of_all_pixels_of_training(layout, tmp_path, capsys):
  config, stored = make(tmp_path, layout)
  flat = np.concatenate([x.reshape(-1, x.shape[-1]) for x in stored["train"]]).astype(np.float64)
  mean, std = scan.image_statistics(input_pipeline.make_source(config.data, "train"))
  np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-8)
  np.testing.assert_allclose(std, flat.std(0), rtol=1e-8)
  assert check_data.check(config) == 0
  printed = capsys.readouterr().out
  assert f"--config.data.mean={','.join(map(repr, mean))} --config.data.std={','.join(map(repr, std))}" in printed


@pytest.mark.parametrize(
  "layout, loader", [("grey of 16 bits", "grain"), *full(("four of 8 bits", "tf_data"), ("array", "tf_data"))]
)
def test_a_run_keeps_its_statistics_and_goes_on_is_scored_and_predicts_with_them(layout, loader, tmp_path):
  config, _ = make(tmp_path / "data", layout)
  config.data.loader = loader
  train(config, tmp_path / "whole")
  whole = config_lib.load(tmp_path / "whole")
  mean, std = scan.image_statistics(input_pipeline.make_source(config.data, "train"))
  assert (whole.data.mean, whole.data.std) == (mean, std) and config.data.mean == ()
  whole.data.mean = (mean[0] + 1, *mean[1:])  # As if the images had changed since.
  (tmp_path / "other").mkdir()
  config_lib.save(whole, tmp_path / "other")
  assert image_statistics.resolved(config, tmp_path / "other", measure=True).data.mean == whole.data.mean
  scores = evaluate(config, tmp_path / "whole")
  assert 0 <= scores["val/mean_iou"] <= 1
  problems = predict(config, tmp_path / "whole", [str(tmp_path / "data/images/val")], tmp_path / "out")
  assert problems == [] and len(list((tmp_path / "out/ids").glob("*.png"))) == 3
  confusion = np.zeros((3, 3), int)
  for n in range(3):
    ids, label = (
      np.asarray(Image.open(p)) for p in (tmp_path / f"out/ids/{n}.png", tmp_path / f"data/masks/val/{n}.png")
    )
    np.add.at(confusion, (label, ids), 1)
  assert np.diag(confusion).sum() / confusion.sum() == pytest.approx(scores["val/pixel_accuracy"])


def test_weights_of_a_run_predict_with_its_statistics_and_without_a_run_they_must_be_named(tmp_path):
  config, _ = make(tmp_path / "data", "array")
  with pytest.raises(ConfigError, match="data.mean and data.std are not known without a run"):
    image_statistics.resolved(config, tmp_path, measure=False)
  trained = config.copy_and_resolve_references()
  trained.data.update(mean=(1.0, 2.0, 3.0, 4.0, 5.0), std=(0.5,) * 5)
  config_lib.save(trained, tmp_path)
  config.init.path = str(tmp_path)
  assert image_statistics.resolved(config, None, measure=False).data.mean == trained.data.mean
  assert image_statistics.resolved(trained, None, measure=False) is trained
  new = image_statistics.resolved(config, tmp_path / "new", measure=True)  # Fine-tuning: its own images'.
  assert new.data.mean == scan.image_statistics(input_pipeline.make_source(config.data, "train"))[0]


@pytest.mark.full
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path):
  config, _ = make(tmp_path / "data", "six of float")
  config.optimizer.schedule = "constant"
  config.num_steps = 3
  train(config, tmp_path / "whole")
  config.num_steps = 2
  train(config, tmp_path / "parts")
  config.num_steps = 3
  train(config, tmp_path / "parts")
  ends = []
  for name in ("whole", "parts"):
    saved = config_lib.load(tmp_path / name)
    saved.eval.checkpoint = "last"
    variables, step = params_of(saved, tmp_path / name)
    assert step == 3
    ends.append(jax.tree.leaves(jax.device_get(variables)))
  assert all((a == b).all() for a, b in zip(*ends, strict=True))


def test_standardised_pixels_have_mean_0_and_the_padding_is_exactly_0(tmp_path):
  config, stored = make(tmp_path, "six of float")
  config = image_statistics.resolved(config, None, measure=True)
  network = Experiment(config).network
  flat = np.concatenate([x.reshape(1, 1, -1, 6) for x in stored["train"]], axis=2)
  found = np.asarray(network.preprocess(flat))
  np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-3)
  np.testing.assert_allclose(found.std((0, 1, 2)), 1, atol=1e-3)
  assert not np.asarray(network.preprocess(np.float32(network.mean).reshape(1, 1, 1, 6))).any()


@pytest.mark.parametrize(
  "write, message",
  [
    (
      lambda p: np.save(p / "0.npy", np.zeros((8, 8, 3), np.float32)),
      "0.npy: 3 channels, shape 8x8x3, but data.channels = 5",
    ),
    (lambda p: np.save(p / "0.npy", np.zeros((8, 8), np.float32)), "0.npy: 1 channel"),
    (
      lambda p: np.save(p / "0.npy", np.zeros((8, 8, 5), np.uint16)),
      "holds uint16, but data.depth = float32. Set data.depth=uint16",
    ),
    (lambda p: np.save(p / "0.npy", np.zeros((8, 8, 5), complex)), "holds complex128"),
    (lambda p: np.save(p / "0.npy", np.zeros((8, 8, 5), object), allow_pickle=True), "damaged or truncated"),
    (lambda p: (p / "0.npy").write_bytes(b"\x93NUMPY" * 3), "0.npy: damaged or truncated"),
    (lambda p: np.save(p / "0.npy", np.ones((21, 30, 5), np.float32)), r"0.png is 24x32, but .*0.npy is 21x30"),
  ],
)
def test_files_of_another_kind_are_named_at_the_start_with_a_remedy(tmp_path, write, message):
  config, _ = make(tmp_path, "array")
  write(tmp_path / "images/train")
  with pytest.raises(DataError, match=message):
    _ = input_pipeline.make_source(config.data, "train").sizes


@pytest.mark.parametrize(
  "value, message", [(np.nan, "1 of its numbers are not finite"), (1e300, "1 of its numbers are not finite")]
)
def test_numbers_that_are_not_finite_are_refused_with_the_file(tmp_path, value, message):
  config, stored = make(tmp_path, "array")
  pixels = stored["train"][0].astype(np.float64)
  pixels[3, 4, 1] = value
  np.save(tmp_path / "images/train/0.npy", pixels)
  with pytest.raises(DataError, match=f"train/0.npy: {message}.*mark these pixels void"):
    input_pipeline.make_source(config.data, "train")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_truncated_file_is_refused_with_its_name(layout, share, tmp_path):
  channels, depth, ending, write = LAYOUTS[layout]
  path = tmp_path / f"a.{ending}"
  label = np.random.default_rng(0).integers(0, 3, (64, 80), dtype=np.uint8)
  write(path, pixels_of(channels, depth, label, np.random.default_rng(1)))
  rasters.read(path, images.Reading(channels=channels, depth=depth))
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  with pytest.raises(DataError, match=f"a.{ending}: "):
    rasters.read(path, images.Reading(channels=channels, depth=depth))


@pytest.mark.parametrize("dtype", ["int16", "int8", "uint32", "float16", "float64", ">i2"])
def test_other_numbers_become_float32_and_geotiffs_give_their_pixels_alone(dtype, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 100, (20, 30, 4)).astype(dtype)
  tags = [
    (33550, "d", 3, (10.0, 10.0, 0.0), True),
    (42113, "s", 0, "-9999", True),
  ]  # Pixel's size on the ground; no data.
  options = dict(photometric="minisblack", planarconfig="contig", extratags=tags)
  if np.dtype(dtype).kind != "f":
    options |= dict(compression="lzw", predictor=True)
  tifffile.imwrite(tmp_path / "geo.tif", pixels, byteorder=">" if dtype[0] == ">" else "<", **options)
  found = rasters.read(tmp_path / "geo.tif", images.Reading(channels=4, depth="float32"))
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, pixels.astype(np.float32))


def test_statistics_leave_out_as_many_unreadable_images_as_may_be_bad(tmp_path):
  config, stored = make(tmp_path, "array")
  (tmp_path / "images/train/3.npy").write_bytes((tmp_path / "images/train/3.npy").read_bytes()[:500])
  source = input_pipeline.make_source(config.data, "train")
  with pytest.raises(DataError, match="train/3.npy"):
    scan.image_statistics(source)
  del stored["train"][3]
  flat = np.concatenate([x.reshape(-1, 5) for x in stored["train"]]).astype(np.float64)
  np.testing.assert_allclose(scan.image_statistics(source, most_bad=1), [flat.mean(0), flat.std(0)], rtol=1e-8)


def test_a_dry_run_needs_no_statistics(tmp_path, capsys):

  config, _ = make(tmp_path, "six of float")
  assert set(dry_run(config)) == {"train", "evaluation"} and "3 classes" in capsys.readouterr().out


def test_tiffs_of_several_images_or_counting_from_white_are_refused(tmp_path):
  reading = images.Reading(channels=1, depth="uint8")
  pages = tmp_path / "pages.tif"
  with tifffile.TiffWriter(pages) as file:
    file.write(np.zeros((8, 9), np.uint8), photometric="minisblack")
    file.write(np.zeros((5, 5), np.uint8), photometric="minisblack")
  with pytest.raises(DataError, match="pages.tif: holds 2 images"):
    rasters.read_header(pages, reading)
  tifffile.imwrite(tmp_path / "white.tif", np.zeros((8, 9), np.uint8), photometric="miniswhite")
  with pytest.raises(DataError, match="count from white to black"):
    rasters.read(tmp_path / "white.tif", reading)


def test_a_tiff_whose_pages_lead_in_a_circle_is_refused(tmp_path):
  path = tmp_path / "a.tif"
  tifffile.imwrite(path, np.zeros((8, 9), np.uint8), photometric="minisblack", metadata=None)
  data = bytearray(path.read_bytes())
  start = int.from_bytes(data[4:8], "little")
  tags = int.from_bytes(data[start : start + 2], "little")
  link = start + 2 + 12 * tags
  assert not any(data[link : link + 4])
  data[link : link + 4] = data[4:8]
  path.write_bytes(data)
  with pytest.raises(DataError, match="a.tif: its pages lead in a circle"):
    rasters.read_header(path, images.Reading(channels=1))


def test_a_tiff_with_an_overview_is_read_whole(tmp_path):
  pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
  with tifffile.TiffWriter(tmp_path / "cog.tif") as file:
    file.write(pixels, photometric="minisblack", tile=(16, 16), subifds=1)
    file.write(pixels[::2, ::2], photometric="minisblack", subfiletype=1, tile=(16, 16))
  with tifffile.TiffWriter(tmp_path / "pages.tif") as file:  # As GDAL has them.
    file.write(pixels, photometric="minisblack", tile=(16, 16))
    file.write(pixels[::2, ::2], photometric="minisblack", subfiletype=1, tile=(16, 16))
  for name in ("cog.tif", "pages.tif"):
    found = rasters.read(tmp_path / name, images.Reading(channels=1, depth="uint16"))
    np.testing.assert_array_equal(found[..., 0], pixels)


def test_a_grey_jpeg_is_one_channel(tmp_path):
  grey = np.kron(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5, np.ones((8, 8), np.uint8))
  Image.fromarray(grey).save(tmp_path / "a.jpg", quality=95)
  found = rasters.read(tmp_path / "a.jpg", images.Reading(channels=1))
  assert found.shape == (48, 64, 1) and np.abs(found[..., 0].astype(int) - grey).max() < 12


def test_an_image_whose_pixels_are_all_alike_is_a_problem_and_so_is_a_constant_channel(tmp_path, capsys):
  config, stored = make(tmp_path, "array")
  np.save(tmp_path / "images/train/2.npy", np.full(stored["train"][2].shape, 0.5))
  assert check_data.check(config) == 1
  assert "train/2: all of its pixels are alike" in capsys.readouterr().out
  for n, pixels in enumerate(stored["train"]):
    pixels[..., 3] = 7
    np.save(tmp_path / f"images/train/{n}.npy", pixels)
  with pytest.raises(DataError, match=r"Channels \[3\] \(from 0\) are the same"):
    scan.image_statistics(input_pipeline.make_source(config.data, "train"))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(channels=0, depth="uint16"), "data.depth = 'uint16': cannot act"),
    (dict(channels=-1), "must be 0 .* or the number"),
    (dict(mean=(1.0,), std=(1.0,)), "data.mean = .*needs a number for each channel"),
    (dict(mean=(1.0,) * 5), "needs as many numbers as data.mean"),
    (dict(mean=(1.0,) * 5, std=(0.0,) * 5), "must be above 0"),
    (dict(mean=("x",) * 5, std=(1.0,) * 5), "data.mean = .*needs a number for each channel"),
    (dict(depth="int8"), "choose one of uint8, uint16, float32"),
  ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, changes, message):
  config, _ = make(tmp_path, "array")
  config_rules.validate(config)
  config.data.update(changes)
  with pytest.raises(ConfigError, match=message):
    config_rules.validate(config)


def test_colours_are_jittered_in_rgb_alone(tmp_path):
  config, _ = make(tmp_path, "array")
  config.augment.brightness = 0.2
  with pytest.raises(ConfigError, match="augment.brightness = 0.2.*defined for RGB of 8 bits"):
    config_rules.validate(config)


def test_an_array_is_refused_with_the_option_that_reads_it_where_images_are_rgb(tmp_path):
  config, _ = make(tmp_path, "array")
  config.data.update(channels=0, depth="uint8")
  with pytest.raises(DataError, match="an image only where data.channels is set"):
    _ = input_pipeline.make_source(config.data, "train").sizes


def test_pictures_of_many_channels_show_the_first_three_stretched_and_rgb_as_it_is():
  rng = np.random.default_rng(0)
  rgb = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
  assert pictures.visible(rgb) is rgb
  many = np.stack([np.linspace(0, 1000 * (n + 1), 2500).reshape(50, 50) for n in range(5)], -1).astype(np.float32)
  shown = pictures.visible(many)
  assert shown.shape == (50, 50, 3) and shown.dtype == np.uint8 and shown.min() == 0 and shown.max() == 255
  np.testing.assert_array_equal(shown[..., 0], shown[..., 2])  # Each on its own scale.
  assert (abs(shown[25, 25].astype(int) - 128) < 5).all() and not (
    pictures.visible(np.zeros((3, 3, 2), np.uint16))
  ).any()


@pytest.mark.parametrize(
  "channels, model, options, path",
  [*((4, *layer) for layer in FIRST_LAYERS), (6, *FIRST_LAYERS[0]), *full(*((1, *layer) for layer in FIRST_LAYERS))],
)
def test_every_network_takes_any_number_of_channels_and_a_first_layer_of_rgb_is_adapted(channels, model, options, path):
  def variables(channels):
    statistics = (0.0,) * channels, (1.0,) * channels
    build = functools.partial(models.build, model, num_classes=2, statistics=statistics, **options)
    network = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    logits = nnx.eval_shape(
      lambda net, x: net(net.preprocess(x)), network, jax.ShapeDtypeStruct((1, 64, 64, channels), "u1")
    )
    assert logits.shape == (1, 64, 64, 2)
    return dict(params=nnx.to_pure_dict(nnx.state(network, nnx.Param)))

  rgb, own = variables(3), variables(channels)
  rng = np.random.default_rng(0)
  stored = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), rgb)
  merged, line = warm_start.merge(own, (stored, "w"), (), channels)
  flat, before = (traverse_util.flatten_dict(x["params"], sep="/") for x in (merged, stored))
  assert [name for name in flat if flat[name].shape != before[name].shape] == [
    path
  ] and f"params/{path}: of RGB" in line
  want = before[path].sum(2, keepdims=True)
  if channels > 1:
    want = np.stack([before[path][:, :, n % 3] for n in range(channels)], 2) * (3 / channels)
  np.testing.assert_allclose(flat[path], want, rtol=1e-6)
  assert all((flat[name] == before[name]).all() for name in flat if name != path)
  if channels == 6:  # Of as many of each colour, so that images which repeat RGB give the same activations.
    np.testing.assert_allclose(flat[path].sum(2), before[path].sum(2), rtol=1e-4, atol=1e-5)


def test_weights_of_rgb_fit_rgb_as_ever_and_others_are_refused():
  ours = dict(params=dict(conv=dict(kernel=np.zeros((3, 3, 3, 4), np.float32))))
  line = warm_start.merge(ours, (ours, "w"), ())[1]
  assert line == "init: imported 1 of 1 tensors from w"
  theirs = dict(params=dict(conv=dict(kernel=np.zeros((3, 3, 5, 4), np.float32))))
  with pytest.raises(ConfigError, match=r"the model has \(3, 3, 3, 4\), w has \(3, 3, 5, 4\)"):
    warm_start.merge(ours, (theirs, "w"), ())
