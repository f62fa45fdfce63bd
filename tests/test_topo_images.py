"""Readers of images: every format says the same, splits are kept, what is damaged is one line."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from constellation.errors import DataError
from constellation.topo.images import checked, divided, labelled
from constellation.topo.readers import read_idx, read_images

RNG = np.random.default_rng(0)


def idx(path: Path, array: np.ndarray) -> Path:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), RNG.integers(0, 10, n)


def test_mnist_keeps_its_split(tmp_path: Path) -> None:
    (a, ya), (b, yb) = digits(30), digits(12)
    idx(tmp_path / "train-images-idx3-ubyte.gz", a)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", ya)
    idx(tmp_path / "t10k-images-idx3-ubyte", b)
    idx(tmp_path / "t10k-labels-idx1-ubyte", yb)
    found = read_images(tmp_path)
    assert found.official and found.shape == (1, 28, 28) and found.classes == 10
    np.testing.assert_allclose(found.train.x[:, 0] * 255, a, atol=1e-4)
    assert (found.test.y == yb).all() and len(found.test) == 12


def test_one_part_alone_is_divided_always_in_the_same_way(tmp_path: Path) -> None:
    a, ya = digits(60)
    file = idx(tmp_path / "t10k-images-idx3-ubyte", a)
    idx(tmp_path / "t10k-labels-idx1-ubyte", ya)
    one, two = read_images(tmp_path), read_images(file)
    assert not one.official and len(one.test) == 10 and one.digest == two.digest
    whole = np.concatenate([one.train.x, one.test.x])
    assert {x.tobytes() for x in whole} == {x.tobytes() for x in (a[:, None] / np.float32(255)).astype(np.float32)}


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_binaries_are_channel_by_channel(tmp_path: Path, hundred: bool) -> None:
    x, y = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8), RNG.integers(0, 10, (5, 1), dtype=np.uint8)
    coarse = np.full((5, 1), 7, np.uint8) if hundred else np.zeros((5, 0), np.uint8)
    rows = np.concatenate([coarse, y, x.reshape(5, -1)], 1)
    for name in ("train.bin", "test.bin") if hundred else ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        rows.tofile(tmp_path / name)
    found = read_images(tmp_path)
    assert len(found.train) == (5 if hundred else 10) and found.official
    np.testing.assert_allclose(found.test.x * 255, x, atol=1e-4)
    assert (found.test.y == y[:, 0]).all()


def test_height_width_channel_becomes_channel_height_width_by_moving_axes(tmp_path: Path) -> None:
    """The original flattened HWC and viewed it as CHW: a red image came out striped."""
    red = np.zeros((12, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    red[0, 0, 0] = 9
    np.savez(tmp_path / "a.npz", x=red, y=np.arange(12))
    found = read_images(tmp_path / "a.npz")
    whole = np.concatenate([found.train.x, found.test.x])
    assert found.shape == (3, 8, 8)
    assert (whole[:, 0, 4:] == 1).all() and (whole[:, 1:, 4:] == 0).all()


def test_folders_of_images(tmp_path: Path) -> None:
    from PIL import Image

    pictures = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for i, picture in enumerate(pictures):
            place = tmp_path / "all" / part / ("cat", "dog")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{i:02}.png")
    found = read_images(tmp_path / "all")
    assert found.official and found.shape == (3, 6, 5) and found.classes == 2
    np.testing.assert_allclose(found.train.x[0] * 255, pictures[0].transpose(2, 0, 1), atol=1e-4)
    assert not read_images(tmp_path / "all" / "train").official
    plain = read_images(tmp_path / "all" / "train" / "cat")
    assert plain.train.y is None and plain.classes == 0


def test_the_digits_need_no_file() -> None:
    found = read_images("digits")
    assert found.shape == (1, 8, 8) and found.classes == 10 and len(found.train) + len(found.test) == 1797
    assert found.digest == read_images("digits").digest and found.train.x.min() >= 0 and found.train.x.max() == 1


def test_what_is_damaged_or_a_pickle_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(source, words: str) -> None:
        with pytest.raises(DataError, match=words) as told:
            read_images(source)
        assert "\n" not in str(told.value)

    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "no IDX, CIFAR binary, npz or image files")
    file = idx(tmp_path / "t10k-images-idx3-ubyte", digits(20)[0])
    file.write_bytes(file.read_bytes()[:-5])
    refused(file, "truncated or damaged")
    file.write_bytes(b"\0\0\x08")
    refused(file, "not an IDX file")
    file.write_bytes(b"\0\0\x08\x03\0\0")
    refused(tmp_path, "truncated in its header")
    (tmp_path / "x-idx3-ubyte.gz").write_bytes(gzip.compress(b"12345678" * 100)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "x-idx3-ubyte.gz")
    cifar = tmp_path / "cifar-10-batches-py"
    cifar.mkdir()
    (cifar / "data_batch_1").write_bytes(pickle.dumps({b"data": [1]}, protocol=2))
    refused(cifar, "a pickle can run any code")
    refused(cifar / "data_batch_1", "a pickle can run any code")
    np.savez(tmp_path / "o.npz", x=np.array([{}, {}], object))
    refused(tmp_path / "o.npz", "a pickle can run any code")
    np.savez(tmp_path / "n.npz", z=np.zeros(3))
    refused(tmp_path / "n.npz", "holds z; x_train")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 nothing")
    refused(tmp_path / "b.npz", "damaged")
    half = tmp_path / "half"
    half.mkdir()
    np.zeros(3073 * 2 - 1, np.uint8).tofile(half / "test_batch.bin")
    refused(half, "without data_batch_1")
    np.zeros(3073 * 2 - 1, np.uint8).tofile(half / "data_batch_1.bin")
    refused(half, "no whole number of records of 3073")


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.full((9, 4, 4), np.nan), None, "144 pixels are NaN"),
        (np.full((9, 4, 4), 7.0), None, "pixels from 7 to 7; scale them"),
        (np.full((9, 4, 4), -3), None, "0 to 255 are wanted"),
        (np.zeros((9, 4, 4, 2)), None, r"images of shape \(9, 4, 4, 2\)"),
        (np.zeros((9, 7)), None, r"images of shape \(9, 7\)"),
        (np.zeros((9, 4, 4)), np.arange(8), "9 images and 8 labels"),
        (np.zeros((9, 4, 4)), np.linspace(0, 1, 9), "whole numbers from 0 on"),
        (np.zeros((0, 4, 4)), None, "no image in it"),
    ],
)
def test_what_are_no_images_is_told(x, y, words: str) -> None:
    with pytest.raises(DataError, match=words):
        labelled(x, y, "here")


def test_what_cannot_be_learned_from_is_told() -> None:
    noise = RNG.random((24, 4, 4))
    some = divided("d", labelled(noise, np.zeros(24, int), "d"))
    assert checked(some, 20, False) is some
    with pytest.raises(DataError, match="21 codes for 20 images"):
        checked(some, 21, False)
    with pytest.raises(DataError, match=r"one class alone \(0\)"):
        checked(some, 4, True)
    with pytest.raises(DataError, match="needs labels and there are none"):
        checked(divided("d", labelled(noise, None, "d")), 4, True)
    with pytest.raises(DataError, match=r"every pixel is 0\.5"):
        checked(divided("d", labelled(np.full((24, 4, 4), 0.5), None, "d")), 4, False)
    with pytest.raises(DataError, match="all 20 images are the same"):
        checked(divided("d", labelled(np.repeat(noise[:1], 24, 0), None, "d")), 4, False)
    with pytest.raises(DataError, match="at least 6 are needed"):
        divided("d", labelled(noise[:3], None, "d"))
