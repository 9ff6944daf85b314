"""What the hub answered instead of a file, told apart from a hub that was not reached, with the way out.

huggingface_hub hides most answers behind "cannot connect" and repeats what a server sent, tokens included. In comes an
error, out comes a line of our own that holds the number of the answer and nothing that was sent.
"""

from collections.abc import Iterator

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
    chain = list(_chain(error))
    classes = {type(one).__name__ for one in chain}
    if "GatedRepoError" in classes:
        return f"{kind} {name} is gated on the hub: ask for access on its page, then {_SIGN_IN}"
    if "RepositoryNotFoundError" in classes:
        nowhere = f"{kind} {name} is no file or folder here, and the hub has none of that name that may be read"
        return f"{nowhere}: check the name; for a private one {_SIGN_IN}"
    statuses = (getattr(getattr(one, "response", None), "status_code", None) for one in chain)
    status = next((status for status in statuses if isinstance(status, int)), None)
    told = None if status is None else _told(status)
    return None if told is None else f"{kind} {name} cannot be read: {told}"


def _told(status: int) -> str | None:
    """What an answer means and what to do; None for one that says nothing by its number alone."""
    if status == 401:
        return (
            f"the hub wants to know who asks, or does not know the token (401): {_SIGN_IN}, with a token that is valid"
        )
    if status == 403:
        return f"the hub forbids it (403): ask for access on its page, or {_SIGN_IN}, with a token that may read it"
    if status == 429:
        return "the hub has had too many requests (429): run the command again later; it lets those do more who sign in"
    if status >= 500:
        return f"the hub has a fault of its own ({status}): run the command again later"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, each once."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
