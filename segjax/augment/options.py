"""What is drawn at random: the fields of `config.augment`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What is drawn at random for each training crop, the fields of `config.augment`; 0 and False are off.

  Scale, crop and flip:
    scale: (smallest, largest) of the random resize, relative to the stored image.
    scale_step: 0: continuous uniform, else the spacing of the values drawn, from the smallest on (official DeepLab: 0.25).
    flip: mirrors left-right with probability 1/2.
    outside: what crops show beyond the image. "mirror": image and label go on, mirrored. "void": the mean pixel, without a
      label; but the image is mirrored for a model with a margin, as in its predictions.
    flip_vertical: mirrors top-bottom with probability 1/2.
    quarter_turns: turns by 0, 90, 180 or 270 degrees, each alike; of square crops.
    foreground: probability that a crop holds a pixel, chosen at random, of one class that its image has: uniform among all
      but class 0, or, with data.sampling = "class_balanced", by its probabilities. 0: off. See `foreground.choose_pixel`.
  Warp, see `warp_field`:
    rotation: strength s, degrees; uniform in [-s, s] about the crop's centre. 0: off.
    shift: strength s, share of the crop; uniform in [-s, s] for height and width. 0: off.
    shear: strength s, degrees; uniform in [-s, s]; slants the columns. 0: off.
    zoom: strength s; factors of height and width are uniform in [1 - s, 1 + s], each its own, beside `scale`. 0: off.
    elastic: deviation in pixels of the normal displacements of a 3x3 grid over the crop, interpolated bicubically to
      all pixels (U-Net, arXiv 1505.04597, section 3.1: 10). 0: off.
  Colour, see `color.jitter`:
    brightness, contrast, saturation: strength s; the factor is uniform in [1 - s, 1 + s]. 0: off.
    hue: strength s; the shift is uniform in [-s, s] of the colour circle. 0: off.
    hsv: strengths s of what is added to hue, saturation and value, uniform in [-s, s] of their range. 0: off.
    gamma: strength s; the exponent of all values, as shares of their range, is uniform in [1 - s, 1 + s]. 0: off.
    blur: deviation of a Gaussian, pixels, is uniform in [0, blur]. 0: off.
    noise: deviation of normal noise, share of the range, is uniform in [0, noise]; of each pixel and channel. 0: off.
  Mixing:
    class_mix: probability that half of the classes in the batch's next crop, drawn at random, are pasted into a crop, with
      their labels (ClassMix, arXiv 2007.07936). 0: off. See `class_mix.mix`.
  """

  scale: tuple[float, float] = (0.5, 2.0)
  scale_step: float = 0.0
  flip: bool = True
  outside: str = "void"
  flip_vertical: bool = False
  quarter_turns: bool = False
  foreground: float = 0.0
  rotation: float = 0.0
  shift: float = 0.0
  shear: float = 0.0
  zoom: float = 0.0
  elastic: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)
  gamma: float = 0.0
  blur: float = 0.0
  noise: float = 0.0
  class_mix: float = 0.0

  @property
  def warps(self) -> bool:
    """Whether crops are warped at all; without it resampling is separable."""
    return any((self.rotation, self.shift, self.shear, self.zoom, self.elastic))
