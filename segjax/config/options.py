"""Every option, once: default and meaning. Its type is its default's.

An option that a constructor or function takes is defined there alone, in its signature and docstring; the others are
defined here. This is the lowest layer, and data workers and --help must not wait for JAX: so signatures are read from the
text of the files (`ast`), without an import.
"""

import ast
import functools
import inspect
import pathlib
import re
from typing import NamedTuple

_PACKAGE = pathlib.Path(__file__).parents[1]


class Option(NamedTuple):
  """An option's default, and what it means, with unit, range or choices."""

  default: object
  meaning: str


RUN = dict(
  seed=Option(0, "initial weights, order of examples, augmentation and dropout."),
  num_steps=Option(1000, "updates in all."),
  batch_size=Option(
    8, "images per update over all devices and hosts; batch norm sees all of them (but see accumulate_steps)."
  ),
  accumulate_steps=Option(
    1,
    "parts of an update, computed one after another, for batches that do not fit into memory. Without batch norm (or with"
    " frozen ones) and dropout the update is that of the whole batch under cross_entropy, bce and focal; batch norm sees the"
    " part, and hard_fraction, dice, jaccard and lovasz rank and compare its pixels only. Slow on CPU, whose fast"
    " convolutions XLA does not use in loops.",
  ),
  crop_size=Option((256, 256), "(H, W) of a training crop, pixels."),
  dtype=Option("float32", "of the computation. Parameters, statistics and loss: float32 (or float64 with float64)."),
  matmul_precision=Option(
    "default",
    'of matmuls and convolutions of float32: "default" is the platform\'s: TF32 (10 bits of mantissa) on NVIDIA GPUs, bfloat16'
    ' (7 bits) on TPU, float32 on CPU, all with sums in float32; "highest": float32 (23 bits) on all of them, for comparisons'
    " with another implementation. Products of bfloat16 are exact in float32.",
  ),
  log_every=Option(20, "steps between progress lines."),
  eval_every=Option(500, "steps between evaluations; each also saves a checkpoint. The last step always does."),
  checkpoint_every=Option(500, "steps between checkpoints."),
  keep_checkpoints=Option(
    2, "how many of the last ones are kept, beside the best by policy.metric. 1: the last, to resume from."
  ),
  head=Option("softmax", 'over all classes, or "sigmoid": one logit, for two classes, the second being foreground.'),
  shard_state=Option(
    False,
    "for memory: parameters, averages and optimiser state each on one of the devices along mesh.data, gathered for each step"
    " (ZeRO, arXiv 1910.02054), instead of all on all of them.",
  ),
  # XLA:CPU drops the barriers that put the second computation off until it is needed, and saves nothing.
  remat=Option(
    False,
    "for memory: the backward pass computes the activations inside blocks again, a third more multiply-adds. For GPU and TPU.",
  ),
  kernels=Option(
    "auto",
    '"auto": kernels that are fast on the mesh\'s platform (segjax/kernels); "plain": textbook code alone.'
    " Results differ by rounding.",
  ),
  trackers=Option(
    ("tensorboard",),
    'where curves and pictures go beside metrics.jsonl and overlays/: any of "tensorboard" (event files in the workdir), "wandb",'
    ' "mlflow" (each an extra); what they read of the environment: docs/use.md. One that fails is left, and never stops the run.',
  ),
  profile_steps=Option(
    (0, 0),
    "steps (first, last) to trace, into WORKDIR/profile, for TensorBoard or ui.perfetto.dev; (0, 0): none. Not the first one,"
    " which compiles.",
  ),
)
MESH = dict(
  data=Option(-1, "devices that split the batch. -1: all that remain."),
  space=Option(1, "devices that split the image height."),
)
DATA = dict(
  dir=Option("", "root folder of the data set."),
  train_split=Option("train", "split that trains."),
  eval_split=Option("val", "split that is scored."),
  loader=Option(
    "tf_data",
    '"tf_data", or "grain", which never imports TensorFlow, and is used where TensorFlow is not installed. Batches are the same,'
    " bit for bit.",
  ),
  workers=Option(0, "threads that read and decode, per host. 0: one per core."),
  cache=Option(
    "none",
    'keeps decoded examples, so that each is decoded once: "memory", for the run; "disk", in ~/.cache/segjax/examples (below'
    ' $XDG_CACHE_HOME where that is set), for all runs, 4 bytes a pixel; "device", the training split on its canvas, 4 bytes a'
    " pixel, in the memory of all devices together, and the evaluation's examples in the host's (a file that changes during"
    " the run is not read again). Batches stay the same, bit for bit.",
  ),
  max_bad_examples=Option(
    0,
    "training examples that may become unreadable during a run; each is all void in its step, and counted. One more stops the"
    " run. Evaluation always stops at the first.",
  ),
  sampling=Option(
    "uniform",
    'which examples train: "uniform", each once an epoch; "class_balanced", a class is drawn, the rarer the more often, and one'
    " of the examples that hold it (DAFormer, arXiv 2111.14887, section 3.3). Then all labels are read once before training.",
  ),
  sampling_temperature=Option(
    0.01,
    "T of class_balanced: a class of share f of the labelled pixels is drawn in proportion to exp((1 - f) / T). Large: all alike.",
  ),
  exif=Option(
    "refuse",
    "images that EXIF wants turned, where the mask's size does not show whether it was drawn on the turned image, and in"
    ' predict, where the run\'s masks did not: "refuse", "apply" (turn them, as viewers do), "ignore" (pixels as stored).',
  ),
  canvas_size=Option(
    (0, 0),
    "(H, W) that images are padded to on the host. (0, 0): the largest of the split; but where that would be mostly padding,"
    " training cuts larger ones to what their crops can show (input_pipeline.canvas.cut_window: crops are drawn from the"
    " same distribution), and evaluation puts them whole on canvases of their own.",
  ),
)
LOSS = dict(
  class_weights=Option(
    (),
    '(): equal. ("median_frequency",), ("inverse_log",): from the training labels. Or one number per class. Of pixels in'
    " cross_entropy, bce and focal, of classes in dice, jaccard and lovasz.",
  ),
)
OPTIMIZER = dict(
  name=Option("sgd", '"sgd" or "adamw".'),
  schedule=Option("poly", '"poly", "cosine", "step" or "constant".'),
  freeze=Option(
    (),
    'patterns of parameters that are not trained, e.g. ("backbone",): a path ("logits/bias") or the first parts of one; * for'
    ' any characters ("*/bias"), ? for one; "!logits" for all but logits. They cost no gradient and no optimiser state, do'
    " not decay, and do not count in clip_norm. Batch norms whose scale and bias are frozen use their running statistics in"
    " training too, and keep them; dropout acts as ever.",
  ),
  ema_decay=Option(
    0.0, "moving average of parameters and statistics that are not frozen, used for evaluation. 0: none."
  ),
)
POLICY = dict(
  metric=Option(
    "mean_iou", 'validation score that decides which checkpoint is best, and all below; "iou/NAME" for a class.'
  ),
  early_stop=Option(0, "evaluations without gain after which training ends. 0: never ends early."),
)
EVAL = dict(
  batch_size=Option(8, "images per evaluation step over all devices; no influence on the score."),
  scales=Option((1.0,), "sizes at which the image is shown; probabilities are averaged at the label's size."),
  flip=Option(False, "also the mirror image, averaged."),
  window=Option((0, 0), "(H, W) of sliding windows at each scale, pixels. (0, 0): the whole image at once."),
  window_stride=Option(
    (0, 0), "(H, W) from one window to the next; less than `window` to overlap. Not of unpadded tiles."
  ),
  threshold=Option(0.5, "of the foreground's probability under the sigmoid head; each evaluation names the best one."),
  outside=Option("void", 'what the canvas shows beyond an image: "void" (the mean pixel), or "mirror".'),
  checkpoint=Option("best", 'which one is scored: "best" by policy.metric, or "last".'),
  num_overlays=Option(
    4, "pictures of image, label and prediction per evaluation, each of the first, the worst and the median."
  ),
)
INIT = dict(
  path=Option(
    "",
    "weights that a new run starts from. Empty: random. The workdir of another run; or a file: .npz, .safetensors, .pth,"
    " .tflite, a TensorFlow checkpoint (the name before .index) or frozen graph (.pb). Or what is downloaded once: a name of"
    " the registry (torchvision/resnet50, ...; docs/weights.md), https://..., hf://OWNER/REPOSITORY/FILE.",
  ),
  scheme=Option(
    "",
    "whose names a file's tensors have: tf_deeplab, ... (segjax/pretrained). Empty for a workdir and a name of the registry.",
  ),
  exclude=Option(
    (),
    'patterns, as of optimizer.freeze, of parameters and statistics left random, e.g. ("logits",) for other classes.',
  ),
  unfold=Option(
    False,
    "before training, one pass over the training images measures what each batch norm is given, and makes that its running"
    " statistics, without changing what the network computes; data.max_bad_examples holds for it too. For weights whose batch"
    " norm was folded into the convolutions, as in TFLite files: by a batch's statistics they would compute something else.",
  ),
)
# Arguments with a default that are no options, or those of all data sources, above.
_NONE = ("dtype", "dir", "exif", "details", "channels")


