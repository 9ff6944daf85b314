"""Errors that phi3v raises on purpose.

Every class also is the standard error it stands for, so callers may catch either. A message is one line that says what
is wrong, where, the limit that was broken and the way out; the command line prints exactly that line and exits with
code 1. To add a class: derive from `Phi3VError` and from the closest built-in exception.
"""


class Phi3VError(Exception):
    """Base of all errors that phi3v raises on purpose."""


class ConfigError(Phi3VError, ValueError):
    """A recipe, an option or a combination of options is not valid."""


class DataError(Phi3VError, ValueError):
    """A data set, a row, a column or a template is not usable."""


class ImageError(DataError):
    """An image cannot be read, decoded or is refused by a limit."""


class ImagePathError(ImageError):
    """An image file is not there, is no regular file, or lies outside its root."""


class NoUsableRowError(DataError):
    """A stream gives no row that can be used, or none among so many records that it is given up."""


class TooLongError(DataError):
    """A row has more tokens than the limit, and what may be done about it is not enough.

    Attributes:
        reason_code: what the row's problem is called.
    """

    reason_code = "too_long"


class CheckpointError(Phi3VError, ValueError):
    """A model folder, an adapter or a run does not hold what it should."""


class DeviceError(Phi3VError, RuntimeError):
    """The device that was asked for is missing or does not support what was asked of it."""


class MissingPackageError(Phi3VError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


def install(extra: str) -> str:
    """The command that brings what an extra names: install("onnx") -> 'pip install "phi3v[onnx]"'.

    It is the same wherever phi3v came from, a copy of its source or an index: pip takes the installed phi3v for the
    named one and adds the extra's packages, in the versions that this phi3v asks for.
    """
    return f'pip install "phi3v[{extra}]"'


class TrainingError(Phi3VError, RuntimeError):
    """Training cannot go on: nothing to train, a non-finite loss, a broken resume."""


class OtherRankError(Phi3VError, RuntimeError):
    """Another process of the same training failed, and says why itself."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, by Ctrl-C or SIGTERM; it is no error, and `except Exception` lets it pass.

    Attributes:
        exit_code: what the command line exits with: 130 after Ctrl-C (SIGINT), 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        """Keep the signal."""
        super().__init__(number)
        self.exit_code = 128 + number
