"""Package metadata; tool settings are in pyproject.toml."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = (ROOT / "segjax" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
TENSORFLOW = [
  # tensorflow-cpu has wheels for these machines only; it spares the others' CUDA download, as JAX does the computing.
  "tensorflow-cpu>=2.20; platform_machine == 'x86_64' and sys_platform == 'linux' and python_version < '3.14'",
  "tensorflow>=2.20; (platform_machine != 'x86_64' or sys_platform != 'linux') and python_version < '3.14'",
]

setuptools.setup(
  name="segjax",
  version=VERSION,
  description="Semantic segmentation in JAX: exact, sharded over 1 to N devices, resumable bit for bit.",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=[*setuptools.find_packages(include=["segjax", "segjax.*"]), "segjax.configs"],
  package_data={"segjax": ["py.typed", "tools/*.jinja"], "segjax.run.page": ["*.html", "*.css"]},
  package_dir={"segjax.configs": "configs"},  # At the top of the repository, and known by name (segjax/config/file.py).
  entry_points={"console_scripts": ["segjax = segjax.tools.verbs:main"]},
  python_requires=">=3.11",
  install_requires=[
    "absl-py",
    "flax>=0.12.8,<0.13",  # The NNX state API changed in 0.10, 0.11 and 0.12.
    "grain>=0.2.18,<0.3",  # Still 0.x: names move between minor releases.
    "importlib-resources",  # TFDS imports it when it builds a data set of one's own, and names it for old Python only.
    "jax>=0.10",  # The first release this was measured on; also tested on 0.12.
    "jinja2>=3.1",  # Fills in HTML pages.
    "matplotlib>=3.8",  # Draws the charts in them.
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",  # Its checkpoint manager is being replaced by another API.
    "pillow>=11",
    "safetensors",
    "simplejpeg>=1.9",  # Decodes JPEGs a sixth faster than Pillow, to the same bits, and tells damage that Pillow hides.
    "scipy",  # SBD's .mat files; distance transforms and connected components of instances. JAX needs it anyway.
    "tensorboard>=2.20",  # Writes and shows curves, and brings no TensorFlow.
    "tensorflow-datasets>=4.9.9",  # Brings no TensorFlow, which only building a data set needs. Imported when asked for.
    "tqdm",
  ],
  extras_require={
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "tensorflow": TENSORFLOW,  # Else grain loads the data. No wheels for Python 3.14 yet.
    "tflite": ["ai-edge-litert>=2.1"],  # Reads .tflite files; see pretrained/tflite.py. Brings no TensorFlow.
    "wandb": ["wandb>=0.20"],
    "mlflow": ["mlflow-skinny>=3", "alembic", "sqlalchemy"],  # The latter two: its default store is an SQLite file.
    "png": ["imagecodecs"],  # Decodes PNGs faster; see input_pipeline/images.py.
    "coco": ["pycocotools>=2.0.8"],  # segjax prepare coco.
    "rasters": ["imagecodecs", "tifffile"],  # Images of many channels or 16 bits; see input_pipeline/rasters.py.
    "hub": ["huggingface-hub>=1"],  # segjax export --push.
    "docs": [
      "mkdocs-jupyter>=0.25",
      "mkdocs-material>=9.6,<10",
      "mkdocstrings[python]>=1,<2",
    ],  # The site: mkdocs build --strict.
    "test": [
      "ai-edge-litert>=2.1",
      "imagecodecs",
      "ipykernel",
      "mkdocs-jupyter>=0.25",
      "mkdocs-material>=9.6,<10",
      "nbclient",  # Runs the notebooks.
      "mkdocstrings[python]>=1,<2",
      "wandb>=0.20",
      "mlflow-skinny>=3",
      "alembic",
      "sqlalchemy",
      "huggingface-hub>=1",
      "onnx",
      "onnx-ir",
      "onnxruntime",
      "cityscapesscripts",  # The official score to compare with.
      "pycocotools>=2.0.8",
      "pytest>=8",
      "pytest-xdist",  # Tests on all cores.
      "ruff==0.17.5",  # Pinned: another ruff formats differently and would fail CI by itself.
      "tifffile",
      *TENSORFLOW,
    ],
  },
)
