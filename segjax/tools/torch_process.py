"""PyTorch running a config's network in a process of its own, for segjax.benchmark --compare=torch."""

import json
import pathlib
import subprocess

from segjax import config as config_lib
from segjax.config import ConfigError

PROGRAM = pathlib.Path(__file__).parents[2] / "benchmarks" / "torch_speed.py"
# Ways to run a network, as FORMS of benchmarks/torch_speed.py; and the options of config.model that its networks follow.
FORMS = ("nchw", "channels_last", "compiled", "compiled_channels_last")
OPTIONS = {"unet": ("width", "depth"), "fcn": ("width", "stride"), "deeplab_v3plus": ("backbone", "output_stride")}


class Torch:
  """A process in which PyTorch runs the same network, a step at a time when told to.

  Args:
    kind: "train" or "eval".
    batch_size, size: of its batches; (H, W) in pixels.
    python: that has PyTorch. It may be another than this one: the CUDA libraries that pip installs for JAX and for PyTorch
      do not always agree.

  Raises:
    ConfigError: model options that its network has not, or no PyTorch there.
  """

  def __init__(self, config, kind: str, batch_size: int, size: tuple[int, int], num_classes: int, python: str):
    check_options(config)
    options = {name: config.model[name] for name in OPTIONS[config.model.name]}
    spec = dict(network=config.model.name, options=options, num_classes=num_classes)
    spec |= dict(batch_size=batch_size, size=size, dtype=config.dtype)
    self._kind = kind
    command = [python, str(PROGRAM), json.dumps(spec)]
    try:
      self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
      raise ConfigError(f"--torch_python={python} cannot be run: {error.strerror}.") from error
    line = self._process.stdout.readline()
    if not line:
      raise ConfigError(f"--compare=torch: {python} {_lacks(python)}, see above; or name another by --torch_python.")
    self.version = json.loads(line)["torch"]

  def steps(self, form: str, count: int) -> list[float]:
    """Seconds of each of `count` steps in one of `FORMS`.

    Raises:
      ConfigError: PyTorch cannot run it.
    """
    self._process.stdin.write(f"{self._kind} {form} {count}\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise ConfigError(f"PyTorch failed in the form {form}; its error is above. Leave it out with --torch_forms.")
    return json.loads(answer)

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()


def _lacks(python: str) -> str:
  """What a Python that could not run `PROGRAM` misses, and the remedy."""
  for module, lack in (
    ("torch", "has no PyTorch, or cannot load it: pip install torch there"),
    (
      "segjax.models",
      "has PyTorch but cannot import segjax, whose layer tables it needs: pip install -e . in the checkout",
    ),
  ):
    # From the program's folder: what it finds must not depend on the working directory.
    probe = subprocess.run([python, "-c", f"import {module}"], cwd=PROGRAM.parent, capture_output=True, check=False)
    if probe.returncode:
      return lack
  return "has PyTorch and segjax, but cannot run the comparison"


def check_options(config) -> None:
  """Raises ConfigError for a model, or options of one, that PyTorch's networks have not."""
  if config.model.name not in OPTIONS:
    raise ConfigError(f"--compare=torch knows {', '.join(OPTIONS)}, not {config.model.name}.")
  defaults = config_lib.fields(config_lib.default_config(model=config.model.name).model)
  own = config_lib.fields(config.model)
  ignored = ("name", "dropout", "bn_momentum", *OPTIONS[config.model.name])  # Those cost next to nothing.
  other = [name for name in own if name not in ignored and own[name] != defaults[name]]
  if other:
    raise ConfigError(
      f"--compare=torch: PyTorch's network has segjax's defaults in {', '.join(f'model.{n}' for n in other)}. Set them"
      " back, or leave the comparison out."
    )


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("benchmark --config=FILE --compare=torch")
