"""What lies in the folders of a data set: the images, and what is not used, with the reason.

check_data names each of these, and a run prints their number when it starts, so that nothing is skipped in silence.
"""

import collections
import dataclasses
import mimetypes
import os
import pathlib
from collections.abc import Iterable, Mapping

from segjax.input_pipeline.images import DataError, printable

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".pgm", ".npy")
_LITTER = ("Thumbs.db", "desktop.ini", "@eaDir", "__MACOSX")  # Of Windows, Synology and macOS; hidden like .DS_Store.


@dataclasses.dataclass(frozen=True)
class Unused:
  """Why an entry of a folder is not used.

  Attributes:
    kind: what it is.
    remedy: a sentence; empty where nothing is wrong.
  """

  kind: str
  remedy: str = ""

  def __str__(self) -> str:
    return f"{self.kind}. {self.remedy}".strip()


HIDDEN = Unused("a hidden entry, which is skipped")
UNLISTED = Unused("in no split")
LINKED = Unused(
  "a linked folder, which is not searched",
  "Put the folder itself in the link's place, or name the one that it leads to.",
)
FOLDER = Unused("a folder where files belong", "Move its files to where the data set has them, or remove it.")
IMAGE_FOLDER = Unused("a folder named like an image", "Put the image in its place, or rename it.")
NO_IMAGE = Unused("a mask without an image", "Add the image under the mask's name, or remove the mask.")
MISNAMED = Unused("a file with another name than the data set's", "Correct the name, or move the file away.")


def search(root: pathlib.Path, levels: int | None = None) -> tuple[list[pathlib.Path], dict[pathlib.Path, Unused]]:
  """The files below `root` that have an image's extension, sorted; and the other entries.

  Opens no file. An entry with an image's extension that is not a regular file (a device, a broken link) counts as an
  image, so that its reader reports it.

  Args:
    levels: how many levels of subfolders are searched, linked ones too. None: all, but no linked ones, which might lead
      back.

  Raises:
    DataError: a folder that may not be read.
  """
  files, others, folders = [], {}, [(root, 0)]
  while folders:
    folder, level = folders.pop()
    try:
      entries = list(os.scandir(folder))
    except OSError as error:
      raise DataError(f"{folder}: cannot be searched ({error.strerror}). Allow reading it, or move it away.") from error
    for entry in entries:
      path = folder / entry.name
      if entry.name.startswith(".") or entry.name in _LITTER:
        others[path] = HIDDEN
      elif entry.is_dir():
        if levels is None and entry.is_symlink():
          others[path] = LINKED
        elif level == levels:
          others[path] = FOLDER
        else:
          folders.append((path, level + 1))
          if path.suffix.lower() in EXTENSIONS:
            others[path] = IMAGE_FOLDER  # Where images in it are used, nothing is wrong.
      elif path.suffix.lower() in EXTENSIONS:
        files.append(path)
      else:
        others[path] = _of_ending(path.suffix.lower())
  return sorted(files), others


def _of_ending(suffix: str) -> Unused:
  kind = f"a {printable(suffix)} file" if suffix else "a file without an ending"
  guess = mimetypes.guess_type(f"a{suffix}")[0]
  if guess and not guess.startswith("image/"):
    return Unused(kind)  # Notes and tables may lie there.
  return Unused(kind, f"segjax reads {', '.join(EXTENSIONS)}: convert it, or move it away.")


def unused(sources: Mapping[str, object]) -> dict[pathlib.Path, Unused]:
  """What lies in the folders of {split: source} and belongs to none of them, sorted."""
  used = (path for source in sources.values() for paths in source.files().values() for path in paths)
  others = {path: why for source in sources.values() for path, why in source.others.items()}
  return without(others, used)


def without(others: Mapping[pathlib.Path, Unused], used: Iterable[pathlib.Path]) -> dict[pathlib.Path, Unused]:
  """`others` without the files `used` and the folders above them, sorted."""
  used = set(used)
  folders = {path.parent for path in used}
  used |= folders.union(*(folder.parents for folder in folders))
  return {path: why for path, why in sorted(others.items()) if path not in used}


def notes(sources: Mapping[str, object], whole: bool = True) -> list[str]:
  """A line on what {split: source} leave out, and one on images that they name twice, where there is any.

  Args:
    whole: whether these are all splits. Off: what another one may use is not counted.
  """
  left_out = [why for why in unused(sources).values() if whole or why not in (UNLISTED, NO_IMAGE)]
  kinds = collections.Counter(why.kind for why in left_out)
  images = [path for source in sources.values() for path in source.files()["image"]]
  twice = len(images) - len(set(images))
  found = []
  if kinds:
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    found.append(f"{kinds.total()} entries of the data folders are not used: {listed}")
  if twice:
    found.append(f"{twice} images are named twice, within a split or in both")
  return [f"{line}. Which: python -m segjax.check_data" for line in found]
