"""Laws of the augmentation: labels are never invented, image and label stay aligned, draws cover what is configured."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.ndimage import gaussian_filter

from segjax import augment, sharding
from segjax.augment import color, labels

FILL = (10.0, 20.0, 30.0)


@functools.cache
def compiled(crop, margin, **options):
  """Of `augment_batch` under options of `Augmentation`: many tests share theirs, and op by op takes ten times as long."""
  return jax.jit(
    functools.partial(
      augment.augment_batch,
      options=augment.Augmentation(**options),
      crop_size=crop,
      margin=margin,
      fill=FILL,
      ignore_label=255,
      num_classes=254,
    )
  )


def run_all(image, label, size=None, border=None, crop=(24, 24), margin=0, seed=0, **options):
  """Crops of image, label and border under options of `Augmentation`."""
  batch = dict(image=image, label=label)
  batch["size"] = np.array([image.shape[1:3]] * len(image), np.int32) if size is None else size
  batch |= {} if border is None else dict(border=border)
  return jax.tree.map(np.asarray, compiled(crop, margin, **options)(jax.random.key(seed), batch))


def run(image, label, **keywords):
  return run_all(image, label, **keywords)[:2]


def coordinates(batch, h, w):
  """Images whose red and green are row and column, and labels that say the same, in blocks of 8."""
  y, x = np.mgrid[:h, :w]
  image = np.stack([y * 4, x * 4, np.full_like(y, 77)], -1).astype(np.uint8)
  label = ((y // 8) * 8 + x // 8).astype(np.uint8)
  return np.tile(image, (batch, 1, 1, 1)), np.tile(label, (batch, 1, 1))


def test_labels_after_are_labels_before_or_void():
  rng = np.random.default_rng(0)
  label = rng.choice(np.array([3, 9, 200], np.uint8), (16, 20, 30))
  image = rng.integers(0, 256, (16, 20, 30, 3), dtype=np.uint8)
  _, out = run(image, label)
  assert set(np.unique(out)) <= {3, 9, 200, 255}


def test_image_and_label_stay_aligned_to_the_pixel():
  image, label = coordinates(32, 48, 56)
  out, classes = run(image, label, crop=(40, 40))
  inside = classes != 255
  row, col = out[..., 0] / 4, out[..., 1] / 4  # Where each pixel came from, to a fraction.
  # The label is that of the nearest input pixel; at a half, either neighbour is nearest.
  for r, c in ((np.floor(row + 0.499), np.floor(col + 0.499)), (np.floor(row + 0.501), np.floor(col + 0.501))):
    wrong = ((r // 8) * 8 + c // 8 != classes) & inside
    near_half = (np.abs(row % 1 - 0.5) < 0.01) | (np.abs(col % 1 - 0.5) < 0.01)
    assert not (wrong & ~near_half).any()
  assert inside.mean() > 0.5


def test_padding_is_the_fill_pixel_and_void():
  image, label = coordinates(16, 16, 16)
  out, classes = run(image, label, crop=(40, 32), scale=(0.5, 1.0))
  padding = classes == 255
  assert padding.any((1, 2)).all() and (out[padding] == FILL).all()
  assert (out[~padding][:, 2] == 77).all()


def test_canvas_outside_the_image_is_never_seen():
  image, label = coordinates(32, 32, 32)
  size = np.array([[20, 12]] * 32, np.int32)
  image[:, 20:], image[:, :, 12:] = 255, 255
  label[:, 20:], label[:, :, 12:] = 99, 99
  out, classes = run(image, label, size=size, crop=(32, 32))
  assert 99 not in classes and (out[classes != 255][:, 2] == 77).all()


def test_scale_1_without_flip_is_an_exact_crop():
  image, label = coordinates(8, 32, 40)
  out, classes = run(image, label, crop=(16, 16), scale=(1.0, 1.0), flip=False)
  for i in range(8):
    top, left = int(out[i, 0, 0, 0]) // 4, int(out[i, 0, 0, 1]) // 4
    np.testing.assert_array_equal(out[i], image[i, top : top + 16, left : left + 16])
    np.testing.assert_array_equal(classes[i], label[i, top : top + 16, left : left + 16])
  assert len({tuple(out[i, 0, 0]) for i in range(8)}) > 4  # Offsets differ between examples.


def test_flip_mirrors_half_of_the_examples_exactly():
  image, label = coordinates(200, 16, 16)
  out, classes = run(image, label, crop=(16, 16), scale=(1.0, 1.0))
  mirrored = out[:, 0, 0, 1] > out[:, 0, -1, 1]
  assert 70 < mirrored.sum() < 130
  for i in range(200):
    side = np.s_[:, ::-1] if mirrored[i] else np.s_[:, :]
    np.testing.assert_array_equal(out[i], image[i][side])
    np.testing.assert_array_equal(classes[i], label[i][side])


def realised_scales(**options):
  image, label = coordinates(400, 60, 60)
  out, _ = run(image, label, crop=(16, 16), flip=False, **options)
  return 4 / (out[:, 1, 0, 0] - out[:, 0, 0, 0])  # One output row is 1 / scale input rows, which are 4 grey levels.


def test_realised_scales_cover_the_configured_range():
  scales = realised_scales(scale=(0.5, 2.0))
  assert scales.min() < 0.55 and scales.max() > 1.9 and np.histogram(scales, 6, (0.49, 2.03))[0].min() > 35


def test_scale_step_draws_the_seven_values_of_official_deeplab():
  scales = realised_scales(scale=(0.5, 2.0), scale_step=0.25)
  nearest = np.round(scales * 4) / 4
  # Aligned corners: 60 pixels at scale s are trunc(60 s), so the realised ratio is (trunc(60 s) - 1) / 59.
  np.testing.assert_allclose(scales, (np.trunc(60 * nearest) - 1) / 59, rtol=1e-3)
  assert sorted(set(nearest)) == [0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]


def test_resampling_equals_the_resize_of_official_deeplab(shared):
  z = np.load(shared / "reference/deeplab/fixtures/preprocess.npz")
  image, label = z["image"], z["label"].reshape(z["image"].shape[:2]).astype(np.uint8)
  checked = 0
  for key in z.files:
    if not (key.startswith("scale/") and key.endswith("/shape")):
      continue
    scale = float(key.split("/")[1])
    h, w = (int(n) for n in z[key][:2])
    out, classes = run(image[None], label[None], crop=(h, w), scale=(scale, scale), flip=False)
    np.testing.assert_allclose(out[0, ::3, ::3], z[f"scale/{key.split('/')[1]}/image"], atol=2e-2)
    np.testing.assert_array_equal(classes[0], z[f"scale/{key.split('/')[1]}/label"].reshape(h, w))
    checked += 1
  assert checked >= 7


def test_one_and_eight_devices_draw_the_same():
  image, label = coordinates(8, 32, 32)
  options = dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2)
  alone = run(image, label, **options)
  mesh = sharding.make_mesh()
  put = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "space"))) for x in (image, label)]
  sharded = run(*put, **options)
  np.testing.assert_allclose(sharded[0], alone[0], atol=2e-2)  # Grey levels: XLA fuses each batch size differently.
  np.testing.assert_array_equal(sharded[1], alone[1])


def test_step_and_position_decide_the_draw():
  image, label = coordinates(4, 32, 32)
  first, again, other = (run(image, label, seed=s)[0] for s in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0 and np.abs(first[0] - first[1]).max() > 0
  longer = run(*coordinates(6, 32, 32))[0]
  np.testing.assert_array_equal(first, longer[:4])  # An example's draw does not depend on how many there are.


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "hsv"])
def test_each_colour_option_changes_the_image_stays_in_range_and_spares_padding(name):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
  label = np.zeros((4, 16, 16), np.uint8)
  plain, classes = run(image, label, crop=(24, 24))
  out, _ = run(image, label, crop=(24, 24), **{name: (0.4, 0.4, 0.4) if name == "hsv" else 0.4})
  assert np.abs(out - plain).max() > 1 and out.min() >= 0 and out.max() <= 255.01
  assert (out[classes == 255] == FILL).all()


def test_hue_by_a_third_turns_red_into_green_and_a_full_turn_changes_nothing():
  red = jnp.array([[[200.0, 50.0, 50.0]]])
  np.testing.assert_allclose(color.shift_hue(red, 1 / 3)[0, 0], [50, 200, 50], atol=1e-3)
  image = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (5, 5, 3)), jnp.float32)
  np.testing.assert_allclose(color.shift_hue(image, 1.0), image, atol=1e-2)


def test_grey_has_no_hue_or_saturation_to_change():
  grey = jnp.full((3, 3, 3), 90.0)
  options = augment.Augmentation(saturation=0.9, hue=0.5, hsv=(0.4, 0.4, 0.0))
  np.testing.assert_allclose(color.jitter(jax.random.key(0), grey, jnp.ones((3, 3), bool), options), grey, atol=1e-3)


def test_hsv_shifts_equal_colorsys():
  rng = np.random.default_rng(0)
  image = rng.uniform(0, 255, (4, 5, 3)).astype(np.float32)
  got = np.asarray(color.shift_hsv(jnp.asarray(image), 0.3, -0.2, 0.15))
  for pixel, out in zip(image.reshape(-1, 3), got.reshape(-1, 3)):
    h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
    want = colorsys.hsv_to_rgb((h + 0.3) % 1, min(max(s - 0.2, 0), 1), min(max(v + 0.15, 0), 1))
    np.testing.assert_allclose(out, 255 * np.array(want), atol=0.01)


WARPS = [
  dict(rotation=30.0),
  dict(shear=20.0),
  dict(shift=0.2),
  dict(zoom=0.3),
  dict(elastic=4.0),
  dict(rotation=180.0, shear=10.0, shift=0.1, zoom=0.2, elastic=3.0),
]


@pytest.mark.parametrize("warp", WARPS)
def test_warped_images_and_labels_stay_aligned_and_labels_are_never_invented(warp):
  image, label = coordinates(16, 56, 48)
  out, classes = run(image, label, crop=(40, 40), scale=(1.0, 1.0), **warp)
  inside = classes != 255
  row, col = out[..., 0] / 4, out[..., 1] / 4  # Where each pixel came from.
  near_half = (np.abs(row % 1 - 0.5) < 0.02) | (np.abs(col % 1 - 0.5) < 0.02)
  right = (np.floor(row + 0.5) // 8) * 8 + np.floor(col + 0.5) // 8 == classes
  # Beyond the first and last pixel centre the image repeats, half a pixel long.
  edge = (row < 0.02) | (row > 54.98) | (col < 0.02) | (col > 46.98)
  assert (right | near_half | edge)[inside].all() and inside.mean() > 0.4
  assert set(np.unique(classes)) <= set(np.unique(label)) | {255} and (out[~inside] == FILL).all()
  straight, _ = run(image, label, crop=(40, 40), scale=(1.0, 1.0))
  assert np.abs(out - straight).max() > 4


def test_a_rotation_keeps_distances_and_the_centre():
  for seed in range(5):
    rows, cols = augment.warp_field(jax.random.key(seed), (21, 31), augment.Augmentation(rotation=90.0))
    assert float(rows[10, 15]) == pytest.approx(10, abs=1e-4) and float(cols[10, 15]) == pytest.approx(15, abs=1e-4)
    away = np.hypot(rows - 10, cols - 15)
    y, x = np.mgrid[:21, :31]
    np.testing.assert_allclose(away, np.hypot(y - 10, x - 15), atol=1e-3)


def test_elastic_displacements_have_their_deviation_at_the_grid_and_are_smooth_between():
  options = augment.Augmentation(elastic=10.0)
  fields = np.stack([np.stack(augment.warp_field(jax.random.key(seed), (65, 65), options)) for seed in range(60)])
  fields -= np.mgrid[:65, :65]
  knots = fields[:, :, ::32, ::32]
  assert knots.shape == (60, 2, 3, 3) and knots.std() == pytest.approx(10, rel=0.08)
  assert np.abs(np.diff(fields, 2, axis=-1)).max() < 0.2 and np.abs(np.diff(fields, axis=-1)).max() < 2.5


def test_bicubic_interpolation_meets_its_knots_and_keeps_straight_lines():
  matrix = augment.bicubic_matrix(9)
  np.testing.assert_allclose(matrix[[0, 4, 8]], np.eye(3), atol=1e-6)
  np.testing.assert_allclose(matrix @ np.array([1.0, 3.0, 5.0]), np.linspace(1, 5, 9), atol=1e-6)
  # Halfway between the first two knots of (0, 1, 0), the ghost knot being -1: (-(-1) + 9*0 + 9*1 - 0) / 16 = 10 / 16.
  assert matrix[2] @ np.array([0.0, 1.0, 0.0]) == pytest.approx(10 / 16)


def test_outside_the_image_mirrored_pixels_carry_their_labels():
  image, label = coordinates(8, 16, 16)
  out, classes = run(image, label, crop=(24, 24), scale=(1.0, 1.0), flip=False, outside="mirror")
  folded = np.pad(image, ((0, 0), (0, 8), (0, 8), (0, 0)), mode="reflect")
  np.testing.assert_array_equal(out, folded)
  np.testing.assert_array_equal(classes, np.pad(label, ((0, 0), (0, 8), (0, 8)), mode="reflect"))


def test_a_margin_shows_the_true_surroundings_and_mirrors_them_at_the_edge():
  image, label = coordinates(8, 30, 30)
  out, classes = run(image, label, crop=(12, 12), margin=6, scale=(1.0, 1.0), flip=False)
  assert out.shape == (8, 24, 24, 3) and classes.shape == (8, 12, 12)
  around = np.pad(image, ((0, 0), (6, 6), (6, 6), (0, 0)), mode="reflect")
  for i in range(8):
    top, left = (int(round(v)) for v in np.asarray(out[i, 6, 6, :2]) / 4)
    np.testing.assert_array_equal(out[i], around[i, top : top + 24, left : left + 24])
    np.testing.assert_array_equal(classes[i], label[i, top : top + 12, left : left + 12])


def test_a_border_map_goes_with_the_label():
  image, label = coordinates(8, 40, 40)
  border = (label / 64).astype(np.float16)
  for warp in (dict(), dict(rotation=20.0, elastic=2.0)):
    _, classes, weight = run_all(image, label, border=border, crop=(32, 32), **warp)
    want = np.where(classes == 255, 0, (classes / 64).astype(np.float16))
    np.testing.assert_array_equal(weight, want)


def straight(seed=0, **options):
  """Crops that are the whole image, of 200 examples, but for what `options` do; and image and label."""
  image, label = coordinates(200, 16, 16)
  label[:, 3, :5] = 255
  return run(image, label, crop=(16, 16), scale=(1.0, 1.0), flip=False, seed=seed, **options), image, label


def test_a_vertical_flip_mirrors_half_of_the_examples_exactly():
  (out, classes), image, label = straight(flip_vertical=True)
  mirrored = out[:, 0, 0, 0] > out[:, -1, 0, 0]
  assert 70 < mirrored.sum() < 130
  for i in range(200):
    side = np.s_[::-1] if mirrored[i] else np.s_[:]
    np.testing.assert_array_equal(out[i], image[i][side])
    np.testing.assert_array_equal(classes[i], label[i][side])


def test_quarter_turns_are_numpys_each_alike():
  (out, classes), image, label = straight(quarter_turns=True)
  counts = np.zeros(4, int)
  for i in range(200):
    (turn,) = (n for n in range(4) if (out[i] == np.rot90(image[i], n)).all())
    np.testing.assert_array_equal(classes[i], np.rot90(label[i], turn))
    counts[turn] += 1
  assert counts.min() > 30


def test_turned_crops_with_a_margin_keep_label_and_image_together():
  image, label = coordinates(40, 30, 30)
  out, classes = run(image, label, crop=(8, 8), margin=5, scale=(1.0, 1.0), quarter_turns=True, flip_vertical=True)
  row, col = out[:, 5:-5, 5:-5, 0] / 4, out[:, 5:-5, 5:-5, 1] / 4
  np.testing.assert_array_equal(row // 8 * 8 + col // 8, classes)


def test_gamma_is_a_power_of_the_value_with_exponents_over_the_configured_range():
  (out, _), image, _ = straight(gamma=0.5)
  exponents = np.log(out[:, 9, 9, 2] / 255) / np.log(77 / 255)
  assert exponents.min() < 0.55 and exponents.max() > 1.45
  want = 255 * (image / 255.0) ** exponents.reshape(-1, 1, 1, 1)
  np.testing.assert_allclose(out, want, atol=0.02)


@pytest.mark.parametrize("channels, most", [(3, 255), (1, 1), (5, 65535)])
def test_blur_equals_scipys_gaussian_and_takes_nothing_from_beyond_the_image(channels, most):
  rng = np.random.default_rng(0)
  image = rng.uniform(0, most, (20, 17, channels)).astype(np.float32)
  inside = np.zeros((20, 17), bool)
  inside[:14, :15] = True
  for deviation in (0.4, 1.7):
    got = np.asarray(color.blur(jnp.asarray(image), jnp.asarray(inside), deviation, 2.0))
    smooth = functools.partial(gaussian_filter, sigma=deviation, radius=6, mode="constant")
    want = np.stack([smooth(image[..., c] * inside) for c in range(channels)], -1) / smooth(inside * 1.0)[..., None]
    np.testing.assert_allclose(got[inside], want[inside], rtol=1e-4)
    np.testing.assert_array_equal(got[~inside], image[~inside])
  np.testing.assert_array_equal(color.blur(jnp.asarray(image), jnp.asarray(inside), 0.0, 2.0), image)


def test_noise_is_normal_with_deviations_over_the_configured_range():
  grey = np.full((200, 16, 16, 3), 128, np.uint8)
  out, classes = run(grey, np.zeros((200, 16, 16), np.uint8), crop=(16, 20), scale=(1.0, 1.0), flip=False, noise=0.1)
  shown = (out - 128)[:, :, :16]
  deviations = shown.std((1, 2, 3))
  assert deviations.min() < 2 and 23 < deviations.max() < 28 and np.histogram(deviations, 4, (0, 25.5))[0].min() > 25
  normalised = shown / deviations.reshape(-1, 1, 1, 1)
  assert np.abs(normalised.mean((0, 1, 2))).max() < 0.02 and abs((np.abs(normalised) < 1).mean() - 0.6827) < 0.01
  correlation = np.corrcoef(normalised.reshape(-1, 3).T)
  assert np.abs(correlation - np.eye(3)).max() < 0.02
  assert (out[:, :, 16:] == FILL).all() and (classes[:, :, 16:] == 255).all()


@pytest.mark.parametrize("name", ["flip_vertical", "quarter_turns", "gamma", "blur", "noise"])
def test_a_device_more_or_less_changes_no_bit_of_what_is_new(name):
  """But for the rounding of gamma and blur, whose fusions differ with the number of examples on a device."""
  image, label = coordinates(8, 16, 16)
  options = {name: True if "flip" in name or "turn" in name else 0.5}
  alone = run(image, label, crop=(16, 16), **options)
  put = [jax.device_put(x, NamedSharding(sharding.make_mesh(), PartitionSpec("data"))) for x in (image, label)]
  split = run(*put, crop=(16, 16), **options)
  np.testing.assert_array_equal(split[1], alone[1])
  np.testing.assert_allclose(split[0], alone[0], atol=2e-2 if name in ("gamma", "blur") else 1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("num_classes", [1, 2, 31, 32, 33, 150, 255])
def test_classes_are_present_if_any_pixel_is_theirs_whatever_the_void_ones_are(num_classes, dtype):
  rng = np.random.default_rng(num_classes)
  label = rng.choice(256, (6, 5, 7)).astype(dtype)
  label[0], label[1, 0, :3] = 255, [0, num_classes - 1, 255]
  found = np.asarray(jax.jit(jax.vmap(lambda x: labels.present(x, num_classes)))(label))
  for has, one in zip(found, label):
    assert np.flatnonzero(has).tolist() == [n for n in np.unique(one).tolist() if n < num_classes]
