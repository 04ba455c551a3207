"""What a config means: its mesh, data, model, steps and variables, each made once, when first asked for."""

import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from segjax import augment, input_pipeline, losses, models, sharding, state, steps
from segjax import optimizer as optimizer_lib
from segjax.config import IGNORE_LABEL, ConfigError
from segjax.config import options as options_lib
from segjax.input_pipeline import images, order
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.models import layers
from segjax.models.base import Network
from segjax.pretrained import unfold
from segjax.run import device_cache, label_balance, warm_start
from segjax.run.checkpoint import Checkpoints
from segjax.run.evaluation import Evaluator
from segjax.state import TrainState


class Experiment:
  """The parts of one config. But for the mesh, nothing is opened or built before it is asked for.

  Each raises ConfigError where the config cannot be used for it, and DataError where the data set cannot.

  Args:
    mesh: in place of the config's.
    num_classes: in place of the data set's.
    labels: whether the evaluation's split must have labels.
  """

  def __init__(self, config, *, mesh: Mesh | None = None, num_classes: int | None = None, labels: bool = True):
    self.config, self._pixels = config, images.pixels_of(config.data)
    self._num_classes, self._labels = num_classes, labels
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.space) if mesh is None else mesh

  # The data.

  @functools.cached_property
  def train_source(self):
    return input_pipeline.make_source(self.config.data, self.config.data.train_split)

  @functools.cached_property
  def eval_source(self):
    return input_pipeline.make_source(self.config.data, self.config.data.eval_split, self._labels)

  @functools.cached_property
  def num_classes(self) -> int:
    given = self._num_classes
    return len(input_pipeline.named_classes(self.config.data)[0]) if given is None else given

  @property
  def weighs_borders(self) -> bool:
    """Whether training batches have `border`."""
    return self.config.loss.border_weight > 0

  @functools.cached_property
  def balance(self) -> order.ClassBalance | None:
    """See `label_balance.balance`; None too for a data set that need not be there."""
    return label_balance.balance(self.train_source, self.config.data) if self._num_classes is None else None

  @functools.cached_property
  def crop_window(self):
    """See `augment.crop_window`; None with augment.foreground, whose pixels may lie anywhere in an image."""
    if self.config.augment.foreground:
      return None
    return augment.crop_window(self.config.crop_size, self.network.margin, self.augmentation)

  @property
  def augmentation(self) -> augment.Augmentation:
    return augment.Augmentation(**self.config.augment)

  @property
  def augment_batch(self) -> Callable:
    """augment_batch(key, batch) -> image, label, border, see `augment.augment_batch`; takes batches of ids too."""
    augmented = functools.partial(
      augment.augment_batch,
      options=self.augmentation,
      crop_size=self.config.crop_size,
      margin=self.network.margin,
      fill=self.network.mean,
      ignore_label=IGNORE_LABEL,
      num_classes=self.num_classes,
      classes=label_balance.of_crops(self.num_classes, self.balance) if self.augmentation.foreground else None,
    )

    def augment_batch(key, batch):
      return augmented(key, device_cache.fetch(batch, self.mesh, self.train_canvas) if "split" in batch else batch)

    return augment_batch

  @functools.cached_property
  def train_canvas(self) -> tuple[int, int]:
    """See `input_pipeline.train_canvas`."""
    return input_pipeline.train_canvas(self.train_source, self.config.data, self.crop_window)

  def train_batches(self, start: int, stop: int, *, rows=None, bad: BadExamples | None = None) -> Iterator[dict]:
    """Host batches of the steps [start, stop), see `input_pipeline.train_batches`.

    Args:
      rows: of the global batch; None: those of this process's devices.
    """
    return input_pipeline.train_batches(
      self.train_source, self.config.data, border=self.weighs_borders, **self._order(start, stop, rows, bad)
    )

  def _order(self, start: int, stop: int, rows, bad: BadExamples | None) -> dict:
    config = self.config
    rows = sharding.local_rows(self.mesh, config.batch_size) if rows is None else rows
    options = dict(seed=config.seed, batch_size=config.batch_size, rows=rows, start_step=start, num_steps=stop)
    return options | dict(bad=bad, window=self.crop_window, balance=self.balance)

  def device_batches(self, start: int, stop: int, bad: BadExamples | None = None) -> Iterator[dict]:
    """What the train step takes in the steps [start, stop): global batches, or, with data.cache = "device", batches of ids."""
    if self.config.data.cache != "device":
      return sharding.to_device(self.train_batches(start, stop, bad=bad), self.mesh)
    split, unreadable = self._device_split
    order = self._order(start, stop, None, bad)
    ids = input_pipeline.id_batches(self.train_source, self.config.data, unreadable=unreadable, **order)
    return (batch | dict(split=split) for batch in sharding.to_device(ids, self.mesh))

  @functools.cached_property
  def _device_split(self) -> tuple[dict, dict]:
    """See `device_cache.load`."""
    workers, beside = self.config.data.workers, sharding.bytes_per_device(self.abstract_state)
    return device_cache.load(self.train_source, self._abstract_split, workers=workers, beside=beside)

  @property
  def _abstract_split(self) -> dict:
    canvas = input_pipeline.canvas_of(self.train_source, self.config.data)
    return device_cache.abstract_split(self.mesh, self.train_source, canvas, self.weighs_borders)

  # Model, optimiser and state.

  def _build_network(self) -> Network:
    config = self.config
    if config.head == "sigmoid" and self.num_classes != 2:
      raise ConfigError(
        f"config.head = 'sigmoid' tells foreground from background, but the data set has {self.num_classes} classes. Set"
        " head = 'softmax', or map the masks to two classes (data.label_map)."
      )
    num_classes, rngs = 1 if config.head == "sigmoid" else self.num_classes, nnx.Rngs(config.seed)
    options = dict(config.model, statistics=self._pixels.statistics, dtype=config.dtype, remat=config.remat)
    try:
      network = models.build(num_classes=num_classes, rngs=rngs, **options)
    except ValueError as error:  # Models know nothing of configs.
      raise ConfigError(f"The model cannot be built: {error}") from error
    if min(config.crop_size) < network.coarsest_stride:
      raise ConfigError(
        f"config.crop_size = {tuple(config.crop_size)}: smaller than the network's stride of {network.coarsest_stride},"
        " so nothing of it would be left. Enlarge the crop, or lower the model's stride."
      )
    if config.optimizer.freeze:
      layers.freeze(network, self._frozen(*state.split(network)[1:]))
    return network

  def _frozen(self, params: dict, batch_stats: dict) -> frozenset[str]:
    return optimizer_lib.frozen_paths(self.config.optimizer.freeze, params, batch_stats)

  @functools.cached_property
  def network(self) -> Network:
    """The model, with shapes in the place of arrays: for what it says of itself, as stride and margin."""
    return nnx.eval_shape(self._build_network)

  @functools.cached_property
  def graphdef(self) -> nnx.GraphDef:
    return nnx.graphdef(self.network)

  @functools.cached_property
  def schedule(self) -> optax.Schedule:
    """step -> learning rate."""
    keywords = self._optimizer_options("make_schedule")
    return optimizer_lib.make_schedule(self.config.optimizer.schedule, num_steps=self.config.num_steps, **keywords)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    keywords = self._optimizer_options("make_optimizer")
    return optimizer_lib.make_optimizer(self.config.optimizer.name, self.schedule, **keywords)

  def _optimizer_options(self, function: str) -> dict:
    """The options of `config.optimizer` that a function of optimizer.py takes."""
    return {name: self.config.optimizer[name] for name in options_lib.signature(f"optimizer.{function}")}

  def init(self) -> TrainState:
    """The initial state: call it through `state.materialize`, as `init_state` does, or under `jax.eval_shape`."""
    _, params, batch_stats = state.split(self._build_network())
    frozen = self._frozen(params, batch_stats)
    trained = dict(params=state.without(params, frozen), batch_stats=state.without(batch_stats, frozen))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=self.optimizer.init(trained["params"]),
      # Copies: a donated state must not hold one buffer twice.
      ema=jax.tree.map(jnp.copy, trained) if self.config.optimizer.ema_decay else None,
      failed_step=jnp.full((), -1, jnp.int32),
      policy=optimizer_lib.init_policy(),
    )

  @functools.cached_property
  def _shapes(self) -> TrainState:
    return jax.eval_shape(self.init)

  @functools.cached_property
  def frozen(self) -> frozenset[str]:
    """The paths of what `config.optimizer.freeze` keeps as it is, see `optimizer.frozen_paths`."""
    return self._frozen(self._shapes.params, self._shapes.batch_stats)

  @functools.cached_property
  def state_sharding(self) -> TrainState:
    """Of the state at rest, see `sharding.of_state`."""
    return sharding.of_state(self.mesh, self._shapes, self.config.shard_state)

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes in their sharding, to compile for or to restore a checkpoint into."""
    return state.with_sharding(self._shapes, self.state_sharding)

  def init_state(self) -> TrainState:
    """A new state, from scratch."""
    return state.materialize(self.init, self.state_sharding)

  def first_state(self, bad: BadExamples | None = None) -> tuple[TrainState, str]:
    """What training begins with: a new state, with the weights that `config.init` names; and the line to report.

    Args:
      bad: of the run, where init.unfold reads its training images.
    """
    init = self.config.init
    if not init.path:
      return self.init_state(), "init: scratch"
    loaded, new = warm_start.load(init), self.init_state()  # In this order: the first may fail.
    own = new.variables()
    variables, report_line = warm_start.merge(
      jax.device_get(sharding.gather(own, self.mesh)), loaded, init.exclude, self._pixels.count
    )
    if init.unfold:
      variables = self._unfold(variables, bad)
      report_line += f"; batch norm by the statistics of {len(self.train_source)} training images (init.unfold)"
    variables = jax.device_put(variables, jax.tree.map(lambda x: x.sharding, own))
    new.params, new.batch_stats = variables["params"], variables["batch_stats"]
    if new.ema is not None:
      new.ema = {name: jax.tree.map(jnp.copy, state.without(x, self.frozen)) for name, x in variables.items()}
    return new, report_line

  def _unfold(self, variables: dict, bad: BadExamples | None) -> dict:
    """Variables of the host with the statistics of the first epoch's crops, see `pretrained.unfold`."""
    config = self.config
    if not variables["batch_stats"]:
      raise ConfigError(f"init.unfold = True: {config.model.name} has no batch norm here. Set it to False.")
    options = dict(seed=config.seed, kernels=config.kernels, matmul_precision=config.matmul_precision)
    step = steps.make_moments_step(self.graphdef, self.mesh, augment_batch=self.augment_batch, **options)
    given, count = sharding.gather(variables, self.mesh), -(-len(self.train_source) // config.batch_size)
    batches = self.device_batches(0, count, bad)
    measured = unfold.total(step(given, batch, number) for number, batch in enumerate(batches))
    return unfold.unfold(self.network, variables, measured)

  def trained_variables(self, workdir: pathlib.Path | None, loaded: tuple[dict, str] | None) -> tuple[dict, int, str]:
    """What to evaluate or predict with: the variables on the mesh, their step, and what to call them.

    Args:
      loaded: of `warm_start.load_unless_run`; None takes the checkpoint of `workdir` that `config.eval.checkpoint` names.
    """
    if loaded is not None:
      # Strictly all: what init.exclude leaves random would only be scored as noise.
      variables, origin = warm_start.merge(self._shapes.variables(), loaded, ())
      return sharding.gather(variables, self.mesh), 0, origin
    with Checkpoints(workdir, read_only=True) as checkpoints:
      best, last = checkpoints.best_step(), checkpoints.latest_step()
      step = best if self.config.eval.checkpoint == "best" and best is not None else last
      restored = checkpoints.restore(self.abstract_state, step)
    variables = sharding.gather(restored.eval_variables(), self.mesh)
    return variables, step, f"checkpoint of step {step} ({'best' if step == best else 'last'})"

  # The steps.

  def make_train_step(self, class_weights: np.ndarray | None = None, **replaced) -> Callable:
    """See `steps.make_train_step`; `replaced` are keywords of it in place of the config's.

    Args:
      class_weights: of `class_weights`, [K].
    """
    config = self.config
    keywords = dict(
      state_sharding=self.state_sharding,
      seed=config.seed,
      augment_batch=self.augment_batch,
      loss=losses.make_loss(ignore_label=IGNORE_LABEL, **dict(config.loss, class_weights=class_weights)),
      ema_decay=config.optimizer.ema_decay,
      frozen=self.frozen,
      accumulate_steps=config.accumulate_steps,
      kernels=config.kernels,
      matmul_precision=config.matmul_precision,
    )
    return steps.make_train_step(self.graphdef, self.optimizer, self.mesh, **keywords | replaced)

  def checked_train_step(self, class_weights: np.ndarray | None) -> Callable:
    """The train step; compiled already, and refused where it does not fit beside the split, with data.cache = "device"."""
    step = self.make_train_step(class_weights)
    if self.config.data.cache != "device":
      return step
    cut = self.train_canvas != input_pipeline.canvas_of(self.train_source, self.config.data)
    return device_cache.compile_step(step, *self.abstract_train_arguments(self.train_canvas, cut), self.mesh)

  @property
  def protocol(self) -> dict:
    """The keywords of `inference.class_scores` that `config.eval` gives."""
    e = self.config.eval
    return dict(scales=e.scales, flip=e.flip, window=e.window, window_stride=e.window_stride)

  def make_eval_step(self, **replaced) -> Callable:
    """See `steps.make_eval_step`; `replaced` are keywords of it in place of the config's."""
    e, sigmoid = self.config.eval, self.config.head == "sigmoid"
    keywords = dict(num_classes=self.num_classes, protocol=self.protocol, outside=e.outside, threshold=e.threshold)
    keywords |= dict(sigmoid=sigmoid, kernels=self.config.kernels, matmul_precision=self.config.matmul_precision)
    return steps.make_eval_step(self.graphdef, self.mesh, **keywords | replaced)

  @functools.cached_property
  def eval_step(self) -> Callable:
    """The step by which everything is scored and predicted."""
    return self.make_eval_step()

  @functools.cached_property
  def evaluator(self) -> Evaluator:
    """Of the evaluation's split, whose batches the mesh has to divide."""
    sharding.check_batch(self.mesh, "eval.batch_size", self.config.eval.batch_size)
    return Evaluator(self.eval_source, self.eval_step, self.config, self.mesh)

  def abstract_train_arguments(self, canvas: tuple[int, int], cut: bool = False) -> tuple[TrainState, dict]:
    """The shapes and shardings that a train step is compiled for.

    Args:
      canvas: (H, W) of the images. cut: whether larger ones are cut to it.
    """
    batch = steps.abstract_batch(self.mesh, self.config.batch_size, canvas, self._pixels, self.weighs_borders, cut)
    if self.config.data.cache == "device":
      ids = {name: batch[name] for name in ("id", "origin", "share") if name in batch}
      batch = ids | dict(split=self._abstract_split)
    return self.abstract_state, batch

  def abstract_eval_arguments(self, canvas: tuple[int, int], batch_size: int | None = None) -> tuple[dict, dict]:
    """The same of the eval step, whose variables are whole on every device; with another `batch_size` than the config's."""
    variables = state.with_sharding(self._shapes.eval_variables(), sharding.replicated(self.mesh))
    return variables, steps.abstract_batch(self.mesh, batch_size or self.config.eval.batch_size, canvas, self._pixels)

  # What has to fit.

  def check(self) -> None:
    """Raises ConfigError where loss and head, or batch norm and batch, do not fit."""
    config = self.config
    try:
      losses.check_terms(config.loss.terms, config.head == "sigmoid")
    except ValueError as error:
      raise ConfigError(f"config.loss.terms = {tuple(config.loss.terms)}: {error}") from error
    self._check_batch_norm()

  def _check_batch_norm(self) -> None:
    """Raises ConfigError where a batch norm would see one value of each channel of a batch, or of each of its parts.

    That is what the ASPP's image pooling leaves of one image, or a network of one smaller than its crop's stride. It sees
    the whole part whatever the mesh, so the forward pass is traced for parts of one image alone.
    """
    config = self.config
    if config.batch_size > config.accumulate_steps:
      return

    def forward(variables, image):
      model = steps.merge(self.graphdef, variables)
      return model(model.preprocess(image), train=True)

    try:
      image = jax.ShapeDtypeStruct((1, *config.crop_size, self._pixels.count), jnp.float32)
      jax.eval_shape(forward, self._shapes.variables(), image)
    except layers.NoVariance as error:
      choices = dict(frozen_bn=True, image_pooling=False, batch_norm=False)  # Of some of the models each.
      remedies = [f"model.{k} = {v}" for k, v in choices.items() if k in config.model and config.model[k] != v]
      raise ConfigError(
        f"config.batch_size = {config.batch_size} with accumulate_steps = {config.accumulate_steps} is one image at a time:"
        f" {error} Make batch_size at least {2 * config.accumulate_steps}, or set {' or '.join(remedies)}."
      ) from error

  def class_weights(self, workdir: pathlib.Path) -> np.ndarray | None:
    """[K] float32 or None, see `label_balance.class_weights`."""
    return label_balance.class_weights(self.train_source, self.config.loss.class_weights, workdir)
