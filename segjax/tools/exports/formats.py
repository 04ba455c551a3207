"""The formats: each writes a file and gives back the function that its own runtime computes from that file."""

import functools
import importlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from segjax import pretrained
from segjax.config import ConfigError
from segjax.pretrained import files, native
from segjax.tools.exports.program import Program

_JAX2ONNX = "jax2onnx chex dm-pix einops equinox jaxtyping toolz wadler-lindig"

# (image [h, w, C]) -> ids [h, w] and probabilities [h, w, K].
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Format(NamedTuple):
  """One of them.

  Attributes:
    file: its name in the folder.
    write: writes a program to a path.
    load: (path, program) -> what the file computes, by the format's own runtime.
    interface: of the file, for people; `{channels}`, `{dtype}`, `{height}`, `{width}`, `{classes}` are filled in.
  """

  file: str
  write: Callable[[Program, pathlib.Path], None]
  load: Callable[[pathlib.Path, Program], Run]
  interface: str


def _write_stablehlo(program: Program, path: pathlib.Path) -> None:
  h, w = program.canvas
  scope = jax.export.symbolic_shape("b, h, w", constraints=(f"h <= {h}", f"w <= {w}"))
  image = jax.ShapeDtypeStruct((*scope, program.pixels.count), program.pixels.dtype)
  exported = jax.export.export(jax.jit(program.of_any_size()), platforms=("cpu", "cuda", "tpu"))(image)
  path.write_bytes(exported.serialize())


def _load_stablehlo(path: pathlib.Path, program: Program) -> Run:
  call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)  # Compiled once for each size.
  return lambda image: tuple(np.asarray(x)[0] for x in call(image[None]))


def _write_safetensors(program: Program, path: pathlib.Path) -> None:
  from safetensors.numpy import save_file

  save_file(
    {name: np.ascontiguousarray(x) for name, x in native.names(jax.device_get(program.variables)).items()}, path
  )


def _load_safetensors(path: pathlib.Path, program: Program) -> Run:
  """Segjax itself reads it again: the others have no network for it."""
  again, _, _ = pretrained.merge_variables(
    jax.device_get(program.variables), native.convert(files.load_arrays(str(path))), (), str(path)
  )
  return functools.partial(program.evaluated, variables=again)


def _write_onnx(program: Program, path: pathlib.Path) -> None:
  # Without its dependencies, as it asks for an older Orbax than ours.
  jax2onnx = library("jax2onnx", f"onnx onnxruntime onnx-ir && pip install --no-deps {_JAX2ONNX}")
  model = jax2onnx.to_onnx(
    program.on_canvas(), _fixed(program, "batch"), input_names=["image", "size"], output_names=["ids", "probabilities"]
  )
  path.write_bytes(model.SerializeToString())


def _load_onnx(path: pathlib.Path, program: Program) -> Run:
  session = library("onnxruntime", "onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])

  def run(image):
    laid, size = program.laid(image)
    return _cut(session.run(None, dict(image=laid, size=size)), image)

  return run


def _write_litert(program: Program, path: pathlib.Path) -> None:
  tf = library("tensorflow", "'segjax[tensorflow]'")
  from jax.experimental import jax2tf

  specs = [tf.TensorSpec(x.shape, x.dtype, name) for x, name in zip(_fixed(program, 1), ("image", "size"))]
  function = jax2tf.convert(program.on_canvas(), native_serialization_platforms=("cpu",))
  module = tf.Module()
  module.predict = tf.function(
    lambda image, size: dict(zip(("ids", "probabilities"), function(image, size))), specs, autograph=False
  )
  with tempfile.TemporaryDirectory() as folder:
    tf.saved_model.save(module, folder, signatures=module.predict)
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def _load_litert(path: pathlib.Path, program: Program) -> Run:
  interpreter = library("ai_edge_litert.interpreter", "'segjax[tflite]'").Interpreter(str(path))
  runner = interpreter.get_signature_runner()

  def run(image):
    laid, size = program.laid(image)
    out = runner(image=laid, size=size)
    return _cut((out["ids"], out["probabilities"]), image)

  return run


def _fixed(program: Program, batch) -> list[jax.ShapeDtypeStruct]:
  """The arguments of `Program.on_canvas`."""
  shape = (batch, *program.canvas, program.pixels.count)
  return [jax.ShapeDtypeStruct(shape, program.pixels.dtype), jax.ShapeDtypeStruct((batch, 2), np.int32)]


def _cut(results, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  h, w = image.shape[:2]
  return tuple(np.asarray(x)[0, :h, :w] for x in results)


def library(name: str, install: str):
  """An optional package; ConfigError where it is missing, with what pip is to install."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ConfigError(f"This needs {name} ({error}): pip install {install}") from error


_ON_CANVAS = (
  "`image` [{batch}, {height}, {width}, {channels}] {dtype}, in whose upper left corner the real image lies, and `size`"
  " [{batch}, 2] int32, its (height, width), to which the results are to be cut."
)
_RESULTS = (
  " Gives `ids` [{batch}, height, width] uint8 and `probabilities` [{batch}, height, width, {classes}] float32."
)
FORMATS = {
  "stablehlo": Format(
    "model.stablehlo",
    _write_stablehlo,
    _load_stablehlo,
    "jax.export, for CPU, CUDA and TPU. Takes `image` [batch, height, width, {channels}] {dtype} of any size up to"
    " {height}x{width}, in any batch." + _RESULTS,
  ),
  "safetensors": Format(
    "model.safetensors",
    _write_safetensors,
    _load_safetensors,
    "The weights alone, by segjax' names: `--config.init.path=model.safetensors --config.init.scheme=segjax`.",
  ),
  "onnx": Format("model.onnx", _write_onnx, _load_onnx, "ONNX. Takes " + _ON_CANVAS + _RESULTS),
  "litert": Format(
    "model.tflite", _write_litert, _load_litert, "LiteRT (TFLite), one image. Takes " + _ON_CANVAS + _RESULTS
  ),
}
