"""Which images are for validation where all share a folder."""

import dataclasses
import re
from collections.abc import Sequence

from segjax.input_pipeline import images
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.order import mix


@dataclasses.dataclass(frozen=True)
class HoldOut:
  """How images are held out, by a hash of each name, so that a new image moves no other one to the other side.

  Attributes:
    holdout: share of images held out for validation where neither folders nor lists name a split; from 1 on, their number.
    folds: instead of `holdout`: so many equal parts, of which part `fold` is held out. 0: none.
    fold: see folds.
    split_seed: another number holds out other images.
  """

  holdout: float = 0.1
  folds: int = 0
  fold: int = 0
  split_seed: int = 0

  def choose(self, names: Sequence[str], group: str = "") -> set[str]:
    """The names that are "val"; the others are "train".

    Args:
      group: regular expression. Names in which it finds the same text are one unit, which is held out whole.

    Raises:
      DataError: a group that is no regular expression or is not in every name, or nothing left to train on.
    """
    try:
      found = {name: re.search(group, name) if group else None for name in names}
    except re.error as error:
      raise DataError(f"data.group = {group!r}: no regular expression ({error}).") from error
    if group and (without := [name for name in names if not found[name]]):
      raise DataError(
        f"data.group = {group!r} finds nothing in {len(without)} of {len(names)} names: {images.listed(without)}. Correct"
        " it, or rename them."
      )
    unit_of = {name: found[name].group() if group else name for name in names}
    hashes = {
      unit: int(mix(*((self.split_seed,) if self.split_seed else ()), *unit.encode(errors="surrogateescape")))
      for unit in unit_of.values()
    }
    ranked = sorted(hashes, key=hashes.__getitem__)
    if self.folds:
      held = set(ranked[self.fold :: self.folds])
    elif self.holdout < 1:
      held = {unit for unit in ranked if hashes[unit] / 2**64 < self.holdout}
    else:
      held = set(ranked[: int(self.holdout)])
    if names and len(held) == len(hashes):
      what = f"data.folds = {self.folds}" if self.folds else f"data.holdout = {self.holdout:g}"
      raise DataError(
        f"{what} holds out all of the {len(hashes)} {'groups' if group else 'images'}, so there is none left to train on."
        " Hold out fewer, or add images."
      )
    return {name for name in names if unit_of[name] in held}
