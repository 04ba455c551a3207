"""From the official archives to a tree that can be trained on.

  python -m segjax.prepare voc --archives=DIR --out=DIR            VOC's tar and SBD's tgz, as downloaded
  python -m segjax.prepare voc --devkit=VOCdevkit/VOC2012 --sbd=benchmark_RELEASE/dataset    already unpacked
  python -m segjax.prepare cityscapes --archives=DIR --out=DIR     the zips of cityscapes-dataset.com
  python -m segjax.prepare nuclei --archives=DIR --out=DIR         stage1_train.zip of Kaggle's data-science-bowl-2018,
                                                                   or the folder stage1_train, already unpacked
  python -m segjax.prepare coco --annotations=FILE.json --images=DIR --out=DIR    COCO's JSON, by the rules of coco.py
  python -m segjax.prepare labelme --annotations=DIR --out=DIR     LabelMe's JSON files, by the rules of labelme.py

With --tfds=DIR, VOC or Cityscapes is also stored there as TFDS's ArrayRecord shards. Every file is written under a
temporary name and renamed, and none that is there already is written again: after an interruption, run the same
command. The last two write a split's images and masks at once, at the end.
"""

import functools
import importlib
import io
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import tqdm
from absl import flags
from PIL import Image

from segjax.config import ConfigError
from segjax.files import atomic
from segjax.input_pipeline import DataError, images, masks
from segjax.input_pipeline.sources import cityscapes, datasets, voc
from segjax.input_pipeline.sources.holdout import HoldOut
from segjax.run import commandline
from segjax.tools import coco, labelme, unpacking

_ARCHIVES = commandline.define_path("archives", None, "Folder of the archives as downloaded.")
_OUT = commandline.define_path("out", None, "Folder to unpack to; default: that of the archives.")
_DEVKIT = commandline.define_path("devkit", None, "voc: the folder VOC2012, already unpacked.")
_SBD = commandline.define_path("sbd", None, "voc: SBD's folder `dataset`, already unpacked, or its benchmark.tgz.")
_TFDS = commandline.define_path("tfds", None, "TFDS's data directory, to store the data set there as well.")
_PARTIAL = flags.DEFINE_bool(
  "allow_partial", False, "Accept other numbers of images than the official ones, and say which."
)
_ANNOTATIONS = commandline.define_path("annotations", None, "coco: the JSON file; labelme: the folder of JSON files.")
_IMAGES = commandline.define_path(
  "images", None, "coco, labelme: folder of the images; labelme's default: where they say."
)
_SPLIT = flags.DEFINE_string("split", "", "coco, labelme: the split that they are, e.g. train; default: there is one.")
_CLIP = flags.DEFINE_bool("clip", False, "coco, labelme: cut shapes off at the image's border, which are refused else.")

VOC_TAR, VOC_TEST_TAR, SBD_TGZ = "VOCtrainval_11-May-2012.tar", "VOC2012test.tar", "benchmark.tgz"
CITYSCAPES_ZIPS = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")
SBD_MASKS = "dataset/cls/"  # In SBD's archive.
_LARGEST_MASK = 2**26  # Bytes of one of SBD's .mat files, which have some thousand; it is read into memory.


def prepare_voc(root: pathlib.Path, sbd: pathlib.Path, allow_partial: bool = False) -> None:
  """Adds SBD's labels and the list `trainaug` to a VOC2012 folder: VOC's train and SBD's images, without VOC's val.

  Images that VOC labels keep VOC's mask with its void; the others get SBD's, whose boundaries are drawn without void, as
  an indexed PNG in SegmentationClassAug.

  Args:
    root: VOC2012.
    sbd: SBD's folder `dataset`, or benchmark.tgz.
    allow_partial: whether other numbers of images than the official ones are a note instead of an error.

  Raises:
    DataError: missing or damaged files, wrong counts, or a folder that cannot be written.
  """
  train, val = voc.read_list(root, "train"), voc.read_list(root, "val")
  official = datasets.VOC_COUNTS
  counts = {"VOC train": (len(train), official["train"]), "VOC val": (len(val), official["val"])}
  _check_counts(counts, allow_partial)
  skip = {*train, *val}
  folder = root / voc.AUG_FOLDER
  present = {path.stem for path in folder.glob("*.png")}
  names = []
  with unpacking.writing(folder):
    folder.mkdir(exist_ok=True)
    for name, read in tqdm.tqdm(_sbd_masks(sbd), "SBD masks", unit=" files"):
      names.append(name)
      if name not in skip and name not in present:
        mask = Image.fromarray(_sbd_labels(name, read), mode="P")
        mask.putpalette(datasets.palette(256).reshape(-1).tolist())
        with atomic.whole_file(folder / f"{name}.png") as file:
          mask.save(file, "PNG")
  trainaug = sorted(set(train) | (set(names) - set(val)))
  counts = {"SBD": (len(set(names)), datasets.SBD_COUNT), "trainaug": (len(trainaug), official["trainaug"])}
  _check_counts(counts, allow_partial)
  path = voc.list_file(root, "trainaug")
  with unpacking.writing(path):
    _write_list(path, trainaug)
  voc.find_pairs(root, "trainaug")  # Names every image that SBD labels and VOC's folder lacks.
  print(f"{path}: {len(trainaug)} images, {len(set(trainaug) - set(train))} with SBD's masks")


