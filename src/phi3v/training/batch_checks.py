"""What is wrong with a micro-batch, seen in the micro-batch itself: images and their tokens, what is trained, the form.

In comes a micro-batch as a step takes it, and the tokenizer's own ids; out come faults, one line each, none where all
is well. No setting is looked at: whatever made the batch, what it would teach is read off its ids, labels and pixels.
Knows no rows, files or models.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Self

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from phi3v.image_tokens import CROP_SIZE, grid_tokens

_LEAST, _MOST = -3.6, 3.9
"""Of pixels that CLIP's means and deviations made. Black and white are -1.8 and 2.2 at most; bicubic interpolation of
noise, at the weights (-3, 19, 19, -3) / 32, overshoots by up to 0.45 of what lies between them,
(38^2 + 6^2) / 32^2 - 1."""

_NAMED = {0: "endoftext", 1: "assistant", 6: "system", 7: "end", 10: "user", 44: "image"}
_SPARE = iter(range(1, 40))
_PLACES = {f"<|{_NAMED.get(place) or f'placeholder{next(_SPARE)}'}|>": place for place in range(45)}
"""Control tokens of Phi-3's vocabulary, counted from <|endoftext|>: <|assistant|> is 32001 where that is 32000."""
_FIRST = {"<unk>": 0, "<s>": 1, "</s>": 2}


