"""The TFDS data set `voc_segmentation`: PASCAL VOC 2012 with SBD's additional labels, every image once.

  tfds build segjax/input_pipeline/sources/voc_segmentation.py --manual_dir=VOCdevkit/VOC2012 --file_format=array_record

or, without Apache Beam, `python -m segjax.prepare voc ... --tfds=DIR`. Splits: train, val, sbd (trainaug without train)
and test; trainaug is "train+sbd", trainval "train+val".
"""

import numpy as np
import tensorflow_datasets as tfds

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import images, masks
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import voc


class VocSegmentation(tfds.core.GeneratorBasedBuilder):
  """JPEG images as VOC ships them; label PNGs of class ids 0 to 20, 255 = void, and void everywhere in test."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "manual_dir is VOC2012, or a folder above it, as `python -m segjax.prepare voc` leaves it (with trainaug)."
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
          "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    root = voc.find_root(str(dl_manager.manual_dir))
    pairs = {}
    for split in ("train", "val", "trainaug", "test"):
      if voc.list_file(root, split).is_file() or split != "test":  # Only test may be absent.
        pairs[split] = dict(zip(*voc.find_pairs(root, split)))
    pairs["sbd"] = {name: pair for name, pair in pairs.pop("trainaug").items() if name not in pairs["train"]}
    if not pairs["sbd"]:  # TFDS refuses empty splits.
      raise DataError(
        f"{voc.list_file(root, 'trainaug')} names no image beyond train. Run python -m segjax.prepare voc."
      )
    return {split: self._generate_examples(found) for split, found in pairs.items()}

  def _generate_examples(self, pairs):
    for name, (image_path, mask_path) in pairs.items():
      if mask_path is None:
        label = np.full(images.read_size(image_path), IGNORE_LABEL, np.uint8)
      else:  # As an array: a palette file would be stored as it is, and TensorFlow would read its colours.
        label = voc.to_label(str(mask_path), masks.read_mask(mask_path))
      yield name, dict(id=name, image=str(image_path), label=label[..., None])
