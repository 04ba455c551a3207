"""How fast images are read, decoded and batched, without any device: the input part of segjax.benchmark.

Per core means per second of CPU time, of all threads together, so that other work on the machine hardly counts. Generated
examples have the sizes of VOC's or Cityscapes' files, and both formats are measured: the benchmark's own folders and
TFDS's shards.
"""

import os
import pathlib
import tempfile
import time
import zipfile

import numpy as np
from PIL import Image

from segjax import input_pipeline
from segjax.config import IGNORE_LABEL, ConfigError
from segjax.input_pipeline.sources import cityscapes, datasets, voc
from segjax.tools import prepare

LOADERS = ("tf_data", "grain")


def speed(batches, batch_size: int, seconds: float, first: int = 2) -> tuple[float, float]:
  """Images per second of wall time and of CPU time, over at least `seconds`, after the `first` batches."""
  for _ in range(first):
    next(batches)
  count, wall, cpu = 0, time.perf_counter(), time.process_time()
  while time.perf_counter() - wall < seconds:
    next(batches)
    count += batch_size
  return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def input_table(config, formats: dict[str, str], seconds: float) -> str:
  """Markdown rows of the training split of `config`: decoding alone, then each format with each loader.

  With data.cache, loaders are measured from the second epoch on.

  Args:
    formats: {data.format: data.dir}; {"": dir} for a source without formats.
    seconds: least duration of each measurement.
  """
  rows = ["| format | loader | threads | images/s | images/s per core |", "|---|---|---|---|---|"]
  for format, folder in formats.items():
    data = config.data.copy_and_resolve_references()
    data.dir = folder
    if format:
      data.format = format
    source = input_pipeline.make_source(data, data.train_split)
    canvas = input_pipeline.canvas_of(source, data)

    def decoded(source=source):
      for step in range(1 << 30):
        yield [source[i] for i in input_pipeline.order.train_ids(config.seed, step, config.batch_size, len(source))]

    def row(loader, threads, rates, format=format):
      rows.append(f"| {format or config.data.name} | {loader} | {threads} | {rates[0]:.0f} | {rates[1]:.0f} |")

    row("none, decoding alone", 1, speed(decoded(), config.batch_size, seconds))
    for data.loader in LOADERS:
      if input_pipeline.loader_of(data) != data.loader:
        continue
      batches = input_pipeline.train_batches(
        source,
        data,
        seed=config.seed,
        batch_size=config.batch_size,
        rows=np.arange(config.batch_size),
        start_step=0,
        num_steps=1 << 30,
      )
      first = 2 + (len(source) // config.batch_size + 1) * (data.cache in ("memory", "disk"))
      row(data.loader, data.workers or os.cpu_count(), speed(batches, config.batch_size, seconds, first))
      batches.close()
  return (
    "\n".join(rows) + f"\n\ncanvas {canvas[0]}x{canvas[1]}, batches of {config.batch_size}, cache {config.data.cache}"
  )


def _picture(rng, size: tuple[int, int], grain: float) -> np.ndarray:
  """[H, W, 3] uint8 with detail at all scales; `grain`, grey levels of noise, decides how many bytes it compresses to."""
  total = np.zeros((*size, 3), np.float32)
  for level in range(2, 9):
    shape = [max(n >> (9 - level), 2) for n in size]
    noise = rng.normal(0, 1, (*shape, 3)).astype(np.float32)
    channels = [Image.fromarray(noise[..., c]).resize(size[::-1], Image.Resampling.BICUBIC) for c in range(3)]
    total += np.stack([np.asarray(channel) for channel in channels], -1) * 2.0 ** -(level - 2)
  return np.clip(128 + 35 * total + rng.normal(0, grain, total.shape), 0, 255).astype(np.uint8)


def _mask(rng, size: tuple[int, int], values: np.ndarray) -> np.ndarray:
  """[H, W] uint8 of some large regions."""
  cells = Image.fromarray(rng.choice(values, (7, 9)).astype(np.uint8))
  return np.asarray(cells.resize(size[::-1], Image.Resampling.NEAREST))


def generate_voc(folder: pathlib.Path, count: int) -> dict[str, str]:
  """`count` training images of VOC's common size, 375x500, as a VOC2012 folder and as TFDS shards.

  The files are as large as VOC's, about 105 kB an image. Returns {data.format: data.dir}.
  """
  rng, root = np.random.default_rng(0), folder / "VOC2012"
  names = [f"2007_{i:06d}" for i in range(count + 1)]
  for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
    (root / name).mkdir(parents=True)
  for split, ids in (("train", names[1:-1]), ("trainaug", names[:-1]), ("val", names[-1:])):
    voc.list_file(root, split).write_text("\n".join(ids))
  for name in names:
    Image.fromarray(_picture(rng, (375, 500), 23)).save(root / "JPEGImages" / f"{name}.jpg", quality=90)
    mask = Image.fromarray(_mask(rng, (375, 500), np.array([0, 0, 0, 1, 15, IGNORE_LABEL])))
    mask.putpalette(datasets.palette(256).reshape(-1).tolist())
    mask.save(root / "SegmentationClass" / f"{name}.png")
  prepare.store_voc(root, str(folder / "tfds"))
  return {"tree": str(root), "tfds": str(folder / "tfds")}


def generate_cityscapes(folder: pathlib.Path, count: int) -> dict[str, str]:
  """`count` training images of 1024x2048, as zips, unzipped and as TFDS shards.

  The files are as large as Cityscapes', about 2.3 MB an image. Returns {data.format: data.dir}.
  """
  rng = np.random.default_rng(0)
  with (
    zipfile.ZipFile(folder / prepare.CITYSCAPES_ZIPS[0], "w") as left,
    zipfile.ZipFile(folder / prepare.CITYSCAPES_ZIPS[1], "w") as fine,
  ):
    for i, split in enumerate(["train"] * count + ["val", "test"]):
      stem = f"{split}/aachen/aachen_{i:06d}_000019"
      for archive, name, pixels in (
        (left, f"{cityscapes.IMAGES}/{stem}{cityscapes.IMAGE_SUFFIX}", _picture(rng, (1024, 2048), 1)),
        (fine, f"gtFine/{stem}_gtFine_labelIds.png", _mask(rng, (1024, 2048), np.arange(34))),
      ):
        with archive.open(name, "w") as file:
          Image.fromarray(pixels).save(file, "PNG")
  prepare.unpack_cityscapes(folder, folder)
  prepare.store_cityscapes(folder, str(folder / "tfds"))
  return {"tree": str(folder), "tfds": str(folder / "tfds")}


GENERATORS = {"voc": generate_voc, "cityscapes": generate_cityscapes}


def file_sizes(source_dir: str, pattern: str) -> str:
  """Mean size of the files below a folder that match, in kB."""
  sizes = [path.stat().st_size for path in pathlib.Path(source_dir).rglob(pattern)]
  return f"{pattern}: {np.mean(sizes) / 1e3:.0f} kB"


def report(config, generate: int, seconds: float) -> str:
  """What was measured, and the table.

  Args:
    generate: number of examples to make in a temporary folder; 0: those of config.data.dir.

  Raises:
    ConfigError: `generate` for a data set that is neither VOC nor Cityscapes.
    DataError: the data set cannot be used.
  """
  if not generate:
    format = config.data.format if "format" in config.data else ""
    return f"{config.data.dir or config.data.name}\n\n" + input_table(config, {format: config.data.dir}, seconds)
  if config.data.name not in GENERATORS:
    raise ConfigError(f"--generate makes {' or '.join(GENERATORS)}, not {config.data.name}. Leave it out.")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["XDG_CACHE_HOME"] = folder  # What data.cache keeps of generated files goes with them.
    formats = GENERATORS[config.data.name](pathlib.Path(folder), generate)
    patterns = ("*.jpg", "*.png") if config.data.name == "voc" else ("*_leftImg8bit.png", "*_labelIds.png")
    sizes = ", ".join(file_sizes(formats["tree"], pattern) for pattern in patterns)
    return f"{generate} generated examples; {sizes}\n\n" + input_table(config, formats, seconds)


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("benchmark --what=input --config=FILE")
