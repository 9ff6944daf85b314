"""A closer look at rows that seem usable: lengths, contents of images and texts, and what is wrong after all.

In come rows and, where tokens are to be counted, a processor; out come, in the same order, a `RowFacts` or a
`RowProblem` for each. Every image is decoded once, on several threads, unless headers are enough. Nothing but numbers
and hashes is kept. Knows no recipes, splits or tables.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

from phi3v.data.encode import text_tokens
from phi3v.data.fit import OnTooLong, fit
from phi3v.data.image_cache import in_shard
from phi3v.data.images import MAX_PIXELS, image_name, image_size, open_image, resolve_path
from phi3v.data.lengths import RowLength, row_lengths
from phi3v.data.schema import ImageRef, Row, RowProblem, TrainOn
from phi3v.errors import ImageError, TooLongError

_BATCH = 64  # rows that are looked at together
DIGEST_BYTES = 16
"""Of a hash: enough that two contents of a set never meet by chance."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is known of a usable row.

    Attributes:
        source: what it was read from.
        row: its number there.
        length: its tokens; None without a processor, while an image is still to be downloaded, or in another part.
        sizes: width and height of each upright image; empty while one is still to be downloaded, or in another part.
        images: a hash of each image's content: of its pixels where it was decoded, else of its file, else (it is still
            to be downloaded) of its address.
        text: a hash of all roles and texts.
        web: a hash of each web address that its images come from.
        too_long: why the row cannot be made to fit the limit; None when it fits, or is made to. `length` is the length
            before.
    """

    source: str
    row: int
    length: RowLength | None
    sizes: tuple[tuple[int, int], ...]
    images: tuple[bytes, ...]
    text: bytes
    web: tuple[bytes, ...] = ()
    too_long: str | None = None


@dataclass(frozen=True, kw_only=True)
class SurveyOptions:
    """How closely rows are looked at.

    Attributes:
        decode: decode every image; False takes the header for enough and hashes files.
        hash_images: whether contents are hashed; False leaves `RowFacts.images` empty.
        train_on: which turns are trained; None for questions without answers.
        max_pixels: larger images are refused.
        max_length: the limit of a row in tokens; None for none.
        on_too_long: what is done about a longer row, see `fit`.
        part: (i, n) looks at rows with an image behind an address of the i-th of n parts alone, at those without such
            images in the first; the others are taken as if they were still to be downloaded. None for all.
        threads: that decode at once, each with a decoded photo in memory: up to 320 MB at the largest that is allowed.
    """

    decode: bool = True
    hash_images: bool = True
    train_on: TrainOn | None = "last_assistant"
    max_pixels: int = MAX_PIXELS
    max_length: int | None = None
    on_too_long: OnTooLong = "skip"
    part: tuple[int, int] | None = None
    threads: int = 2


def survey(
    rows: Iterable[Row],
    processor: Any | None,
    options: SurveyOptions,
) -> Iterator[RowFacts | RowProblem]:
    """Facts or the problem of each row, in order.

    Args:
        rows: the rows.
        processor: a Phi3VProcessor; None counts no tokens.
        options: how closely.
    Yields: one for each row; problems are those of `row_lengths`, and `image_unreadable` for what does not decode. One
        that is too long has facts, so that lengths are known of all; `too_long_problem` makes a problem of them.
    """
    waiting = iter(rows)
    with ThreadPoolExecutor(options.threads) as pool:
        while group := list(islice(waiting, _BATCH)):
            yield from _look(group, processor, options, pool)


def is_pending(row: Row) -> bool:
    """Whether an image of the row is still to be downloaded."""
    return any(image.url is not None and image.path is None for image in row.images)


def _is_left(row: Row, part: tuple[int, int] | None) -> bool:
    """Whether nothing of a row is opened here: it waits for a download, or is another part's."""
    web = [image.url for image in row.images if image.url is not None]
    others = part is not None and not any(in_shard(url, part) for url in web) and (bool(web) or part[0] > 0)
    return others or is_pending(row)


