"""The FCNs: PyTorch's numbers, the sum of their parts, every geometry, training in stages."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from segjax import models, pretrained, state, steps, train
from segjax.config import default_config
from tests.marks import full
from tests.seeded import DATA, torch_weights

PARTS = ("score_fc7", "score_pool4", "score_pool3")


# Most of the time here is compilation, and the networks are small.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def initial(**options):
  """Graph and parameters of a narrow FCN whose zeros, the score layers, are drawn at random."""

  def init():
    graphdef, params, _ = state.split(models.build("fcn", rngs=nnx.Rngs(0), **(dict(num_classes=3, width=2) | options)))
    for n, name in enumerate(PARTS):
      if name in params:
        params[name] = {
          leaf: jax.random.normal(jax.random.key(n), x.shape, x.dtype) for leaf, x in params[name].items()
        }
    graph.append(graphdef)
    return params

  graph = []
  params = jit(init)()
  return graph[0], params


def build(**options):
  graphdef, params = initial(**options)
  return steps.merge(graphdef, dict(params=params, batch_stats={}))


def run(model, x):
  """Logits and endpoints, compiled."""
  graphdef, params, _ = state.split(model)

  @jit
  def forward(params, x):
    endpoints = {}
    return steps.merge(graphdef, dict(params=params, batch_stats={}))(x, endpoints=endpoints), endpoints

  return forward(params, x)


def image(h, w, dtype=np.float32, batch=1):
  return jnp.asarray(np.random.default_rng(0).normal(size=(batch, h, w, 3)), dtype)


def check_scores(z, prefix, size, **options):
  """Every score that a fixture holds of a network with seeded weights, within 20 times PyTorch's own float32 noise."""
  options |= dict(geometry="caffe", normalization="caffe")
  model = nnx.eval_shape(lambda: models.build("fcn", rngs=nnx.Rngs(0), **options))
  weights = torch_weights(torch_shapes(state.split(model)[1]), gain=1.0)
  assert pretrained.assign(model, weights, scheme="wkentaro") == len(weights) == 39
  bgr = np.random.default_rng(0).standard_normal([1, 3, *size]).astype(np.float32)
  logits, endpoints = run(model, jnp.asarray(bgr[:, ::-1].transpose(0, 2, 3, 1)))
  noise = z[f"{prefix}/logits__f32_noise"]
  np.testing.assert_allclose(logits.transpose(0, 3, 1, 2), z[f"{prefix}/logits"], atol=20 * noise)
  theirs = dict(score_fr="score_fc7", upscore2="upscore_fc7", upscore8="upscore")
  compared = [name[1][1:] for key in z.files if (name := re.fullmatch(rf"{prefix}(/\w+)(?<!logits)__probe", key))]
  for name in compared:
    ours = np.asarray(endpoints[theirs[name] if name in theirs else name]).transpose(0, 3, 1, 2)
    assert ours.shape == tuple(z[f"{prefix}/{name}__shape"])
    probe, noise = ours.reshape(-1)[z[f"{prefix}/{name}__probe_index"]], z[f"{prefix}/{name}__f32_noise"]
    np.testing.assert_allclose(probe, z[f"{prefix}/{name}__probe"], atol=20 * noise, err_msg=name)
  return compared


def torch_shapes(params):
  """{PyTorch's key: shape} of wkentaro's FCN-8s."""
  theirs = dict(score_fc7="score_fr", upscore_fc7="upscore2", upscore="upscore8")
  shapes = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    layer, kind = theirs[path[-2]] if path[-2] in theirs else path[-2], path[-1]
    order = (2, 3, 0, 1) if layer.startswith("upscore") else (3, 2, 0, 1)  # Transposed: [in, out, kh, kw].
    shape = tuple(leaf.shape[i] for i in order) if kind == "kernel" else leaf.shape
    shapes[f"{layer}.{'weight' if kind == 'kernel' else kind}"] = shape
  return shapes


def test_every_score_of_a_narrow_network_equals_pytorch_fcn_with_the_caffe_geometry():
  """tests/narrow_peers.py made them."""
  compared = check_scores(np.load(DATA / "torch_narrow.npz"), "wkentaro_fcn8s/32x48", (32, 48), num_classes=5, width=4)
  assert len(compared) == 11


@pytest.mark.reference
def test_every_score_equals_pytorch_fcn_with_the_caffe_geometry(shared):
  z = np.load(shared / "reference/torch/fixtures/wkentaro_fcn8s.npz")
  assert float(z["gain"]) == 1
  rows = (line.split("\t") for line in (shared / "reference/torch/state/wkentaro_fcn8s.tsv").read_text().splitlines())
  network = nnx.eval_shape(lambda: models.build("fcn", num_classes=21, rngs=nnx.Rngs(0)))
  assert torch_shapes(state.split(network)[1]) == {key: tuple(map(int, shape.split("x"))) for key, shape, _ in rows}
  assert len(check_scores(z, "64x96", (64, 96), num_classes=21)) == 9


