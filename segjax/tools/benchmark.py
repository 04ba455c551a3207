"""Speed, measured: python -m segjax.benchmark --config=configs/x.py [--what=train,eval,compile,input] [--compare=torch]

`train` and `eval` time the compiled steps of a run: on its data, and how long they wait for it, where config.data.dir is at
hand; else on noise of config.crop_size. --compare=torch has PyTorch run the same network in turn. `compile` compiles both
steps, from scratch and from JAX's cache, and runs neither. `input` reads and decodes without any device. The JSON lines of --json
hold all figures, the table the main ones.
"""

import os
import pathlib
import platform
import sys
import time

from absl import flags

from segjax.config import ConfigError
from segjax.config import rules as config_rules
from segjax.run import commandline

_WHAT = flags.DEFINE_list("what", ["train", "eval"], "What to measure, of train, eval, compile, input.")
_COMPARE = flags.DEFINE_enum("compare", None, ("torch",), "What to measure beside it, in turn.")
_TORCH_FORMS = flags.DEFINE_list(
  "torch_forms", None, "Ways to run PyTorch, of which the fastest is taken. None: all four."
)
_TORCH_PYTHON = commandline.define_path("torch_python", sys.executable, "The Python whose PyTorch it is.")
_DTYPES = flags.DEFINE_list("dtypes", None, "Measure under each of these types. None: config.dtype.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Least duration of a measurement.", lower_bound=0.0)
_GENERATE = flags.DEFINE_integer("generate", 0, "input: measure this many generated examples, not config.data.dir.")
_JSON = commandline.define_json()
WHAT = ("train", "eval", "compile", "input")


def processor() -> str:
  """The name of the CPU."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str]) -> None:
  """The command line."""
  del argv
  with commandline.readable_errors():
    if not _WHAT.value or not set(_WHAT.value) <= set(WHAT):
      raise ConfigError(f"--what={','.join(_WHAT.value)}: choose from {', '.join(WHAT)}.")
    commandline.check_json(_JSON.value)
    config = commandline.config(data_dir="absent")  # Only `input` without --generate needs one.
    dtypes = _DTYPES.value or [config.dtype]
    for config.dtype in dtypes:
      config_rules.validate(config)
    print(f"python -m segjax.benchmark {' '.join(sys.argv[1:])}")
    print(
      f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True
    )
    if "input" in _WHAT.value:
      from segjax.tools import input_speed

      print(input_speed.report(config, _GENERATE.value, _SECONDS.value))
    kinds = [kind for kind in WHAT if kind in _WHAT.value and kind != "input"]
    if kinds:
      print(_steps(config, kinds, dtypes))


def _steps(config, kinds: list[str], dtypes: list[str]) -> str:
  import jax

  from segjax.tools import step_speed, torch_process

  commandline.keep_freed_memory()
  jax.config.update("jax_enable_compilation_cache", False)  # Compilation is measured too.
  forms = tuple(_TORCH_FORMS.value or torch_process.FORMS) if _COMPARE.value else ()
  rows, compilations = [], []
  for config.dtype in dtypes:
    for kind in kinds:
      if kind == "compile":
        found = [step_speed.measure_compilation(config, step) for step in step_speed.STEPS]
        compilations += found
      else:
        found = [
          step_speed.measure(config, kind, seconds=_SECONDS.value, torch_forms=forms, torch_python=_TORCH_PYTHON.value)
        ]
        rows += found
      for row in found:
        print(commandline.append_json(_JSON.value, row), flush=True)
  first = (rows or compilations)[0]
  tables = [step_speed.table(rows)] * bool(rows) + [step_speed.compilation_table(compilations)] * bool(compilations)
  return f"\njax {jax.__version__}, {first['devices']} x {first['device']}\n\n" + "\n\n".join(tables)


if __name__ == "__main__":
  commandline.run(main)
