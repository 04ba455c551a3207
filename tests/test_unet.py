"""The U-Net: its wiring, sizes and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import inference, models, pretrained, state, steps
from tests import test_peers
from tests.seeded import DATA, torch_weights


@functools.cache
def initial(**options):
  """Compiled, and each network once."""
  return nnx.split(nnx.jit(lambda: models.build("unet", rngs=nnx.Rngs(0), **options))())


def build(**options):
  return nnx.merge(*initial(**dict(num_classes=3, width=4, depth=3) | options), copy=True)


def image(h, w, seed=0, batch=2):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, h, w, 3)), jnp.float32)


@nnx.jit
def run(model, x):
  """Compiled as one: op by op it takes ten times as long, most of it to compile."""
  return model(x)


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 40), (1, 1)])
def test_logits_have_the_images_size_whatever_it_is(up, size):
  logits = run(build(up=up), image(*size))
  assert logits.shape == (2, *size, 3) and logits.dtype == jnp.float32 and jnp.isfinite(logits).all()


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (1, 1)])
def test_auxiliary_logits_have_half_the_images_size_rounded_up(size):
  def forward(image):
    endpoints = {}
    models.build("unet", num_classes=3, width=4, auxiliary=True, rngs=nnx.Rngs(0))(image, endpoints=endpoints)
    return endpoints["auxiliary"]

  logits = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, *size, 3), jnp.bfloat16))
  assert logits.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 3) and logits.dtype == jnp.float32


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_skip_changes_the_output(up, level):
  """Cutting the weights that read a skip must matter: the finest one is easily lost (scenic's U-Net drops it)."""
  model, x = build(up=up), image(16, 24)
  whole = run(model, x)
  kernel = getattr(model, f"up{level}").conv1.kernel
  skip_channels = kernel[...].shape[2] // 2
  assert skip_channels == 4 * 2**level
  for half in (slice(None, skip_channels), slice(skip_channels, None)):  # The skip, and what comes from below.
    saved = kernel[...]
    kernel[...] = saved.at[:, :, half].set(0)
    assert jnp.abs(run(model, x) - whole).max() > 1e-3
    kernel[...] = saved


def test_finest_skip_is_aligned_to_the_pixel():
  """With the path from below cut off, a logit sees exactly the pixels within the four 3x3 convolutions around it."""
  model = build()
  kernel = model.up0.conv1.kernel
  kernel[...] = kernel[...].at[:, :, 4:].set(0)
  gradient = jax.jit(jax.grad(lambda x: model(x)[0, 9, 14].sum()))(image(19, 27, batch=1))[0]
  rows, cols = np.nonzero(np.asarray(jnp.abs(gradient).sum(-1)))
  assert (rows.min(), rows.max(), cols.min(), cols.max()) == (5, 13, 10, 18)


def test_a_size_is_padded_at_the_bottom_and_right():
  model, x = build(), image(15, 13)
  padded = jnp.pad(x, ((0, 0), (0, 1), (0, 3), (0, 0)))
  np.testing.assert_allclose(run(model, x), run(model, padded)[:, :15, :13], atol=1e-6)


def test_evaluation_is_pure_and_training_updates_statistics():
  model, x = build(dropout=0.5), image(16, 16)
  graphdef, params, stats = state.split(model)

  @functools.partial(jax.jit, static_argnames="train")
  def compiled(variables, x, key, train):
    merged = steps.merge(graphdef, variables)
    return merged(x, train=train, key=key), merged.down0.norm1.mean[...]

  def forward(train, key=None):
    return compiled(dict(params=params, batch_stats=stats), x, key, train)

  evaluated, mean = forward(train=False)
  np.testing.assert_array_equal(mean, model.down0.norm1.mean[...])
  np.testing.assert_array_equal(forward(train=False)[0], evaluated)
  first, mean = forward(train=True, key=jax.random.key(0))
  assert jnp.abs(mean - model.down0.norm1.mean[...]).max() > 1e-3
  assert jnp.abs(first - forward(train=True, key=jax.random.key(1))[0]).max() > 1e-3
  np.testing.assert_array_equal(first, forward(train=True, key=jax.random.key(0))[0])


def test_batch_order_does_not_matter():
  model, x = build(), image(16, 16, batch=3)
  np.testing.assert_allclose(run(model, x)[::-1], run(model, x[::-1]), atol=1e-5)


def test_width_64_has_the_papers_channels():
  _, params, _ = state.split(
    nnx.eval_shape(lambda: models.build("unet", num_classes=3, width=64, depth=4, rngs=nnx.Rngs(0)))
  )
  assert params["down4"]["conv2"]["kernel"].shape == (3, 3, 1024, 1024)


def test_bfloat16_stays_near_float32_and_gives_float32_logits():
  x = image(32, 32)
  want, got = run(build(), x), run(build(dtype="bfloat16"), x)
  assert got.dtype == jnp.float32
  assert jnp.linalg.norm(got - want) < 2e-2 * jnp.linalg.norm(want)


PUBLISHED = dict(padding="valid", batch_norm=False)


def published(width=2, depth=2):
  return build(width=width, depth=depth, **PUBLISHED)


def test_the_published_network_turns_572_into_388_and_has_31_million_parameters():
  model = nnx.eval_shape(lambda: models.build("unet", width=64, depth=4, num_classes=2, rngs=nnx.Rngs(0), **PUBLISHED))
  assert model.margin == 92 and model.unpadded_size(388) == 572
  x = jax.ShapeDtypeStruct((1, 572, 572, 3), jnp.float32)
  graphdef, params, _ = state.split(model)
  out = jax.eval_shape(lambda p, x: steps.merge(graphdef, dict(params=p, batch_stats={}))(x, context=True), params, x)
  assert out.shape == (1, 388, 388, 2)
  assert sum(x.size for x in jax.tree.leaves(params)) == 31_031_810


def test_unpadded_logits_are_lax_convolutions_without_padding():
  """depth 1: two convolutions, pooling, two, up, crop and concatenate, two, 1x1; written out with lax alone."""
  model, x = published(depth=1), image(20, 24, batch=1)

  def conv(layer, x):
    y = jax.lax.conv_general_dilated(
      x, layer.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    return y + layer.bias[...].reshape(1, 1, 1, -1)

  def double(block, x):
    return jax.nn.relu(conv(block.conv2, jax.nn.relu(conv(block.conv1, x))))

  @nnx.jit
  def ours_and_lax(model, x):
    skip = double(model.down0, x)  # 16 x 20
    below = jax.lax.reduce_window(skip, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    up = model.upconv0(double(model.down1, below))  # 8 x 12
    return model(x, context=True), conv(model.logits, double(model.up0, jnp.concatenate([skip[:, 4:-4, 4:-4], up], -1)))

  got, want = ours_and_lax(model, x)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert want.shape == (1, 4, 8, 3)


def test_the_mirrored_surroundings_equal_numpys_reflection():
  model, x = published(), image(8, 12, batch=1)
  assert model.margin == 20
  padded = np.pad(x, ((0, 0), (20, 20), (20, 20), (0, 0)), mode="reflect")
  mirrored, in_context = nnx.jit(lambda model, x, padded: (model(x), model(padded, context=True)))(model, x, padded)
  np.testing.assert_array_equal(mirrored, in_context)


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (1, 1), (3, 40)])
def test_unpadded_logits_cover_images_of_any_size(size):
  logits = run(published(), image(*size))
  assert logits.shape == (2, *size, 3) and jnp.isfinite(logits).all()


@pytest.mark.parametrize("size, tile", [((61, 45), (16, 20)), ((61, 45), (33, 100)), ((5, 7), (64, 64))])
def test_tiled_logits_equal_untiled_ones(size, tile):
  model, x = published(depth=3), image(*size, batch=1)
  tiled = inference.overlap_tile(model, x, tile)
  np.testing.assert_allclose(tiled, run(model, x), atol=1e-5)
  scores = inference.class_scores(model, x, window=tile)
  np.testing.assert_array_equal(scores, tiled)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(padding="zeros"), "model.padding = 'zeros': choose same or valid"),
    (dict(padding="valid", up="bilinear"), "set it to transposed, or model.padding to same"),
    (dict(up="nearest"), "model.up = 'nearest': choose transposed, bilinear or bilinear_conv"),
    (dict(up="bilinear_conv", batch_norm=False), "up = bilinear_conv, head_conv and auxiliary have batch norm"),
    (dict(auxiliary=True, depth=1), "set model.depth to 2 or more, and model.padding to same"),
    (dict(depth=0), "model.depth = 0"),
    (dict(dropout=1.0), r"model.dropout = 1.0 must lie in \[0, 1\)"),
    (dict(bn_momentum=1.5), "model.bn_momentum = 1.5"),
  ],
)
def test_wrong_options_say_so(options, message):
  with pytest.raises(ValueError, match=message):
    build(**options)