@pytest.mark.parametrize(
  "options", full(dict(), dict(geometry="caffe", upsampling="fixed", at_once=True), dict(stride=16))
)
def test_the_fused_score_is_the_sum_of_its_upsampled_parts_in_float64(options):
  with jax.enable_x64(True):
    graphdef, params = initial(dtype="float64", **options)
    logits = jit(lambda params, x: steps.merge(graphdef, dict(params=params, batch_stats={}))(x))
    x, total = image(37, 50, np.float64), 0
    present = [name for name in PARTS if name in params]
    for kept in present:
      silent = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in present if name != kept}
      part = logits(params | silent, x)
      assert jnp.abs(part).max() > 0
      total += part
    assert len(present) == (2 if "stride" in options else 3)
    np.testing.assert_allclose(total, logits(params, x), atol=1e-10)


@pytest.mark.parametrize(
  "options",
  [
    dict(geometry="caffe"),
    *full(
      dict(),
      dict(stride=16, geometry="caffe"),
      dict(stride=32),
      dict(stride=32, geometry="caffe"),
      dict(fuse="features"),
      dict(upsampling="last_fixed"),
    ),
  ],
)
def test_logits_cover_images_of_any_size(options):
  for size in ((33, 47), (1, 5)):
    logits, _ = run(build(**options), image(*size))
    assert logits.shape == (1, *size, 3) and jnp.isfinite(logits).all()
    assert (jnp.abs(logits).max((1, 2)) > 0).all()


@pytest.mark.parametrize("geometry", full("same", "caffe"))
def test_scores_of_all_strides_lie_above_the_pixels_they_see(geometry):
  """Each skip's share of a logit changes most with the pixels around that logit: within half its stride of them."""
  x, graphdef = jnp.abs(image(160, 160)), initial(geometry=geometry, width=4)[0]

  @jit
  @jax.grad
  def of_middle(x, params):
    return steps.merge(graphdef, dict(params=params, batch_stats={}))(x)[0, 72:88, 72:88].sum()

  for part, reach in (("score_pool3", 8), ("score_pool4", 16)):
    model = build(geometry=geometry, width=4)
    for name in PARTS:
      layer = getattr(model, name)
      # All pixels count alike and nothing cancels, so that the gradient shows where a logit looks.
      layer.kernel[...], layer.bias[...] = jnp.full_like(layer.kernel[...], name == part), 0 * layer.bias[...]
    for stage in model.backbone.stages:
      for name in stage:
        layer = getattr(model.backbone, name)
        layer.kernel[...] = jnp.ones_like(layer.kernel[...]) / layer.kernel[..., 0].size
    gradient = of_middle(x, state.split(model)[1])[0].sum(-1)
    weight = np.asarray(gradient) / gradient.sum()
    centre = [float((weight.sum(1 - axis) * np.arange(160)).sum()) for axis in (0, 1)]
    np.testing.assert_allclose(centre, 79.5, atol=reach / 2)


def test_at_once_scales_the_skips_features():
  scaled, plain, x = build(at_once=True), build(), image(40, 40)
  before, _ = run(plain, x)
  plain.score_pool4.kernel[...] *= 0.01
  plain.score_pool3.kernel[...] *= 0.0001
  np.testing.assert_allclose(run(scaled, x)[0], run(plain, x)[0], atol=1e-5)
  assert jnp.abs(run(scaled, x)[0] - before).max() > 1e-2


def test_fused_features_have_the_pools_channels_and_nothing_is_scored_twice():
  model = build(fuse="features")
  _, endpoints = run(model, image(64, 64))
  assert endpoints["fuse_pool4"].shape == (1, 4, 4, 16) and endpoints["fuse_pool3"].shape == (1, 8, 8, 8)
  assert not hasattr(model, "score_pool4")
  want = endpoints["upscore_pool4"][:, 1:-1, 1:-1] + endpoints["pool3"]
  np.testing.assert_array_equal(endpoints["fuse_pool3"], want)


@pytest.mark.parametrize("options", full(dict(), dict(fuse="features"), dict(upsampling="fixed", geometry="caffe")))
def test_every_parameter_has_a_gradient(options):
  graphdef, params = initial(width=4, **options)
  x, weight = image(64, 64), image(64, 64)

  def loss(params):
    return (steps.merge(graphdef, dict(params=params, batch_stats={}))(x) * weight).sum()

  for path, gradient in jax.tree_util.tree_flatten_with_path(jit(jax.grad(loss))(params))[0]:
    assert jnp.abs(gradient).max() > 0, jax.tree_util.keystr(path)
  assert ("upscore" in params) == ("upsampling" not in options)


