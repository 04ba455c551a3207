"""Tiny archives in the very layout of the official ones: VOC's tars, SBD's tgz with .mat files, Cityscapes' zips."""

import io
import tarfile
import zipfile

import numpy as np
import scipy.io
from PIL import Image

from segjax.input_pipeline.sources import datasets

TRAIN, VAL, SBD_ONLY, TEST = (
  ("2007_000032", "2007_000039", "2007_000063"),
  ("2007_000033", "2007_000042"),
  ("2008_000002", "2008_000007"),
  ("2008_000006", "2008_000011"),
)
SIZES = ((36, 50), (50, 34), (40, 40))  # (H, W), as if 500 pixels were 50.
CITIES = {"train": ("aachen", "zurich"), "val": ("munster",), "test": ("berlin",)}


def encode(array, format="PNG", palette=False):
  image = Image.fromarray(array, mode="P") if palette else Image.fromarray(array)
  if palette:
    image.putpalette(datasets.palette(256).reshape(-1).tolist())
  buffer = io.BytesIO()
  image.save(buffer, format, **(dict(quality=95) if format == "JPEG" else {}))
  return buffer.getvalue()


def scene(name, num_classes, size, void=255):
  """An image whose brightness follows its label, [H, W, 3] and [H, W] uint8, with a void stripe."""
  rng = np.random.default_rng(list(name.encode()))
  label = np.kron(rng.integers(0, num_classes, (4, 4)), np.ones((-(-size[0] // 4), -(-size[1] // 4)), int))
  label = label[: size[0], : size[1]].astype(np.uint8)
  image = np.stack([label * (255 // num_classes)] * 3, -1) + rng.integers(0, 8, (*size, 3)).astype(np.uint8)
  label[:, 5] = void
  return image, label


def voc_label(name):
  return scene(name, 21, size_of(name))[1]


def sbd_label(name):
  """SBD's mask differs from VOC's and knows no void."""
  return scene("sbd" + name, 21, size_of(name), void=0)[1]


def size_of(name):
  return SIZES[int(name[-1]) % 3]


def make_voc(folder, test=True):
  """VOCtrainval_11-May-2012.tar, VOC2012test.tar and benchmark.tgz."""
  root = "VOCdevkit/VOC2012"
  lists = dict(train=TRAIN, val=VAL, trainval=sorted(TRAIN + VAL))
  files = {f"{root}/ImageSets/Segmentation/{k}.txt": "".join(n + "\n" for n in v).encode() for k, v in lists.items()}
  for name in TRAIN + VAL + SBD_ONLY:
    files[f"{root}/JPEGImages/{name}.jpg"] = encode(scene(name, 21, size_of(name))[0], "JPEG")
  for name in TRAIN + VAL:
    files[f"{root}/SegmentationClass/{name}.png"] = encode(voc_label(name), palette=True)
  _tar(folder / "VOCtrainval_11-May-2012.tar", files, "w")
  if test:
    files = {f"{root}/ImageSets/Segmentation/test.txt": "".join(n + "\n" for n in TEST).encode()}
    files |= {f"{root}/JPEGImages/{n}.jpg": encode(scene(n, 21, size_of(n))[0], "JPEG") for n in TEST}
    _tar(folder / "VOC2012test.tar", files, "w")
  files = {}
  for name in (TRAIN[0], VAL[0], *SBD_ONLY):  # SBD covers parts of VOC's train and val.
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"GTcls": {"Segmentation": sbd_label(name), "Boundaries": np.zeros((20, 1))}})
    files[f"benchmark_RELEASE/dataset/img/{name}.jpg"] = b"not needed"
    files[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = buffer.getvalue()
  _tar(folder / "benchmark.tgz", files, "w:gz")


def cityscapes_names(split):
  return [f"{city}_00000{i}_000019" for city in CITIES[split] for i in range(2)]


def cityscapes_ids(name, size):
  """A mask of label ids with all 34 of them."""
  ids = scene(name, 34, size, void=0)[1]
  ids.reshape(-1)[:34] = np.arange(34)
  return ids


def make_cityscapes(folder, size=(32, 64)):
  """leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip; test labels are the dummies of the official zip."""
  left, fine = {"README": b"readme"}, {"README": b"readme"}
  for split in CITIES:
    for name in cityscapes_names(split):
      ids, place = cityscapes_ids(name, size), f"{split}/{name.split('_')[0]}/{name}"
      left[f"leftImg8bit/{place}_leftImg8bit.png"] = encode(np.stack([ids * 7] * 3, -1))
      labels = np.zeros(size, np.uint8) if split == "test" else ids
      fine[f"gtFine/{place}_gtFine_labelIds.png"] = encode(labels)
      fine[f"gtFine/{place}_gtFine_instanceIds.png"] = encode(labels.astype(np.uint16))
  for name, files in (("leftImg8bit_trainvaltest.zip", left), ("gtFine_trainvaltest.zip", fine)):
    with zipfile.ZipFile(folder / name, "w") as archive:
      for path, content in files.items():
        archive.writestr(path, content)


def _tar(path, files, mode):
  with tarfile.open(path, mode) as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
