"""Losses: pure functions of logits and labels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# What `loss.terms` may name. All take logits and label, and leave void pixels out.
TERMS = ("cross_entropy", "bce", "dice", "jaccard", "focal", "lovasz")


def parse_terms(terms: tuple[str, ...]) -> dict[str, float]:
  """("bce", "dice:0.5") -> {"bce": 1.0, "dice": 0.5}.

  Raises:
    ValueError: an unknown or repeated name, a weight that is no number above 0, or no term at all.
  """
  weights = {}
  for term in terms:
    name, _, weight = str(term).partition(":")
    if name not in TERMS or name in weights:
      raise ValueError(f"{term!r}: choose each of {', '.join(TERMS)} once, with or without a weight (dice:0.5).")
    try:
      weights[name] = float(weight or 1)
    except ValueError:
      weights[name] = math.nan
    if not 0 < weights[name] < math.inf:
      raise ValueError(f"{term!r}: its weight must be a number above 0, as in dice:0.5.")
  if not weights:
    raise ValueError(f"() sums up nothing: name at least one of {', '.join(TERMS)}.")
  return weights


def check_terms(terms: tuple[str, ...], sigmoid: bool) -> None:
  """Raises ValueError where a term does not fit the head: bce one logit, cross_entropy one per class."""
  weights = parse_terms(terms)
  if sigmoid and "cross_entropy" in weights:
    raise ValueError("cross_entropy is 0 over a single class: with head = 'sigmoid', use bce.")
  if not sigmoid and "bce" in weights:
    raise ValueError("bce needs the one-logit head: set head = 'sigmoid', or use cross_entropy.")


def make_loss(
  *,
  ignore_label: int,
  terms: tuple[str, ...] = ("cross_entropy",),
  class_weights: np.ndarray | None = None,
  hard_fraction: float = 1.0,
  hard_fraction_steps: int = 0,
  focal_gamma: float = 2.0,
  border_weight: float = 0.0,
  auxiliary_weight: float = 0.4,
) -> Callable[..., jax.Array]:
  """loss(logits, label, step, border=None, auxiliary=None) -> scalar, a weighted sum.

  Args:
    terms: what is summed, with weights: ("bce", "dice:0.5"). cross_entropy (softmax head), bce (sigmoid head), dice,
      jaccard, focal, lovasz.
    class_weights: [K], of cross_entropy, bce and focal per pixel, of dice, jaccard and lovasz per class.
    hard_fraction: of cross_entropy: share of all pixels that counts, those of the largest loss. 1: all.
    hard_fraction_steps: steps over which the share falls from 1 to that. 0: at once.
    focal_gamma: how much focal neglects easy pixels (arXiv 1708.02002: 2).
    border_weight: w0 of the U-Net's weight map (arXiv 1505.04597, equation 2: 10), which cross_entropy and bce add to a
      pixel's weight: w0 * border, where `border` [B, H, W] in [0, 1] comes with the batch (data.instances). 0: off.
    auxiliary_weight: of a model's auxiliary head (PSPNet, arXiv 1612.01105, section 5.2), where it has one.

  `auxiliary` are the logits of that head, of the label's size; their loss is the same weighted sum.

  Raises:
    ValueError: terms that `parse_terms` refuses.
  """
  weights = parse_terms(terms)

  def loss(logits, label, step, border=None, auxiliary=None):
    if auxiliary is not None:
      return loss(logits, label, step, border) + auxiliary_weight * loss(auxiliary, label, step, border)
    extra = None if border is None else border_weight * border
    weighted = dict(ignore_label=ignore_label, class_weights=class_weights)
    of_pixels = dict(weighted, extra_weight=extra)
    functions = {
      "cross_entropy": lambda: softmax_cross_entropy(
        logits, label, hard_fraction=hard_fraction_at(step, hard_fraction, hard_fraction_steps), **of_pixels
      ),
      "bce": lambda: binary_cross_entropy(logits, label, **of_pixels),
      "dice": lambda: dice(logits, label, **weighted),
      "jaccard": lambda: jaccard(logits, label, **weighted),
      "focal": lambda: focal(logits, label, gamma=focal_gamma, **weighted),
      "lovasz": lambda: lovasz(logits, label, **weighted),
    }
    return sum(weight * functions[name]() for name, weight in weights.items())

  return loss


def softmax_cross_entropy(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  class_weights: jax.Array | np.ndarray | None = None,
  hard_fraction: float | jax.Array = 1.0,
  extra_weight: jax.Array | None = None,
) -> jax.Array:
  """Mean cross-entropy over the valid pixels of the whole batch, or over its hardest pixels.

  The sum is divided by the number of valid pixels of all devices at once; a mean of per-device means would weigh
  pixels by how much void their device happened to get. Weights scale the numerator only, as in official DeepLab
  (utils/train_utils.py); PyTorch divides by the sum of weights instead.

  Args:
    logits: [B, H, W, K] float32 (or float64).
    label: [B, H, W] int, in [0, K) or `ignore_label`, which adds exactly 0 to loss and gradient.
    class_weights: [K] >= 0.
    hard_fraction: below 1, only so large a share of all pixels (void ones count) counts, those of the largest weighted
      loss; their sum is divided by how many of them are not 0. May be traced, see `hard_fraction_at`.
    extra_weight: [B, H, W], added to each pixel's weight (1, or its class's).

  Void adds nothing; classes that do not occur have no influence but through the others' probabilities.

  Returns:
    A float scalar; 0 where every pixel is void.
  """
  valid = label != ignore_label
  loss = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - _of_label(logits, label), 0)
  loss = loss * _pixel_weight(label, class_weights, extra_weight, loss.dtype)
  if isinstance(hard_fraction, (int, float)) and hard_fraction >= 1:
    return loss.sum() / jnp.maximum(valid.sum(), 1)
  hardest = jnp.sort(loss.reshape(-1), descending=True)
  count = jnp.floor(jnp.float32(hard_fraction) * jnp.float32(hardest.size)).astype(jnp.int32)
  hardest = jnp.where(jnp.arange(hardest.size) < count, hardest, 0)
  return hardest.sum() / jnp.maximum((hardest != 0).sum(), 1)


def _in_range(label, num_classes):
  """Indices of classes; that of some class where void."""
  return jnp.clip(label.astype(jnp.int32), 0, num_classes - 1)


@jax.custom_vjp
def _of_label(x, label):
  """[B, H, W]: the element of [B, H, W, K] at each pixel's class; any of them where void, without a gradient.

  Its gradient is written as a comparison with each class, because autodiff makes a scatter of this gather's
  (benchmarks/kernels.md).
  """
  return jnp.take_along_axis(x, _in_range(label, x.shape[-1])[..., None], -1, mode="promise_in_bounds")[..., 0]


def _of_label_forward(x, label):
  return _of_label(x, label), (label, jnp.arange(x.shape[-1]))


def _of_label_backward(saved, g):
  label, classes = saved
  return jnp.where(label[..., None] == classes.reshape(1, 1, 1, -1), g[..., None], 0), None


_of_label.defvjp(_of_label_forward, _of_label_backward)


def _pixel_weight(label, class_weights, extra_weight, dtype):
  """[B, H, W] or 1: the weight of each pixel's class, of some class where void, plus what is extra."""
  weight = 1.0
  if class_weights is not None:
    weight = jnp.asarray(class_weights, dtype)[_in_range(label, len(class_weights))]
  return weight if extra_weight is None else weight + extra_weight.astype(dtype)