@dataclass(frozen=True)
class Ids:
    """Ids that a batch is read by.

    Attributes:
        image: stands where images are placed.
        start: begins a text, and stands behind each image.
        user: opens a turn of the user.
        assistant: opens a turn of the assistant.
        end: closes any turn; answers stop here.
        text_end: closes the whole.
        control: all control tokens with their ids.
        tokenizer: turns ids into text.
    """

    image: int
    start: int
    user: int
    assistant: int
    end: int
    text_end: int
    control: Mapping[str, int]
    tokenizer: Any

    @classmethod
    def of(cls, processor: Any) -> Self:
        """The ids of a processor."""
        tokenizer = processor.tokenizer
        named = {"user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>", "text_end": "<|endoftext|>"}
        found = {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
        control = tokenizer.get_added_vocab()
        return cls(processor.image_token_id, tokenizer.bos_token_id, **found, control=control, tokenizer=tokenizer)


@dataclass(frozen=True)
class Sequence:
    """One sample of a batch: ids and labels [T], without padding."""

    ids: list[int]
    labels: list[int]


def batch_faults(batch: Mapping[str, Any], ids: Ids, *, tags: bool = True) -> list[str]:
    """Everything that is wrong with a micro-batch.

    Args:
        batch: arguments of the model's `forward`.
        ids: what it is read by.
        tags: whether an image tag as plain text is a fault; rows may speak of such tags.
    Example: a batch whose labels are its ids -> ["image tokens are trained: ...", "sample 1 trains its prompt: ..."].
    """
    samples = list(sequences_of(batch))
    faults = [*vocabulary_faults(samples, ids), *image_faults(batch, samples, ids, tags=tags)]
    for number, sample in enumerate(samples, 1):
        faults += [f"sample {number} {fault}" for fault in (*label_faults(sample, ids), *form_faults(sample, ids))]
    return faults


def vocabulary_faults(samples: list[Sequence], ids: Ids) -> list[str]:
    """Whether control tokens are the ids that Phi-3 knows them by, seen from where most of them are.

    A tokenizer that swaps two of them opens, trains and closes turns with the wrong ones, and each other check reads
    the batch by the same tokenizer. A vocabulary that has its control tokens at quite other places is somebody's own,
    and of two placeholders that no sample holds nothing is said.

    Example: <|end|> 32000, <|endoftext|> 32007 and all others at their places -> one fault.
    """
    begins = Counter(number - _PLACES[name] for name, number in ids.control.items() if name in _PLACES)
    begin, agreeing = begins.most_common(1)[0] if begins else (0, 0)
    if agreeing <= len(_PLACES) // 2:
        return []
    known = {**_FIRST, **{name: begin + place for name, place in _PLACES.items()}}
    taken = set(known.values())
    swapped = {name: one for name, one in ids.control.items() if known.get(name, one) != one and one in taken}
    used = [one for name, one in swapped.items() if "placeholder" not in name or any(one in it.ids for it in samples)]
    if not used:
        return []
    shown = " and ".join(f"{name} is {number}" for name, number in sorted(swapped.items()))
    return [f"control tokens are swapped: {shown}, which the model knows the other way round; restore tokenizer.json"]


def sequences_of(batch: Mapping[str, Any]) -> Iterator[Sequence]:
    """The samples of a batch: of a pack by its borders, of padded rows by their mask or positions.

    Example: input_ids [[5, 6, 7, 8, 9]] with cu_seqlens [0, 3, 5] -> ids [5, 6, 7] and [8, 9].
    """
    rows, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if batch.get("cu_seqlens") is not None:
        for first, last in pairwise(batch["cu_seqlens"].tolist()):
            yield Sequence(rows[0][first:last], labels[0][first:last])
        return
    for number, row in enumerate(rows):
        length = len(row)
        if batch.get("attention_mask") is not None:
            length = int(batch["attention_mask"][number].sum())
        elif batch.get("position_ids") is not None:
            length = int(batch["position_ids"][number].max()) + 1  # padding repeats the last position
        yield Sequence(row[:length], labels[number])


def image_faults(batch: Mapping[str, Any], samples: list[Sequence], ids: Ids, *, tags: bool) -> list[str]:
    """Whether there is a feature for each image token and a token for each feature, and pixels are CLIP's."""
    tokens = sum(sample.ids.count(ids.image) for sample in samples)
    sizes = batch.get("image_sizes")
    sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes or []
    pixels, kept = batch.get("pixel_values"), batch.get("image_features")
    if not sizes:
        if pixels is not None or kept is not None:
            return ["pixels come without image_sizes: the model cannot place them, and would answer blindly"]
        if tags and any("<|image" in ids.tokenizer.decode(_text_of(sample, ids)) for sample in samples):
            return ["an image tag is tokenised as plain text and no image is there: the model never sees the picture"]
        return [f"{tokens} image tokens stand for no image"] if tokens else []
    features = sum(grid_tokens(int(height) // CROP_SIZE, int(width) // CROP_SIZE) for height, width in sizes)
    faults = []
    if tokens != features:
        faults.append(
            f"{tokens} image tokens for {features} image features of {len(sizes)} images: "
            + ("images are cut" if tokens else "the images have no place in the text")
        )
    if pixels is None and kept is None:
        faults.append(f"{len(sizes)} images are named and no pixels are there: the model never sees them")
    floats = [part for part in (pixels, batch.get("global_views")) if part is not None and part.is_floating_point()]
    if pixels is not None and list(pixels.shape[-3:]) != [3, CROP_SIZE, CROP_SIZE]:
        faults.append(f"crops are {list(pixels.shape[-3:])}, the tower takes [3, {CROP_SIZE}, {CROP_SIZE}]")
    elif pixels is not None and not pixels.is_floating_point() and batch.get("global_views") is None:
        faults.append("pixels are grey levels as they lie in a file: nothing made crops of them")
    for part in floats:
        least, most = float(part.min()), float(part.max())
        if least < _LEAST or most > _MOST:
            faults.append(f"pixels lie between {least:.3g} and {most:.3g}, CLIP's between {_LEAST} and {_MOST}")
            break
    if pixels is not None and not faults and pixels.dtype == torch.float32 and not _has_grey_levels(pixels):
        faults.append("pixels were normalised by other means and deviations than CLIP's: no crop has whole grey levels")
    return faults


def _has_grey_levels(pixels: torch.Tensor) -> bool:
    """Whether there is a crop that CLIP's normalisation made of bytes; views of the whole, resized as floats, are none.

    Example: of black by CLIP's mean 0.4815 and deviation 0.2686, -1.792, comes the grey level 0 again; of black by a
    mean and deviation of 0.5, -1.0, comes 54.3.
    """
    mean, std = (torch.tensor(list(one)).view(3, 1, 1) for one in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    levels = (pixels.flatten(0, -4).cpu() * std + mean) * 255
    return bool(((levels - levels.round()).abs().amax((1, 2, 3)) < 0.02).any())


def _text_of(sample: Sequence, ids: Ids) -> list[int]:
    """A sample's ids without image tokens and what no vocabulary holds."""
    return [one for one in sample.ids if one != ids.image and one >= 0]


def label_faults(sample: Sequence, ids: Ids) -> list[str]:
    """Whether the answers are trained, all of them to their end, and nothing else."""
    trained = [place for place, label in enumerate(sample.labels) if label != -100]
    if not trained:
        return ["trains nothing: its labels are all -100"]
    faults = []
    if any(label < 0 for label in sample.labels if label != -100):
        faults.append("has negative labels, which are no token")
    if trained[-1] >= len(sample.ids):
        faults.append("trains padding")
    inside = [place for place in trained if place < len(sample.ids)]
    wrong = [place for place in inside if sample.labels[place] not in (sample.ids[place], -100)]
    if wrong:
        faults.append(f"has a label at position {wrong[0]} that is not the token there")
    for first, last in _runs(inside):
        before = sample.ids[first - 1] if first else None
        if before != ids.assistant and not _only_newlines(sample.ids[:first], ids):
            if ids.image in sample.ids[first : last + 1]:
                faults.append("trains image tokens")
            shown = ids.tokenizer.decode([one for one in sample.ids[first : first + 6] if 0 <= one != ids.image])
            faults.append(f"trains its prompt: what is trained begins with {shown[:40]!r}, behind no <|assistant|>")
            break
        if ids.end not in sample.ids[first : last + 1]:
            faults.append("trains an answer without its <|end|>, so answers would not stop")
            break
    if sample.ids[-1] != ids.text_end or sample.labels[len(sample.ids) - 1] == -100:
        faults.append("does not train the end of text behind its answer, so answers would not stop")
    return faults


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """Places without gaps: [3, 4, 5, 9] -> [(3, 5), (9, 9)]."""
    groups = [list(group) for _, group in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    return [(group[0][1], group[-1][1]) for group in groups]


def _only_newlines(before: list[int], ids: Ids) -> bool:
    """Whether nothing but a newline stands between the last <|assistant|> and here."""
    place = next((place for place in range(len(before) - 1, -1, -1) if before[place] == ids.assistant), None)
    return place is not None and not ids.tokenizer.decode(before[place + 1 :]).strip()


def form_faults(sample: Sequence, ids: Ids) -> list[str]:
    """Whether turns are written as the model was trained on: `<|end|>` and a newline, `<s>` behind each image."""
    faults = []
    if any(one < 0 for one in sample.ids):
        faults.append("holds negative ids, which are no token")
    if sample.ids[0] != ids.start:
        faults.append("does not begin with <s>")
    behind_image = {place + 1 for place, one in enumerate(sample.ids) if one == ids.image}
    spare = [place for place, one in enumerate(sample.ids) if one == ids.start and place and place not in behind_image]
    if spare:
        faults.append(f"has a <s> at position {spare[0]}, where no text begins and no image ends")
    roles = {ids.user, ids.assistant}
    for place, one in enumerate(sample.ids):
        if one == ids.end:
            following = _up_to_control(sample.ids[place + 1 :], {*roles, ids.text_end, ids.end})
            if following is None or ids.tokenizer.decode(following) not in ("\n", " \n"):
                shown = "nothing" if not following else repr(ids.tokenizer.decode(following)[:20])
                faults.append(
                    f"has no newline alone behind <|end|> at position {place} ({shown}), as the model knows it"
                )
                break
    ends = [
        place
        for place, one in enumerate(sample.ids[:-1])
        if one == ids.image and sample.ids[place + 1] not in (ids.image, ids.start)
    ]
    if ends or sample.ids[-1] == ids.image:
        faults.append("has no <s> behind an image, as the model knows it")
    if ids.assistant not in sample.ids:
        faults.append("has no turn of the assistant")
    return faults


def _up_to_control(following: list[int], control: set[int]) -> list[int] | None:
    """What stands in front of the next control token: [13, 32010, 7] -> [13]; None where none follows."""
    place = next((place for place, one in enumerate(following) if one in control), None)
    return None if place is None else following[:place]