@pytest.mark.full
def test_a_new_network_scores_every_class_alike_and_learns_from_there():
  """Score layers begin with zeros (Shelhamer et al. 2017, section 4.3)."""
  x, (graphdef, _) = image(32, 32), initial()

  @jit
  def begin():
    _, params, _ = state.split(models.build("fcn", num_classes=3, width=2, rngs=nnx.Rngs(0)))

    def loss(params):
      logits = steps.merge(graphdef, dict(params=params, batch_stats={}))(x)
      return ((logits - x) ** 2).sum(), logits

    return jax.grad(loss, has_aux=True)(params)

  gradient, logits = begin()
  assert (logits == 0).all() and jnp.abs(gradient["score_pool3"]["kernel"]).max() > 0


@pytest.mark.full
def test_bfloat16_stays_near_float32_and_gives_float32_logits():
  x = image(64, 64)
  want, got = run(build(), x)[0], run(build(dtype="bfloat16"), x)[0]
  assert got.dtype == jnp.float32
  assert jnp.linalg.norm(got - want) < 3e-2 * jnp.linalg.norm(want)


def test_caffe_normalization_takes_the_mean_off_and_divides_by_nothing():
  model = build(normalization="caffe")
  got = model.preprocess(jnp.full((1, 1, 1, 3), 130.0)).reshape(3)
  np.testing.assert_allclose(got, 130 - np.asarray(model.mean), rtol=1e-6)
  assert model.mean[0] > model.mean[2]  # Red first.


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(stride=4), "model.stride = 4: choose 32, 16 or 8"),
    (dict(width=0), "model.width = 0"),
    (dict(fuse="sum"), "model.fuse = 'sum': choose one of score, features"),
    (dict(upsampling="nearest"), "model.upsampling = 'nearest'"),
    (dict(geometry="valid"), "model.geometry = 'valid'"),
    (dict(normalization="tf"), "model.normalization = 'tf'"),
    (dict(fuse="features", upsampling="fixed"), "which interpolation cannot; set it to learned"),
    (dict(dropout=1.0), r"model.dropout = 1.0 must lie in \[0, 1\)"),
  ],
)
def test_wrong_options_say_so(options, message):
  with pytest.raises(ValueError, match=message):
    build(**options)


@pytest.mark.slow
def test_each_stride_starts_from_the_one_before(tmp_path, capsys):
  """32s -> 16s -> 8s through init.path: all that exists is taken over, and a new skip begins by adding zeros."""
  config = default_config(model="fcn", data="synthetic")
  config.num_steps = config.eval_every = config.log_every = 1
  config.mesh.data, config.batch_size, config.eval.batch_size, config.crop_size = 1, 2, 2, (32, 32)
  config.data.image_size, config.data.num_train, config.data.num_val = (32, 32), 2, 2
  config.data.loader, config.eval.num_overlays = "grain", 0
  config.model.width, config.model.upsampling = 2, "last_fixed"
  for before, stride, new in (
    (None, 32, ()),
    (32, 16, ("score_pool4", "upscore_fc7")),
    (16, 8, ("score_pool3", "upscore_pool4")),
  ):
    config.model.stride = stride
    config.init.path, config.init.exclude = (str(tmp_path / f"{before}s") if before else ""), new
    train.train(config, tmp_path / f"{stride}s")
  output = capsys.readouterr().out
  assert "init: imported 32 of 35 tensors" in output and "init: imported 35 of 38 tensors" in output


def test_imagenet_weights_of_vgg_fit_the_backbone_and_only_scores_stay_new():
  """torchvision's names and layouts, on a narrow network; fc6 is a linear layer over channels, rows, columns."""
  rng, arrays, number = np.random.default_rng(0), {}, 0
  model = build()
  for stage in model.backbone.stages:
    for name in stage:
      kernel = getattr(model.backbone, name).kernel[...]
      arrays[f"features.{number}.weight"] = rng.normal(size=kernel.transpose(3, 2, 0, 1).shape).astype(np.float32)
      arrays[f"features.{number}.bias"] = rng.normal(size=kernel.shape[-1]).astype(np.float32)
      number += 2
    number += 1
  for key, shape in (("0", (128, 16 * 49)), ("3", (128, 128)), ("6", (1000, 128))):
    arrays[f"classifier.{key}.weight"] = rng.normal(size=shape).astype(np.float32)
    arrays[f"classifier.{key}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
  new = ("score_fc7", "score_pool4", "score_pool3", "upscore_fc7", "upscore_pool4", "upscore")
  assert pretrained.assign(model, arrays, "torchvision", exclude=(*new, "logits")) == 30
  window = rng.normal(size=(1, 16, 7, 7)).astype(np.float32)
  want = arrays["classifier.0.weight"] @ window.reshape(-1) + arrays["classifier.0.bias"]
  got = model.backbone.fc6(jnp.asarray(window.transpose(0, 2, 3, 1)))[0, 3, 3]
  np.testing.assert_allclose(got, want, atol=1e-4)
