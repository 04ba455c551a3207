"""Reads mutated files of one kind: python -m tests.fuzz_readers KIND COUNT FOLDER, in a process that tests watch.

Its last line is JSON: how many were read, how many refused, what else happened, and by how many MiB memory grew at most.
"""

import collections
import contextlib
import faulthandler
import io
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import time
import traceback
import zlib

import numpy as np
from PIL import Image

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.config import rules as config_rules
from segjax.input_pipeline import sources
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources.folder import FolderSource
from segjax.pretrained import files

SECONDS = 20  # Per input; a hang ends the process with a trace.
EXTREMES = [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 4, b"\x80\0\0\0", b"\0\0\xea\x60"]


def mutate(content: bytes, draw: random.Random) -> bytes:
  """One to four random changes, half of them among the first 96 bytes, where formats have their headers."""
  data = bytearray(content)
  for _ in range(draw.randint(1, 4)):
    if not data:
      break
    at = draw.randrange(min(len(data), 96) if draw.random() < 0.5 else len(data))
    length = draw.choice([1, 2, 4, 16, 64])
    kind = draw.randrange(8)
    if kind == 0:
      data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
      data[at : at + length] = draw.randbytes(length)
    elif kind == 2:
      del data[at:]
    elif kind == 3:
      del data[at : at + length]
    elif kind == 4:
      data[at:at] = data[at : at + length] * draw.choice([1, 2, 50])
    elif kind == 5:
      data[at : at + 4] = draw.choice(EXTREMES)
    elif kind == 6:
      data[at : at + length] = bytes(length)
    else:
      other = draw.randrange(len(data))
      data[at : at + length] = data[other : other + length]
  return bytes(data)


def pictures(format, extension):
  """Mutated images, and mutated masks, through a folder source."""

  def prepare(folder):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
      (folder / name).mkdir()
    image = Image.fromarray(rng.integers(0, 256, (33, 47, 3), dtype=np.uint8))
    mask = Image.fromarray(np.kron(rng.integers(0, 3, (3, 47), dtype=np.uint8), np.ones((11, 1), np.uint8)))
    image.save(folder / f"images/a{extension}", format)
    mask.save(folder / "masks/a.png")
    mask.save(folder / f"masks/sound{extension}", format)
    whole = [(folder / f"images/a{extension}").read_bytes(), (folder / f"masks/sound{extension}").read_bytes()]
    (folder / f"masks/sound{extension}").unlink()
    sound_image, sound_mask = whole[0], (folder / "masks/a.png").read_bytes()

    def read(draw):
      for path in (folder / "masks").iterdir():
        path.unlink()
      if draw.random() < 0.5:
        (folder / f"images/a{extension}").write_bytes(mutate(sound_image, draw))
        (folder / "masks/a.png").write_bytes(sound_mask)
      else:
        (folder / f"images/a{extension}").write_bytes(sound_image)
        (folder / f"masks/a{extension}").write_bytes(mutate(whole[1], draw))
      source = open_folder(folder)
      source.canvas_size  # noqa: B018 - Reads the headers.
      return source[0]

    return read

  return prepare


def open_folder(folder, **options):
  data = config_lib.default_config(data="folder").data
  known = {name: data[name] for name in config_lib.SOURCES["folder"]}
  known |= dict(images="images", masks="masks", classes=("a", "b", "c"), holdout=1e-9) | options
  return FolderSource(split="train", **sources.arguments(FolderSource, known | dict(dir=str(folder))))


def lists(folder):
  """List files, class names and what a run notes about bad examples."""
  for name in ("images", "masks"):
    (folder / name).mkdir()
    for i in range(3):
      Image.new("L" if name == "masks" else "RGB", (4, 4)).save(folder / name / f"{i}.png")
  texts = {
    "train.txt": b"0\n1.png\n2\n",
    "pairs.txt": b"/x/images/0.png /x/masks/0.png\nimages/1.png masks/1.png\n",
    "classes.txt": "a\nb\nc\u00e9\n".encode(),
    "bad_examples_0.jsonl": b'{"step": 3, "row": 1, "name": "a", "error": "x"}\n' * 2,
  }

  def read(draw):
    for name, text in texts.items():
      (folder / name).write_bytes(text)
    name = draw.choice(sorted(texts))
    (folder / name).write_bytes(mutate(texts[name], draw))
    if name.startswith("bad"):
      return BadExamples(folder, most=5)
    source = open_folder(folder, list=name if name in ("train.txt", "pairs.txt") else "train.txt", classes=())
    return [source[i] for i in range(len(source))]

  return read


