"""A generated data set: textured shapes on a shaded ground, with occlusion, void borders and exact labels.

No download, no files: for trying segjax out and for tests. Every class has its own outline and its own texture; colours
are random, so that colour alone never gives a class away.
"""

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline.order import mix
from segjax.input_pipeline.sources import datasets
from segjax.input_pipeline.sources.base import Source

CLASSES = ("ground", "disk", "square", "triangle", "ring", "cross")


def _inside(kind: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Signed distance-like value, below 0 inside the shape of radius 1 centred at the origin."""
  if kind == 1:  # Disk.
    return np.hypot(y, x) - 1
  if kind == 2:  # Square.
    return np.maximum(np.abs(y), np.abs(x)) - 0.85
  if kind == 3:  # Triangle.
    return np.maximum(np.maximum(-y, 0.5 * y + 0.866 * x), 0.5 * y - 0.866 * x) - 0.65
  if kind == 4:  # Ring.
    return np.abs(np.hypot(y, x) - 0.72) - 0.28
  ay, ax = np.abs(y), np.abs(x)  # Cross.
  return np.minimum(np.maximum(ay - 0.3, ax - 1), np.maximum(ay - 1, ax - 0.3))


def _texture(rng, kind: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """The surface of a class in two random colours, [H, W, 3] float."""
  angle, period = rng.uniform(0, np.pi), rng.uniform(*((14, 20), (8, 11), (6, 8), (4, 5), (6, 8), (6, 8))[kind])
  phase = 2 * np.pi / period
  along = np.sin(phase * (np.cos(angle) * y + np.sin(angle) * x) + rng.uniform(0, 2 * np.pi))
  across = np.sin(phase * (np.cos(angle) * x - np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
  pattern = (
    0.6 * along,  # Ground: soft, wide stripes.
    along,  # Disk: coarse stripes.
    np.sign(along * across),  # Square: a chequerboard.
    along,  # Triangle: fine stripes.
    np.maximum(along * across, 0) * 2 - 1,  # Ring: dots.
    rng.uniform(-1, 1, x.shape),  # Cross: noise.
  )[kind]
  return rng.uniform(50, 205, 3) + pattern[..., None] * rng.uniform(20, 50, 3)


class _Generator:
  """A store of generated examples; see `base.Files`."""

  def __init__(self, split: str, count: int, size: tuple[int, int], exif: str):
    self.names, self.sizes = [f"synthetic_{index:05d}" for index in range(count)], [size] * count
    self.files, self.others, self.exif = dict(image=[]), {}, exif
    self._seed = int.from_bytes(split.encode()[:7], "little")

  def identity(self, index: int) -> tuple[str, str]:
    """See `base.Files`; nothing changes."""
    return f"{self.names[index]} of {self._seed} {self.sizes[index]}", ""

  def read(self, index: int) -> tuple[str, np.ndarray, str, np.ndarray]:
    """See `base.Files`; labels are void along every outline, 2 pixels wide."""
    rng = np.random.Generator(np.random.PCG64(int(mix(self._seed, index))))
    h, w = self.sizes[index]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    image = _texture(rng, 0, y, x)
    label = np.zeros((h, w), np.uint8)
    for _ in range(rng.integers(3, 7)):  # Later shapes hide parts of earlier ones.
      kind, radius = int(rng.integers(1, len(CLASSES))), rng.uniform(0.15, 0.3) * min(h, w)
      angle = rng.uniform(0, 2 * np.pi)
      centre_y, centre_x, reach = rng.uniform(0, h), rng.uniform(0, w), 1.3 * radius + 2  # No shape is wider.
      top, left = max(int(centre_y - reach), 0), max(int(centre_x - reach), 0)
      box = np.s_[top : int(centre_y + reach) + 1, left : int(centre_x + reach) + 1]
      dy, dx = (y[box] - centre_y) / radius, (x[box] - centre_x) / radius
      distance = radius * _inside(
        kind, np.cos(angle) * dy - np.sin(angle) * dx, np.sin(angle) * dy + np.cos(angle) * dx
      )
      texture = _texture(rng, kind, y[box], x[box])
      image[box] = np.where((distance < 0)[..., None], texture, image[box])
      label[box] = np.where(np.abs(distance) < 1, IGNORE_LABEL, np.where(distance < 0, kind, label[box]))
    image += rng.normal(0, 6, image.shape)
    name = self.names[index]
    return name, np.clip(image, 0, 255).astype(np.uint8), name, label


class SyntheticSource(Source):
  """Random access to generated examples; example i of a split is a pure function of (split, i).

  Args:
    split: "train", or any other, which is drawn from other seeds.
    num_train: examples in the split "train".
    num_val: examples in any other split.
    image_size: (H, W), pixels.
    dir, exif: unused, there are no files.
  """

  def __init__(
    self,
    *,
    split: str,
    dir: str = "",
    exif: str = "refuse",
    num_train: int = 512,
    num_val: int = 64,
    image_size: tuple[int, int] = (64, 64),
  ):
    count = num_train if split == "train" else num_val
    super().__init__(
      _Generator(split, count, tuple(image_size), exif), *self.named_classes(), lambda path, label: label
    )

  @staticmethod
  def named_classes(**_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `input_pipeline.named_classes`."""
    return CLASSES, datasets.palette(len(CLASSES))
