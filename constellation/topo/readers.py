"""Reading images: IDX (MNIST), CIFAR-10 and CIFAR-100 binary, npz, folders of images, scikit-learn's digits.

    digits                     scikit-learn's 1,797 digits of 8 x 8 pixels: nothing to download
    FOLDER of IDX files        train-images-idx3-ubyte, train-labels-..., t10k-images-..., t10k-labels-... [.gz]
    FOLDER of CIFAR binaries   data_batch_1.bin ... test_batch.bin; train.bin, test.bin (CIFAR-100)
    FILE.npz                   x_train, y_train, x_test, y_test; or x and y
    FOLDER of images           train/CLASS/*.png and test/CLASS/*.png; or CLASS/*.png
    FILE                       one IDX file of images, with the labels beside it where they are

Official splits are kept. No pickle is ever read: CIFAR's Python version and object arrays are refused.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from constellation.errors import DataError
from constellation.topo.images import Images, Split, divided, labelled

DIGITS = "digits"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
NO_PICKLE = "a pickle can run any code when it is read and is refused; give the binary version (*.bin), IDX or npz"
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_images(source: str | Path) -> Images:
    """The data set that `source` names; DataError, one line, when there is none or it is damaged."""
    if str(source) == DIGITS:
        return _digits()
    path = Path(source)
    if not path.exists():
        raise DataError(f"--data {source}: no such file or folder; {DIGITS} needs none")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".npy" or "idx" not in path.name:
        _refuse_pickle(path)
        raise DataError(f"--data {path}: an IDX file (*-idx3-ubyte), .npz or a folder is wanted")
    return divided(path.name, labelled(read_idx(path), _labels_beside(path), str(path)))


def read_idx(path: Path) -> NDArray:
    """The array of an IDX file, plain or .gz; DataError where its size is not what its header says."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES or not data[3]:
        raise DataError(f"{path}: not an IDX file (it begins with {data[:4].hex() or 'nothing'}); see MNIST's")
    kind, dims = np.dtype(_TYPES[data[2]]), data[3]
    begin = 4 + 4 * dims
    if len(data) < begin:
        raise DataError(f"{path}: truncated in its header; copy it again")
    shape = struct.unpack(f">{dims}I", data[4:begin])
    wanted = begin + math.prod(shape) * kind.itemsize
    if len(data) != wanted:
        raise DataError(f"{path}: {len(data):,} bytes, its header says {wanted:,}: truncated or damaged; copy it again")
    return np.frombuffer(data, kind, offset=begin).reshape(shape).astype(kind.newbyteorder("="))


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"--data {DIGITS} needs scikit-learn: pip install 'constellation[topo]'") from None
    found = load_digits()
    return divided(DIGITS, labelled((found.images / 16).astype(np.float32), found.target, DIGITS))


def _folder(path: Path) -> Images:
    names = sorted(p for p in path.iterdir() if p.is_file())
    if any("idx3-ubyte" in p.name for p in names):
        return _mnist(path, names)
    if any(p.suffix == ".bin" for p in names):
        return _cifar(path, names)
    found = [p for p in names if p.suffix == ".npz"]
    if len(found) == 1:
        return _npz(found[0])
    for file in names:
        _refuse_pickle(file)
    return _pictures(path)


def _mnist(path: Path, names: list[Path]) -> Images:
    parts: dict[str, Split] = {}
    for file in names:
        if "idx3-ubyte" in file.name:
            part = "train" if "train" in file.name else "test"
            if part in parts:
                raise DataError(f"{path}: two files of {part} images, {file.name} the second; leave one")
            parts[part] = labelled(read_idx(file), _labels_beside(file), str(file))
    if len(parts) == 2:
        return Images(path.name, parts["train"], parts["test"], True)
    return divided(path.name, next(iter(parts.values())))


def _labels_beside(images: Path) -> NDArray | None:
    """Of an IDX file of images its labels: the same name with labels-idx1 for images-idx3."""
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (stem, f"{stem}.gz"):
        if name != images.name and (images.parent / name).exists():
            return read_idx(images.parent / name)
    return None