def configs(folder):
  saved = []
  for model in config_lib.MODELS:
    for source in config_lib.SOURCES:
      config = config_lib.default_config(model=model, data=source)
      config.data.dir = "" if source == "synthetic" else "/data"
      saved.append(config_lib.to_json(config))

  def read(draw):
    text = draw.choice(saved)
    if draw.random() < 0.5:
      text = mutate(text.encode(), draw)
    else:  # Sound JSON, with other values.
      tree = json.loads(text)
      for _ in range(draw.randint(1, 3)):
        part, key = tree, draw.choice(sorted(tree))
        while isinstance(part[key], dict) and part[key] and draw.random() < 0.95:
          part = part[key]
          key = draw.choice(sorted(part))
        values = [None, [], {}, "x", -1, 1e308, 10**400, [[1]], ["a", 2], True, "\ud800", [None] * 3, [1.5, {}]]
        part[key] = draw.choice(values)
      text = json.dumps(tree).encode()
    (folder / "config.json").write_bytes(text)
    config_rules.validate(config_lib.finalize(config_lib.load(folder)))

  return read


ARRAYS = {"a/weights": np.arange(60, dtype=np.float32).reshape(20, 3), "b": np.float32([1.5])}


def weights(extension, write):
  """Files of weights; `write(path)` makes a sound one, in as many files as it likes."""

  def prepare(folder):
    path = folder / f"w{extension}"
    write(path)
    sound = {p: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "checkpoint"}

    def read(draw):
      for p, content in sound.items():
        p.write_bytes(content)
      changed = draw.choice(sorted(sound))
      changed.write_bytes(mutate(sound[changed], draw))
      return files.load_arrays(str(path))

    return read

  return prepare


def _npz(path):
  np.savez(path, **ARRAYS)


def _safetensors(path):
  from safetensors.numpy import save_file

  save_file(ARRAYS, path)


def _torch(path):
  import torch

  torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)


def _tflite(path):
  from tests import tflite_file

  array = np.arange(12, dtype=np.float32).reshape(4, 1, 1, 3)
  constants = {
    "A/weights": (array,),
    "A/m": (array[:, 0, 0, 0],),
    "B/w": (array.astype(np.int8), [1.0] * 4, [0] * 4, 0),
  }
  operators = [
    ("CONV_2D", ["in", "A/weights"], "x", 0),
    ("MUL", ["x", "A/m"], "y", 0),
    ("CONV_2D", ["y", "B/w"], "z", 0),
  ]
  tflite_file.write(path, constants, operators)


def _tensorflow(path):
  import tensorflow as tf

  with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
    variables = {name: tf.compat.v1.get_variable(name, initializer=array) for name, array in ARRAYS.items()}
    session.run(tf.compat.v1.global_variables_initializer())
    if path.suffix == ".pb":
      total = tf.add_n([tf.reduce_sum(v) for v in variables.values()])
      frozen = tf.compat.v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [total.op.name])
      path.write_bytes(frozen.SerializeToString())
    else:
      tf.compat.v1.train.Saver(variables).save(session, str(path))


def checkpoints(folder):
  """Files of our own checkpoints; of every other one the checksums are made to fit, as a forger would."""
  import jax.numpy as jnp

  from segjax import state
  from segjax.run import checkpoint

  params = {"layer": {"kernel": jnp.arange(500.0), "bias": jnp.ones(3)}}
  with checkpoint.Checkpoints(folder / "sound") as written:
    written.save(state.TrainState(jnp.int32(1), params, {}, {"momentum": params}, None, jnp.int32(-1), {}), 0.5)

  def read(draw):
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / "sound", folder / "run")
    step = folder / "run/checkpoints/step_1"
    path = draw.choice(sorted(p for p in step.rglob("*") if p.is_file()))
    path.write_bytes(mutate(path.read_bytes(), draw))
    if draw.random() < 0.5:
      checkpoint._write_checksums(step)
    with checkpoint.Checkpoints(folder / "run", read_only=True) as opened:
      return opened.restore_variables(1)

  return read


def tasks(folder):
  from segjax.run import prediction_info

  sound = prediction_info.PredictionInfo(("a", "b"), np.zeros((2, 3), np.uint8), (24, 32), "refuse")
  sound.save(folder)
  content = (folder / prediction_info.INFO_FILE).read_bytes()

  def read(draw):
    (folder / prediction_info.INFO_FILE).write_bytes(mutate(content, draw))
    return prediction_info.load(folder)

  return read