def test_unknown_model_lists_the_known_ones():
  with pytest.raises(ValueError, match=f"choose one of {', '.join(models.MODELS)}"):
    models.build("segformer", num_classes=2, rngs=nnx.Rngs(0))


def test_logits_of_a_narrow_network_equal_the_pytorch_unet():
  """tests/narrow_peers.py made them; tests/test_peers.py has the whole network."""
  z, prefix, width = np.load(DATA / "torch_narrow.npz"), "milesial_unet_transposed/32x48", 4
  num_classes = int(z[f"{prefix}/logits__shape"][1])
  shapes = {
    key: tuple(num_classes if n == 21 else n * width // 64 if n >= 64 else n for n in shape)
    for key, shape in test_peers.shapes("milesial_unet_transposed").items()
  }
  options = dict(num_classes=num_classes, width=width)
  model = nnx.eval_shape(lambda: pretrained.build("milesial/unet_transposed", rngs=nnx.Rngs(0), **options))
  pretrained.assign(model, torch_weights(shapes, gain=1.0), "milesial")
  x = np.random.default_rng(0).standard_normal([1, 3, 32, 48]).astype(np.float32).transpose(0, 2, 3, 1)
  got = np.asarray(test_peers.forward(model, jnp.asarray(x))[0]).transpose(0, 3, 1, 2)
  np.testing.assert_allclose(got, z[f"{prefix}/logits"], atol=20 * z[f"{prefix}/logits__f32_noise"])
