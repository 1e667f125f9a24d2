"""Images to train on: the bundled digits, and MNIST, CIFAR10 and SVHN through torchvision.

Files are checked before they are read. The batches of CIFAR10 are pickles, and unpickling can run any code: each file must have
the MD5 digest that torchvision lists for it before it is opened as a pickle. Nobody knows how to make another file with a
given MD5 digest, so nothing but the published batches is ever unpickled. IDX files (MNIST) are plain bytes behind a header,
from which their size follows.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import MissingPackages, UsageError, digits, missing, require

__all__ = ["DATASETS", "DataError", "Images", "Part", "load"]

VALIDATION, LARGE = 10_000, 50_000  # the paper's number of validation samples, and from how many training samples it is used
SHARE = 5  # of smaller sets, one in so many
SPLIT_SEED = 0  # the split is the same in every run, whatever the seed of the weights
#: labels of all of these
CLASSES = 10

Raw = tuple[Tensor, Tensor, Tensor, Tensor]


class DataError(UsageError):
    """Files of a data set are missing, damaged, or not what they should be; the message names them."""


@dataclass(frozen=True, eq=False, repr=False)
class Part:
    """Images ``(N, C, H, W)`` as they were read, uint8 or float32; labels int64 ``(N,)``."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """A data set in three parts.

    Attributes:
        train, valid, test: see :class:`Part`.
        mean, std: of the training images by channel, ``(C, 1, 1)``.
    """

    name: str
    classes: int
    train: Part
    valid: Part
    test: Part
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, columns = self.train.x.shape[1:]
        return channels, height, columns

    def normalised(self, x: Tensor) -> Tensor:
        """A batch with mean 0 and standard deviation 1 by channel, in the dtype of ``mean``."""
        return (x.to(self.mean.dtype) - self.mean) / self.std

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Images:
        """The same on a device; ``dtype`` is that of normalised images."""
        train, valid, test = (Part(p.x.to(device), p.y.to(device)) for p in (self.train, self.valid, self.test))
        return Images(self.name, self.classes, train, valid, test, self.mean.to(device, dtype), self.std.to(device, dtype))


def load(name: str, root: Path | str = "data", *, download: bool = False) -> Images:
    """A data set, on the CPU, normalised in float32.

    Validation samples are split off the training part by a generator with a fixed seed: 10,000 of at least 50,000, as in the
    paper, and one in five of smaller sets.

    Arguments:
        name: ``"digits"`` (needs no files), ``"mnist"``, ``"cifar10"`` or ``"svhn"``.
        root: the folder that torchvision calls by this name.
        download: fetch files that are missing or damaged.
    Raises:
        UsageError: unknown name.
        MissingPackages: scikit-learn, torchvision or scipy are not installed, or torchvision cannot be imported.
        DataError: files are missing or damaged, or cannot be downloaded.
    """
    if name not in DATASETS:
        raise UsageError(f"--dataset is {name!r}; accepted are {', '.join(DATASETS)}")
    x, y, test_x, test_y = DATASETS[name](Path(root), download)
    for what, images, labels in (("training", x, y), ("test", test_x, test_y)):
        if len(images) != len(labels) or len(images) < SHARE:
            raise DataError(f"{name}: {len(images)} {what} images and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= CLASSES:
            raise DataError(
                f"{name}: {what} labels from {int(labels.min())} to {int(labels.max())}; expected 0 to {CLASSES - 1}"
            )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count = VALIDATION if len(x) >= LARGE else len(x) // SHARE
    chosen, left = order[:count], order[count:]
    train = Part(x[left], y[left])
    mean, std = _statistics(train.x)
    return Images(name, CLASSES, train, Part(x[chosen], y[chosen]), Part(test_x, test_y), mean, std)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, a channel at a time to bound the memory."""
    channels = [x[:, c].float() for c in range(x.shape[1])]
    mean, std = (torch.stack(s).view(-1, 1, 1) for s in zip(*((c.mean(), c.std()) for c in channels)))
    return mean, torch.where(std > 0, std, 1.0)


def _digits(root: Path, download: bool) -> Raw:
    d = digits.load()
    return d.train_x.view(-1, 1, 8, 8), d.train_y, d.test_x.view(-1, 1, 8, 8), d.test_y


