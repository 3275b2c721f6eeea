"""CIFAR-10 and MNIST as text: the pixel values of an image, then the digit of its class. Read from
the hub's Parquet files, the binary releases, or PNG files in one folder a class."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssm_train.data.published import Part, Published, read_files
from ssm_train.data.records import Numbered, Records, json_type
from ssm_train.data.tasks.task import Record, Rendered
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.errors import InputError

NUMBERS = tuple(map(str, range(256)))

Stream = io.BufferedReader | gzip.GzipFile

LOSSLESS = {"RGB": ("RGB", "L", "P"), "L": ("L", "1")}
"""Mode of the pixels that are used -> modes of a PNG that hold the same values."""


@dataclass(frozen=True)
class ImageFormat:
    """What the images of a data set look like, how much of them is used, how their files are read.

    A record is {pixels, label} or {png, label}: the values that are used, row by row, those of a
    pixel side by side, as bytes; or a PNG's bytes or path. PNGs are decoded when a record is
    rendered and not sooner: splits are drawn from all records of a file.
    """

    side: int
    """Pixels of an edge."""
    crop: int
    """Pixels of an edge of the middle that is used."""
    mode: Literal["RGB", "L"]
    """Three values a pixel, or one."""
    field: str
    """Where the hub's records keep the image."""

    def middle(self, pixels: NDArray[np.uint8]) -> bytes:
        """The values that are used, of [side, side] or [side, side, 3] pixels."""
        start = (self.side - self.crop) // 2
        inside = slice(start, start + self.crop)
        return pixels[inside, inside].tobytes()

    def decode(self, png: Any) -> bytes:
        """The values that are used. Raises InputError without a place: unreadable, another size,
        other values than bytes of this mode."""
        from PIL import Image, UnidentifiedImageError

        if not isinstance(png, bytes | Path):
            raise InputError(f"the image is {json_type(png)}; expected the bytes of a PNG")
        source = io.BytesIO(png) if isinstance(png, bytes) else png
        try:
            with Image.open(source, formats=["PNG"]) as image:
                size, mode = image.size, image.mode
                if size == (self.side, self.side) and mode in LOSSLESS[self.mode]:
                    return self.middle(np.asarray(image.convert(self.mode)))
        except UnidentifiedImageError:
            raise InputError("not a PNG image") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"not a readable PNG image: {error}") from None
        raise InputError(
            f"an image of {size[0]} x {size[1]} pixels in mode {mode}; expected {self.side} x "
            f"{self.side} in mode {self.mode}"
        )

    def read(self, files: Sequence[Path]) -> Records:
        """The records of files of one layout, still as they are there if they are the hub's.

        Raises InputError here or while reading, with file and record: a layout that is not read,
        unreadable, cut off, not of this format.
        """
        if files[0].suffix == ".parquet":
            return read_files(files)
        if files[0].suffix == ".png":
            return read_files(files, _read_png)
        if "-ubyte" in files[0].name:
            images = _find_idx(files, "images")
            return Records(str(images), self._read_idx(images, _find_idx(files, "labels")))
        binary = [file for file in files if file.suffix == ".bin"]
        if not binary:
            raise InputError(
                f"{files[0]} is of CIFAR-10's Python version, pickles, which are never loaded; get "
                "the binary version (cifar-10-binary.tar.gz) or the hub's Parquet files"
            )
        return read_files(binary, lambda file: Records(str(file), self._read_cifar(file)))

    def clean(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record of the hub in the shape of the others. Raises KeyError: a field is missing."""
        if "png" in record or "pixels" in record:
            return record
        image = record[self.field]
        return {
            "png": image["bytes"] if isinstance(image, dict) else image,
            "label": record["label"],
        }

    def _read_cifar(self, file: Path) -> Iterator[Numbered]:
        """The binary version of CIFAR-10: a byte for the class, then all reds, greens and blues,
        each row by row (Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html)."""
        size = 1 + 3 * self.side * self.side
        with _open(file) as stream:
            count = -(-file.stat().st_size // size)
            for number in range(1, count + 1):
                data = _take(stream, size, f"{file}, record {number}")
                planes = np.frombuffer(data, np.uint8, offset=1)
                planes = planes.reshape(3, self.side, self.side)
                yield number, {"pixels": self.middle(planes.transpose(1, 2, 0)), "label": data[0]}

    def _read_idx(self, images: Path, labels: Path) -> Iterator[Numbered]:
        """MNIST's own files: unsigned bytes after a header, images apart from labels, maybe
        gzipped (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist)."""
        shape = (self.side, self.side)
        with _open(images) as image_stream, _open(labels) as label_stream:
            count = _read_idx_header(image_stream, images, shape)
            label_count = _read_idx_header(label_stream, labels, ())
            if count != label_count:
                raise InputError(f"{images} has {count} images and {labels} {label_count} labels")
            for number in range(1, count + 1):
                data = _take(image_stream, self.side**2, f"{images}, record {number}")
                (label,) = _take(label_stream, 1, f"{labels}, record {number}")
                pixels = np.frombuffer(data, np.uint8).reshape(shape)
                yield number, {"pixels": self.middle(pixels), "label": label}
            for stream, file in ((image_stream, images), (label_stream, labels)):
                if _read(stream, 1, str(file)):
                    raise InputError(f"{file} goes on after the {count} records of its header")


class ImageTask(ClassificationTask):
    """Which class an image is of. The prompt's field `pixels` is its values with a space between;
    they are text from here on only, because text takes four times the memory."""

    format: ImageFormat
    """How its images are decoded."""

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """One example. Raises InputError without a place: unusable image, class unknown."""
        if "png" in record:
            record = {**record, "pixels": self.format.decode(record["png"])}
        if isinstance(record.get("pixels"), bytes):
            record = {**record, "pixels": " ".join([NUMBERS[value] for value in record["pixels"]])}
        return super().render(record, training=training)


def _read_png(file: Path) -> Records:
    """One image in a folder that has the number or the name of its class."""
    return Records(str(file), [(1, {"png": file, "label": file.parent.name})])


def _find_idx(files: Sequence[Path], kind: str) -> Path:
    found = [file for file in files if kind in file.name]
    if not found:
        raise InputError(f"{files[0].parent} has no file of the {kind} beside {files[0].name}")
    return found[0]


def _read_idx_header(stream: Stream, file: Path, shape: tuple[int, ...]) -> int:
    """The number of items. Raises InputError unless they are unsigned bytes of that shape."""
    expected = bytes([0, 0, 8, 1 + len(shape)])  # two zeros, unsigned bytes, dimensions
    magic = _take(stream, 4, str(file))
    if magic != expected:
        raise InputError(
            f"{file} begins with bytes {magic.hex(' ')}, not the {expected.hex(' ')} of such an "
            "IDX file; get it again"
        )
    dimensions = 1 + len(shape)
    count, *sizes = struct.unpack(f">{dimensions}I", _take(stream, 4 * dimensions, str(file)))
    if tuple(sizes) != shape:
        raise InputError(
            f"{file}: images of {' x '.join(map(str, sizes))} pixels; expected "
            f"{' x '.join(map(str, shape))}"
        )
    return int(count)


def _open(file: Path) -> Stream:
    try:
        return gzip.open(file) if file.suffix == ".gz" else file.open("rb")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def _take(stream: Stream, size: int, place: str) -> bytes:
    """Exactly `size` bytes. Raises InputError where there are fewer, or they cannot be read."""
    data = _read(stream, size, place)
    if len(data) < size:
        raise InputError(f"{place}: {len(data)} of {size} bytes; the file is cut off, get it again")
    return data


def _read(stream: Stream, size: int, place: str) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{place}: cannot be read: {error}") from None


CIFAR = ImageFormat(side=32, crop=24, mode="RGB", field="img")
MNIST = ImageFormat(side=28, crop=28, mode="L", field="image")

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def classify(format: ImageFormat, prefix: str, cue: str, names: Sequence[str] = ()) -> ImageTask:
    """Prefix, pixels and cue are tokenized one by one; the answer is a digit. `names`: what the
    classes may be called in the data, instead of 0 to 9."""
    numbers = {number: f" {number}" for number in range(10)}
    return ImageTask(
        prompt=[prefix, " {pixels}", cue],
        label_field="label",
        labels=numbers | {name: numbers[number] for number, name in enumerate(names)},
        metrics=["accuracy"],
        format=format,
    )


SPLITS = {"train": Part("train", "kept"), "val": Part("train", "held_out"), "test": Part("test")}
"""Like TVT; the official split beside the training one is called test."""

DATASETS: dict[str, Published] = {
    "cifar-tvt": Published(
        task=classify(
            CIFAR,
            "classes : "
            + " , ".join(f"{number} {name}" for number, name in enumerate(CIFAR_CLASSES))
            + " \nred green blue of 24 x 24 pixels :",
            " \nclass :",
            CIFAR_CLASSES,
        ),
        folders=(
            *("cifar10", "uoft-cs/cifar10"),
            *("cifar-10-batches-bin", "cifar-10-batches-py", "cifar"),
        ),
        files={
            split: (
                *(f"plain_text/{split}-*.parquet", f"{split}-*.parquet"),
                *(release, f"cifar-10-batches-*/{release}"),
                f"{split}/*/*.png",
            )
            for split, release in (("train", "data_batch_*"), ("test", "test_batch*"))
        },
        hub="uoft-cs/cifar10",
        splits=SPLITS,
        read=CIFAR.read,
        clean=CIFAR.clean,
        source="unpack cifar-10-binary.tar.gz there, or copy the hub's uoft-cs/cifar10",
    ),
    "mnist": Published(
        task=classify(MNIST, "grey values of 28 x 28 pixels :", " \ndigit :"),
        folders=("mnist", "ylecun/mnist", "MNIST"),
        files={
            split: (
                *(f"mnist/{split}-*.parquet", f"{split}-*.parquet"),
                *(
                    f"{folder}{stem}-*-ubyte{packed}"
                    for folder in ("", "raw/", "MNIST/raw/")
                    for packed in ("", ".gz")
                ),
                f"{split}/*/*.png",
            )
            for split, stem in (("train", "train"), ("test", "t10k"))
        },
        hub="ylecun/mnist",
        splits=SPLITS,
        read=MNIST.read,
        clean=MNIST.clean,
        source="put the four IDX files there, or copy the hub's ylecun/mnist",
    ),
}
