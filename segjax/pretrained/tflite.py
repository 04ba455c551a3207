"""TFLite: the weights of each convolution of a graph, under the name that TensorFlow's variables have."""

import math
import pathlib
import re

import numpy as np

CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# What stands in a name behind the layer's scope and before its last part: of variables, of fused and of fake-quantised ones.
INSIDE = re.compile(r"BatchNorm\w*|Conv2D\w*|(depthwise_)?weights\w*")


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """{name: float array} of every convolution and fully connected layer; the operators tell what belongs together.

  "SCOPE/weights" is [kh, kw, in, out], "SCOPE/depthwise_weights" [kh, kw, in, multiplier], "SCOPE/biases" [out]. Quantised
  tensors are dequantised. A batch norm that was left behind a convolution, a multiplication and an addition by constants,
  is folded into it, so that the bias is all that remains of any. Other constants of several numbers keep their names, so
  that a scheme refuses them; integers that are no quantised numbers are shapes and axes, and left out.

  Raises:
    ValueError: no TFLite file, weights that are no constants or of a type that has no numpy equivalent, two layers of one
      name, or one of none.
  """
  from ai_edge_litert import schema_py_generated as schema

  content = path.read_bytes()
  if content[4:8] != b"TFL3":
    raise ValueError("it does not begin as a TFLite file does")
  return _Graph(schema.ModelT.InitFromPackedBuf(content, 0), schema).layers()


