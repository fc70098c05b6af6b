"""TensorBoard's files, written without TensorFlow."""

import io
import pathlib
import platform
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import summary_v2 as scalar_summary
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util


class Writer:
  """Writes what clu's SummaryWriter writes; not thread-safe.

  Not through TensorBoard's EventFileWriter, which imports TensorFlow where it
  can and writes in a thread of its own.
  """

  def __init__(self, logdir: pathlib.Path):
    logdir.mkdir(parents=True, exist_ok=True)
    # Files are read in the order of their names.
    name = f'events.out.tfevents.{time.time():.6f}.{platform.node()}'
    file = open(logdir / name, 'xb')  # noqa: SIM115, `close` closes it.
    self._records = record_writer.RecordWriter(file)
    self.write_event(event_pb2.Event(file_version='brain.Event:2'))

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars` by their tags."""
    for tag, value in scalars.items():
      self._write_summary(step, scalar_summary.scalar_pb(tag, value))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes pictures, uint8 (height, width, 3), by their tags."""
    metadata = image_metadata.create_summary_metadata(None, None)
    for tag, pixels in images.items():
      image, png = Image.fromarray(pixels), io.BytesIO()
      image.save(png, 'PNG')
      tensor = tensor_util.make_tensor_proto(
        [str(image.width).encode(), str(image.height).encode(), png.getvalue()]
      )
      value = summary_pb2.Summary.Value(
        tag=tag, tensor=tensor, metadata=metadata
      )
      self._write_summary(step, summary_pb2.Summary(value=[value]))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what the run was made with."""
    self._write_summary(0, hparams_summary.hparams_pb(hparams))

  def write_event(self, event: event_pb2.Event) -> None:
    """Writes any other event."""
    if not event.wall_time:
      event.wall_time = time.time()
    self._records.write(event.SerializeToString())

  def flush(self) -> None:
    """Lets others see what was written."""
    self._records.flush()

  def close(self) -> None:
    """Ends the file."""
    self._records.close()

  def _write_summary(self, step: int, summary: summary_pb2.Summary) -> None:
    self.write_event(event_pb2.Event(step=step, summary=summary))
