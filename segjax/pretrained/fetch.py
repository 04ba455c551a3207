"""Weights from elsewhere as local files: names of the registry, https:// addresses, hf://OWNER/REPOSITORY/FILE.

Each file is downloaded once into the user's cache (files/user_cache.py, "weights"; the Hub's own for hf://), goes on where a
transfer was cut, and is used without a network from then on.
"""

import hashlib
import os
import pathlib
import re

from segjax.config import ConfigError, suggest
from segjax.files import user_cache
from segjax.pretrained.registry import REGISTRY

_INSTALL = "pip install 'segjax[hub]'"


def local_file(path: str, scheme: str) -> tuple[str, str]:
  """What `init.path` and `init.scheme` name, as a path of this machine and a scheme; downloaded where it is not.

  Args:
    path: a file or folder, which stays as it is; a name of `REGISTRY`; https://..., with "#sha256=HEX" behind it, where its
      content is to be checked; or hf://OWNER/REPOSITORY/FILE, with "@REVISION" behind the repository, where it is not main.

  Raises:
    ConfigError: another scheme than the registry's, no such name, no network, or other content; with the remedy.
  """
  if os.path.exists(os.path.expanduser(path)):
    return path, scheme
  if path.startswith("hf://"):
    return _from_hub(path), scheme
  if path.startswith(("https://", "http://")):
    url, _, checksum = path.partition("#")
    if checksum and not re.fullmatch(r"sha256=[0-9a-f]{8,64}", checksum):
      raise ConfigError(f"init.path = {path}: what is behind # must be sha256= and 8 to 64 hexadecimal digits.")
    return str(_download(url, checksum.removeprefix("sha256="), path)), scheme
  if path in REGISTRY:
    entry = REGISTRY[path]
    if scheme not in ("", entry.scheme):
      raise ConfigError(f"init.scheme = {scheme}: {path} has the names of {entry.scheme}. Leave the scheme empty.")
    return str(_download(entry.url, entry.sha256, path)), entry.scheme
  if path.partition("/")[0] in {name.partition("/")[0] for name in REGISTRY}:
    raise ConfigError(
      f"init.path = {path}: no such file, nor a name of the registry.{suggest(path, REGISTRY)} Known: {', '.join(REGISTRY)}."
    )
  return path, scheme


def _download(url: str, sha256: str, path: str) -> pathlib.Path:
  """The cached file of an address, checked by the first digits of its checksum."""
  hub = _library(path)
  import filelock  # Of huggingface_hub's.

  folder, name = user_cache.folder("weights"), url.rpartition("/")[2].partition("?")[0]
  file = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
  part = folder / f"{file.name}.part"
  with filelock.FileLock(folder / f"{file.name}.lock"):  # The other processes of this machine wait.
    if file.exists() and (not sha256 or _checksum(file).startswith(sha256)):
      return file
    try:
      with open(part, "ab") as stream:
        hub.http_get(url, stream, resume_size=stream.tell(), displayed_filename=name)
    except Exception as error:  # Of the transport, in many classes.
      if "416" in str(error):  # What is there is no beginning of the file.
        part.unlink()
      raise ConfigError(
        f"init.path = {path}: {url} cannot be downloaded ({type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}). Give the"
        f" command again, and it goes on; or fetch the file elsewhere and name it, or put it at {file}."
      ) from error
    found = _checksum(part)
    if not found.startswith(sha256):
      part.unlink()
      raise ConfigError(
        f"init.path = {path}: {url} gave a file of SHA-256 {found}, not {sha256}..., which was removed. Give the command again,"
        " or check the address."
      )
    part.replace(file)
  print(f"{path}: downloaded to {file}, sha256={found}", flush=True)
  return file


def _from_hub(path: str) -> str:
  match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
  if not match:
    raise ConfigError(f"init.path = {path}: write hf://OWNER/REPOSITORY/FILE.")
  repository, revision, name = match.groups()
  hub = _library(path)
  try:
    return hub.hf_hub_download(repository, name, revision=revision)
  except Exception as error:  # The Hub's, and those of its transport.
    raise ConfigError(
      f"init.path = {path}: {type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}. Check the name and the network (hf auth login"
      " for private ones), or fetch the file elsewhere and name it."
    ) from error


def _library(path: str):
  try:
    from huggingface_hub import file_download
  except ImportError as error:
    raise ConfigError(f"init.path = {path}: downloading needs huggingface_hub ({error}). {_INSTALL}") from error
  return file_download


def _checksum(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
