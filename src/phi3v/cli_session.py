"""What every command shares: quiet libraries, one line for an error, one JSON object for machines, exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted from the keyboard, 143 by SIGTERM. With `--json` standard
output carries exactly one JSON object, {"error": LINE} where a command fails or its words are wrong, whatever the
libraries print; everything else goes to standard error. Imports no heavy library itself, huggingface_hub aside, which
has to be told how long to wait (`hub_attempt`), and PIL when a command runs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import typer

from phi3v.errors import ConfigError, Interrupted, OtherRankError, Phi3VError
from phi3v.hub_attempt import give_up_early
from phi3v.launch import Launch

if TYPE_CHECKING:
    from rich.console import Console

FAILED, INTERRUPTED = 1, 130
_LONGEST_NAME = 255  # bytes, on the file systems of Linux, macOS and Windows
_TOLD_BY_COMMANDS = "phi3v.data.sources"
"""Its warnings, of rows that are left out, are on the screen already, in each command's own words."""


@dataclass(frozen=True)
class Session:
    """The streams of one command. `answers` is the real standard output; `as_json` says who reads it."""

    as_json: bool
    answers: TextIO

    @property
    def screen(self) -> Console:
        """Where a person reads: standard output, or standard error when a machine reads standard output."""
        from rich.console import Console

        where = sys.stderr if self.as_json else self.answers
        return Console(file=io.StringIO() if Launch.here().rank else where, highlight=False)

    def result(self, value: dict[str, Any]) -> None:
        """Print the one JSON object of a command, not-a-number and infinity as null; does nothing without `--json`."""
        if self.as_json and not Launch.here().rank:
            from phi3v.plain_json import to_json

            self.answers.write(to_json(value) + "\n")
            self.answers.flush()

    def failed(self, message: str, debug: bool) -> None:
        """Print why a command failed: a line for people, and with `--json` an object for machines as well."""
        _say(message, debug)
        self.result({"error": printable(message)})


@contextlib.contextmanager
def session(debug: bool = False, as_json: bool = False, *, on_interrupt: str = "") -> Iterator[Session]:
    """Run a command's body: hush the libraries, and turn what goes wrong into one line and an exit code.

    Args:
        debug: let the libraries talk, and show tracebacks.
        as_json: keep standard output for one JSON object.
        on_interrupt: what Ctrl-C prints behind "interrupted"; where it is empty, the exception's notes.
    """
    hush(debug, as_json)
    give_up_early()
    answers = sys.stdout
    here = Session(as_json, answers)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if main else None
    try:
        if main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # until here it was `__main__`'s
        _stand_somewhere()
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield here
    except typer.Exit:
        raise
    except OtherRankError:
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt as error:
        if not Launch.here().rank:
            notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
            here.failed("interrupted" + (on_interrupt or notes), debug)
        raise typer.Exit(error.exit_code if isinstance(error, Interrupted) else INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), answers.fileno())
        raise typer.Exit(FAILED) from None
    except Phi3VError as error:
        here.failed(str(error), debug)
        raise typer.Exit(FAILED) from None
    except FileNotFoundError as error:
        here.failed(f"no such file: {error.filename}" if error.filename else str(error), debug)
        raise typer.Exit(FAILED) from None
    except OSError as error:
        fault = _name_too_long(error) or f"{type(error).__name__}: {error} (run again with --debug to see where)"
        here.failed(fault, debug)
        raise typer.Exit(FAILED) from None
    except Exception as error:  # a fault of ours or of a library: still one line, and the way to see more
        if _is_usage_error(error):
            raise
        here.failed(f"{type(error).__name__}: {error} (run again with --debug to see where)", debug)
        raise typer.Exit(FAILED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _stand_somewhere() -> None:
    """Raises: ConfigError where the folder that the command was started in, and paths count from, is gone."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder was deleted: change to another one (cd) and run it again") from error


def _name_too_long(error: OSError) -> str | None:
    """What is wrong with a path whose name no file can have, 255 bytes at most; None for other faults."""
    if error.errno != errno.ENAMETOOLONG or error.filename is None:
        return None
    path = os.fsdecode(error.filename)
    name = max(path.split(os.sep), key=lambda part: len(os.fsencode(part)))
    if (size := len(os.fsencode(name))) > _LONGEST_NAME:
        return f"no file or folder can be called {name[:40]}...: {size:,} bytes, at most {_LONGEST_NAME}; shorten it"
    return f"the path {path[:40]}... has {len(os.fsencode(path)):,} bytes, more than this system takes; shorten it"


def _terminated(number: int, frame: Any) -> None:
    """SIGTERM where nothing else is done about it: ends as Ctrl-C does, with another exit code."""
    raise Interrupted(number)


def _is_usage_error(error: Exception) -> bool:
    """Whether typer itself wants to print this and exit with 2."""
    return hasattr(error, "exit_code") and hasattr(error, "show")


@contextlib.contextmanager
def slips_as_json(words: list[str]) -> Iterator[None]:
    """Print a usage error as JSON too where the command line, up to a "--", asks for that; typer says the rest.

    Example: ["train", "--json"] prints {"error": "Missing argument 'RECIPE'."}, and the error goes on.
    """
    try:
        yield
    except Exception as error:
        typed = words[: words.index("--")] if "--" in words else words
        if "--json" in typed and _is_usage_error(error):
            Session(True, sys.stdout).result({"error": printable(error.format_message())})  # type: ignore[attr-defined]
        raise


def _say(message: str, debug: bool) -> None:
    """A line for people. What ranks say before they know of each other they all say, so one on each machine does."""
    launch = Launch.here()
    if launch.local_rank and not _have_met():
        return
    if debug:
        traceback.print_exc(file=sys.stderr)
    sys.stderr.write(f"phi3v: {f'rank {launch.rank}: ' if launch.rank else ''}{printable(message)}\n")
    sys.stderr.flush()


def _have_met() -> bool:
    """Whether this rank has found the others."""
    ranks = sys.modules.get("phi3v.ranks")
    return ranks is not None and ranks.have_met()


def printable(text: str) -> str:
    """A text as one line that a terminal shows and does not obey: "a\\n  \\x1b[31mb" -> "a \\\\x1b[31mb".

    Column names, paths and cells are the words of strangers, and may hold control characters or half characters.
    """
    line = " ".join(text.split())
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def hush(debug: bool, as_json: bool) -> None:
    """Keep third-party chatter off the screen; call it before those libraries are imported."""
    if debug:
        return
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    if not Launch.here().rank:
        show_warnings("phi3v")
        logging.getLogger(_TOLD_BY_COMMANDS).setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says of a broken image is in the row's problem
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs as errors what it raises, and we say, as well
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if as_json or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from phi3v.data.quiet_tiff import silence_libtiff

    silence_libtiff()


def show_warnings(name: str) -> None:
    """What our modules warn of is one line, as our errors are, and each line is shown once.

    The level is set as well: loggers take the root's otherwise, whose ERROR hushes the libraries, and ours with them.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.WARNING)
    if not logger.handlers:
        shown = logging.StreamHandler(sys.stderr)
        shown.setFormatter(_Line())
        shown.addFilter(_Once())
        logger.addHandler(shown)
        logger.propagate = False


class _Line(logging.Formatter):
    """One line, with the traceback below where an error has one: "phi3v: left out"."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"phi3v: {printable(record.message)}"


class _Once(logging.Filter):
    """Holds a warning back that was shown before: of a set that is opened for training and for validation, say."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.getMessage()
        again = record.levelno <= logging.WARNING and line in self._shown
        self._shown.add(line)
        return not again
