"""Small TFLite files of given constants and operators."""

import numpy as np

TYPES = dict(float32="FLOAT32", float16="FLOAT16", int8="INT8", uint8="UINT8", int32="INT32")


def write(path, constants, operators):
  """A TFLite file.

  Args:
    constants: {name: array or (array, scales, zero points, axis)}.
    operators: (kind, names of inputs, name of the output, activation, options); other names are computed.
  """
  import flatbuffers
  from ai_edge_litert import schema_py_generated as schema

  names = list(dict.fromkeys([*constants, *(n for _, inputs, output, *_ in operators for n in (*inputs, output))]))
  model, graph = schema.ModelT(), schema.SubGraphT()
  model.version, model.subgraphs, model.buffers, graph.tensors = 3, [graph], [schema.BufferT()], []
  for name in names:
    tensor, (array, *quantised) = schema.TensorT(), constants.get(name, (np.zeros(1, np.float32),))
    tensor.name, tensor.shape, tensor.type = name, array.shape, getattr(schema.TensorType, TYPES[array.dtype.name])
    if name in constants:
      tensor.buffer, buffer = len(model.buffers), schema.BufferT()
      buffer.data = np.frombuffer(array.tobytes(), np.uint8)
      model.buffers.append(buffer)
    if quantised:
      tensor.quantization = schema.QuantizationParametersT()
      tensor.quantization.scale, tensor.quantization.zeroPoint, tensor.quantization.quantizedDimension = quantised
    graph.tensors.append(tensor)
  kinds = sorted({kind for kind, *_ in operators})
  model.operatorCodes, graph.operators = [], []
  for kind in kinds:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    model.operatorCodes.append(code)
  for kind, inputs, output, activation in operators:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.outputs = kinds.index(kind), [names.index(output)]
    operator.inputs = [names.index(name) for name in inputs]
    options = dict(
      CONV_2D="Conv2DOptions", DEPTHWISE_CONV_2D="DepthwiseConv2DOptions", MUL="MulOptions", ADD="AddOptions"
    )
    if kind in options:
      operator.builtinOptionsType = getattr(schema.BuiltinOptions, options[kind])
      operator.builtinOptions = getattr(schema, f"{options[kind]}T")()
      operator.builtinOptions.fusedActivationFunction = activation
      operator.builtinOptions.depthMultiplier = 1
    graph.operators.append(operator)
  graph.inputs, graph.outputs = [names.index(operators[0][1][0])], [names.index(operators[-1][2])]
  builder = flatbuffers.Builder(1024)
  builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
  path.write_bytes(builder.Output())
  return str(path)
