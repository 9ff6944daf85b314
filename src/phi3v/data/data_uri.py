"""A picture as a small JPEG, as a file or as text that stands in a page. Knows nothing of pages or rows."""

import base64
import io

from PIL import Image

PHOTO_SIDE = 360  # pixels; sharp enough for two columns on a phone, about 20 kB a photo


def photo_uri(photo: Image.Image, side: int = PHOTO_SIDE) -> str:
    """A photo as a JPEG data URI, its longer side at most `side` pixels; the photo itself is not changed."""
    return "data:image/jpeg;base64," + base64.b64encode(photo_jpeg(photo, side)).decode("ascii")


def photo_jpeg(photo: Image.Image, side: int = PHOTO_SIDE) -> bytes:
    """The same as an encoded file."""
    small = photo.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()
