"""The U-Net on an encoder: PyTorch's numbers, which weights fit, and what every part is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import models, pretrained
from segjax.models import backbones, unet_decoder
from tests import seeded, test_peers
from tests.marks import full

GAIN = {"smp_unet_resnet18": 0.85, "smp_unet_vgg16_bn": 1.0}
NORM = ("running_mean", "running_var", "weight", "bias")


def smp_unet(weights, image):
  """segmentation_models_pytorch's Unet on resnet18 or vgg16_bn, written with torch's functions alone."""
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  w = {key: torch.from_numpy(array).double() for key, array in weights.items()}

  def conv_norm(x, conv, norm, **options):
    x = functional.conv2d(x, w[f"{conv}.weight"], w[f"{conv}.bias"] if f"{conv}.bias" in w else None, **options)
    return functional.batch_norm(x, *(w[f"{norm}.{leaf}"] for leaf in NORM))

  def resnet18(x):
    found = [torch.relu(conv_norm(x, "encoder.conv1", "encoder.bn1", stride=2, padding=3))]
    x = functional.max_pool2d(found[0], 3, 2, 1)
    for layer in range(1, 5):
      for unit in range(2):
        name, stride = f"encoder.layer{layer}.{unit}", 2 if layer > 1 and unit == 0 else 1
        y = torch.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride=stride, padding=1))
        y = conv_norm(y, f"{name}.conv2", f"{name}.bn2", padding=1)
        x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=2) if stride == 2 else x
        x = torch.relu(x + y)
      found.append(x)
    return found

  def vgg16_bn(x):
    found, number = [], 0
    for count in (2, 2, 3, 3, 3):
      for _ in range(count):
        x = torch.relu(conv_norm(x, f"encoder.features.{number}", f"encoder.features.{number + 1}", padding=1))
        number += 3
      found.append(x)
      x, number = functional.max_pool2d(x, 2), number + 1
    return [*found[1:], x]  # The first has the size of the image and is not used.

  *skips, x = (resnet18 if "encoder.conv1.weight" in w else vgg16_bn)(torch.from_numpy(image).double())
  for n in (0, 1) if "decoder.center.0.0.weight" in w else ():
    x = torch.relu(conv_norm(x, f"decoder.center.{n}.0", f"decoder.center.{n}.1", padding=1))
  for n in range(5):
    x = functional.interpolate(x, scale_factor=2, mode="nearest")
    x = torch.cat([x, skips.pop()], 1) if skips else x
    for conv in (f"decoder.blocks.{n}.conv1", f"decoder.blocks.{n}.conv2"):
      x = torch.relu(conv_norm(x, f"{conv}.0", f"{conv}.1", padding=1))
  head = "segmentation_head.0"
  return functional.conv2d(x, w[f"{head}.weight"], w[f"{head}.bias"], padding=1).numpy()


@pytest.mark.parametrize("case", ["smp_unet_resnet18", *full("smp_unet_vgg16_bn")])
def test_logits_equal_an_independent_torch_implementation(case):
  weights = seeded.torch_weights(test_peers.shapes(case), GAIN[case])
  image = np.random.default_rng(0).standard_normal([1, 3, 64, 96]).astype(np.float32)
  want = smp_unet(weights, image).transpose(0, 2, 3, 1)
  model = test_peers.seeded_model(case, GAIN[case])
  got, _ = test_peers.forward(model, jnp.asarray(image.transpose(0, 2, 3, 1)))
  assert np.abs(want).max() > 0.3
  np.testing.assert_allclose(got, want, atol=1e-4)


def abstract(encoder, **options):
  return nnx.eval_shape(lambda: models.build("unet", num_classes=3, encoder=encoder, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("encoder", backbones.BACKBONES)
def test_logits_have_any_images_size_on_any_encoder(encoder):
  graphdef, state = nnx.split(abstract(encoder))
  logits, endpoints = jax.eval_shape(
    lambda state, x: (nnx.merge(graphdef, state)(x, endpoints=(found := {})), found)[0:2],
    state,
    jax.ShapeDtypeStruct((1, 37, 65, 3), jnp.float32),
  )
  assert logits.shape == (1, 37, 65, 3)
  for n, width in enumerate((256, 128, 64, 32, 16), start=1):
    assert endpoints[f"decoder/block{n}"].shape == (1, 2 * 2**n, 3 * 2**n, width)


# torchvision's counts of parameters, less those of the classifiers.
@pytest.mark.parametrize(
  "encoder, parameters",
  [
    ("resnet_18", 11689512 - 513000),
    ("resnet_34", 21797672 - 513000),
    ("resnet_50", 25557032 - 2049000),
    ("mobilenet_v2", 3504872 - 1281000),
    ("vgg16_bn", 138365992 - 25088 * 4096 - 4096 - 4096 * 4097 - 4097 * 1000),
  ],
)
def test_an_encoder_has_the_parameters_of_the_published_network(encoder, parameters):
  params = nnx.state(abstract(encoder).backbone, nnx.Param)
  assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("scheme", ["torchvision", "timm"])
@pytest.mark.parametrize("encoder, case", [("resnet_18", "smp_unet_resnet18"), ("vgg16_bn", "smp_unet_vgg16_bn")])
def test_weights_of_an_imagenet_classifier_fit_the_encoder(scheme, encoder, case):
  shapes = {key.removeprefix("encoder."): s for key, s in test_peers.shapes(case).items() if key.startswith("encoder.")}
  arrays, exclude = seeded.torch_weights(shapes, 1.0), ["decoder", "logits"]
  linear = ["fc" if encoder == "resnet_18" else "classifier.6" if scheme == "torchvision" else "head.fc"]
  if encoder == "vgg16_bn":
    linear += ["classifier.0", "classifier.3"] if scheme == "torchvision" else ["pre_logits.fc1", "pre_logits.fc2"]
    exclude += ["backbone/fc6", "backbone/fc7"]
  for name in linear:
    shape = (2, 49 * 2) if name == "classifier.0" else (2, 2, 7, 7) if name == "pre_logits.fc1" else (2, 2)
    arrays |= {f"{name}.weight": np.zeros(shape, np.float32), f"{name}.bias": np.zeros(2, np.float32)}
  model = abstract(encoder)
  assert pretrained.assign(model, arrays, scheme, tuple(exclude)) == len(shapes)
  first, key = (
    (model.backbone.block4.unit2.conv2.conv, "layer4.1.conv2.weight")
    if encoder == "resnet_18"
    else (model.backbone.conv5_3.conv, "features.40.weight")
  )
  np.testing.assert_array_equal(first.kernel[...], arrays[key].transpose(2, 3, 1, 0))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(encoder="resnet_19"), "model.encoder = 'resnet_19': choose one of none, "),
    (dict(encoder="resnet_18", width=32), "model.width = 32: a U-Net on an encoder has none, leave it at 64"),
    (dict(encoder="resnet_18", padding="valid"), "model.padding = 'valid': a U-Net on an encoder"),
  ],
)
def test_options_that_would_not_act_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    abstract(**options)


@pytest.mark.full
def test_dropout_acts_between_encoder_and_decoder_and_remat_changes_no_logit():
  def run(key, **options):
    @nnx.jit
    def call():
      model = models.build("unet", num_classes=2, encoder="resnet_18", rngs=nnx.Rngs(0), **options)
      return model(jnp.ones((2, 32, 32, 3)) * jnp.arange(2).reshape(2, 1, 1, 1), True, key)

    return call()

  plain = run(jax.random.key(0))
  np.testing.assert_allclose(run(jax.random.key(0), remat=True), plain, atol=1e-5)
  assert jnp.abs(run(jax.random.key(0), dropout=0.5) - plain).max() > 1e-3


def test_each_skip_and_the_features_below_change_the_logits():
  model = test_peers.seeded_model("smp_unet_resnet18", 0.85)
  graphdef, state = nnx.split(model)
  image = jnp.asarray(np.random.default_rng(0).standard_normal([1, 32, 32, 3]), jnp.float32)

  @jax.jit
  def run(state, cut):
    model = nnx.merge(graphdef, state)
    for n in range(1, 5):
      kernel = getattr(model.decoder, f"block{n}").conv1.conv.kernel
      below = (model.backbone.features, *unet_decoder.FEATURES)[n - 1]
      inside = jnp.arange(kernel.shape[2]) < below
      keep = jnp.stack([inside, ~inside])  # All skips, then all from below.
      kernel[...] = kernel[...] * jnp.where(cut == 2 * n, keep[0], jnp.where(cut == 2 * n + 1, keep[1], True)).reshape(
        1, 1, -1, 1
      )
    return model(image)

  whole = run(state, 0)
  for cut in range(2, 10):
    assert jnp.abs(run(state, cut) - whole).max() > 1e-3, cut
