"""Makes docs/results.png: images of CamVid's val, their labels, and what runs predict for them.

python docs/results.py --images=CAMVID/val --labels=CAMVID/valannot --names=A,B,C FCN-8s=PREDICTIONS ... --out=docs/results.png

Each PREDICTIONS is what `python -m segjax.predict --workdir=RUN IMAGES --out=PREDICTIONS` wrote. Needs matplotlib.
"""

import argparse
import pathlib

import matplotlib
import numpy as np
from PIL import Image

from segjax.input_pipeline.sources import datasets

matplotlib.use("agg")
import matplotlib.pyplot as plt

SIZE = (240, 180)  # Of each picture, (W, H).


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="+", help="title=folder of predictions")
  for option in ("images", "labels", "out"):
    parser.add_argument(f"--{option}", type=pathlib.Path, required=True)
  parser.add_argument("--names", required=True, help="of the images, comma-separated")
  args = parser.parse_args()
  names, runs = args.names.split(","), dict(run.split("=") for run in args.runs)
  colors = np.vstack([datasets.parse_colors(datasets.CAMVID["colors"]), np.zeros((245, 3))]).astype(np.uint8)
  image = lambda name: Image.open(next(args.images.glob(f"{name}.*"))).convert("RGB")  # noqa: E731
  ids = lambda folder: lambda name: Image.fromarray(colors[np.asarray(Image.open(folder / f"{name}.png"))])  # noqa: E731
  columns = {"image": image, "label": ids(args.labels)}
  columns |= {title: ids(pathlib.Path(folder) / "ids") for title, folder in runs.items()}
  figure, axes = plt.subplots(
    len(names), len(columns), figsize=(2.4 * len(columns), 1.8 * len(names) + 0.3), layout="constrained"
  )
  figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
  for row, name in zip(axes, names):
    for axis, (title, picture) in zip(row, columns.items()):
      axis.imshow(
        picture(name).resize(SIZE, Image.Resampling.NEAREST if title != "image" else Image.Resampling.LANCZOS)
      )
      axis.axis("off")
      if name == names[0]:
        axis.set_title(title, fontsize=11)
  figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
  main()
