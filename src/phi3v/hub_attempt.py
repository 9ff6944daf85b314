"""How long the commands wait for a hub that does not answer: one attempt, ten seconds at most, in all.

huggingface_hub tries each file six times and says so each time, which is minutes and a screen of warnings where a name
was misspelt on a machine without network. Here the first failure to connect is the last: requests after it fail at
once, in the way that libraries know from offline mode, so files in the cache are still found. Once the hub has
answered, huggingface_hub's own patience applies: a long download survives a network that comes and goes.
"""

from __future__ import annotations

from typing import Any

CONNECT_SECONDS = 10.0
_NO_CONNECTION = ("ConnectError", "ConnectTimeout")  # of httpx or httpx2, as the version of huggingface_hub has it


def give_up_early() -> None:
    """From now on huggingface_hub asks once whether there is a hub; in this process only."""
    from huggingface_hub import set_client_factory

    set_client_factory(_OneAttempt().client)


class _OneAttempt:
    """Whether the hub has answered, and what was wrong when it did not; shared by all clients of a process."""

    def __init__(self) -> None:
        self._answered = False
        self._fault: str | None = None

    def client(self) -> Any:
        """A client as huggingface_hub makes it, whose first failure to connect is its last."""
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils._http import default_client_factory

        client: Any = default_client_factory()
        send = client.send

        def once(request: Any, **options: Any) -> Any:
            if self._answered:
                return send(request, **options)
            if self._fault is None:
                request.extensions = _impatient(request.extensions)
                try:
                    response = send(request, **options)
                except Exception as error:
                    if type(error).__name__ not in _NO_CONNECTION:
                        raise
                    self._fault = f"no connection to {request.url.host}: {error}"
                else:
                    self._answered = True
                    return response
            raise OfflineModeIsEnabled(self._fault)

        client.send = once
        return client


def _impatient(extensions: dict[str, Any]) -> dict[str, Any]:
    """The extensions of a request with a limit for connecting: {"timeout": {"connect": None}} -> {... 10.0}."""
    timeout = extensions.get("timeout") or {}
    seconds = min(timeout.get("connect") or CONNECT_SECONDS, CONNECT_SECONDS)
    return {**extensions, "timeout": {**timeout, "connect": seconds}}
