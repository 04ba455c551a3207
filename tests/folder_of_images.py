"""Files for tests of what happens to files."""

import numpy as np
from PIL import Image

from segjax.config import default_config


def folder_of_images(config, root):
  """The run of `config`, but on 12 images of training and 4 of validation that are PNG files below `root`."""
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("val", 4)):
    for folder in ("images", "masks"):
      (root / folder / split).mkdir(parents=True)
    for i in range(count):
      pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(root / "images" / split / f"{i:02d}.png")
      label = np.kron(rng.integers(0, 3, (3, 4), dtype=np.uint8), np.ones((8, 8), np.uint8))
      Image.fromarray(label).save(root / "masks" / split / f"{i:02d}.png")
  folder = default_config(data="folder")
  shared = [name for name in folder.data if name in config.data and name != "name"]
  for section in ("model", "augment", "optimizer", "eval", "mesh"):
    folder[section].update(config[section])
  folder.data.update({name: config.data[name] for name in shared})
  names = ("num_steps", "batch_size", "crop_size", "log_every", "eval_every", "checkpoint_every")
  folder.update({name: config[name] for name in names})
  folder.data.dir, folder.data.classes = str(root), ("ground", "cell", "rim")
  folder.data.instances = "components"
  return folder