def _cifar(path: Path, names: list[Path]) -> Images:
    """CIFAR-10: a label and 3 x 32 x 32 bytes, channel by channel; CIFAR-100 has a coarse label before the fine one."""
    found = {p.name: p for p in names if p.suffix == ".bin"}
    if "test_batch.bin" in found:
        before, train, test = 1, sorted(n for n in found if n.startswith("data_batch")), "test_batch.bin"
    elif {"train.bin", "test.bin"} <= found.keys():
        before, train, test = 2, ["train.bin"], "test.bin"
    else:
        raise DataError(
            f"{path}: {', '.join(found)} are no CIFAR: data_batch_1.bin ... test_batch.bin, or train.bin, test.bin"
        )
    if not train:
        raise DataError(f"{path}: test_batch.bin without data_batch_1.bin ...; copy them too")
    parts = [np.concatenate([_records(found[n], before) for n in some]) for some in (train, [test])]
    splits = [labelled(rows[:, before:].reshape(-1, 3, 32, 32), rows[:, before - 1].astype(np.int64), str(path))
              for rows in parts]  # fmt: skip
    return Images(path.name, splits[0], splits[1], True)


def _records(file: Path, before: int) -> NDArray[np.uint8]:
    data = np.fromfile(file, np.uint8)
    size = before + 3072
    if not len(data) or len(data) % size:
        raise DataError(
            f"{file}: {len(data):,} bytes are no whole number of records of {size}: truncated; copy it again"
        )
    return data.reshape(-1, size)


def _npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except ValueError as error:
        raise DataError(f"{path}: {NO_PICKLE if 'pickle' in str(error) else 'damaged: ' + str(error)}") from None
    except Exception as error:  # whatever zip makes of a damaged file
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); copy it again") from None
    if {"x_train", "x_test"} <= arrays.keys():
        parts = [
            labelled(arrays[f"x_{part}"], arrays.get(f"y_{part}"), f"{path}: x_{part}") for part in ("train", "test")
        ]
        return Images(path.stem, parts[0], parts[1], True)
    if "x" in arrays:
        return divided(path.stem, labelled(arrays["x"], arrays.get("y"), str(path)))
    raise DataError(
        f"{path}: holds {', '.join(arrays) or 'nothing'}; x_train, y_train, x_test, y_test are wanted, or x, y"
    )


def _pictures(path: Path) -> Images:
    if (path / "train").is_dir() and (path / "test").is_dir():
        names = sorted(p.name for p in (path / "train").iterdir() if p.is_dir())
        parts = [_classes(path / part, names) for part in ("train", "test")]
        return Images(path.name, parts[0], parts[1], True)
    return divided(path.name, _classes(path, sorted(p.name for p in path.iterdir() if p.is_dir())))


def _classes(path: Path, names: list[str]) -> Split:
    """Images in a folder for each class, or all in one, without labels."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"--data {path}: folders of images need pillow: pip install 'constellation[topo]'") from None
    files = [
        (f, label)
        for label, name in enumerate(names)
        for f in sorted((path / name).glob("*"))
        if (path / name).is_dir()
    ]
    labels = True
    if not files:
        files, labels = [(f, 0) for f in sorted(path.glob("*"))], False
    files = [(f, label) for f, label in files if f.suffix.lower() in PICTURES]
    if not files:
        raise DataError(f"--data {path}: no IDX, CIFAR binary, npz or image files in it; {DIGITS} needs none")
    found = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("1", "L", "I", "I;16")
                found.append(np.asarray(image.convert("L" if grey else "RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{file}: no image that can be read ({' '.join(str(error).split())}); remove it") from None
        if found[-1].shape != found[0].shape:
            raise DataError(f"{file}: of shape {found[-1].shape}, the first image is {found[0].shape}; make them alike")
    return labelled(np.stack(found), np.array([label for _, label in files]) if labels else None, str(path))


def _refuse_pickle(path: Path) -> None:
    """DataError where a file looks like a pickle, by its name or its first bytes."""
    with path.open("rb") as file:
        first = file.read(2)
    if path.suffix in (".pkl", ".pickle", ".pt", ".pth") or (
        first[:1] == b"\x80" and first[1:2] <= b"\x05" and first[1:]
    ):
        raise DataError(f"{path}: {NO_PICKLE}")
    if path.suffix == ".npy":
        raise DataError(f"{path}: one .npy has no labels and no split; put x and y into an .npz")
