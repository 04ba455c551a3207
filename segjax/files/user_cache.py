"""The user's own cache folder: what segjax keeps between runs and can make again. Compiled programs are run from it."""

import os
import pathlib

from segjax.config import ConfigError


def folder(name: str) -> pathlib.Path:
  """$XDG_CACHE_HOME/segjax/`name`, or ~/.cache/segjax/`name`: made where missing, and readable by its owner alone (mode 0700).

  Raises:
    ConfigError: it cannot be made; or it belongs to another user, or others can write to it, so that what it holds may be
      theirs.
  """
  given = os.environ.get("XDG_CACHE_HOME")
  remedy = "set XDG_CACHE_HOME to a folder of your own"
  if given and not os.path.isabs(given):
    raise ConfigError(f"XDG_CACHE_HOME = {given!r} is a relative path. Give an absolute one, or unset it.")
  try:
    home = pathlib.Path(given) if given else pathlib.Path.home() / ".cache"
    home.mkdir(parents=True, exist_ok=True)
    for path in (home / "segjax", home / "segjax" / name):
      path.mkdir(mode=0o700, exist_ok=True)
      status = path.stat()
      # The owner of a link too: it decides what the link leads to.
      if owners := {status.st_uid, path.lstat().st_uid} - {os.geteuid()}:
        raise ConfigError(
          f"{path} belongs to another user (uid {owners.pop()}), who may have put anything there. Remove it, or {remedy}."
        )
      if status.st_mode & 0o022:
        raise ConfigError(
          f"{path} can be written by other users, who may have put anything there. Remove it, or {remedy}."
        )
      if status.st_mode & 0o077:
        path.chmod(0o700)
  except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home.
    raise ConfigError(f"The cache folder cannot be made ({error}). Free the space, or {remedy}.") from error
  return path
