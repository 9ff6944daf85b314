"""A row whose images were seen before as a training sample without pixels: its text, and where its images stand.

In come a row and a processor; out come the tensors of `encode` but for the pixels, from the sizes that reading the row
found, and a name for each image file. No image is opened.
"""

import hashlib
import os
from dataclasses import replace

import torch

from phi3v.data.encode import EncodedRows, Example, label_answers, text_tokens, untrained_answers
from phi3v.data.fit import Fitted, fit
from phi3v.data.images import resolve_path
from phi3v.data.lengths import token_ids
from phi3v.data.schema import ImageRef
from phi3v.image_tokens import canvas_size, num_image_tokens


def encode_seen(rows: EncodedRows, index: int) -> Example | None:
    """What `rows[index]` is without its pixels; None where the size of an image is not known.

    Args:
        rows: with the processor and how rows are encoded.
        index: of the row.
    Raises: DataError as `encode` does for text; ImageError for an image that is too narrow.
    """
    row, processor = rows.rows[index], rows.processor
    sizes = [image.size for image in row.images if image.size is not None]
    if len(sizes) < len(row.images):
        return None
    fitted = Fitted(row.messages, processor.image_processor.num_crops, 0, 0)
    if rows.max_length is not None:
        fitted = fit(
            row.messages,
            sizes,
            count=lambda messages: text_tokens(messages, processor),
            num_crops=fitted.num_crops,
            max_length=rows.max_length,
            on_too_long=rows.on_too_long,
        )
    short = token_ids([replace(row, messages=fitted.messages)], processor)[0]
    ids = with_image_tokens(
        short, processor.image_token_id, [num_image_tokens(*one, fitted.num_crops) for one in sizes]
    )
    convert = processor.tokenizer.convert_tokens_to_ids
    labels = label_answers(
        ids,
        assistant_id=convert("<|assistant|>"),
        end_id=convert("<|end|>"),
        train_on=rows.train_on,
        untrained=untrained_answers(fitted.messages),
    )
    example = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), dtype=torch.long),
        "labels": torch.tensor(labels),
    }
    if sizes:
        example["image_sizes"] = torch.tensor([canvas_size(*one, fitted.num_crops) for one in sizes])
    return example


def with_image_tokens(ids: list[int], image_token: int, counts: list[int]) -> list[int]:
    """Ids with as many image tokens as each image has.

    Example: [1, 9, 5, 9] with 9 for images, of 2 and 3 tokens -> [1, 9, 9, 5, 9, 9, 9].
    """
    waiting, found = iter(counts), []
    for token in ids:
        found += [token] * (next(waiting) if token == image_token else 1)
    return found


def file_name(image: ImageRef) -> str:
    """What tells an image file from others and from itself once it is changed: its bytes, or place, size and time.

    Raises: ImagePathError when it is not there.
    """
    if image.data is not None:
        return hashlib.sha256(image.data).hexdigest()
    path = resolve_path(image)
    found = os.stat(path)
    return f"{path} {found.st_ino} {found.st_size} {found.st_mtime_ns}"