class _Graph:
  """The first subgraph of a model, which is the network.

  Args:
    model, schema: of ai_edge_litert's flatbuffers.
  """

  def __init__(self, model, schema):
    kinds = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    self.model, self.graph = model, model.subgraphs[0]
    self.dtypes = {
      getattr(schema.TensorType, name): np.dtype(name.lower())
      for name in ("FLOAT16", "FLOAT32", "FLOAT64", "INT8", "UINT8", "INT16", "INT32", "INT64")
    }
    # Files before schema 3a have the code in the older field alone.
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    self.operators = [(kinds[codes[operator.opcodeIndex]], operator) for operator in self.graph.operators]
    self.makers = {output: entry for entry in self.operators for output in entry[1].outputs}
    self.used = set()  # Constants.

  def layers(self) -> dict[str, np.ndarray]:
    """See `read`."""
    found = {}
    for kind, operator in self.operators:
      if kind in CONVOLUTIONS:
        scope, arrays = self._layer(kind, operator)
        for name, array in arrays.items():
          name = f"{scope}/{name}"
          if name in found and not np.array_equal(found[name], array):
            raise ValueError(f"two layers are called {scope}")
          found[name] = array
    for index, tensor in enumerate(self.graph.tensors):
      if index not in self.used and self._holds_numbers(index) and (array := self._constant(index)).size > 1:
        found[tensor.name.decode()] = array
    return found

  def _layer(self, kind: str, operator) -> tuple[str, dict[str, np.ndarray]]:
    """A convolution's scope, and its arrays by leaf; see `read`."""
    indices = [*operator.inputs[1:2], *operator.outputs, *operator.inputs[2:3]]
    scope = self._scope(indices)
    weights = self._constant(operator.inputs[1])
    if weights is None:
      raise ValueError(f"the weights of {scope} are not constant")
    leaf, outputs = "weights", weights.shape[:1]
    if kind == "CONV_2D":
      weights = weights.transpose(1, 2, 3, 0)
    elif kind == "FULLY_CONNECTED":
      weights = weights.T[None, None]
    else:
      leaf, weights = (
        "depthwise_weights",
        weights[0].reshape(*weights.shape[1:3], -1, operator.builtinOptions.depthMultiplier),
      )
      outputs = weights.shape[2:]
    bias = self._constant(operator.inputs[2]) if len(operator.inputs) > 2 and operator.inputs[2] >= 0 else 0
    scale, shift = self._behind(operator, channels=math.prod(outputs))
    weights = weights * scale.reshape(outputs)
    return scope, {leaf: weights.astype(np.float32), "biases": (bias * scale + shift).astype(np.float32)}

  def _scope(self, indices: list[int]) -> str:
    """The layer's: of its weights, its output and its bias, the first whose name has one.

    The bias comes last because converters share equal ones among layers, under the name of any. What a converter has fused
    has its names joined by semicolons.
    """
    names = [self.graph.tensors[index].name.decode() for index in indices if index >= 0]
    for name in ";".join(names).split(";"):
      *scopes, _ = name.split("/")
      while scopes and INSIDE.fullmatch(scopes[-1]):
        scopes.pop()
      if scopes:  # An atrous depthwise convolution has operators of its own below "SCOPE/depthwise".
        return re.sub(r"(depthwise)/depthwise$", r"\1", "/".join(scopes))
    raise ValueError(f"no name tells the layer of {' and '.join(names)}")

  def _behind(self, operator, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """scale, shift [channels]: what multiplications and additions by constants make of a convolution's output y.

    That is scale * y + shift, before any activation.
    """
    scale, shift = np.ones(channels), np.zeros(channels)
    for _ in self.operators:  # At most: a damaged file may have a cycle.
      if getattr(operator.builtinOptions, "fusedActivationFunction", 0):
        break
      (output,) = operator.outputs
      followers = [entry for entry in self.operators if output in entry[1].inputs]
      if len(followers) != 1 or output in self.graph.outputs:
        break
      ((kind, operator),) = followers
      if kind == "BATCH_TO_SPACE_ND":  # The end of an atrous convolution.
        continue
      others = [index for index in operator.inputs if index != output]
      constant = self._constant(others[0], use=False) if kind in ("MUL", "ADD") and len(others) == 1 else None
      if constant is None or (constant.size, *constant.shape[-1:]) not in ((1,), (1, 1), (channels, channels)):
        break
      self._constant(others[0])
      constant = constant.reshape(-1)
      scale, shift = (scale * constant, shift * constant) if kind == "MUL" else (scale, shift + constant)
    return scale, shift

  def _holds_numbers(self, index: int) -> bool:
    """Whether a tensor is a constant of real numbers: floating point, or quantised."""
    tensor = self.graph.tensors[index]
    if self.model.buffers[tensor.buffer].data is None or tensor.type not in self.dtypes:
      return False
    return _is_quantised(tensor) or self.dtypes[tensor.type].kind == "f"

  def _constant(self, index: int, use: bool = True) -> np.ndarray | None:
    """The values of a tensor, float64; None where it is computed from something else than a constant.

    Args:
      use: whether they are taken from here, so that nothing else needs to.
    """
    tensor = self.graph.tensors[index]
    data = self.model.buffers[tensor.buffer].data
    if data is None:
      kind, maker = self.makers.get(index, ("", None))
      return self._constant(maker.inputs[0], use) if kind == "DEQUANTIZE" else None
    if tensor.type not in self.dtypes:
      raise ValueError(f"{tensor.name.decode()} has a type (number {tensor.type}) that cannot be read")
    shape = () if tensor.shape is None else tensor.shape
    array = data.view(self.dtypes[tensor.type]).reshape(shape).astype(np.float64)
    self.used |= {index} if use else set()
    if not _is_quantised(tensor):
      return array
    quantization, shape = tensor.quantization, [1] * array.ndim
    if len(quantization.scale) > 1:
      shape[quantization.quantizedDimension] = -1  # One scale for each channel.
    zero = 0 if quantization.zeroPoint is None else np.reshape(quantization.zeroPoint, shape)
    return (array - zero) * np.reshape(np.float64(quantization.scale), shape)


def _is_quantised(tensor) -> bool:
  """Whether its integers stand for numbers, by a scale and a zero point."""
  quantization = tensor.quantization
  return quantization is not None and quantization.scale is not None and len(quantization.scale) > 0
