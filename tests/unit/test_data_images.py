"""CIFAR-10 and MNIST in every layout give the same texts; what is damaged is named with its place.

The pixels are drawn here, and read back with Pillow's own getpixel and getchannel.
"""

import gzip
import io
import itertools
import random
import struct
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from pyarrow import parquet

from ssm_train.data.examples import render_records, tokenize_records
from ssm_train.data.published import find_split
from ssm_train.data.tasks.images import CIFAR_CLASSES, DATASETS
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

Labelled = list[tuple[Image.Image, int]]

SHAPES = {"cifar-tvt": ("RGB", 32, 4), "mnist": ("L", 28, 0)}  # mode, side, edge that is left out


def draw(name: str, count: int, seed: int = 0) -> Labelled:
    """Random images, each of another class than the one before."""
    mode, side, _ = SHAPES[name]
    size = side * side * len(mode.replace("L", "1"))
    values = random.Random(seed)
    return [
        (Image.frombytes(mode, (side, side), values.randbytes(size)), number * 7 % 10)
        for number in range(count)
    ]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images: Labelled, field: str) -> None:
    """As the hub's files are written, by the library that writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({field: datasets.Image(), "label": ClassLabel(num_classes=10)})
    columns = {field: [image for image, _ in images], "label": [n for _, n in images]}
    Dataset.from_dict(columns, features=features).to_parquet(path)


def write_cifar(path: Path, images: Labelled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    planes = [b"".join(image.getchannel(c).tobytes() for c in "RGB") for image, _ in images]
    path.write_bytes(b"".join(bytes([n]) + p for p, (_, n) in zip(planes, images, strict=True)))


def write_idx(folder: Path, stem: str, images: Labelled, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = b"".join(image.tobytes() for image, _ in images)
    files = {
        "images-idx3": struct.pack(">4I", 0x803, len(images), 28, 28) + pixels,
        "labels-idx1": struct.pack(">2I", 0x801, len(images)) + bytes(n for _, n in images),
    }
    for kind, content in files.items():
        path = folder / f"{stem}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)


def write_folders(folder: Path, images: Labelled, names=tuple(range(10))) -> None:
    for number, (image, label) in enumerate(images):
        path = folder / str(names[label]) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))


def expected_pixels(name: str, image: Image.Image) -> str:
    _, side, edge = SHAPES[name]
    inside = range(edge, side - edge)
    pixels = [image.getpixel((x, y)) for y in inside for x in inside]
    return " ".join(str(v) for p in pixels for v in (p if isinstance(p, tuple) else (p,)))


def expected(name: str, images: Labelled) -> list[tuple[str, str]]:
    return [(expected_pixels(name, image), f" {n}") for image, n in images]


def read(name: str, split: str, root: Path) -> list[tuple[str, str]]:
    """(pixels, label word) of each example, as the model would be given them."""
    task = DATASETS[name].task
    records = find_split(DATASETS[name], name, split, str(root), None).open()
    found = []
    for _, (example,) in render_records(task, records.placed(), training=split == "train"):
        prefix, pixels, cue, label = (segment.text for segment in example.segments)
        assert pixels[0] == " " and prefix[-1] == cue[-1] == ":" and not example.ends
        found.append((pixels[1:], label))
    return found


def test_values_stand_row_by_row_red_green_blue_of_the_middle(tmp_path):
    image = Image.new("RGB", (32, 32))
    for x, y in itertools.product(range(32), range(32)):
        image.putpixel((x, y), (x, 100 + y, 255))
    write_cifar(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", [(image, 9)])
    ((text, label),) = read("cifar-tvt", "test", tmp_path)
    assert text.startswith("4 104 255 5 104 255 6 104 255 ") and label == " 9"
    assert text.endswith(" 26 127 255 27 127 255")
    values = text.split(" ")
    assert len(values) == 1_728 and values[72:75] == ["4", "105", "255"]


def cifar_layouts(root: Path, train: Labelled, test: Labelled) -> dict[str, Path]:
    for folder in ("hub/cifar10/plain_text", "owner/uoft-cs/cifar10/plain_text"):
        write_parquet(root / folder / "train-00000-of-00002.parquet", train[:7], "img")
        write_parquet(root / folder / "train-00001-of-00002.parquet", train[7:], "img")
        write_parquet(root / folder / "test-00000-of-00001.parquet", test, "img")
    for folder in ("release/cifar-10-batches-bin", "inside/cifar/cifar-10-batches-bin"):
        write_cifar(root / folder / "data_batch_1.bin", train[:6])
        write_cifar(root / folder / "data_batch_2.bin", train[6:])
        write_cifar(root / folder / "test_batch.bin", test)
        (root / folder / "batches.meta.txt").write_text("airplane\n")
    return {name: root / name for name in ("hub", "owner", "release", "inside")}


def mnist_layouts(root: Path, train: Labelled, test: Labelled) -> dict[str, Path]:
    for folder in ("hub/mnist/mnist", "owner/ylecun/mnist/mnist"):
        write_parquet(root / folder / "train-00000-of-00001.parquet", train, "image")
        write_parquet(root / folder / "test-00000-of-00001.parquet", test, "image")
    for stem, images in (("train", train), ("t10k", test)):
        write_idx(root / "release" / "mnist", stem, images)
        write_idx(root / "packed" / "mnist", stem, images, packed=True)
        write_idx(root / "raw" / "MNIST" / "raw", stem, images)
        write_idx(root / "raw" / "MNIST" / "raw", stem, images, packed=True)
    return {name: root / name for name in ("hub", "owner", "release", "packed", "raw")}


@pytest.mark.parametrize("name", DATASETS)
def test_every_layout_gives_the_same_examples(tmp_path, name):
    train, test = draw(name, 11), draw(name, 4, seed=1)
    write = {"cifar-tvt": cifar_layouts, "mnist": mnist_layouts}[name]
    halves = Dataset.from_dict({"i": range(11)}).train_test_split(test_size=0.2, seed=123)
    kept, held_out = ([train[i] for i in halves[half]["i"]] for half in ("train", "test"))
    assert (len(kept), len(held_out)) == (8, 3)
    for layout, root in write(tmp_path, train, test).items():
        assert read(name, "test", root) == expected(name, test), layout
        assert read(name, "train", root) == expected(name, kept), layout
        assert read(name, "val", root) == expected(name, held_out), layout


@pytest.mark.parametrize(
    ("name", "folder", "names"),
    [
        ("cifar-tvt", "cifar10", CIFAR_CLASSES),
        ("cifar-tvt", "cifar", range(10)),
        ("mnist", "mnist", range(10)),
    ],
)
def test_png_files_in_a_folder_a_class(tmp_path, name, folder, names):
    train, test = draw(name, 20), draw(name, 5, seed=1)
    write_folders(tmp_path / folder / "train", train, names)
    write_folders(tmp_path / folder / "test", test, names)
    found = {split: read(name, split, tmp_path) for split in ("train", "val", "test")}
    assert [len(part) for part in found.values()] == [16, 4, 5]
    assert sorted(found["train"] + found["val"]) == sorted(expected(name, train))
    by_class = sorted(test, key=lambda pair: str(names[pair[1]]))
    assert found["test"] == expected(name, by_class)


@pytest.mark.parametrize("name", DATASETS)
def test_the_answer_is_one_token_and_pixels_are_words(tmp_path, name):
    images = draw(name, 10)
    write_parquet(tmp_path / "mnist/test-0.parquet", images, "image")
    write_parquet(tmp_path / "cifar10/test-0.parquet", images, "img")
    found = find_split(DATASETS[name], name, "test", str(tmp_path), None)
    task = found.published.task
    rendered = [task.render(record, training=False)[0] for _, record in found.open().rows]
    words = build_tokenizer((s.text for e in rendered for s in e.segments), {"type": "word"})
    data = tokenize_records(found.open(), task, words, training=False)
    assert len(set(data.class_ids)) == 10
    for i, (image, label) in enumerate(images):
        assert data.label_ids(i).tolist() == [data.class_ids[label]]
        assert f": {expected_pixels(name, image)} " in words.decode(data.prompt_ids(i))
    answers = [e.label for e in rendered]
    wrong = [answers[1], *answers[1:]]
    scores = task.score(wrong, [e.references for e in rendered], [""] * 10)
    assert scores == {"accuracy": 0.9, "out_of_cls": 0.0} and task.metrics == ["accuracy"]


def test_a_png_with_a_palette_or_without_colours_has_the_same_pixels(tmp_path):
    grey = draw("mnist", 1)[0][0].resize((32, 32))
    few = draw("cifar-tvt", 1)[0][0].quantize(64)
    write_folders(tmp_path / "cifar" / "test", [(grey, 0), (few, 1)])
    colours = [(grey.convert("RGB"), 0), (few.convert("RGB"), 1)]
    assert read("cifar-tvt", "test", tmp_path) == expected("cifar-tvt", colours)


def test_images_are_decoded_one_by_one_when_they_are_rendered(tmp_path):
    images = draw("cifar-tvt", 10)
    write_folders(tmp_path / "cifar/train", images)
    for path in (tmp_path / "cifar/train").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:500])
    published = DATASETS["cifar-tvt"]
    records = find_split(published, "cifar-tvt", "train", str(tmp_path), None).open()
    with pytest.raises(InputError, match=r"/train/\d/\d+.png, record 1: not a readable PNG"):
        list(render_records(published.task, records.placed(), training=True))

    write_cifar(tmp_path / "cifar/test_batch.bin", images[:3])
    with (tmp_path / "cifar/test_batch.bin").open("ab") as file:
        file.write(b"more")
    records = find_split(published, "cifar-tvt", "test", str(tmp_path), None).open()
    rows = iter(records.rows)
    assert [len(next(rows)[1]["pixels"]) for _ in range(3)] == [1_728] * 3
    with pytest.raises(InputError, match="test_batch.bin, record 4: 4 of 3073 bytes"):
        next(rows)


def read_damaged(name: str, root: Path) -> str:
    """The one line that is said of test data."""
    with pytest.raises(InputError) as caught:
        read(name, "test", root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img": {"bytes": png(Image.new("L", (28, 28)))}}, "2: an image of 28 x 28 pixels in mo"),
        ({"img": {"bytes": png(Image.new("RGBA", (32, 32)))}}, "in mode RGBA; expected 32 x 32 in"),
        ({"img": {"bytes": png(Image.new("I;16", (32, 32)))}}, "in mode I;16; expected 32 x 32 in"),
        ({"img": {"bytes": b"no image"}}, "record 2: not a PNG image"),
        ({"img": {"bytes": None}}, "record 2: the image is null; expected the bytes of a PNG"),
        ({"img": None}, "record 2: the image is null; expected the bytes of a PNG"),
        ({"label": 10}, "record 2: label 10 in field 'label'; known: 0, 1, "),
        ({"label": None}, "record 2: label None in field 'label'; known: 0, 1, "),
    ],
)
def test_hub_records_that_cannot_be_used(tmp_path, changes, message):
    path = tmp_path / "cifar10/plain_text/test-00001-of-00002.parquet"
    write_parquet(path.with_name("test-00000-of-00002.parquet"), draw("cifar-tvt", 3), "img")
    rows = [{"img": {"bytes": png(image)}, "label": n} for image, n in draw("cifar-tvt", 3)]
    rows[1] |= changes
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    said = read_damaged("cifar-tvt", tmp_path)
    assert said.startswith(f"{path}, record 2: ") and message in said


def test_other_fields_than_the_hubs(tmp_path):
    write_parquet(tmp_path / "cifar10/test-0.parquet", draw("cifar-tvt", 1), "picture")
    assert "record 1: no field 'img'; it has 'picture', 'label'" in read_damaged(
        "cifar-tvt", tmp_path
    )


def test_a_folder_that_is_no_class(tmp_path):
    write_folders(tmp_path / "mnist/test", draw("mnist", 3), names=[*range(7), "seven", 8, 9])
    said = read_damaged("mnist", tmp_path)
    assert said.startswith(f"{tmp_path}/mnist/test/seven/00001.png, record 1: label 'seven' in fie")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "test_batch.bin, record 3: 3072 of 3073 bytes; the file is cut o"),
        (
            lambda data: data[:3073] + b"\xff" + data[3074:],
            "test_batch.bin, record 2: label 255 in",
        ),
    ],
)
def test_damaged_binary_files(tmp_path, change, message):
    path = tmp_path / "cifar-10-batches-bin/test_batch.bin"
    write_cifar(path, draw("cifar-tvt", 3))
    path.write_bytes(change(path.read_bytes()))
    assert message in read_damaged("cifar-tvt", tmp_path)


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda data: data[4:], "idx3-ubyte begins with bytes 00 00 00 03, not the 00 00"),
        (LABELS, lambda data: b"\0\0\x08\3" + data[4:], "idx1-ubyte begins with bytes 00 00 08 03"),
        (IMAGES, lambda data: data[:9], "t10k-images-idx3-ubyte: 5 of 12 bytes; the file is cut"),
        (
            IMAGES,
            lambda data: data[:8] + struct.pack(">2I", 14, 56) + data[16:],
            "images of 14 x 56 pixels; expected 28 x 28",
        ),
        (IMAGES, lambda data: data[: 16 + 784 + 9], "idx3-ubyte, record 2: 9 of 784 bytes; the fi"),
        (LABELS, lambda data: data[:-2], "t10k-labels-idx1-ubyte, record 2: 0 of 1 bytes; the fi"),
        (LABELS, lambda data: struct.pack(">2I", 0x801, 2) + bytes(2), "has 3 images and "),
        (LABELS, lambda data: data[:9] + b"\x0c\0", "images-idx3-ubyte, record 2: label 12 in fi"),
        (IMAGES, lambda data: data + b"x", "idx3-ubyte goes on after the 3 records of its header"),
        (IMAGES + ".gz", lambda data: data[:1200], "idx3-ubyte.gz, record 2: cannot be read: Comp"),
        (
            IMAGES + ".gz",
            lambda data: data[:200] + b"?" * 50 + data[250:],
            "read: CRC check failed",
        ),
        (IMAGES + ".gz", gzip.decompress, "idx3-ubyte.gz: cannot be read: Not a gzipped file"),
    ],
)
def test_damaged_idx_files(tmp_path, name, change, message):
    write_idx(tmp_path / "mnist", "t10k", draw("mnist", 3), packed=name.endswith(".gz"))
    path = tmp_path / "mnist" / name
    path.write_bytes(change(path.read_bytes()))
    assert message in read_damaged("mnist", tmp_path)


def test_images_without_their_labels(tmp_path):
    write_idx(tmp_path / "mnist", "t10k", draw("mnist", 3))
    (tmp_path / "mnist" / LABELS).unlink()
    said = f"{tmp_path}/mnist has no file of the labels beside {IMAGES}"
    assert read_damaged("mnist", tmp_path) == said


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "cifar/cifar-10-batches-py/test_batch"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x80\x04.")
    said = (
        f"{path} is of CIFAR-10's Python version, pickles, which are never loaded; get the binary"
    )
    assert read_damaged("cifar-tvt", tmp_path).startswith(said)


def test_the_binary_version_is_taken_where_the_pickles_are_too(tmp_path):
    images = draw("cifar-tvt", 2)
    write_cifar(tmp_path / "cifar/cifar-10-batches-bin/test_batch.bin", images)
    (tmp_path / "cifar/cifar-10-batches-py").mkdir()
    (tmp_path / "cifar/cifar-10-batches-py/test_batch").write_bytes(b"\x80\x04.")
    assert read("cifar-tvt", "test", tmp_path) == expected("cifar-tvt", images)


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="none of the folders mnist, ylecun/mnist, MNIST; put the"):
        read("mnist", "test", tmp_path)
    (tmp_path / "mnist").mkdir()
    with pytest.raises(InputError, match=r"no file for the train split; expected mnist/train-\*"):
        read("mnist", "val", tmp_path)
    with pytest.raises(InputError, match="mnist has no split 'dev'; it has train, val, test"):
        read("mnist", "dev", tmp_path)
