"""Data sets: how they are split and normalised, and files in the formats of MNIST, CIFAR10 and SVHN, whole and damaged.

The files are small ones that the tests write. torchvision, which reads them, imports only beside a CUDA build of torch
(``make test-cuda-build``); elsewhere these tests are skipped.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from frog_cuda.__main__ import main
from frog_cuda.experiments import MissingPackages, UsageError, datasets
from frog_cuda.experiments import digits as bundled
from frog_cuda.experiments.datasets import DataError, load

try:
    import torchvision
except Exception as error:  # without torch's operators it raises whatever its registration meets
    torchvision, WHY = None, f"torchvision does not import here: {error}"
else:
    WHY = ""

reads_files = pytest.mark.skipif(torchvision is None, reason=WHY)


# ---- splitting and normalising


def test_digits() -> None:
    images, again = load("digits"), load("digits")
    assert images.shape == (1, 8, 8) and images.classes == 10
    assert [len(p.x) for p in (images.train, images.valid, images.test)] == [1150, 287, 360]
    assert torch.equal(images.valid.x, again.valid.x) and torch.equal(images.train.y, again.train.y)
    every = torch.cat([images.train.x, images.valid.x, images.test.x]).flatten(1)
    labels = torch.cat([images.train.y, images.valid.y, images.test.y])
    d = bundled.load()
    known = {tuple(x.tolist()): int(y) for x, y in zip(torch.cat([d.train_x, d.test_x]), torch.cat([d.train_y, d.test_y]))}
    assert len({tuple(x) for x in every.tolist()}) == len(known) == 1797, "each image is in one part"
    assert all(known[tuple(x)] == y for x, y in zip(every.tolist(), labels.tolist()))


def test_normalised() -> None:
    images = load("digits").to("cpu", torch.float64)
    x = images.normalised(images.train.x)
    assert x.dtype == torch.float64 and x.mean().abs() < 1e-6 and (x.std() - 1).abs() < 1e-6
    torch.testing.assert_close(x * images.std + images.mean, images.train.x.double())


def test_a_constant_channel_stays_finite() -> None:
    x = torch.stack([torch.full((6, 4, 4), 3, dtype=torch.uint8), torch.arange(96, dtype=torch.uint8).view(6, 4, 4)], 1)
    mean, std = datasets._statistics(x)
    assert mean.flatten().tolist() == [3, 47.5] and std[0] == 1 and std[1] == pytest.approx(x[:, 1].float().std().item())


@pytest.mark.parametrize(("count", "held_out"), [(50_000, 10_000), (60_000, 10_000), (49_999, 9_999), (10, 2)])
def test_validation_samples(count: int, held_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbered(root: Path, download: bool) -> datasets.Raw:
        x = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)
        return x, torch.arange(count) % 10, torch.zeros(9, 1, 1, 1), torch.zeros(9, dtype=torch.int64)

    monkeypatch.setitem(datasets.DATASETS, "digits", numbered)
    images = load("digits")
    assert len(images.valid.x) == held_out
    assert sorted(torch.cat([images.train.x, images.valid.x]).flatten().tolist()) == list(range(count))
    assert torch.equal(images.valid.x.flatten() % 10, images.valid.y.float())
    assert images.mean.item() == pytest.approx(images.train.x.mean().item(), rel=1e-5), "of the training samples alone"


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="--dataset is 'letters'; accepted are digits, mnist, cifar10, svhn"):
        load("letters")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_without_torchvision(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets, "missing", lambda *modules: ["torchvision"])
    assert main(["train", "--dataset", name, "--lr", "1"]) == 1
    assert f"torchvision, which reads {name}, is not installed; run `pip install torchvision`" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_torchvision_that_does_not_import(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr(datasets, "missing", lambda *modules: [])
    monkeypatch.setattr(datasets, "import_module", fail)
    with pytest.raises(MissingPackages, match="which reads mnist, cannot be imported beside torch .*torchvision::nms"):
        load("mnist")


# ---- files of the published formats


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def random_images(count: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(count)
    return random.integers(0, 256, (count, *shape), np.uint8), random.permutation(np.arange(count) % 10).astype(np.uint8)


Files = dict[str, bytes]
Published = tuple[str, Files, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def mnist_files(monkeypatch: pytest.MonkeyPatch) -> Published:
    x, y = random_images(30, 28, 28)
    test_x, test_y = random_images(20, 28, 28)
    files = {"train-images-idx3-ubyte": idx(x), "train-labels-idx1-ubyte": idx(y)}
    files |= {"t10k-images-idx3-ubyte": idx(test_x), "t10k-labels-idx1-ubyte": idx(test_y)}
    return "MNIST/raw", files, x[:, None], y, test_x[:, None], test_y


def cifar_batch(x: np.ndarray, y: np.ndarray) -> bytes:
    return pickle.dumps({b"data": x.reshape(len(x), -1), b"labels": y.tolist(), b"batch_label": b"small"}, protocol=2)


def latin(content: bytes) -> bytes:
    """The same with keys as str, as the published files have them for a reader that decodes latin1."""
    return pickle.dumps({k.decode(): v for k, v in pickle.loads(content).items()}, protocol=2)


def cifar_files(monkeypatch: pytest.MonkeyPatch) -> Published:
    x, y = random_images(50, 3, 32, 32)
    test_x, test_y = random_images(20, 3, 32, 32)
    files = {f"data_batch_{i + 1}": cifar_batch(x[i::5], y[i::5]) for i in range(5)}
    files["test_batch"] = cifar_batch(test_x, test_y)
    files = {name: latin(content) for name, content in files.items()}
    files["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=2)
    digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    reader = torchvision.datasets.CIFAR10
    monkeypatch.setattr(reader, "train_list", [[f"data_batch_{i + 1}", digests[f"data_batch_{i + 1}"]] for i in range(5)])
    monkeypatch.setattr(reader, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": digests["batches.meta"]})
    order = np.concatenate([np.arange(50)[i::5] for i in range(5)])
    return reader.base_folder, files, x[order], y[order], test_x, test_y


def svhn_files(monkeypatch: pytest.MonkeyPatch) -> Published:
    import io

    from scipy.io import savemat

    parts = [random_images(count, 3, 32, 32) for count in (30, 20)]
    files, split_list = {}, dict(torchvision.datasets.SVHN.split_list)
    for split, (x, y) in zip(("train", "test"), parts):
        content = io.BytesIO()
        savemat(content, {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None]})  # 0 is written as 10
        files[f"{split}_32x32.mat"] = content.getvalue()
        split_list[split] = [split_list[split][0], f"{split}_32x32.mat", hashlib.md5(content.getvalue()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)
    return ".", files, *parts[0], *parts[1]


FORMATS: dict[str, Callable[[pytest.MonkeyPatch], Published]] = {
    "mnist": mnist_files,
    "cifar10": cifar_files,
    "svhn": svhn_files,
}


def write(root: Path, folder: str, files: Files) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root / folder


@reads_files
@pytest.mark.parametrize("name", FORMATS)
def test_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files, x, y, test_x, test_y = FORMATS[name](monkeypatch)
    write(tmp_path, folder, files)
    images = load(name, tmp_path)
    assert images.train.x.dtype == torch.uint8 and images.shape == x.shape[1:]
    assert torch.equal(images.test.x, torch.from_numpy(test_x)) and images.test.y.tolist() == test_y.tolist()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(datasets.SPLIT_SEED))
    got_x, got_y = torch.cat([images.valid.x, images.train.x]), torch.cat([images.valid.y, images.train.y])
    assert torch.equal(got_x, torch.from_numpy(x)[order]) and got_y.tolist() == y[order.numpy()].tolist()
    batch = images.normalised(images.train.x)
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-5


@reads_files
@pytest.mark.parametrize("name", FORMATS)
def test_training_on_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files, *_ = FORMATS[name](monkeypatch)
    write(tmp_path, folder, files)
    options = f"train --dataset {name} --data-root {tmp_path} --width 8 --lr 0.01 --k 2 --batch 8 --epochs 1 --output"
    assert main([*options.split(), str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / f"{name}-fc-width8-orthogonal-k2-seed0" / "result.json").exists()


@reads_files
@pytest.mark.parametrize("name", FORMATS)
def test_missing_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files, *_ = FORMATS[name](monkeypatch)
    with pytest.raises(DataError, match="use --download or put the files there") as caught:
        load(name, tmp_path)
    assert all(f"{tmp_path / folder / file}: missing" in str(caught.value) for file in files)
    first, *others = files
    write(tmp_path, folder, {file: files[file] for file in others})
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    assert str(caught.value).endswith(f":\n  {tmp_path / folder / first}: missing"), "the others are not named"


@reads_files
@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "flipped"])
@pytest.mark.parametrize(
    ("name", "file"), [(n, i) for n, count in (("mnist", 4), ("cifar10", 7), ("svhn", 2)) for i in range(count)]
)
def test_damaged_files(name: str, file: int, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files, *_ = FORMATS[name](monkeypatch)
    chosen = list(files)[file]
    content = bytearray(files[chosen])
    if damage == "flipped":
        content[3] ^= 1  # of an IDX file, the number of dimensions
    changed = {"cut": content[:-1], "longer": content + b"\0", "empty": b"", "flipped": content}[damage]
    path = write(tmp_path, folder, {**files, chosen: bytes(changed)}) / chosen
    with pytest.raises(DataError, match="remove what is damaged, then use --download") as caught:
        load(name, tmp_path)
    fault = "IDX file|bytes, but" if name == "mnist" else "MD5 is .*, not .*; not opened"
    assert caught.match(f"{path}: .*({fault})")
    assert str(caught.value).count("\n") == 1, "only what is damaged is named"


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@reads_files
@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_other_pickles_are_not_opened(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files, *_ = cifar_files(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, folder, {**files, file: pickle.dumps(Payload())})
    with pytest.raises(DataError, match=f"{file}: MD5 is"):
        load("cifar10", tmp_path)
    assert not Path("ran").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("ran").exists(), "the payload works where it is opened"


@reads_files
def test_old_files_of_torchvision_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions of torchvision kept MNIST in files of torch.save."""
    folder, files, *_, test_x, _ = mnist_files(monkeypatch)
    write(tmp_path, folder, files)
    write(tmp_path, "MNIST/processed", {"training.pt": b"anything", "test.pt": b"anything"})
    assert torch.equal(load("mnist", tmp_path).test.x, torch.from_numpy(test_x))


