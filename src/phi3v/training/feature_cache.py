"""Training samples whose images have been through the frozen tower already.

In come samples as `data.encode` makes them, one after the other, and the features of a model; out come the same samples
with `image_features` instead of pixels where the features are kept, and the count of what is and is not. Of a row all
of whose images are kept no file is opened again, by a later run with the same store neither. Knows nothing about the
Trainer.
"""

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from phi3v.data.encode import EncodedRows
from phi3v.data.encode_seen import encode_seen, file_name
from phi3v.errors import DataError, TrainingError
from phi3v.features.collate import use_features
from phi3v.features.store import FeatureStore
from phi3v.features.vision import PIXELS, Example, VisionFeatures, image_name, images_of
from phi3v.passthrough import first_line
from phi3v.training.disk_space import size_text
from phi3v.training.loader_watch import WatchedWorkers, taking_over

_GIVE_UP = 16
"""So many images in a row that do not fit end the look: to open all others for a smaller one, or one that was seen
before, would take longer than it saves."""


@dataclass(frozen=True)
class FeatureReport:
    """What is kept of a run's images.

    Attributes:
        cache: memory or disk.
        images: different images that were looked at.
        kept: those of them whose features are kept.
        computed: those that went through the tower for it; the others were kept by an earlier run.
        kept_bytes: what the kept ones take.
        limit_bytes: the bound.
        rows: training and validation rows with images; those that were not looked at count as such.
        whole_rows: rows all of whose images are kept.
        needed_bytes: what all would take, as far as the rows that were looked at tell.
        trouble: why nothing more could be kept, None where it is the bound or all is kept.
    """

    cache: str
    images: int
    kept: int
    computed: int
    kept_bytes: int
    limit_bytes: int
    rows: int
    whole_rows: int
    needed_bytes: int
    trouble: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the features of all images are kept."""
        return self.whole_rows == self.rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "line": str(self)}

    def __str__(self) -> str:
        """One line: what is kept, what is not, why, and the way out.

        Example: "features of 260 images are kept in memory (4.0 GB); the images of 9740 of 10000 rows go through the
        tower each time: vision.cache_gb=4.0 is full, all need about 154.2 GB (vision.cache_gb, or vision.cache=disk)".
        """
        where = {"memory": "in memory", "disk": "on disk"}[self.cache]
        images = f"{self.kept} image{'' if self.kept == 1 else 's'}"
        kept = f"features of {images} are kept {where} ({size_text(self.kept_bytes)})"
        if self.complete:
            return kept
        left = f"{kept}; the images of {self.rows - self.whole_rows} of {self.rows} rows go through the tower each time"
        if self.trouble is not None:
            return f"{left}: {self.trouble}; free space there, or name another folder in vision.cache_folder"
        ways = "vision.cache_gb, or vision.cache=disk" if self.cache == "memory" else "vision.cache_gb"
        full = f"vision.cache_gb={self.limit_bytes / 10**9:g} is full"
        return f"{left}: {full}, all need about {size_text(self.needed_bytes)} ({ways})"


class FeatureRows(Dataset[Example]):
    """Samples with features in place of the pixels of those images that have them.

    Features that another process took away meanwhile are missed and nothing else: the sample then has pixels again.
    """

    def __init__(self, samples: Any, store: FeatureStore, seen: Sequence["SeenRow | None"]) -> None:
        """Keep the samples, and what is known of the first ones.

        Args:
            samples: with pixels.
            store: of their features.
            seen: of each row what a look at it found, None for rows without kept images.
        """
        self._samples = samples
        self._store = store
        self._seen = seen

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:
        """The sample of a row."""
        seen = self._seen[index]
        if seen is None:
            return self._samples[index]
        features = [None if name is None else self._store.get(name) for name in seen.names]
        whole = [one for one in features if one is not None]
        if seen.rest is not None and len(whole) == len(features):
            return {**seen.rest.example(), "image_features": torch.cat(whole)}
        return use_features(self._samples[index], features)


@dataclass(frozen=True, slots=True)
class SeenRow:
    """What stays in memory of a row: a hundred bytes, and a thousand more where its files need not be opened again.

    Attributes:
        names: of its images' features; None for an image that is not kept.
        rest: the row without its pixels, where all its images are kept.
    """

    names: tuple[str | None, ...]
    rest: "Packed | None"


@dataclass(frozen=True, slots=True)
class Packed:
    """Small integer tensors as bytes, equal neighbours once.

    Example: input_ids [5, 9, 9, 9, 7] are the values [5, 9, 7] and the counts [1, 3, 1]; the 2,509 tokens of an image
    are one value and one count.

    Attributes:
        parts: name -> type, shape, values and counts.
    """

    parts: dict[str, tuple[torch.dtype, tuple[int, ...], bytes, bytes]]

    @classmethod
    def of(cls, example: Example) -> "Packed":
        """Everything of an example but its pixels."""
        parts = {}
        for name, tensor in example.items():
            if name not in PIXELS:
                values, counts = torch.unique_consecutive(tensor.flatten(), return_counts=True)
                runs = (values.numpy().tobytes(), counts.to(torch.int32).numpy().tobytes())
                parts[name] = (tensor.dtype, tuple(tensor.shape), *runs)
        return cls(parts)

    def example(self) -> Example:
        """The tensors as they were."""
        found = {}
        for name, (dtype, shape, values, counts) in self.parts.items():
            runs = torch.frombuffer(bytearray(values), dtype=dtype)
            lengths = torch.frombuffer(bytearray(counts), dtype=torch.int32)
            found[name] = runs.repeat_interleave(lengths.long()).view(shape)
        return found


class FeatureCache:
    """The look at all images of a run, one after the other, before its first step.

    Each different image whose features are not kept yet goes through the tower once. The look ends early when nothing
    fits any more.
    """

    def __init__(self, features: VisionFeatures, *, workers: int = 0) -> None:
        """Begin a run.

        Args:
            features: of the model that is trained.
            workers: processes that open images meanwhile.
        """
        self.features = features
        self._workers = workers
        self._sizes: dict[str, int] = {}
        self._kept: set[str] = set()
        self._rows = self._looked = self._whole = 0
        features.store.begin()

    def keep(self, samples: Any, on_row: Callable[[int], None] = lambda rows: None) -> FeatureRows:
        """Samples with features in place of pixels where they are kept.

        Args:
            samples: with pixels; opened once each, none stays in memory.
            on_row: called with the number of rows looked at.
        """
        seen: list[SeenRow | None] = [None] * len(samples)
        self._rows += len(samples)
        misfits = 0
        for row, (example, names) in enumerate(self._looks(samples)):
            self._looked += 1
            # of images that were seen before there are no pixels here, and their features are held
            kept = self.features.keep(example, names) if images_of(example) else [True] * len(names)
            for name, canvas, there in zip(names, _canvases(example), kept, strict=True):
                self._sizes[name] = self.features.size_of(canvas)
                misfits = 0 if there else misfits + 1
                if there:
                    self._kept.add(name)
            if all(kept):
                self._whole += 1
            if any(kept):
                found = tuple(name if there else None for name, there in zip(names, kept, strict=True))
                seen[row] = SeenRow(found, Packed.of(example) if all(kept) else None)
            on_row(row + 1)
            if misfits >= _GIVE_UP:
                break
        return FeatureRows(samples, self.features.store, seen)

    def report(self) -> FeatureReport:
        """What is kept of all samples so far."""
        store = self.features.store
        needed = sum(self._sizes.values()) * (self._rows / self._looked if self._looked else 1)
        return FeatureReport(
            cache=store.kind,
            images=len(self._sizes),
            kept=len(self._kept),
            computed=self.features.computed,
            kept_bytes=store.held_bytes,
            limit_bytes=store.limit_bytes,
            rows=self._rows,
            whole_rows=self._whole,
            needed_bytes=round(needed),
            trouble=store.trouble,
        )

    def _looks(self, samples: Any) -> Iterator[tuple[Example, list[str]]]:
        """Each sample with the names of its images, in order; without pixels where all of them were seen before."""
        known = KnownRows(samples, self.features)
        told = [known.find(row) for row in range(len(samples))]
        opened = [row for row, found in enumerate(told) if found is None]
        waiting = self._opened(Subset(_Named(samples, self.features.weights), opened), len(opened))
        with contextlib.closing(waiting):
            for row, found in enumerate(told):
                if found is not None:
                    yield found[0].example(), found[1]
                    continue
                example, names, own = next(waiting)
                if own:
                    known.note(row, example, names)
                yield example, names

    def _opened(self, samples: Dataset[Any], count: int) -> Generator[Any, None, None]:
        """So many samples, by workers that are watched. Raises: TrainingError for one that is gone or stuck."""
        watch = WatchedWorkers(self._workers if count else 0)
        loader = DataLoader(
            watch.samples(samples),
            batch_size=None,
            num_workers=self._workers if count else 0,
            generator=torch.Generator(),  # the global one is the training's own: it decides about dropout
        )
        with watch:
            waiting = iter(watch.over(loader))
            for _ in range(count):
                watch.wait()
                with _workers_are_there(watch), taking_over():
                    sample = next(waiting)
                watch.got()
                yield sample


class KnownRows:
    """What earlier runs with the same store saw of the images of some samples.

    An image is known by its file, by the canvas it is drawn on, and by the weights and settings that see it.
    """

    def __init__(self, samples: Any, features: VisionFeatures) -> None:
        """Name the samples; those that are no rows with a processor have no known images."""
        self._encoded: Any = getattr(samples, "encoded", None)
        self._store, self._way = features.store, ""
        if isinstance(self._encoded, EncodedRows):
            settings = self._encoded.processor.image_processor.to_dict()
            told = sorted((name, str(value)) for name, value in settings.items() if name != "num_crops")
            limits = (self._encoded.byte_crops, self._encoded.max_pixels)
            self._way = hashlib.sha256(f"{features.weights} {limits} {told}".encode()).hexdigest()

    def find(self, row: int) -> tuple[Packed, list[str]] | None:
        """A sample without pixels and the names of its features, which are held; None where it has to be opened."""
        if not self._way or not self._store.seen:
            return None
        try:
            example = encode_seen(self._encoded, row)
            names = [] if example is None else [self._store.seen.get(key, "") for key in self._keys(row, example)]
        except (DataError, OSError):
            return None  # said where the row is opened
        whole = [name for name in names if name and self._store.hold(name)]
        return None if example is None or len(whole) < len(names) else (Packed.of(example), whole)

    def note(self, row: int, example: Example, names: list[str]) -> None:
        """Remembers the images of a row that was opened."""
        if self._way and names:
            with contextlib.suppress(DataError, OSError):  # gone meanwhile
                self._store.seen.update(zip(self._keys(row, example), names, strict=True))

    def _keys(self, row: int, example: Example) -> list[tuple[str, tuple[int, int], str]]:
        images = self._encoded.rows[row].images
        return [(file_name(image), canvas, self._way) for image, canvas in zip(images, _canvases(example), strict=True)]


class _Named(Dataset[tuple[Example, list[str], bool]]):
    """Samples with the names of their images' features, so that loader workers compute these too, and whether a sample
    is of its own row."""

    def __init__(self, samples: Any, weights: str) -> None:
        self._samples = samples
        self._weights = weights

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Example, list[str], bool]:
        example = self._samples[index]
        own = not hasattr(self._samples, "is_own") or self._samples.is_own(index)
        return example, [image_name(self._weights, picture) for picture in images_of(example)], own


@contextlib.contextmanager
def _workers_are_there(watch: WatchedWorkers) -> Iterator[None]:
    """Turns the end of a loader worker into one line."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or str(error).startswith("Caught"):
            raise
        what = (
            "gave no sample any more and was ended"
            if watch.killed
            else "was ended from outside (for its memory perhaps)"
        )
        raise TrainingError(
            f"a loader worker {what} while images were looked at before the first step ({first_line(error)}): see "
            "training.dataloader_num_workers; the same command begins that look again"
        ) from error


def _canvases(example: Example) -> list[tuple[int, int]]:
    """Height and width of the canvas of each image."""
    return [(height, width) for height, width in example["image_sizes"].tolist()] if "image_sizes" in example else []