def rasters(folder):
  """Images of many channels, of every layout in `tests.test_rasters`."""
  from segjax.input_pipeline import rasters
  from segjax.input_pipeline.images import Reading
  from tests.test_rasters import LAYOUTS, pixels_of

  rng, sound = np.random.default_rng(0), []
  for channels, depth, ending, write in LAYOUTS.values():
    path = folder / f"a.{ending}"
    write(path, pixels_of(channels, depth, rng.integers(0, 3, (33, 47), dtype=np.uint8), rng))
    sound.append((path, path.read_bytes(), Reading(channels=channels, depth=depth)))

  def read(draw):
    path, content, reading = draw.choice(sound)
    path.write_bytes(mutate(content, draw))
    found = rasters.read(path, reading)
    if found.ndim != 3 or (found.shape[2], found.dtype) != (reading.channels, reading.depth):
      raise TypeError(f"{found.shape} {found.dtype}")

  return read


def annotations(folder):
  """COCO's and LabelMe's JSON: damaged bytes, or sound JSON with other values."""
  from segjax.tools import coco, labelme
  from tests import test_annotations

  photos = test_annotations.coco_folder(folder, test_annotations.coco_content())[1]
  test_annotations.labelme_folder(folder, test_annotations.labelme_content())

  def read(draw):
    shutil.rmtree(folder / "out", ignore_errors=True)
    of_coco = draw.random() < 0.5
    content = test_annotations.coco_content() if of_coco else test_annotations.labelme_content()
    path = folder / ("instances.json" if of_coco else "in/a.json")
    path.write_bytes(mutate(json.dumps(content).encode(), draw) if draw.random() < 0.3 else replaced(content, draw))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
      if of_coco:
        coco.prepare(path, photos, folder / "out", "train", draw.random() < 0.5)
      else:
        labelme.prepare(path.parent, None, folder / "out", "train", draw.random() < 0.5)

  return read


def replaced(tree, draw: random.Random) -> bytes:
  """JSON of a tree in which one to three values, at any depth, are others."""
  for _ in range(draw.randint(1, 3)):
    part = tree
    while True:
      keys = list(range(len(part)) if isinstance(part, list) else part)
      if not keys:
        break
      key = draw.choice(keys)
      if isinstance(part[key], dict | list) and part[key] and draw.random() < 0.9:
        part = part[key]
        continue
      part[key] = draw.choice(
        [None, [], {}, "x", -1, 0, 7, 1e308, 10**400, [[1]], ["a", 2], True, "\ud800", 1.5, {"x": []}]
      )
      break
  return json.dumps(tree).encode()


KINDS = {
  "jpeg": pictures("JPEG", ".jpg"),
  "png": pictures("PNG", ".png"),
  "gif": pictures("GIF", ".gif"),
  "tiff": pictures("TIFF", ".tif"),
  "lists": lists,
  "config": configs,
  "task": tasks,
  "npz": weights(".npz", _npz),
  "safetensors": weights(".safetensors", _safetensors),
  "pth": weights(".pth", _torch),
  "tf_checkpoint": weights("", _tensorflow),
  "frozen_graph": weights(".pb", _tensorflow),
  "checkpoint": checkpoints,
  "tflite": weights(".tflite", _tflite),
  "rasters": rasters,
  "annotations": annotations,
}


def main(kind: str, count: int, folder: pathlib.Path) -> None:
  read, faults, outcomes, slowest = KINDS[kind](folder), [], collections.Counter(), 0.0
  seed = zlib.crc32(kind.encode())
  for warm_up in range(3):  # Imports and caches are no growth.
    try:
      read(random.Random(f"warm up {warm_up}"))
    except (DataError, ConfigError):
      pass
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  if kind in ("jpeg", "png", "gif", "tiff", "rasters"):
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
  for n in range(count):
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    begin = time.monotonic()
    print(f"{kind} {n}", flush=True)  # So that a crash tells its input.
    try:
      read(random.Random(seed + n))
      outcomes["read"] += 1
    except (DataError, ConfigError) as error:
      outcomes["refused"] += 1
      if not str(error).strip():
        faults.append(f"{n}: no message")
    except Exception as error:
      faults.append(f"{n}: {type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}")
    slowest = max(slowest, time.monotonic() - begin)
  faulthandler.cancel_dump_traceback_later()
  growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
  print(json.dumps(dict(outcomes, faults=faults, growth_mib=round(growth), slowest_s=round(slowest, 2))), flush=True)
  os._exit(0)  # Not what libraries do at their end.


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