@reads_files
@pytest.mark.parametrize("labels", [29, 31])
def test_labels_must_fit_images(labels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files, *_ = mnist_files(monkeypatch)
    write(tmp_path, folder, {**files, "train-labels-idx1-ubyte": idx(np.zeros(labels, np.uint8))})
    with pytest.raises(DataError, match=f"mnist: 30 training images and {labels} labels"):
        load("mnist", tmp_path)
    write(tmp_path, folder, {**files, "train-labels-idx1-ubyte": idx(np.full(30, 10, np.uint8))})
    with pytest.raises(DataError, match="mnist: training labels from 10 to 10; expected 0 to 9"):
        load("mnist", tmp_path)


@reads_files
@pytest.mark.parametrize("name", FORMATS)
def test_download(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing or damaged is fetched by torchvision; a failure is told."""
    folder, files, x, *_ = FORMATS[name](monkeypatch)
    reader = {"mnist": "MNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}[name]
    reader = getattr(torchvision.datasets, reader)
    calls: list[str] = []

    def no_network(self: Any) -> None:
        raise URLError("no route")

    def fetch(self: Any) -> None:
        calls.append(name)
        assert calls[1:] or not damaged.exists(), "torchvision would keep it"
        write(tmp_path, folder, files)

    damaged = write(tmp_path, folder, {**files, list(files)[0]: b""}) / list(files)[0]
    monkeypatch.setattr(reader, "download", no_network)
    with pytest.raises(DataError, match=f"--download: {name} could not be downloaded: .*no route"):
        load(name, tmp_path, download=True)
    monkeypatch.setattr(reader, "download", fetch)
    assert len(load(name, tmp_path, download=True).train.x) + len(x) // 5 == len(x)
    assert calls
    calls.clear()
    load(name, tmp_path, download=True)
    assert not calls, "everything is there"
