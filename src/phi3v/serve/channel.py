"""What server and worker tell each other: small JSON objects, each with binary attachments, over a pair of pipes.

A message is the length of its JSON (4 bytes), the JSON, and the attachments one after the other, whose lengths the JSON
holds. Nothing is pickled. Knows nothing of what the messages mean.
"""

import json
import struct
from collections.abc import Sequence
from typing import IO, Any

Message = dict[str, Any]


def write_message(
    stream: IO[bytes], message: Message, attachments: Sequence[bytes] = (), *, flush: bool = True
) -> None:
    """Sends one message, or without `flush` leaves it to the next. Raises: OSError, ValueError where nobody reads."""
    head = json.dumps({**message, "attached": [len(one) for one in attachments]}).encode()
    stream.write(struct.pack("!I", len(head)) + head)
    for one in attachments:
        stream.write(one)
    if flush:
        stream.flush()


def read_message(stream: IO[bytes]) -> tuple[Message, list[bytes]] | None:
    """The next message and its attachments; None where the other side has ended, in the middle of a message too."""
    start = _exactly(stream, 4)
    head = None if start is None else _exactly(stream, struct.unpack("!I", start)[0])
    if head is None:
        return None
    message = json.loads(head)
    attachments = []
    for length in message.pop("attached"):
        one = _exactly(stream, length)
        if one is None:
            return None
        attachments.append(one)
    return message, attachments


def _exactly(stream: IO[bytes], count: int) -> bytes | None:
    """So many bytes, or None where fewer come."""
    try:
        data = stream.read(count)
    except (OSError, ValueError):
        return None
    return data if data is not None and len(data) == count else None
