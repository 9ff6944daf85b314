"""What to do about a row that is left out: reason code in, one short sentence out.

The table of docs/data.md says the same at more length; a test holds both against the codes that are raised.
"""

ADVICE = {
    "missing_value": "fill the cell, or take the column out of the template",
    "value_type": "name a column with text or numbers in the template",
    "image_missing": "fill the cell, drop the row, or give an empty list [] for a row without images",
    "image_type": "name the column with the images in data.images",
    "image_path": "mend the path, or set data.image_root",
    "image_unreadable": "save it again as JPEG or PNG, or leave the row out; for its size raise image.max_pixels",
    "image_narrow": "crop the image to a less extreme shape, or raise image.num_crops",
    "image_places": "place each image once, in the order of the list",
    "no_answer": "end the conversation with a turn of the assistant",
    "too_long": "lower image.num_crops or image.max_tokens, shorten the text, or raise data.max_length",
}
"""Reason code -> the way out."""

_ADDRESS = "look at the address in a browser; mend or drop the row, then check again with --fetch"
_OTHER = "mend the row, or take it out of the set"


def advice(reason_code: str) -> str:
    """The way out for a reason code; a general word where there is no special one.

    Example: advice("missing_value") -> "fill the cell, or take the column out of the template".
    """
    return ADVICE.get(reason_code) or (_ADDRESS if reason_code.startswith("url_") else _OTHER)
