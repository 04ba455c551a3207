"""Scalars and pictures for TensorBoard, in its own records, without TensorFlow.

`tensorboard.summary.Writer` imports TensorFlow where that is installed, and has no pictures; tensorboardX's writer writes
records in a thread, whose failure on a full disk would go unseen.
"""

import io
import pathlib
import socket
import time

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
  """A new file of TensorBoard events in `folder`; each call adds one event, on disk when it returns."""

  def __init__(self, folder: pathlib.Path):
    now = time.time()  # TensorBoard reads a folder's files in the order of their names.
    self._path = folder / f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}"
    self._append(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Adds {tag: value}."""
    self._summary(step, [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

  def picture(self, step: int, tag: str, picture: np.ndarray) -> None:
    """Adds [H, W, 3] uint8, as PNG."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    height, width, channels = picture.shape
    image = summary_pb2.Summary.Image(
      height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
    )
    self._summary(step, [summary_pb2.Summary.Value(tag=tag, image=image)])

  def _summary(self, step: int, values: list) -> None:
    self._append(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))

  def _append(self, event: event_pb2.Event) -> None:
    with self._path.open("ab") as file:
      RecordWriter(file).write(event.SerializeToString())