def _mnist(root: Path, download: bool) -> Raw:
    datasets = _torchvision("mnist")
    folder = root / "MNIST" / "raw"
    parts = [(f"{part}-{kind}", dims) for part in ("train", "t10k") for kind, dims in (("images-idx3", 3), ("labels-idx1", 1))]
    files = [(folder / f"{name}-ubyte", _is_idx(dims)) for name, dims in parts]
    _have("mnist", files, download, lambda: datasets.MNIST(str(root), download=True))
    read = (datasets.mnist.read_image_file, datasets.mnist.read_label_file)
    x, y, test_x, test_y = (read[i % 2](str(path)) for i, (path, _) in enumerate(files))
    return x.unsqueeze(1), y, test_x.unsqueeze(1), test_y


def _cifar10(root: Path, download: bool) -> Raw:
    reader = _torchvision("cifar10").CIFAR10
    folder = root / reader.base_folder
    listed = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    files = [(folder / name, _digest_is(md5)) for name, md5 in listed]
    _have("cifar10", files, download, lambda: reader(str(root), download=True))
    found = [reader(str(root), train=train) for train in (True, False)]
    x, test_x = (torch.from_numpy(part.data.transpose(0, 3, 1, 2).copy()) for part in found)
    y, test_y = (torch.tensor(part.targets) for part in found)
    return x, y, test_x, test_y


def _svhn(root: Path, download: bool) -> Raw:
    require("scipy.io")
    reader = _torchvision("svhn").SVHN
    splits = ("train", "test")
    files = [(root / reader.split_list[s][1], _digest_is(reader.split_list[s][2])) for s in splits]
    _have("svhn", files, download, lambda: [reader(str(root), split=s, download=True) for s in splits])
    train, test = (reader(str(root), split=s) for s in splits)
    x, test_x = (torch.from_numpy(part.data.copy()) for part in (train, test))
    y, test_y = (torch.from_numpy(part.labels.copy()) for part in (train, test))
    return x, y, test_x, test_y


#: by the names that the command line takes; each returns images and labels to train on, and to test
DATASETS: dict[str, Callable[[Path, bool], Raw]] = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10, "svhn": _svhn}


def _torchvision(dataset: str) -> Any:
    """The module torchvision.datasets."""
    if missing("torchvision"):
        raise MissingPackages(
            f"torchvision, which reads {dataset}, is not installed; run `pip install torchvision`, in the version and build "
            f"that belong to torch {torch.__version__}"
        )
    try:
        return import_module("torchvision.datasets")
    except (ImportError, OSError, RuntimeError) as error:  # torchvision's operators do not fit this build of torch
        raise MissingPackages(
            f"torchvision, which reads {dataset}, cannot be imported beside torch {torch.__version__}: {error}"
        ) from error


Check = Callable[[Path], "str | None"]


def _have(name: str, files: list[tuple[Path, Check]], download: bool, fetch: Callable[[], object]) -> None:
    """Sees to it that all files are there and pass their checks.

    Arguments:
        files: each with a check that returns what is wrong, or None.
        fetch: downloads what torchvision finds missing.
    """
    faults = _faults(files)
    if faults and download:
        # torchvision takes a file that is there for a good one; it would not fetch it again
        for path in faults:
            path.unlink(missing_ok=True)
        try:
            fetch()
        except (OSError, RuntimeError) as error:
            raise DataError(f"--download: {name} could not be downloaded: {error}") from error
        faults = _faults(files)
    if faults:
        hint = "remove what is damaged, then " if any(path.exists() for path in faults) else ""
        lines = "".join(f"\n  {path}: {fault}" for path, fault in faults.items())
        raise DataError(f"--data-root: {name} cannot be read; {hint}use --download or put the files there:{lines}")


def _faults(files: list[tuple[Path, Check]]) -> dict[Path, str]:
    found = {path: check(path) if path.is_file() else "missing" for path, check in files}
    return {path: fault for path, fault in found.items() if fault is not None}


def _digest_is(expected: str) -> Check:
    def check(path: Path) -> str | None:
        found = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        return None if found.hexdigest() == expected else f"MD5 is {found.hexdigest()}, not {expected}; not opened"

    return check


def _is_idx(dims: int) -> Check:
    """An IDX file of unsigned bytes: two zeros, type 8, the number of dimensions, each size in 4 bytes, then the elements."""
    start = 4 + 4 * dims

    def check(path: Path) -> str | None:
        with path.open("rb") as file:
            head = file.read(start)
        if len(head) < start or head[:4] != bytes((0, 0, 8, dims)):
            return f"not an IDX file of {dims}-dimensional unsigned bytes"
        size, expected = path.stat().st_size, start + math.prod(struct.unpack(f">{dims}I", head[4:]))
        return None if size == expected else f"{size} bytes, but {expected} by its header"

    return check
