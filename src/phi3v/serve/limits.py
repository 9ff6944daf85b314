"""How much of everything one request may take, and all of them together. Plain numbers; knows nothing else."""

from dataclasses import dataclass

from phi3v.errors import ConfigError

LEAST_CONTEXT = 32
"""Tokens; the shortest question with its turns, and a short answer."""
MOST_ROWS = 1024
"""Of a batch, whose images all are in memory."""
MAX_PIXELS = 20_000_000
"""Of one image."""


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        batch: requests that are answered at once by one adapter, or by the base.
        queue: requests that may wait beside them; the next one is refused with 429.
        seconds: from a request's arrival to the end of its answer; then it ends with 503 or 504.
        context: tokens of prompt and answer; None for what the model has, up to `longest_context`.
        longest_context: what `context` is where nothing is said and the model has more.
        default_tokens: tokens of an answer at most where the request does not say.
        body_bytes: of a request.
        held_bytes: of the requests that are in the server, all together.
        images: in a request.
        messages: in a request.
        fetch_seconds: for the images of web addresses of a request.
        connections: that are open at once.
        header_seconds: that a connection may take from its beginning, or the last answer, to a request's last header.
        drain_seconds: how long a server that is asked to stop lets answers go on.
    """

    batch: int = 8
    queue: int = 64
    seconds: float = 120.0
    context: int | None = None
    longest_context: int = 32_768
    default_tokens: int = 1024
    body_bytes: int = 20_000_000
    held_bytes: int = 400_000_000
    images: int = 16
    messages: int = 1000
    fetch_seconds: float = 15.0
    connections: int = 1024
    header_seconds: float = 10.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Raises: ConfigError for a limit that lets nothing through."""
        for name in ("batch", "seconds", "body_bytes", "default_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, and nothing could be answered: raise it")
        if self.context is not None and self.context < LEAST_CONTEXT:
            raise ConfigError(
                f"context is {self.context}, where question and answer take {LEAST_CONTEXT} tokens at least: raise it"
            )
        if self.batch > MOST_ROWS:
            raise ConfigError(f"batch is {self.batch}, more than the limit of {MOST_ROWS}: lower it")

    @property
    def places(self) -> int:
        """Requests that may be in the server at once."""
        return self.batch + self.queue
