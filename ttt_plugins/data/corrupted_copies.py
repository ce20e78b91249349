"""Corrupted copies of a source's images, in the layouts of ImageNet-C and CIFAR-10-C."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..errors import DataError, InputError
from ..utils.files import remove_abandoned_files, replacing
from ..utils.progress import progress_bar
from .corruptions import TENSOR_CORRUPTIONS
from .datasets import DATASETS, Dataset
from .decode import PICTURE_SUFFIXES, PictureError
from .loading import Transform, default_workers, to_pixels
from .published_corruptions import check_library, corrupt_as_published
from .source import ImageSource, Sample

__all__ = ["CorruptedCopies", "Report", "layout_of"]

#: Quality of the JPEG files, as in ImageNet-C.
_QUALITY = 85


@dataclass
class Report:
    """What a call of `CorruptedCopies.write` wrote.

    Attributes:
        written: number of files.
        kept: number of files that already existed.
        images: number of images of the source.
        skipped: one line for each damaged picture that was skipped.
    """

    written: int = 0
    kept: int = 0
    images: int = 0
    skipped: list[str] = field(default_factory=list)


class _Done(NamedTuple):
    """One image's result in a worker process, or its error."""

    row: int
    label: int | None = None
    target: str = ""
    written: int = 0
    kept: int = 0
    arrays: np.ndarray | None = None
    damaged: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class CorruptedCopies(TorchDataset):
    """Corrupts every image of a source and writes the results.

    A file that exists is kept, and files are written atomically, so that the same call resumes an
    interrupted run. Noise depends on the seed, the corruption, the severity
    and the image's row alone, not on the number of workers.

    Attributes:
        source: the clean images.
        spec: the data set whose layout is written.
        names: names of corruptions, among `PUBLISHED_CORRUPTIONS`.
        severities: integers from 1 to 5.
        transform: resizes and crops pictures beforehand; None leaves them as they are.
        seed: seed for the noise.
        limit: number of images, from the first; None for all.
        skip_damaged: skip damaged pictures (not for arrays, whose rows would be shifted).
        root: folder of the cells' folders; `write` sets it.
    """

    source: ImageSource
    spec: Dataset
    names: Sequence[str]
    severities: Sequence[int]
    transform: Transform | None = None
    seed: int = 0
    limit: int | None = None
    skip_damaged: bool = False
    root: Path = Path()

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def __getitem__(self, row: int) -> _Done:
        try:
            sample = self.source.read(row)
            pixels = to_pixels(sample, self.transform)
            if pixels.is_floating_point():
                raise DataError(f"{self.source.location}: images to corrupt must be uint8")
            image = pixels.permute(1, 2, 0).contiguous().numpy()
            if self.spec.layout == "npy":
                return _Done(row, sample.label, arrays=self._corrupt_all(image, row))
            target = _target(self.source, sample, row)
            written = self._write(image, row, target)
        except PictureError as error:
            return _Done(row, damaged=str(error))
        except (DataError, InputError, OSError) as error:
            return _Done(row, error=str(error))
        cells = len(self.names) * len(self.severities)
        return _Done(row, sample.label, target, written, cells - written)

    def write(self, out: Path, workers: int | None = None, progress: bool = True) -> Report:
        """Write the files below ``out`` in a folder of the data set's name.

        Args:
            out: folder; created if it is missing.
            workers: number of processes, 0 for none; by default one per CPU, at most 8.
            progress: whether to show a progress bar.

        Raises:
            InputError: the source does not suit the layout, or two of its pictures would be written
                to one file.
            DataError: the source cannot be read, or a file cannot be written.
            MissingDependencyError: a package that the corruptions need is not installed.
        """
        if set(self.names) - set(TENSOR_CORRUPTIONS):
            check_library()
        workers = default_workers() if workers is None else workers
        root = out / self.spec.title
        with _translated(root):
            root.mkdir(parents=True, exist_ok=True)
            if self.spec.layout == "npy":
                return self._write_arrays(root, workers, progress)
            return self._write_pictures(root, workers, progress)

    # -- one image, in a worker process --------------------------------------------------------

    def _corrupt(self, image: np.ndarray, name: str, severity: int, row: int) -> np.ndarray:
        variant = "cifar" if self.spec.layout == "npy" else "imagenet"
        seed = (self.seed, zlib.crc32(name.encode()), severity, row)
        return corrupt_as_published(image, name, severity, variant=variant, seed=seed)

    def _corrupt_all(self, image: np.ndarray, row: int) -> np.ndarray:
        side = self.spec.side
        if image.shape != (side, side, 3):
            raise DataError(
                f"{self.source.location}: row {row} is {image.shape[1]} x {image.shape[0]} pixels; "
                f"{self.spec.title} has {side} x {side}"
            )
        (name,) = self.names
        return np.stack([self._corrupt(image, name, s, row) for s in self.severities])

    def _write(self, image: np.ndarray, row: int, target: str) -> int:
        written = 0
        for name in self.names:
            for severity in self.severities:
                file = self.root / name / str(severity) / target
                if file.is_file():
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                remove_abandoned_files(file)
                corrupted = Image.fromarray(self._corrupt(image, name, severity, row))
                with replacing(file) as temporary:
                    corrupted.save(temporary, "JPEG", quality=_QUALITY, optimize=True)
                written += 1
        return written

    # -- all images ----------------------------------------------------------------------------

    def _done(self, workers: int) -> Iterator[_Done]:
        rows = range(len(self))
        loader = DataLoader(
            self,
            sampler=rows,
            batch_size=None,
            num_workers=min(workers, len(rows)),
            collate_fn=_unchanged,  # pyright: ignore[reportArgumentType]
        )
        for done in loader:
            if done.error is not None:
                raise DataError(done.error)
            if done.damaged and not self.skip_damaged:
                raise PictureError(f"{done.damaged}; repair or remove it, or skip damaged pictures")
            yield done

    def _write_pictures(self, root: Path, workers: int, progress: bool) -> Report:
        report, targets = Report(), set()
        total = len(self) * len(self.names) * len(self.severities)
        job = _with(self, root=root)
        with progress_bar(
            title=self.spec.title, total=total, unit="file", show=progress, leave=True
        ) as bar:
            for done in job._done(workers):
                if done.damaged:
                    report.skipped.append(done.damaged)
                    continue
                if done.target in targets:
                    raise InputError(
                        f"{self.source.location}: two pictures would be written to {done.target}; "
                        "give each its own name"
                    )
                targets.add(done.target)
                report.images += 1
                report.written += done.written
                report.kept += done.kept
                bar.update(done.written + done.kept)
        return report

    def _write_arrays(self, root: Path, workers: int, progress: bool) -> Report:
        rows, levels = self.spec.rows, self.spec.severities
        if not self.source.labelled:
            raise InputError(f"{self.source.location}: {self.spec.title} needs labels")
        if tuple(self.severities) != levels:
            raise InputError(f"{self.spec.title} needs all severities, {levels}")
        if len(self) > rows:
            raise InputError(
                f"{self.source.location} has {len(self):,} images; {self.spec.title} has {rows:,} "
                f"at each severity: give a limit of at most {rows:,}"
            )
        report = Report(images=len(self))
        # Rows after the last image stay empty (sparse files): RobustBench reads first rows only.
        shape = (len(levels), rows, self.spec.side, self.spec.side, 3)
        files = [root / f"{name}.npy" for name in self.names]
        missing = [file for file in files if not file.is_file()]
        report.kept = len(files) - len(missing)
        for file in missing:
            labels = np.zeros((len(levels), rows), np.int64)
            title = f"{self.spec.title} {file.stem}"
            remove_abandoned_files(file)
            remove_abandoned_files(root / "labels.npy")
            with replacing(file) as temporary:
                array = np.lib.format.open_memmap(
                    temporary, "w+", np.uint8, (len(levels) * rows, *shape[2:])
                )
                job = _with(self, names=(file.stem,), skip_damaged=False)
                images = job._done(workers)
                for done in progress_bar(
                    images, title, len(self), unit="image", show=progress, leave=True
                ):
                    array.reshape(shape)[:, done.row] = done.arrays
                    labels[:, done.row] = -1 if done.label is None else done.label
                array.flush()
                # Written before the array gets its name: an array that exists is never read again.
                with replacing(root / "labels.npy") as other, other.open("wb") as stream:
                    np.save(stream, labels.reshape(-1))
            report.written += 1
        return report