def sections() -> dict[str, dict[str, Option]]:
  """The sections of a config but `model` and `data`, "" being its top."""
  return {
    "": RUN,
    "mesh": MESH,
    "augment": signature("augment.options.Augmentation"),
    "loss": signature("losses.make_loss") | LOSS,
    "optimizer": OPTIMIZER | signature("optimizer.make_schedule") | signature("optimizer.make_optimizer"),
    "policy": POLICY | signature("optimizer.update_policy"),
    "eval": EVAL,
    "init": INIT,
  }


def networks() -> dict[str, str]:
  """{name: "models.module.Class"} of the `base.Network` in each file of models/, whose name is the model's."""
  return {
    path.stem: f"models.{path.stem}.{node.name}"
    for path in sorted((_PACKAGE / "models").glob("*.py"))
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef) and "base.Network" in map(ast.unparse, node.bases)
  }


def loss_terms() -> tuple[str, ...]:
  """What `loss.terms` may name, `losses.TERMS`."""
  return ast.literal_eval(_assigned(_parse("losses"), "TERMS"))


def trackers() -> tuple[str, ...]:
  """What `trackers` may name, `run.trackers.TRACKERS`."""
  return tuple(_table("run.trackers", "TRACKERS"))


def models() -> dict[str, dict[str, Option]]:
  """The options of each model; "details.NAME" are those of its section `details`."""
  found = {name: signature(origin) for name, origin in networks().items()}
  details = signature("models.deeplab_details.Details")
  return found | {
    "deeplab_v3plus": found["deeplab_v3plus"] | {f"details.{name}": option for name, option in details.items()}
  }


