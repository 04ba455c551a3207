"""The index beside TFDS's shards: a cache, made again where it is damaged."""

import io

import numpy as np
import pytest
from PIL import Image

from segjax.input_pipeline import images
from segjax.input_pipeline.sources import tfds_store


def png(size):
  buffer = io.BytesIO()
  Image.fromarray(np.zeros(size, np.uint8)).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.mark.parametrize(
  "damage",
  [
    "",
    "[]",
    "{}",
    '{"names": [1, 2], "sizes": [[4, 6], [5, 3]]}',
    '{"names": ["a", "b"], "sizes": [3, 4]}',
    '{"names": ["a", "b"], "sizes": [[4, 6]]}',
    '{"names": 3, "sizes": 3}',
    "[" * 10**5,
    "\0",
  ],
)
def test_a_damaged_index_is_made_again(damage, tmp_path):
  records = [dict(image=png(size), mask=png(size), id=name) for size, name in (((4, 6), b"a"), ((5, 3), b"b"))]
  want = dict(names=["a", "b"], sizes=[(4, 6), (5, 3)])
  assert tfds_store._index(tmp_path, "train", records, "image", "mask", "id", images.Reading()) == want
  (path,) = tmp_path.glob("segjax_index_*.json")
  whole = path.read_text()
  path.write_text(damage)
  assert tfds_store._index(tmp_path, "train", records, "image", "mask", "id", images.Reading()) == want
  assert path.read_text() == whole
