"""FCN of wkentaro/pytorch-fcn, whose weights are those of the published Caffe networks: names -> our paths.

They want `geometry="caffe"` and `normalization="caffe"`. Names are the same at each stride but for the upsampling
layers, which they name after their factor.
"""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict

MODULES = (
  (r"(conv\d_\d|fc[67])", r"backbone/\1"),
  (r"score_fr", "score_fc7"),
  (r"(score_pool[34])", r"\1"),
  (r"upscore2", "upscore_fc7"),
  (r"(upscore_pool4)", r"\1"),
  (r"upscore(8|16)?", "upscore"),  # Of stride 8, 16 and, without a number, 32.
)


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """{"params": ..., "batch_stats": ...} in our paths and layouts, of a `state_dict`.

  The first layer's kernel is turned from BGR, which Caffe reads, to RGB.

  Raises:
    ValueError: listing every name that the scheme does not know.
  """
  layouts = (
    (r"upscore.*", lambda kernel: kernel.transpose(2, 3, 0, 1)),  # [in, out, kh, kw].
    (r"backbone/conv1_1", lambda kernel: state_dict.channels_last(kernel[:, ::-1])),
  )
  return state_dict.convert(arrays, MODULES, "pytorch-fcn", layouts)