def binary_cross_entropy(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  class_weights: jax.Array | np.ndarray | None = None,
  extra_weight: jax.Array | None = None,
) -> jax.Array:
  """Mean cross-entropy of sigmoid(logits) over the valid pixels of the whole batch.

  Args:
    logits: [B, H, W, 1].
    label: [B, H, W] int: 0, 1 or `ignore_label`, which adds exactly 0 to loss and gradient.
    class_weights: [2], of background and foreground; they scale the numerator only.
    extra_weight: [B, H, W], added to each pixel's weight.

  Void adds nothing; a batch without foreground, or without background, is scored like any other.
  """
  valid = label != ignore_label
  z = jnp.where(valid, logits[..., 0], 0)
  loss = jnp.where(valid, jax.nn.softplus(z) - z * (label == 1), 0)  # softplus(z) = -log(1 - sigmoid(z)).
  loss = loss * _pixel_weight(label, class_weights, extra_weight, loss.dtype)
  return loss.sum() / jnp.maximum(valid.sum(), 1)


def _probability_and_truth(logits, label, ignore_label):
  """[B, H, W, K] each, 0 where void: softmax and one-hot; of a one-logit head the foreground alone, K = 1."""
  valid = (label != ignore_label)[..., None]
  logits = jnp.where(valid, logits, 0)
  if logits.shape[-1] == 1:
    probability, truth = jax.nn.sigmoid(logits), (label == 1)[..., None]
  else:
    probability, truth = jax.nn.softmax(logits), jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  return jnp.where(valid, probability, 0), (truth & valid).astype(logits.dtype)


