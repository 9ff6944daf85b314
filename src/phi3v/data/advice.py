"""What to do about a row that is left out: reason code in, one short sentence out.

A test holds this against the codes that are raised; docs/data.md says the same at more length.
"""

ADVICE = {
    "missing_value": "fill the cell, or take the column out of the template",
    "value_type": "name a column with text or numbers in the template, and save its text as UTF-8",
    "conversation_type": "write the turns as docs/data.md shows them: role and content, or from and value",
    "turn_role": "name the speakers system, user and assistant (or human and gpt)",
    "turn_order": "let user and assistant alternate, a system turn first if there is one, the answer last",
    "empty_question": "fill the turn, or take the row out",
    "empty_answer": "fill the turn, or take the row out",
    "image_tags": "write one <image> in the questions for each image of the row, or none at all",
    "unclear_tags": "say data.format: conversations where images stand at <image>; messages where it is text",
    "image_missing": "fill the cell, drop the row, or give an empty list [] for a row without images",
    "image_type": "name the column with the images in data.images",
    "image_path": "mend the path, or set data.image_root",
    "image_unreadable": "save it again as JPEG or PNG, or leave the row out; for its size raise image.max_pixels",
    "image_narrow": "crop the image to a less extreme shape, or raise image.num_crops",
    "image_places": "place each image once, in the order of the list",
    "data_uri": "write it as data:image/png;base64,... or save the image as a file",
    "no_answer": "end the conversation with a turn of the assistant",
    "too_long": "set data.on_too_long: fewer_crops or cut_text, lower image.num_crops, or raise data.max_length",
    "not_encoded": "mend what the line says, or take the row out",
    "held_out_image": "nothing, or give data.validation: a validation row has the same image",
    "url_scheme": "give http or https addresses, or save the image as a file and name it",
    "url_invalid": "mend the address",
    "url_private": "give a public address; if the machine is yours, add it to data.allow_hosts",
    "url_not_cached": "run phi3v data check with --fetch",
    "url_not_found": "the image is gone: mend the address, or take the row out",
    "url_gone": "the image is gone: mend the address, or take the row out",
    "url_html": "the address leads to a page: give the address of the image itself",
    "url_not_image": "the address leads to something else: give the address of the image itself",
    "url_too_large": "save a smaller file behind the address",
}
"""Reason code -> the way out."""

_ADDRESS = "run phi3v data check --fetch again; if it stays, open the address in a browser and mend it"
_OTHER = "mend the row, or take it out of the set"


def advice(reason_code: str) -> str:
    """The way out for a reason code; a general word where there is no special one.

    Example: advice("missing_value") -> "fill the cell, or take the column out of the template".
    """
    return ADVICE.get(reason_code) or (_ADDRESS if reason_code.startswith("url_") else _OTHER)