def sources() -> dict[str, dict[str, Option]]:
  """The options of each data source, beside those of all, `DATA`."""
  return {name: signature(origin) for name, origin in _table("input_pipeline.sources", "SOURCES").items()}


def defaults(options: dict[str, Option]) -> dict:
  """{name: default}; {"details.NAME": ...} becomes a dict `details`."""
  found = {}
  for name, (default, _) in options.items():
    section, _, leaf = name.rpartition(".")
    (found.setdefault(section, {}) if section else found)[leaf] = default
  return found


@functools.cache
def signature(origin: str) -> dict[str, Option]:
  """The arguments with a default of a function or class of segjax ("losses.make_loss"), or the fields of a dataclass.

  Their meaning is what its docstring says of them, as "NAME: text" or "NAME, OTHER: text". An argument whose default is
  `Group(...)`, a dataclass, stands for its fields, with the defaults that this call gives them.

  Raises:
    TypeError: a default that is no literal, or an argument that the docstring leaves out.
  """
  module, _, name = origin.rpartition(".")
  node = next(node for node in _parse(module).body if getattr(node, "name", None) == name)
  meanings = _meanings(ast.get_docstring(node) or "")
  if isinstance(node, ast.ClassDef):
    made = [part for part in node.body if getattr(part, "name", None) == "__init__"]
    if not made:
      fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
      return {field.target.id: _option(origin, field.target.id, field.value, meanings) for field in fields}
    node = made[0]
  found = {}
  for name, value in zip((argument.arg for argument in node.args.kwonlyargs), node.args.kw_defaults):
    if isinstance(value, ast.Call) and ast.unparse(value.func) in _origins(
      module
    ):  # A dataclass: its fields are options.
      own = {keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords}
      fields = signature(_origins(module)[ast.unparse(value.func)])
      found |= {
        field: option._replace(default=own[field]) if field in own else option for field, option in fields.items()
      }
    elif value and name not in _NONE:
      found[name] = _option(origin, name, value, meanings)
  return found