def _sbd_masks(sbd: pathlib.Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
  """(name, function that opens the .mat file) of all class masks of SBD, from its folder or its archive."""
  if sbd.is_dir():
    paths = sorted((sbd / "cls").glob("*.mat"))
    if not paths:
      raise DataError(f"{sbd / 'cls'} holds no .mat files. Name SBD's folder `dataset`, which has cls, img and inst.")
    for path in paths:
      yield path.stem, lambda path=path: path.open("rb")
    return
  found = False
  with unpacking.open_tar(sbd, "r|gz") as archive:
    for member in unpacking.members_of(sbd, archive):
      if SBD_MASKS in member.name and member.name.endswith(".mat"):
        if member.size > _LARGEST_MASK:
          raise DataError(f"{sbd}: {member.name} claims {member.size:,} bytes, which no mask has. Download it again.")
        found = True
        yield pathlib.PurePosixPath(member.name).stem, functools.partial(archive.extractfile, member)
  if not found:
    raise DataError(f"{sbd} holds no {SBD_MASKS}*.mat, so it is not SBD's benchmark.tgz. Download it again.")


def _sbd_labels(name: str, read: Callable[[], BinaryIO]) -> np.ndarray:
  """GTcls.Segmentation of a .mat file, [H, W] uint8."""
  import scipy.io  # JAX depends on it. Imported here, as training needs none of it.

  try:
    with read() as file:
      label = scipy.io.loadmat(io.BytesIO(file.read()), struct_as_record=False, squeeze_me=True)["GTcls"].Segmentation
  except (OSError, ValueError, KeyError, AttributeError, TypeError, *unpacking.DAMAGE) as error:
    raise DataError(
      f"SBD's cls/{name}.mat: no class mask can be read ({error}). Unpack or download SBD again."
    ) from error
  return voc.to_label(f"SBD's cls/{name}.mat", np.asarray(label))


def unpack_voc(archives: pathlib.Path, out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Unpacks VOC's tar, and the test tar where it is there, below `out`.

  Returns:
    The folder VOC2012, and SBD's archive, which is read without unpacking it.

  Raises:
    DataError: an archive that is missing or damaged, or `out` cannot be written.
  """
  for name, origin in (
    (VOC_TAR, "host.robots.ox.ac.uk/pascal/VOC/voc2012"),
    (SBD_TGZ, "www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"),
  ):
    if not (archives / name).is_file():
      raise DataError(f"{archives / name}: no such file. Download it from {origin}")
  for name in (VOC_TAR, VOC_TEST_TAR):
    if not (archives / name).is_file():
      print(f"{archives / name} is not there: no split `test`, which only submissions need")
      continue
    unpacking.untar(archives / name, out)
  return voc.find_root(str(out)), archives / SBD_TGZ


def unpack_cityscapes(archives: pathlib.Path, out: pathlib.Path) -> None:
  """Unzips the archives of Cityscapes that are there; the images and gtFine must be.

  Raises:
    DataError: an archive that is missing or damaged, or `out` cannot be written.
  """
  for name in CITYSCAPES_ZIPS:
    if not (archives / name).is_file():
      raise DataError(
        f"{archives / name}: no such file. Download it from www.cityscapes-dataset.com (needs an account)."
      )
  for name in (*CITYSCAPES_ZIPS, "leftImg8bit_trainextra.zip", "gtCoarse.zip"):
    if not (archives / name).is_file():
      continue
    unpacking.unzip(archives / name, out)


def check_cityscapes(root: pathlib.Path, allow_partial: bool = False) -> None:
  """Pairs all images with their labels and compares their numbers with the official ones.

  Raises:
    DataError: missing files, or, without `allow_partial`, other numbers.
  """
  counts = {}
  for split in ("train", "val", "test"):
    counts[f"Cityscapes {split}"] = (
      len(cityscapes.find_pairs(root, split, "gtFine")[0]),
      datasets.CITYSCAPES_COUNTS[split],
    )
  _check_counts(counts, allow_partial)
  print(f"{root}: " + ", ".join(f"{name} {count}" for name, (count, _) in counts.items()))


def prepare_nuclei(stage1: pathlib.Path, out: pathlib.Path, allow_partial: bool = False) -> None:
  """From the 2018 Data Science Bowl's folders, one file per nucleus, to one mask per image.

  Writes `out`/images, `out`/masks (0, 255), `out`/instances (16 bits: 1, 2, ... in the order of the nuclei's files;
  where two overlap, the later one), and train.txt and val.txt. A seventh is held out, by a hash of the names: as
  `HoldOut` chooses fold 0 of 7.

  Args:
    stage1: stage1_train, with ID/images/ID.png and ID/masks/*.png.
    allow_partial: whether another number of images than the official one is a note instead of an error.

  Raises:
    DataError: missing or damaged files, another number of images, a nucleus of another size than its image, or `out`
      cannot be written.
  """
  names = sorted(path.name for path in stage1.iterdir() if path.is_dir())
  missing = [f"{name}/images/{name}.png" for name in names if not (stage1 / name / "images" / f"{name}.png").is_file()]
  missing += [f"{name}/masks/*.png" for name in names if not any((stage1 / name / "masks").glob("*.png"))]
  if missing:
    raise DataError(
      f"{stage1} lacks {images.listed(missing)}. Unpack stage1_train.zip again; the other archives have no masks."
    )
  _check_counts({"stage1_train": (len(names), datasets.NUCLEI_COUNT)}, allow_partial)
  with unpacking.writing(out):
    for folder in ("images", "masks", "instances"):
      (out / folder).mkdir(parents=True, exist_ok=True)
    for name in tqdm.tqdm(names, "nuclei", unit=" images"):
      image, mask, instances = (out / folder / f"{name}.png" for folder in ("images", "masks", "instances"))
      if image.is_file() and mask.is_file() and instances.is_file():
        continue
      source = stage1 / name / "images" / f"{name}.png"
      numbers = _nuclei(sorted((stage1 / name / "masks").glob("*.png")), source)
      with atomic.whole_file(image) as file:
        file.write(source.read_bytes())
      for path, values in ((mask, (numbers > 0).astype(np.uint8) * 255), (instances, numbers)):
        with atomic.whole_file(path) as file:
          Image.fromarray(values).save(file, "PNG")
    val = HoldOut(folds=7).choose(names)
    for split in ("train", "val"):
      _write_list(out / f"{split}.txt", [name for name in names if (name in val) == (split == "val")])
  print(f"{out}: {len(names)} images, {len(val)} of them in val.txt")


def _nuclei(paths: list[pathlib.Path], image: pathlib.Path) -> np.ndarray:
  """[H, W] uint16, 0 or the number of the nucleus, from one mask file each."""
  numbers = np.zeros(images.read_size(image), np.uint16)
  for number, path in enumerate(paths, start=1):
    nucleus = masks.read_mask(path)
    if nucleus.shape[:2] != numbers.shape:
      raise DataError(masks.size_problem(image, numbers.shape, path, nucleus.shape))
    numbers[(nucleus if nucleus.ndim == 2 else nucleus.any(-1)) > 0] = number
  return numbers


def _check_counts(counts: dict[str, tuple[int, int]], allow_partial: bool) -> None:
  wrong = [
    f"{name} has {count} images, not {official}" for name, (count, official) in counts.items() if count != official
  ]
  if not wrong:
    return
  if not allow_partial:
    raise DataError(
      "Not the official data set: " + "; ".join(wrong) + ". Unpack or download it again; or pass --allow_partial, but"
      " scores will not compare with published ones."
    )
  print("note (--allow_partial): " + "; ".join(wrong))


def _write_list(path: pathlib.Path, names: list[str]) -> None:
  text = "".join(name + "\n" for name in names)
  if not path.is_file() or path.read_bytes() != text.encode():
    atomic.write_text(path, text)


def store_voc(root: pathlib.Path, data_dir: str) -> None:
  """Stores a prepared VOC2012 folder as the TFDS data set `voc_segmentation` under `data_dir`."""
  builder = _tfds_module("segjax.input_pipeline.sources.voc_segmentation").VocSegmentation(
    data_dir=data_dir, file_format="array_record"
  )
  _download_and_prepare(builder, root)


def store_cityscapes(archives: pathlib.Path, data_dir: str) -> None:
  """Stores the zips of Cityscapes as TFDS's `cityscapes/semantic_segmentation` under `data_dir`."""
  tfds = _tfds_module("tensorflow_datasets")
  builder = tfds.builder("cityscapes/semantic_segmentation", data_dir=data_dir, file_format="array_record")
  _download_and_prepare(builder, archives)


def _tfds_module(name: str):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise DataError(f"--tfds needs TFDS ({error}). Install it: pip install tensorflow-datasets.") from error


def _download_and_prepare(builder, manual_dir: pathlib.Path) -> None:
  tfds = _tfds_module("tensorflow_datasets")
  try:
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
  except ImportError as error:
    raise DataError(f"--tfds needs TensorFlow ({error}). Install it: pip install 'segjax[tensorflow]'.") from error
  print(
    f"{builder.data_path}: " + ", ".join(f"{name} {info.num_examples}" for name, info in builder.info.splits.items())
  )


def main(argv: list[str]) -> None:
  """The command line."""
  with commandline.readable_errors():
    names = dict(voc=_main_voc, cityscapes=_main_cityscapes, nuclei=_main_nuclei)
    names |= {name: functools.partial(_main_annotations, name) for name in ("coco", "labelme")}
    if len(argv) != 2 or argv[1] not in names:
      raise ConfigError(f"Name one data set: {' or '.join(names)}.")
    names[argv[1]]()


def _main_voc() -> None:
  if bool(_ARCHIVES.value) == bool(_DEVKIT.value and _SBD.value):
    raise ConfigError("Give --archives=DIR, or --devkit=VOC2012 and --sbd=dataset.")
  if _ARCHIVES.value:
    archives = pathlib.Path(_ARCHIVES.value)
    root, sbd = unpack_voc(archives, pathlib.Path(_OUT.value or archives))
  else:
    root, sbd = voc.find_root(_DEVKIT.value), pathlib.Path(_SBD.value)
  prepare_voc(root, sbd, _PARTIAL.value)
  if _TFDS.value:
    store_voc(root, _TFDS.value)
  print(f"train on it: --config.data.dir={root}")


def _main_cityscapes() -> None:
  if not _ARCHIVES.value:
    raise ConfigError("Give --archives=DIR, the folder of the zips; an unzipped tree needs no preparation.")
  archives = pathlib.Path(_ARCHIVES.value)
  root = pathlib.Path(_OUT.value or archives)
  unpack_cityscapes(archives, root)
  check_cityscapes(root, _PARTIAL.value)
  if _TFDS.value:
    store_cityscapes(archives, _TFDS.value)
  print(f"train on it: --config.data.dir={root}")


def _main_nuclei() -> None:
  if not _ARCHIVES.value or _TFDS.value:
    raise ConfigError("Give --archives=DIR, the folder of stage1_train.zip or stage1_train, and no --tfds.")
  archives = pathlib.Path(_ARCHIVES.value)
  out = pathlib.Path(_OUT.value or archives)
  stage1, archive = archives / "stage1_train", archives / "stage1_train.zip"
  if archive.is_file():
    stage1 = out / "stage1_train"
    unpacking.unzip(archive, stage1)
  elif not stage1.is_dir():
    raise DataError(f"{archive}: no such file. Download it from kaggle.com/c/data-science-bowl-2018/data")
  prepare_nuclei(stage1, out, _PARTIAL.value)
  print(f"train on it: --config=unet_nuclei --config.data.dir={out}")


def _main_annotations(name: str) -> None:
  if not (_ANNOTATIONS.value and _OUT.value and (_IMAGES.value or name == "labelme")):
    raise ConfigError("Give --annotations and --out, and for coco --images.")
  if not re.fullmatch(r"[\w-]*", _SPLIT.value):
    raise ConfigError(f"--split={_SPLIT.value}: a split's name has letters, digits, - and _.")
  annotations, out = pathlib.Path(_ANNOTATIONS.value), pathlib.Path(_OUT.value)
  folder = pathlib.Path(_IMAGES.value) if _IMAGES.value else None
  dict(coco=coco, labelme=labelme)[name].prepare(annotations, folder, out, _SPLIT.value, _CLIP.value)
  fixed = "" if _SPLIT.value else " --config.data.images=images --config.data.masks=masks"
  print(f"train on it: --config=folder --config.data.dir={out}{fixed}")


if __name__ == "__main__":
  commandline.run(main, positional=True, takes_config=False)