def _of_classes(class_weights, num_classes, dtype):
  """[K]: the weights of a loss that is a mean over classes; refuses a single class, whose mean no weight can change."""
  if class_weights is None:
    return jnp.ones(num_classes, dtype)
  if num_classes == 1:
    raise ValueError(
      "class_weights weigh nothing with one logit, of which dice, jaccard and lovasz score the foreground."
    )
  return jnp.asarray(class_weights, dtype)


def _overlap_loss(union, probability, truth, smooth, class_weights):
  """The (weighted) mean over classes of 1 - hits / union(hits, false) over the whole batch; 0 for absent classes."""
  hits = (probability * truth).sum((0, 1, 2))  # [K]
  false = (probability + truth).sum((0, 1, 2)) - 2 * hits  # False positives and false negatives.
  loss = jnp.where(truth.sum((0, 1, 2)) > 0, 1 - (hits + smooth) / jnp.maximum(union(hits, false) + smooth, 1e-7), 0)
  weights = _of_classes(class_weights, loss.size, loss.dtype)
  return (loss * weights).sum() / weights.sum()


def dice(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  smooth: float = 0.0,
  class_weights: jax.Array | np.ndarray | None = None,
) -> jax.Array:
  """1 - 2 sum(p t) / (sum p + sum t) per class over the whole batch, then the mean over classes (V-Net, arXiv 1606.04797).

  Args:
    logits: [B, H, W, K], softmax; or [B, H, W, 1], sigmoid, where only the foreground is scored.
    label: [B, H, W] int; void counts nowhere, neither its label nor its probability.
    smooth: added to sum(p t) and to half the denominator.
    class_weights: [K] of the mean over classes, not all 0; none with one logit.

  A class without a pixel in the batch scores 0 and counts in the mean (segmentation_models.pytorch's rule): false alarms
  are punished through the classes that are there.

  Raises:
    ValueError: class weights for one logit.
  """
  probability, truth = _probability_and_truth(logits, label, ignore_label)
  return _overlap_loss(lambda hits, false: hits + false / 2, probability, truth, smooth, class_weights)


def jaccard(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  smooth: float = 0.0,
  class_weights: jax.Array | np.ndarray | None = None,
) -> jax.Array:
  """1 - sum(p t) / (sum p + sum t - sum(p t)), soft IoU; arguments, void and absent classes as of `dice`."""
  probability, truth = _probability_and_truth(logits, label, ignore_label)
  return _overlap_loss(lambda hits, false: hits + false, probability, truth, smooth, class_weights)


def focal(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  gamma: float = 2.0,
  one_vs_rest: bool = False,
  class_weights: jax.Array | np.ndarray | None = None,
) -> jax.Array:
  """(1 - p)^gamma times cross-entropy, p the probability of the true class (Lin et al. 2017, arXiv 1708.02002, eq. 4).

  Args:
    logits: [B, H, W, K], softmax; or [B, H, W, 1], sigmoid.
    label: [B, H, W] int; void adds exactly 0. The mean is over valid pixels.
    gamma: 0 gives cross-entropy.
    one_vs_rest: K sigmoids, one per class against all others, and their mean.
    class_weights: [K], of a sigmoid [2]: the alpha of equation 5, by a pixel's class; they scale the numerator only.

  A class without a pixel has no term of its own under softmax; with `one_vs_rest` its false alarms count.
  """
  valid = label != ignore_label
  logits = jnp.where(valid[..., None], logits, 0)
  if logits.shape[-1] == 1 or one_vs_rest:
    truth = (label == 1)[..., None] if logits.shape[-1] == 1 else jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    log_p = jax.nn.log_sigmoid(jnp.where(truth, logits, -logits))
  else:
    log_p = _of_label(jax.nn.log_softmax(logits), label)[..., None]
  # Not quite 0 where p is 1: the gradient of a power below 1 is infinite there.
  loss = -((-jnp.expm1(jnp.minimum(log_p, -1e-30))) ** gamma) * log_p
  loss = jnp.where(valid[..., None], loss, 0).mean(-1) * _pixel_weight(label, class_weights, None, loss.dtype)
  return loss.sum() / jnp.maximum(valid.sum(), 1)


