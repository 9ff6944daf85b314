"""What the hub answered instead of a file, told apart from a hub that was not reached, with the way out.

huggingface_hub hides most answers behind "cannot connect" and repeats what a server sent, tokens included. In comes an
error, out comes a line of our own that holds the number of the answer and nothing that was sent.
"""

from collections.abc import Iterator
from typing import Any

_SIGN_IN = "sign in with hf auth login or set HF_TOKEN"


def hub_fault(error: BaseException, name: str, kind: str = "data set") -> str | None:
    """One line about an answer of the hub at the bottom of an error; None where none of these is there.

    Example: an OSError raised from an HfHubHTTPError whose response has the status 403 -> "data set owner/name cannot
    be read: the hub forbids it (403): ...".

    Args:
        error: what a library raised.
        name: the hub id.
        kind: what is of this name: "data set" or "model".
    """
    classes = {type(one).__name__ for one in _chain(error)}
    if "GatedRepoError" in classes:
        return f"{kind} {name} is gated on the hub: ask for access on its page, then {_SIGN_IN}"
    if "RepositoryNotFoundError" in classes:
        nowhere = f"{kind} {name} is no file or folder here, and the hub has none of that name that may be read"
        return f"{nowhere}: check the name; for a private one {_SIGN_IN}"
    response = answer_below(error)
    told = None if response is None else _told(response.status_code)
    return None if told is None else f"{kind} {name} cannot be read: {told}"


def answer_below(error: BaseException) -> Any:
    """The hub's answer at the bottom of an error, as the library has it, with a `status_code`; None where none is."""
    answers = (getattr(one, "response", None) for one in _chain(error))
    return next((answer for answer in answers if isinstance(getattr(answer, "status_code", None), int)), None)


def hubs_own(status: int) -> str | None:
    """Why the hub does not answer at the moment, whatever was asked by whomever; None where that is not why.

    Example: 503 -> "the hub has a fault of its own (503)".
    """
    if status == 429:
        return "the hub has had too many requests (429)"
    return f"the hub has a fault of its own ({status})" if status >= 500 else None


def _told(status: int) -> str | None:
    """What an answer means and what to do; None for one that says nothing by its number alone."""
    if status == 401:
        return (
            f"the hub wants to know who asks, or does not know the token (401): {_SIGN_IN}, with a token that is valid"
        )
    if status == 403:
        return f"the hub forbids it (403): ask for access on its page, or {_SIGN_IN}, with a token that may read it"
    if (fault := hubs_own(status)) is None:
        return None
    return f"{fault}: run the command again later{'; it lets those do more who sign in' if status == 429 else ''}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, each once."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
