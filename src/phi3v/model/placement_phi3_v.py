"""Which image goes to which image tokens: plain arithmetic on ids and token counts.

Both carriers of images are understood: `image_token_id` (images in the order of the text) and Microsoft's negative ids,
where -k is image k of its own row whatever the order in the text. Nothing here knows what a feature is made of.
"""

import torch

MISMATCH = "Image features and image tokens do not match"  # TRL looks for this text to explain truncated images


def image_mask(input_ids: torch.Tensor, image_token_id: int | None) -> torch.Tensor:
    """Where images stand: `[[1, -1, -1, 5, 9]]` with `image_token_id=9` gives `[[False, True, True, False, True]]`."""
    mask = input_ids < 0
    return mask if image_token_id is None else mask | (input_ids == image_token_id)


def images_per_row(input_ids: torch.Tensor, image_token_id: int | None, counts: list[int]) -> list[int]:
    """Number of images of each row, from the image tokens in it and the token counts of the images, in order.

    Example: rows with 5 and 0 and 7 image tokens and images of 2, 3 and 7 tokens: `[2, 0, 1]`.

    Raises: ValueError if the images do not fit the rows.
    """
    if bool((input_ids < 0).any()):
        rows = [row[row < 0].unique().numel() for row in input_ids]
        if sum(rows) != len(counts):
            raise ValueError(f"{MISMATCH}: the rows name {rows} images, {len(counts)} were given")
        return rows
    wanted = image_mask(input_ids, image_token_id).sum(-1).tolist()
    rows, image = [], 0
    for tokens in wanted:
        first = image
        while tokens > 0 and image < len(counts):
            tokens -= counts[image]
            image += 1
        if tokens != 0:
            break
        rows.append(image - first)
    if len(rows) != len(wanted) or image != len(counts):
        raise ValueError(f"{MISMATCH}: rows with {wanted} image tokens, images of {counts} tokens")
    return rows


def new_images(is_image: torch.Tensor, new: int, counts: list[int]) -> list[int] | None:
    """Which images stand in the last `new` columns, from where image tokens stand and the token counts of all images.

    Example: rows of image tokens `[[1, 1, 0, 1]]` with images of 2 and 1 tokens and 1 new column: `[1]`.

    Returns: None where the images are not those of the whole rows, or one of them is cut by the border: they are to be
    judged as they stand.
    """
    whole, fresh = is_image.sum(-1).tolist(), is_image[:, -new:].sum(-1).tolist()
    picks: list[int] = []
    image = 0
    for tokens, behind in zip(whole, fresh, strict=True):
        while tokens > 0 and image < len(counts):
            if tokens <= behind:
                picks.append(image)
            tokens -= counts[image]
            image += 1
        if tokens != 0:
            return None
    fits = image == len(counts) and sum(counts[pick] for pick in picks) == sum(fresh)
    return picks if fits and picks else None


def image_order(input_ids: torch.Tensor, counts: list[int]) -> list[int] | None:
    """Order of images along the text for Microsoft's negative ids; None where the order is that of the images.

    Example: one row `[-2, -2, 5, -1]` with images of 1 and 2 tokens: `[1, 0]`. A tag that stands twice gives its image
    twice.

    Raises: ValueError if a run of a tag is not as long as its image, or the tags of a row are not 1 to the number of
    its images.
    """
    if torch.compiler.is_compiling() or not bool((input_ids < 0).any()):
        return None
    order: list[int] = []
    first = 0
    for number, row in enumerate(input_ids.tolist()):
        tags = sorted({-i for i in row if i < 0})
        if tags != list(range(1, len(tags) + 1)) or first + len(tags) > len(counts):
            raise ValueError(
                f"{MISMATCH}: row {number} names images {tags}, and {len(counts) - first} images are left for it"
            )
        position = 0
        while position < len(row):
            if row[position] >= 0:
                position += 1
                continue
            image = first - row[position] - 1
            run = row[position : position + counts[image]]
            if run != [row[position]] * counts[image]:
                raise ValueError(
                    f"{MISMATCH}: a tag of row {number} stands for {counts[image]} tokens, its run is shorter"
                )
            order.append(image)
            position += counts[image]
        first += len(tags)
    if first != len(counts):
        raise ValueError(f"{MISMATCH}: the rows name {first} images, {len(counts)} were given")
    return order


def place_features(
    features: torch.Tensor, counts: list[int], order: list[int] | None, is_image: torch.Tensor
) -> torch.Tensor:
    """Features `[T, H]` in the order of the text, checked against the number of image tokens.

    Raises: ValueError if there are not exactly as many features as image tokens.
    """
    if order is not None and order != list(range(len(counts))):
        pieces = features.split(counts)
        features = torch.cat([pieces[image] for image in order])
    if not torch.compiler.is_compiling() and is_image.device.type != "meta":
        tokens = int(is_image.sum())
        if tokens != features.shape[0]:
            raise ValueError(f"{MISMATCH}: {tokens} tokens, {features.shape[0]} features")
    return features


def refuse_images_beside_embeddings(embeddings: torch.Tensor | None, *images: torch.Tensor | list | None) -> None:
    """Raises: ValueError for images beside embeddings, into which nothing says where they belong.

    Example: pixel values given with the `inputs_embeds` that PEFT's prompt tuning makes.
    """
    if embeddings is not None and any(image is not None for image in images):
        raise ValueError(
            "inputs_embeds were given with images, which would not be seen: pass input_ids, or embeddings that hold "
            "the images, without pixel_values and image_features"
        )


def missing_images(features: list[torch.Tensor | None], counts: list[int]) -> list[int]:
    """Numbers of the images that have no features; each tensor stands for as many images as it has features for.

    Example: tensors of 5 and 4 rows around one None, for images of 2, 3, 6 and 4 tokens: `[2]`.

    Raises: ValueError if the features are not those of images of so many tokens.
    """
    missing, image, left = [], 0, 0
    for one in features:
        if one is None:
            missing.append(image)
            image += 1
            continue
        left = one.shape[0]
        while left > 0 and image < len(counts):
            left -= counts[image]
            image += 1
        if left != 0:
            break
    if left != 0 or image != len(counts):
        given = [None if one is None else one.shape[0] for one in features]
        raise ValueError(f"{MISMATCH}: images of {counts} tokens, given {given} features")
    return missing
