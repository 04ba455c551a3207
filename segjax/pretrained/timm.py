"""timm: aligned Xception-41, 65 and 71, the classifiers and their `features_only` form, which has no `head.fc`."""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict, torch_parts


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`; the classifier becomes `logits`."""
  modules = (*torch_parts.aligned_xception("", arrays), (r"head\.fc", "logits"))
  return state_dict.convert(arrays, modules, "timm's aligned Xception")