def _look(
    rows: Sequence[Row], processor: Any | None, options: SurveyOptions, pool: Executor
) -> Iterator[RowFacts | RowProblem]:
    """The facts of some rows."""
    left = [_is_left(row, options.part) for row in rows]
    present = [row for row, is_left in zip(rows, left, strict=True) if not is_left]
    contents: Iterator[tuple[bytes, ...] | str]
    if options.decode or options.hash_images:
        contents = iter(list(pool.map(lambda row: _content(row, options), present)))
    else:
        contents = iter([()] * len(present))
    if processor is None:
        lengths: Iterator[RowLength | RowProblem] = iter([_sizes(row, options.max_pixels) for row in present])
    else:
        lengths = row_lengths(present, processor, train_on=options.train_on, max_pixels=options.max_pixels)
    for row, is_left in zip(rows, left, strict=True):
        text = _text_digest(row)
        if is_left:
            yield RowFacts(row.source, row.index, None, (), _names(row), text, _web(row))
            continue
        content, length = next(contents), next(lengths)
        if isinstance(length, RowProblem):
            yield length
        elif isinstance(content, str):
            yield RowProblem(row.index, "image_unreadable", content, row.source)
        else:
            counted = length if processor is not None else None
            wrong = _unfit(row, counted, processor, options)
            yield RowFacts(row.source, row.index, counted, length.sizes, content, text, _web(row), wrong)


def too_long_problem(fact: RowFacts) -> RowProblem | None:
    """The problem of a row that is too long; None for any other."""
    return None if fact.too_long is None else RowProblem(fact.row, "too_long", fact.too_long, fact.source)


def _unfit(row: Row, length: RowLength | None, processor: Any, options: SurveyOptions) -> str | None:
    """Why a row cannot be made to fit: "2539 tokens (2509 for images), and the limit is 2048: ..."; else None."""
    if length is None or options.max_length is None or length.total <= options.max_length:
        return None
    try:
        fit(
            row.messages,
            length.sizes,
            count=lambda messages: text_tokens(messages, processor),
            num_crops=processor.image_processor.num_crops,
            max_length=options.max_length,
            on_too_long=options.on_too_long,
        )
    except (TooLongError, ImageError) as error:
        return str(error)
    return None


def _sizes(row: Row, max_pixels: int) -> RowLength | RowProblem:
    """The sizes of a row's images alone, without tokens."""
    try:
        return RowLength(0, 0, 0, tuple(image_size(image, max_pixels=max_pixels) for image in row.images))
    except ImageError as error:
        return RowProblem(row.index, "image_unreadable", str(error), row.source)


def _content(row: Row, options: SurveyOptions) -> tuple[bytes, ...] | str:
    """Hashes of the images of a row, or the reason why one of them cannot be read."""
    try:
        digests = []
        for image in row.images:
            if options.decode:
                picture = open_image(image, max_pixels=options.max_pixels)
                if options.hash_images:
                    digests.append(_digest(f"{picture.size}".encode() + picture.tobytes()))
            elif options.hash_images:
                digests.append(_digest(_file(image)))
        return tuple(digests)
    except ImageError as error:
        return str(error)
    except OSError as error:  # the file went away, or its disk does
        return f"image {image_name(image)} cannot be read: {error.strerror or error}"


def _names(row: Row) -> tuple[bytes, ...]:
    """Hashes of the addresses of images that are not here yet."""
    return tuple(_digest(f"url:{image.url or image.path}".encode("utf-8", "surrogatepass")) for image in row.images)


def _web(row: Row) -> tuple[bytes, ...]:
    """Hashes of the addresses that a row's images come from."""
    return tuple(address_digest(image.url) for image in row.images if image.url is not None)


def address_digest(url: str) -> bytes:
    """The hash of a web address, as `RowFacts.web` holds it."""
    return _digest(url.encode("utf-8", "surrogatepass"))


def _file(image: ImageRef) -> bytes:
    """The encoded file."""
    return image.data if image.data is not None else resolve_path(image).read_bytes()


def _text_digest(row: Row) -> bytes:
    """A hash of all that is said, and by whom."""
    said = "\0".join(f"{message.role}\0{message.text}" for message in row.messages)
    return _digest(said.encode("utf-8", "surrogatepass"))


def _digest(content: bytes) -> bytes:
    """Sixteen bytes that stand for a content."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()
