"""`python -m phi3v` and the `phi3v` command: both call the command line and nothing else.

Ctrl-C ends them in one line from the first moment: until a command catches it itself (`cli_session`) the imports of the
command line, half a second, would show a traceback.
"""

import gc
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of the `phi3v` command."""
    caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, behind nohup for one
    if caught:
        signal.signal(signal.SIGINT, _leave)
    try:
        from phi3v.cli import main as command

        command()
    finally:
        gc.freeze()  # else Python looks through half a million objects of libraries for cycles before it ends: seconds
        if caught:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said: what is left is Python's own end


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before anything was begun: one line, and JSON for machines, of one rank on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # `launch` may be half imported
        typed = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
        os.write(2, b"phi3v: interrupted\n")
        if "--json" in typed:
            os.write(1, b'{"error": "interrupted"}\n')
    os._exit(128 + number)


if __name__ == "__main__":
    main()
