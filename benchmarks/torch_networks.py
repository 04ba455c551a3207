"""U-Net, FCN-8s and DeepLabV3+ in PyTorch, as a PyTorch user would write them: for timing beside segjax, nothing else.

The same layers, parameters and multiply-adds as segjax's defaults, which tests/test_step_speed.py counts. Layer tables are
segjax's own. Images and logits are [B, C, H, W].
"""

import torch
from torch import nn
from torch.nn import functional

from segjax.models import deeplab_v3plus, fcn
from segjax.models.backbones import mobilenet_v2, resnet, strides, vgg, xception


def conv_norm(in_features, features, kernel=1, *, stride=1, rate=1, groups=1, activation=nn.ReLU, momentum=0.1):
  """Convolution without bias, batch norm, activation (None: none)."""
  layers = [
    nn.Conv2d(in_features, features, kernel, stride, rate * (kernel // 2), rate, groups, bias=False),
    nn.BatchNorm2d(features, eps=1e-3, momentum=momentum),
  ]
  return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


class UNet(nn.Module):
  """Padded, with batch norm and transposed convolutions; sizes that 2^depth divides."""

  def __init__(self, num_classes, width=64, depth=4):
    super().__init__()
    features = [width * 2**level for level in range(depth + 1)]

    def double(before, after):
      return nn.Sequential(conv_norm(before, after, 3), conv_norm(after, after, 3))

    self.down = nn.ModuleList(double(b, a) for b, a in zip([3, *features], features))
    self.upconv = nn.ModuleList(nn.ConvTranspose2d(2 * f, f, 2, 2) for f in features[:-1])
    self.up = nn.ModuleList(double(2 * f, f) for f in features[:-1])
    self.logits = nn.Conv2d(width, num_classes, 1)

  def forward(self, x):
    skips = []
    for level, block in enumerate(self.down):
      x = block(x if level == 0 else functional.max_pool2d(x, 2))
      skips.append(x)
    for skip, upconv, block in reversed(list(zip(skips, self.upconv, self.up))):
      x = block(torch.cat([skip, upconv(x)], 1))
    return self.logits(x)


class FCN(nn.Module):
  """FCN-32s, 16s or 8s on VGG-16, scores fused, all upsampling learned."""

  def __init__(self, num_classes, width=64, stride=8):
    super().__init__()
    below, self.stages = 3, nn.ModuleList()
    for count, factor in vgg.STAGES:
      convs = []
      for _ in range(count):
        convs += [nn.Conv2d(below, factor * width, 3, padding=1), nn.ReLU(inplace=True)]
        below = factor * width
      self.stages.append(nn.Sequential(*convs, nn.MaxPool2d(2, ceil_mode=True)))
    wide = 64 * width
    self.classifier = nn.Sequential(
      nn.Conv2d(below, wide, 7, padding=3),
      nn.ReLU(inplace=True),
      nn.Dropout(0.5),
      nn.Conv2d(wide, wide, 1),
      nn.ReLU(inplace=True),
      nn.Dropout(0.5),
      nn.Conv2d(wide, num_classes, 1),
    )
    self.skips = [int(name[-1]) - 1 for name in fcn.SKIPS[stride]]  # pool4, pool3.
    self.scores = nn.ModuleList(nn.Conv2d(vgg.STAGES[n][1] * width, num_classes, 1) for n in self.skips)
    self.upscores = nn.ModuleList(
      nn.ConvTranspose2d(num_classes, num_classes, 2 * s, s, bias=False) for s in (*(2 for _ in self.skips), stride)
    )
    self.stride = stride

  def forward(self, image):
    x, pools = image, []
    for stage in self.stages:
      x = stage(x)
      pools.append(x)
    x = self.classifier(x)
    for n, score, upscore in zip(self.skips, self.scores, self.upscores):
      finer = score(pools[n])
      x = upscore(x)[:, :, 1 : 1 + finer.shape[2], 1 : 1 + finer.shape[3]] + finer
    x, half = self.upscores[-1](x), self.stride // 2
    return x[:, :, half : half + image.shape[2], half : half + image.shape[3]]


class SeparableConv(nn.Module):
  """Depthwise 3x3 and pointwise convolution, a batch norm after each; ReLUs "before" both or "inside", after each."""

  def __init__(self, in_features, features, *, stride=1, rate=1, rectify="inside", momentum=0.1):
    super().__init__()
    inside = nn.ReLU if rectify == "inside" else None
    options = dict(activation=inside, momentum=momentum)
    self.before = rectify == "before"
    self.depthwise = conv_norm(in_features, in_features, 3, stride=stride, rate=rate, groups=in_features, **options)
    self.pointwise = conv_norm(in_features, features, **options)

  def forward(self, x):
    return self.pointwise(self.depthwise(functional.relu(x) if self.before else x))


class XceptionUnit(nn.Module):
  """Three separable convolutions and a shortcut; also gives the second one's result."""

  def __init__(self, in_features, features, *, stride, rate, shortcut, rectify):
    super().__init__()
    self.convs = nn.ModuleList(
      SeparableConv(before, after, stride=stride if n == 2 else 1, rate=rate, rectify=rectify)
      for n, (before, after) in enumerate(zip((in_features, *features), features))
    )
    self.kind = shortcut
    if shortcut == "conv":
      self.shortcut = conv_norm(in_features, features[2], stride=stride, activation=None)

  def forward(self, x):
    skip = self.shortcut(x) if self.kind == "conv" else x
    second = self.convs[1](self.convs[0](x))
    x = self.convs[2](second)
    return x if self.kind == "none" else x + skip, second


class Xception(nn.Module):
  """Aligned Xception; gives its features and those of stride 4 for the decoder."""

  features, low_level_features = 2048, 256

  def __init__(self, depth, output_stride):
    super().__init__()
    self.stem = nn.Sequential(conv_norm(3, 32, 3, stride=2), conv_norm(32, 64, 3))
    table, in_features, units = xception.blocks(depth), 64, []
    placed = strides.strides_to_rates([block[3] for block in table], output_stride // 2, False)
    for (name, count, features, _, shortcut), (stride, rate) in zip(table, placed):
      rectify = "inside" if name == "exit_block2" else "before"
      for _ in range(count):
        options = dict(stride=stride, rate=rate, shortcut=shortcut, rectify=rectify)
        units.append(XceptionUnit(in_features, features, **options))
        in_features = features[-1]
    self.units = nn.ModuleList(units)
    self.tap = [n for n, block in enumerate(table) if block[3] == 2][1]  # Of one unit each up to there.

  def forward(self, x):
    x = self.stem(x)
    for n, unit in enumerate(self.units):
      x, second = unit(x)
      if n == self.tap:
        low_level = second
    return x, low_level


class MobileNetV2(nn.Module):
  """MobileNetV2 without its last convolution."""

  features, low_level_features = 320, 144

  def __init__(self, output_stride):
    super().__init__()
    self.stem = conv_norm(3, 32, 3, stride=2, activation=nn.ReLU6)
    layers, in_features = [], 32
    residuals = mobilenet_v2.RESIDUALS
    placed = strides.strides_to_rates([stride for _, stride in residuals], output_stride // 2, False)
    for n, ((features, _), (stride, rate)) in enumerate(zip(residuals, placed)):
      wide = in_features * (6 if n else 1)
      expand = conv_norm(in_features, wide, activation=nn.ReLU6) if n else nn.Identity()
      depthwise = conv_norm(wide, wide, 3, stride=stride, rate=rate, groups=wide, activation=nn.ReLU6)
      layers.append(nn.ModuleList([expand, depthwise, conv_norm(wide, features, activation=None)]))
      in_features = features
    self.layers = nn.ModuleList(layers)

  def forward(self, x):
    x = self.stem(x)
    for n, (expand, depthwise, project) in enumerate(self.layers):
      inner = depthwise(expand(x))
      if n == 2:  # layer_4/depthwise.
        low_level = inner
      out = project(inner)
      x = x + out if out.shape == x.shape else out
    return x, low_level


class Bottleneck(nn.Module):
  def __init__(self, in_features, features, *, stride, rate):
    super().__init__()
    width = features // 4
    self.convs = nn.Sequential(
      conv_norm(in_features, width),
      conv_norm(width, width, 3, stride=stride, rate=rate),
      conv_norm(width, features, activation=None),
    )
    projects = stride > 1 or in_features != features
    self.shortcut = conv_norm(in_features, features, stride=stride, activation=None) if projects else nn.Identity()

  def forward(self, x):
    return functional.relu(self.convs(x) + self.shortcut(x))


class ResNet(nn.Module):
  """ResNet-50 or 101 without the classifier."""

  features, low_level_features = 2048, 256

  def __init__(self, depth, output_stride):
    super().__init__()
    self.stem = nn.Sequential(conv_norm(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, 1))
    counts = resnet.UNITS[depth]
    blocks = [(block, n) for block, count in enumerate(counts) for n in range(count)]
    placed = strides.strides_to_rates([2 if b and n == 0 else 1 for b, n in blocks], output_stride // 4, False)
    units, in_features = [], 64
    for (block, _), (stride, rate) in zip(blocks, placed):
      units.append(Bottleneck(in_features, 256 * 2**block, stride=stride, rate=rate))
      in_features = 256 * 2**block
    self.low, self.high = nn.Sequential(*units[: counts[0]]), nn.Sequential(*units[counts[0] :])

  def forward(self, x):
    low_level = self.low(self.stem(x))
    return self.high(low_level), low_level


class DeepLabV3Plus(nn.Module):
  """With separable ASPP branches, image pooling and the two-convolution decoder."""

  def __init__(self, num_classes, backbone="xception_65", output_stride=16):
    super().__init__()
    family, _, depth = backbone.partition("_")
    if family == "mobilenet":
      self.backbone = MobileNetV2(output_stride)
    else:
      self.backbone = dict(xception=Xception, resnet=ResNet)[family](int(depth), output_stride)
    features = self.backbone.features
    self.branches = nn.ModuleList(
      [
        conv_norm(features, 256),
        *(SeparableConv(features, 256, rate=r) for r in deeplab_v3plus.DEFAULT_RATES[output_stride]),
      ]
    )
    self.pooling = conv_norm(features, 256)
    self.projection = nn.Sequential(conv_norm(5 * 256, 256), nn.Dropout(0.1))
    self.low_level = conv_norm(self.backbone.low_level_features, 48)
    self.decoder = nn.Sequential(SeparableConv(256 + 48, 256), SeparableConv(256, 256))
    self.logits = nn.Conv2d(256, num_classes, 1)

  def forward(self, image):
    x, low_level = self.backbone(image)
    pooled = self.pooling(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
    x = self.projection(torch.cat([pooled, *(branch(x) for branch in self.branches)], 1))
    low_level = self.low_level(low_level)
    x = functional.interpolate(x, low_level.shape[2:], mode="bilinear", align_corners=True)
    x = self.logits(self.decoder(torch.cat([x, low_level], 1)))
    return functional.interpolate(x, image.shape[2:], mode="bilinear", align_corners=True)


# By segjax's names, and the options of config.model that they follow; the others must have segjax's defaults.
NETWORKS = {
  "unet": (UNet, ("width", "depth")),
  "fcn": (FCN, ("width", "stride")),
  "deeplab_v3plus": (DeepLabV3Plus, ("backbone", "output_stride")),
}
