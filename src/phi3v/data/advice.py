"""What to do about a row that is left out: reason code in, one short sentence out.

The sentences are those of the tables in docs/data.md; a test holds them against each other and against the codes that
are raised.
"""

from phi3v.data.address_guard import MEND
from phi3v.data.fit import way_out

ADVICE = {
    "missing_value": "fill the cell, or take the column out of the template",
    "value_type": "name a column with text, numbers or dates; decode bytes and write durations as numbers or text; "
    "mend a number or date out of range; save text as UTF-8; mend the member of the shard",
    "conversation_type": "write the turns as mappings of role and content, or from and value",
    "turn_role": "name the speakers system, user and assistant (or human and gpt), or drop the row",
    "turn_order": "let user and assistant alternate, the answer last, or drop the row",
    "empty_question": "fill the turn, or drop the row",
    "empty_answer": "fill the turn, or drop the row",
    "image_tags": "write one <image> or image part in the questions for each image of the row, or none at all; name an "
    "image in its part or in the column",
    "unclear_tags": "say data.format: conversations where <image> is the image's place, messages where it is text",
    "answer_weight": "write 0 or 1, and take a last exchange of weight 0 out, or drop the row",
    "other_media": "save frames of a film as images, or drop the row",
    "image_missing": "fill the cell or drop the row; rows without images have an empty list [] where cells can be "
    "lists (JSON, Parquet), else a set of their own with data.images: null",
    "image_type": "name the column with the images in data.images; write base64 as data:image/png;base64,...; "
    "write lists of images in a JSON or Parquet file",
    "image_path": "mend the path (with / between folders, not \\), or set data.image_root",
    "image_unreadable": "save it again as JPEG or PNG, or drop the row; for its size raise image.max_pixels",
    "data_uri": "write it as data:image/png;base64,... or save the image as a file",
    "held_out_image": "nothing; where they are too many give data.validation, or (not of a stream, which does not "
    "count them) raise data.max_skipped",
    "image_narrow": "crop it to a less extreme shape, or raise image.num_crops",
    "too_long": "set data.on_too_long to fewer_crops or cut_text, lower image.num_crops, shorten the text, "
    "or raise data.max_length",
    "no_answer": "end the conversation with a turn of the assistant",
    "image_places": "place each image once, in the order of the list",
    "not_encoded": "mend what the line says, or drop the row",
    "url_scheme": "give an http or https address, or save the image as a file; of file:///a/b.png write the path "
    "alone, /a/b.png",
    "url_not_cached": "run the command again",
    "url_invalid": "write it as https://host/path, or save the image as a file",
    "url_private": "if the machine is yours, list it in data.allow_hosts; never one that the line calls link-local or "
    "a cloud's: mend that address",
    "url_dns": "mend the name; look whether this machine has a network",
    "url_connect": "try again later; look whether a firewall is between",
    "url_tls": "mend the name; set SSL_CERT_FILE for an authority of your own",
    "url_timeout": "try again later; save slow ones as files",
    "url_busy": "run the command again later",
    "url_server": "run the command again later",
    "url_refused": "look whether the address opens in a browser without signing in",
    "url_not_found": "mend the address, or drop the row",
    "url_gone": "drop the row",
    "url_redirects": "name the last address",
    "url_reset": "run the command again",
    "url_length": "run the command again",
    "url_protocol": "look what answers at that port",
    "url_too_large": "save a smaller file",
    "url_encoded": "save it as a file",
    "url_empty": "mend the address",
    "url_html": "name the image's own address",
    "url_not_image": "convert it and save it as a file",
    "url_damaged": "drop the row, or save it as a file from elsewhere",
}
"""Reason code -> the way out."""

_UNKNOWN = "mend the row, or drop it"
"""For a failure that another version of phi3v wrote into the cache of images."""


def advice(reason_code: str, message: str = "") -> str:
    """The way out for a reason code; of a row that is too long, and of a private address, that of its message, which
    knows what would do.

    Example: advice("missing_value") -> "fill the cell, or take the column out of the template".
    """
    if reason_code == "url_private" and message.endswith(MEND):
        return MEND
    if reason_code == "too_long" and message:
        return way_out(message)
    return ADVICE.get(reason_code, _UNKNOWN)