def _option(origin: str, name: str, value: ast.expr, meanings: dict[str, str]) -> Option:
  try:
    return Option(ast.literal_eval(value), meanings[name])
  except (ValueError, KeyError) as error:
    raise TypeError(f"{origin}: {name} needs a literal default, and an entry in the docstring's Args.") from error


def _parse(module: str) -> ast.Module:
  path = _PACKAGE / module.replace(".", "/")
  return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def _table(package: str, name: str) -> dict[str, str]:
  """A package's dict {option: class}, as {option: "package.module.class"}."""
  table, origins = _assigned(_parse(package), name), _origins(package)
  return {key.value: origins[value.id] for key, value in zip(table.keys, table.values)}


def _origins(module: str) -> dict[str, str]:
  """{name: "module.name"} of the classes that a module defines or imports from segjax."""
  body = _parse(module).body
  own = {node.name: f"{module}.{node.name}" for node in body if isinstance(node, ast.ClassDef)}
  imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module.startswith("segjax")]
  return own | {a.name: f"{node.module.removeprefix('segjax.')}.{a.name}" for node in imports for a in node.names}


def _assigned(module: ast.Module, name: str) -> ast.expr:
  return next(n.value for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)


def _meanings(docstring: str) -> dict[str, str]:
  """{name: text} of a docstring's entries."""
  found, names = {}, ()
  for line in inspect.cleandoc(docstring).splitlines():
    entry = re.match(r"  (\w+(?:, \w+)*): (.*)", line)
    if entry:
      names = [name for name in entry[1].split(", ") if name not in found]
      found |= dict.fromkeys(names, entry[2])
    elif line.startswith("    "):
      found |= {name: f"{found[name]} {line.strip()}" for name in names}
    else:
      names = ()
  return found


def table() -> str:
  """All options as a page of Markdown: name, type, default and meaning; docs/options.md is this."""
  rows = [
    "# All options\n\nMade by `segjax config --options`. An option's type is that of its default. In brackets: the one model or"
    " data source that has it.\n\n| option | type | default | meaning |\n|---|---|---|---|"
  ]
  groups = [("", section, options) for section, options in sections().items()]
  groups += [("", "model", dict(name=Option("unet", f"{', '.join(models())}; decides the other options of `model`.")))]
  groups += [(name, "model", options) for name, options in models().items()]
  named = Option("folder", f"{', '.join(sources())}; decides the other options of `data`.")
  groups += [("", "data", dict(name=named, **DATA))]
  groups += [(name, "data", options) for name, options in sources().items()]
  for owner, section, options in groups:
    for name, (default, meaning) in options.items():
      whole = f"{section}.{name}".lstrip(".") + (f" ({owner})" if owner else "")
      rows.append(f"| {whole} | {type_name(default)} | `{default!r}` | {meaning.replace('|', chr(92) + '|')} |")
  return "\n".join(rows) + "\n"


def type_name(default) -> str:
  """The type of an option, from its default."""
  kinds = sorted({type(item).__name__ for item in default}) if isinstance(default, tuple) else []
  return f"tuple of {kinds[0]}" if kinds else type(default).__name__
