"""Tensors by name from the files that other frameworks write. What a format's own library reads, it reads."""

import pathlib
import re
from collections.abc import Mapping

import numpy as np

from segjax.config import ConfigError
from segjax.pretrained import tflite

FORMATS = ".npz, .safetensors, .pth (or .pt, .bin), .tflite, .pb, or a TensorFlow checkpoint (the name before .index)"


def load_arrays(path: str) -> dict[str, np.ndarray]:
  """{name: array} of a file of weights.

  Args:
    path: `.npz`; `.safetensors` (needs safetensors); `.pth`, `.pt` or `.bin` of PyTorch (needs torch from 2.6 on;
      unpickled with weights_only); `.tflite` (needs ai-edge-litert; see `tflite.read`); a TensorFlow checkpoint, by its
      `.index` file or the name before it, or a frozen graph `.pb` (need TensorFlow).

  Raises:
    ConfigError: no such file, another format, a damaged file, or a library that is not installed; with the remedy.
  """
  file = pathlib.Path(path).expanduser()
  checkpoint = file.with_suffix("") if file.suffix == ".index" else file
  if pathlib.Path(f"{checkpoint}.index").is_file():
    return _read(_tensorflow_checkpoint, checkpoint, "tensorflow")
  if not file.is_file():
    near = sorted(p.name for p in file.parent.glob(f"{file.name}*"))[:5] if file.parent.is_dir() else []
    raise ConfigError(
      f"init.path = {path}: no such file." + (f" There are {', '.join(near)}." if near else "") + " A TensorFlow"
      " checkpoint is named without its .index and .data-... endings."
    )
  readers = {
    ".npz": (_npz, "numpy"),
    ".safetensors": (_safetensors, "safetensors"),
    ".pth": (_torch, "torch"),
    ".pt": (_torch, "torch"),
    ".bin": (_torch, "torch"),
    ".tflite": (tflite.read, "ai-edge-litert"),
    ".pb": (_frozen_graph, "tensorflow"),
  }
  if file.suffix not in readers:
    raise ConfigError(f"init.path = {path}: unknown format. Known: {FORMATS}.")
  return _read(readers[file.suffix][0], file, readers[file.suffix][1])


def _read(reader, path, library):
  try:
    return reader(path)
  except ConfigError:
    raise
  except ImportError as error:
    raise ConfigError(f"init.path = {path}: reading it needs {library} ({error}). pip install {library}") from error
  except Exception as error:  # Each library has its own.
    raise ConfigError(
      f"init.path = {path}: cannot be read as {path.suffix or 'a checkpoint'} ({type(error).__name__}: {error}). Fetch it"
      " again, or check that it holds weights."
    ) from error


def _npz(path):
  with np.load(path, allow_pickle=False) as archive:
    return dict(archive)


def _safetensors(path):
  from safetensors.numpy import load_file

  return load_file(path)


def _torch(path):
  import torch

  if [int(n) for n in re.findall(r"\d+", torch.__version__)[:2]] < [2, 6]:  # CVE-2025-32434, of all before.
    raise ConfigError(
      f"init.path = {path}: torch {torch.__version__} may run code that a file of weights holds, even with weights_only."
      " pip install 'torch>=2.6', or save the weights as .safetensors."
    )
  return _state_dict(path, torch.load(path, map_location="cpu", weights_only=True), torch)


def _state_dict(path, loaded, torch) -> dict[str, np.ndarray]:
  """The tensors of a state_dict, or of the only one in a training checkpoint ("model_state", "state_dict", ...)."""

  def is_state(value):
    return isinstance(value, Mapping) and len(value) > 0 and all(torch.is_tensor(v) for v in value.values())

  if not is_state(loaded):
    found = {k: v for k, v in loaded.items() if is_state(v)} if isinstance(loaded, Mapping) else {}
    if len(found) != 1:
      raise ConfigError(
        f"init.path = {path}: needs one dictionary of tensors, holds {sorted(map(str, found)) or 'none'}. Save the one"
        " you mean: torch.save(model.state_dict(), path)."
      )
    (loaded,) = found.values()
  names = list(loaded)
  wrapped = all(name.startswith("module.") for name in names)  # By DataParallel.
  return {
    name.removeprefix("module.") if wrapped else name: (v.float() if v.is_floating_point() else v).numpy()
    for name, v in loaded.items()
  }


def _tensorflow_checkpoint(path):
  import tensorflow as tf

  reader = tf.train.load_checkpoint(str(path))
  return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def _frozen_graph(path):
  """The constants that were variables: freezing leaves their read operations, "NAME/read" or ".../ReadVariableOp"."""
  import tensorflow as tf

  graph = tf.compat.v1.GraphDef()
  graph.ParseFromString(path.read_bytes())
  constants = {node.name: node for node in graph.node if node.op == "Const"}
  read = {
    node.input[0].split(":")[0]
    for node in graph.node
    if node.op == "Identity" and node.name.endswith(("/read", "ReadVariableOp"))
  }
  return {name: tf.make_ndarray(constants[name].attr["value"].tensor) for name in constants.keys() & read}
