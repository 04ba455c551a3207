"""PyTorch's FCN-8s and U-Net with few channels: networks of our own size whose numbers are the peers'.

  python -m tests.narrow_peers                    writes tests/data/torch_narrow.npz, as FIXTURES.md, section 2, describes it
  python -m tests.narrow_peers --check FIXTURES   compares both at full width with FIXTURES (../shared/reference/torch/fixtures)

Layers and names are those of wkentaro/pytorch-fcn and milesial/Pytorch-UNet, the weights those of `seeded.torch_weights`.
Needs PyTorch, which the tests do not.
"""

import pathlib
import sys

import numpy as np
import torch
from torch.nn import functional

from tests import seeded

SIZE, CLASSES, WIDTH = (32, 48), 5, 4  # Of the stored numbers.


def fcn8s_shapes(width: int, num_classes: int) -> dict[str, tuple]:
  shapes, below = {}, 3
  for stage, (count, factor) in enumerate(((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)), start=1):
    for n in range(1, count + 1):
      shapes[f"conv{stage}_{n}.weight"], below = (factor * width, below, 3, 3), factor * width
  wide = 64 * width
  shapes |= {"fc6.weight": (wide, below, 7, 7), "fc7.weight": (wide, wide, 1, 1)}
  for name, features in (("score_fr", wide), ("score_pool3", 4 * width), ("score_pool4", 8 * width)):
    shapes[f"{name}.weight"] = (num_classes, features, 1, 1)
  shapes |= {key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items()}
  return shapes | {
    f"{name}.weight": (num_classes, num_classes, size, size)
    for name, size in (("upscore2", 4), ("upscore8", 16), ("upscore_pool4", 4))
  }


def fcn8s(weights, image):
  """{name: value}; the first convolution pads by 100, the crops are at 5, 9 and 31."""
  found = {}

  def conv(name, x, padding=0):
    return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

  def up(name, x, stride):
    found[name] = functional.conv_transpose2d(x, weights[f"{name}.weight"], stride=stride)
    return found[name]

  def crop(x, offset, like):
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]

  x = image
  for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
    for n in range(1, count + 1):
      x = functional.relu(conv(f"conv{stage}_{n}", x, padding=100 if (stage, n) == (1, 1) else 1))
    x = found[f"pool{stage}"] = functional.max_pool2d(x, 2, ceil_mode=True)
  x = functional.relu(conv("fc7", functional.relu(conv("fc6", x))))
  found["score_fr"] = conv("score_fr", x)
  x = up("upscore2", found["score_fr"], 2)
  found["score_pool4"] = conv("score_pool4", found["pool4"])
  x = up("upscore_pool4", x + crop(found["score_pool4"], 5, x), 2)
  found["score_pool3"] = conv("score_pool3", found["pool3"])
  x = up("upscore8", x + crop(found["score_pool3"], 9, x), 8)
  return found | {"logits": crop(x, 31, image)}


def unet_shapes(width: int, num_classes: int) -> dict[str, tuple]:
  shapes, features = {}, [width * 2**level for level in range(5)]
  doubles = {"inc": (3, width)} | {f"down{n}.maxpool_conv.1": (features[n - 1], features[n]) for n in range(1, 5)}
  doubles |= {f"up{n}.conv": (features[5 - n], features[4 - n]) for n in range(1, 5)}
  for name, (before, after) in doubles.items():
    for index, channels in ((0, before), (3, after)):
      shapes[f"{name}.double_conv.{index}.weight"] = (after, channels, 3, 3)
      for leaf in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.double_conv.{index + 1}.{leaf}"] = (after,)
  for n in range(1, 5):
    shapes |= {f"up{n}.up.weight": (features[5 - n], features[4 - n], 2, 2), f"up{n}.up.bias": (features[4 - n],)}
  return shapes | {"outc.conv.weight": (num_classes, width, 1, 1), "outc.conv.bias": (num_classes,)}


def unet(weights, image):
  """{name: value}, of sizes that 16 divides."""

  def double(name, x):
    for n in (0, 3):
      x = functional.conv2d(x, weights[f"{name}.double_conv.{n}.weight"], padding=1)
      norm = [weights[f"{name}.double_conv.{n + 1}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
      x = functional.relu(functional.batch_norm(x, *norm))
    return x

  found = {"inc": double("inc", image)}
  skips = [found["inc"]]
  for n in range(1, 5):
    skips.append(double(f"down{n}.maxpool_conv.1", functional.max_pool2d(skips[-1], 2)))
    found[f"down{n}"] = skips[-1]
  x = skips.pop()
  for n in range(1, 5):
    x = functional.conv_transpose2d(x, weights[f"up{n}.up.weight"], weights[f"up{n}.up.bias"], stride=2)
    x = found[f"up{n}"] = double(f"up{n}.conv", torch.cat([skips.pop(), x], 1))
  return found | {"logits": functional.conv2d(x, weights["outc.conv.weight"], weights["outc.conv.bias"])}


NETWORKS = {"wkentaro_fcn8s": (fcn8s_shapes, fcn8s), "milesial_unet_transposed": (unet_shapes, unet)}


def compute(network: str, width: int, num_classes: int, size: tuple[int, int], dtype=torch.float64):
  """{name: value, float64} of a network with seeded weights on the noise of FIXTURES.md."""
  shapes, forward = NETWORKS[network]
  arrays = seeded.torch_weights(shapes(width, num_classes), gain=1.0)
  weights = {key: torch.from_numpy(array).to(dtype) for key, array in arrays.items()}
  image = np.random.default_rng(0).standard_normal([1, 3, *size]).astype(np.float32)
  with torch.no_grad():
    found = forward(weights, torch.from_numpy(image).to(dtype))
  return {name: value.double().numpy() for name, value in found.items()}


def probe_index(size: int) -> np.ndarray:
  return np.random.default_rng(1).integers(0, size, 256)


def write() -> None:
  stored = {}
  for network in NETWORKS:
    exact, rounded = (compute(network, WIDTH, CLASSES, SIZE, dtype) for dtype in (torch.float64, torch.float32))
    for name, value in exact.items():
      key = f"{network}/{SIZE[0]}x{SIZE[1]}/{name}"
      stored[f"{key}__shape"], stored[f"{key}__probe_index"] = np.array(value.shape), probe_index(value.size)
      stored[f"{key}__probe"] = value.ravel()[probe_index(value.size)].astype(np.float32)
      stored[f"{key}__f32_noise"] = np.abs(value - rounded[name]).max()
    stored[key] = exact["logits"].astype(np.float32)  # The last one, whole.
  np.savez_compressed(seeded.DATA / "torch_narrow.npz", **stored)


def check(fixtures: pathlib.Path) -> None:
  for network in NETWORKS:
    z = np.load(fixtures / f"{network}.npz")
    found = compute(network, width=64, num_classes=21, size=(64, 96))
    names = [key[6:-7] for key in z.files if key.startswith("64x96/") and key.endswith("__probe")]
    for name in names:
      want, got = z[f"64x96/{name}__probe"], found[name].ravel()[z[f"64x96/{name}__probe_index"]]
      assert found[name].shape == tuple(z[f"64x96/{name}__shape"]), name
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max(), err_msg=name)
    print(f"{network}: {', '.join(names)} equal")


if __name__ == "__main__":
  if sys.argv[1:]:
    check(pathlib.Path(sys.argv[2]))
  else:
    write()
