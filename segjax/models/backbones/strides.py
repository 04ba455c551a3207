"""The output stride: which layers of a backbone keep their stride, and at which rate the others run."""


def strides_to_rates(strides: list[int], output_stride: int, dilate_first: bool = False) -> list[tuple[int, int]]:
  """(stride, rate) of each layer, so that the product of strides stays at `output_stride`.

  Before the product is reached a layer keeps its stride and has rate 1. After that it has stride 1 and the rate so
  far; only the layers behind it run at the rate multiplied by the stride it gave up. So a layer that gives up its
  stride still samples as densely as before (official DeepLab, core/xception.py; PyTorch's ResNets do the same).

  Args:
    strides: as in the network for classification, in order.
    output_stride: of this list alone: without the strides of layers before it.
    dilate_first: the layer that gives up its stride already runs at the multiplied rate.
  """
  result, stride_so_far, rate = [], 1, 1
  for stride in strides:
    if stride_so_far == output_stride:
      result.append((1, rate * stride if dilate_first else rate))
      rate *= stride
    else:
      result.append((stride, 1))
      stride_so_far *= stride
  return result