def _with(copies: CorruptedCopies, **changes: Any) -> CorruptedCopies:
    return CorruptedCopies(**(vars(copies) | changes))


def _unchanged(done: _Done) -> _Done:
    return done


@contextlib.contextmanager
def _translated(root: Path) -> Iterator[None]:
    """Convert failures to write below a folder into `DataError`."""
    try:
        yield
    except (DataError, InputError):
        raise
    except OSError as error:
        raise DataError(f"{root} cannot be written ({error.strerror or error})") from error


def _target(source: ImageSource, sample: Sample, row: int) -> str:
    """Where a picture is written in the folder of a cell: ``<class folder>/<file>``."""
    parts = [part for part in Path(sample.name).parts if part not in ("..", "/")]
    file = parts[-1] if parts and parts[-1].lower().endswith(PICTURE_SUFFIXES) else f"{row:08d}"
    if not file.lower().endswith((".jpg", ".jpeg")):
        file += ".jpeg"
    if source.classes and sample.label is not None:
        folder = source.classes[sample.label]
        if Path(folder).name != folder:
            raise DataError(f"{source.location}: class {folder!r} cannot be a folder's name")
        inner = parts[1:-1] if parts[0] == folder else []
        return str(Path(folder, *inner, file))
    if len(parts) > 1:
        return str(Path(parts[-2], file))
    return file if sample.label is None else str(Path(f"{sample.label:04d}", file))


def layout_of(source: ImageSource) -> str:
    """The data set, a key of `DATASETS`, whose layout suits a source's first picture."""
    sample = source.read(0)
    side = DATASETS["cifar10"].side
    if tuple(to_pixels(sample, None).shape[1:]) != (side, side):
        return "imagenet"
    return "cifar100" if source.classes and len(source.classes) == 100 else "cifar10"