def lovasz(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  per_image: bool = False,
  class_weights: jax.Array | np.ndarray | None = None,
) -> jax.Array:
  """The Lovász extension of 1 - IoU: softmax for classes, hinge for one logit (Berman et al. 2018, arXiv 1705.08790).

  Args:
    logits: [B, H, W, K] or [B, H, W, 1].
    label: [B, H, W] int; void pixels sort last, with an error of 0, and change no value and no gradient.
    per_image: the mean over images instead of the batch as one image.
    class_weights: [K], each multiplies the loss of its class; the mean stays that of the classes present (as in
      mmsegmentation's LovaszLoss; the paper has none). None with one logit.

  Only classes with a pixel in the batch (or image) count in the mean. A batch without foreground under the hinge scores
  its largest error. All void: 0.

  Raises:
    ValueError: class weights for one logit.
  """
  options = dict(ignore_label=ignore_label, class_weights=class_weights)
  if per_image:
    return jax.vmap(lambda x, y: lovasz(x[None], y[None], **options))(logits, label).mean()
  weights = _of_classes(class_weights, logits.shape[-1], logits.dtype)
  label = label.reshape(-1)
  valid = label != ignore_label
  logits = jnp.where(valid[:, None], logits.reshape(-1, logits.shape[-1]), 0)
  if logits.shape[-1] == 1:
    truth = (label == 1) & valid
    return _lovasz_sum(1 - jnp.where(truth, logits[:, 0], -logits[:, 0]), truth, valid, hinge=True)
  truth = jax.nn.one_hot(label, logits.shape[-1], dtype=bool, axis=0) & valid[None]
  errors = jnp.abs(truth - jax.nn.softmax(logits).T)
  losses = jax.vmap(lambda e, t: _lovasz_sum(e, t, valid, hinge=False))(errors, truth)  # [K]
  present = truth.any(1)
  return jnp.where(present, weights * losses, 0).sum() / jnp.maximum(present.sum(), 1)


def _lovasz_sum(error, truth, valid, *, hinge: bool):
  """sum over pixels, by descending error, of error times the growth of 1 - IoU that the pixel brings."""
  order = jnp.argsort(jnp.where(valid, jax.lax.stop_gradient(error), -jnp.inf), descending=True)
  error, truth = jnp.where(valid, error, 0)[order], truth[order]
  hits = truth.sum() - jnp.cumsum(truth)
  union = truth.sum() + jnp.cumsum(~truth & valid[order])
  missed = jnp.where(union > 0, 1 - hits / jnp.maximum(union, 1), 0).astype(error.dtype)
  growth = missed - jnp.concatenate([jnp.zeros(1, error.dtype), missed[:-1]])
  return ((jax.nn.relu(error) if hinge else error) * growth).sum()


def hard_fraction_at(step: jax.Array | int, fraction: float, steps: int) -> jax.Array | float:
  """The share of pixels in the loss at a step: linearly from 1 to `fraction` over `steps`, 0 for at once.

  Easing in lets all pixels teach at first, when the hardest are hard by chance (official DeepLab,
  hard_example_mining_step).
  """
  if steps == 0 or fraction == 1:
    return fraction
  progress = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / steps)
  return progress * fraction + (1 - progress)


def class_weights(rule: str, pixels: np.ndarray, images_with_class: np.ndarray) -> np.ndarray:
  """Weights [K] float32 from label statistics of the training split.

  Args:
    rule: "median_frequency": median(f) / f, f = a class's share of the pixels of the images that contain it (Eigen &
      Fergus 2015, section 4.3). "inverse_log": 1 / ln(1.02 + share of all pixels) (ENet, Paszke et al. 2016, section 5.2).
    pixels: [K] valid pixels per class.
    images_with_class: [K] valid pixels of the images that contain the class.

  Raises:
    ValueError: a class without any pixel under "median_frequency", where its weight would be infinite.
  """
  pixels, images_with_class = np.asarray(pixels, np.float64), np.asarray(images_with_class, np.float64)
  if rule == "inverse_log":
    return (1 / np.log(1.02 + pixels / pixels.sum())).astype(np.float32)
  if (pixels == 0).any():
    raise ValueError(
      f"loss.class_weights = median_frequency, but classes {np.flatnonzero(pixels == 0).tolist()} have no pixel in the"
      " training labels. Use inverse_log, list the weights, or remove these classes."
    )
  frequency = pixels / images_with_class
  return (np.median(frequency) / frequency).astype(np.float32)
