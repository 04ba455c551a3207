"""Any TensorFlow Datasets data set that has an image and a mask feature."""

import numpy as np

from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources.base import Source
from segjax.input_pipeline.sources.mask_labels import MaskLabels, MaskMeaning
from segjax.input_pipeline.sources.tfds_store import Records


class TfdsSource(Source):
  """Random access to a TFDS data set in ArrayRecord files.

  Args:
    dir: TFDS's data directory.
    split: of the data set, also a slice as TFDS writes it, "train[:90%]".
    dataset: any TFDS data set in ArrayRecord files under `dir`: "oxford_iiit_pet", or "name/config".
    image_feature, mask_feature: names of the features.
    id_feature: feature that names the examples, e.g. "file_name". Empty: they are numbered.
    mask_labels: what the masks mean.
    exif: see `images.Reading`.

  Raises:
    DataError: no such data set, split or feature, another file format, or options that contradict each other.
  """

  def __init__(
    self,
    *,
    dir: str,
    split: str,
    dataset: str = "",
    image_feature: str = "image",
    mask_feature: str = "segmentation_mask",
    id_feature: str = "",
    mask_labels: MaskLabels = MaskLabels(),
    exif: str = "refuse",
  ):
    if not dataset:
      raise DataError("data.dataset: name a TFDS data set, e.g. --config.data.dataset=oxford_iiit_pet.")
    meaning = MaskMeaning(mask_labels)
    features = dict(image=image_feature, mask=mask_feature, id=id_feature)
    store = Records(dir, dataset, (split,), **features, reading=meaning.reading(exif))
    super().__init__(store, meaning.classes, meaning.palette, meaning.to_label, meaning=meaning.key)

  @staticmethod
  def named_classes(*, mask_labels, **_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `input_pipeline.named_classes`."""
    meaning = MaskMeaning(mask_labels)
    return meaning.classes, meaning.palette
