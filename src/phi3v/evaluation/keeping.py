"""What an evaluation or a prediction leaves to go on from, and the processes that share it.

In come a loaded model, rows and settings; out come the journal that belongs to them, and the ranks. Answers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from phi3v.data.schema import Row
from phi3v.evaluation.journal import Journal
from phi3v.fingerprints import name_rows, name_weights
from phi3v.loading import rank_device
from phi3v.machine import most_memory
from phi3v.plain_json import to_json
from phi3v.ranks import ALONE, Ranks
from phi3v.run_folder import gather_versions
from phi3v.run_lock import RunLock


class Keeping:
    """The journals of one evaluation, one for each side.

    Attributes:
        ranks: the processes that share the rows; the first one writes.
        weights: side -> name of the weights that answered, of those that have a journal here and those compared.
    """

    def __init__(
        self,
        place: Callable[[str], Path] | None = None,
        ranks: Ranks = ALONE,
        check: Callable[[str, str], None] | None = None,
        compared: Collection[str] = (),
    ) -> None:
        """Open nothing yet.

        Args:
            place: the file of a side, "tuned" for instance; None keeps nothing.
            ranks: the processes.
            check: told of a side and the name of its weights before it answers; raises where others should.
            compared: sides whose weights are named though nothing is kept; equal ones are the same model.
        """
        self.ranks = ranks
        self.weights: dict[str, str] = {}
        self._place, self._check, self._compared = place, check, compared
        self._opened: list[Journal] = []
        self._named: list[tuple[Sequence[Row], str]] = []

    def journal(
        self, side: str, model: Any, processor: Any, rows: Sequence[Row], settings: Mapping[str, Any]
    ) -> Journal | None:
        """The journal of a side, with what an earlier start left in it; None where nothing is kept, or not here.

        Args:
            side: names it.
            model: as it answers.
            processor: its processor.
            rows: all rows; for a side that is asked with other images those that the images were taken from.
            settings: the other arguments of `answer_rows` that answers depend on.
        Raises: what `check` raises.
        """
        with self.ranks.together():
            if not self.ranks.first:
                return None
            if self._place is None:
                if side in self._compared:
                    self.weights[side] = name_weights(model.state_dict().items())
                return None
            made = depends_on(model, processor, self.name(rows), {"side": side, **settings})
            self.weights[side] = made["weights"]
            if self._check is not None:
                self._check(side, made["weights"])
            found = Journal(self._place(side), made)
            self._opened.append(found)
            return found

    def name(self, rows: Sequence[Row]) -> str:
        """A name for rows and the files of their images, found once."""
        named = next((name for known, name in self._named if known is rows), None)
        if named is None:
            named = name_rows(rows, stamps=True)
            self._named.append((rows, named))
        return named

    @contextmanager
    def said(self) -> Iterator[None]:
        """An interruption says what is kept beside the answers that were being made, which it names itself."""
        try:
            yield
        except KeyboardInterrupt as error:
            named = self._opened[:-1] if getattr(error, "__notes__", []) else self._opened
            counts = {one.path.name: sum(map(len, one.windows.values())) for one in named if one.windows}
            if counts:
                error.add_note("kept too: " + ", ".join(f"{count} in {name}" for name, count in counts.items()))
            raise

    def memory_gib(self) -> float:
        """The most memory that a process took: of all ranks, and of the starts that ended early."""
        earlier = max((one.memory for one in self._opened), default=0)
        return self.ranks.most([max(most_memory(), earlier)])[0] / 2**30

    def done(self) -> None:
        """What was kept is elsewhere now."""
        for journal in self._opened:
            journal.remove()


def depends_on(model: Any, processor: Any, rows: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """What answers depend on, by name: {"weights": "9f2c...", "rows": "77ab...", "settings": "01d4..."}.

    Settings are those given, how the model computes and how its images are cut, the machine's device and the versions
    of the libraries. Example: the same run on another GPU, or with other crops, has other settings.
    """
    images = processor.image_processor
    cuda = model.device.type == "cuda"
    how = {
        **settings,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name(model.device) if cuda else model.device.type,
        "crops": [images.num_crops, images.fast],
        "stops": list(processor.stop_token_ids),
        "versions": gather_versions(),
    }
    named = {"weights": name_weights(model.state_dict().items()), "rows": rows}
    return named | {"settings": sha256(to_json(how).encode()).hexdigest()[:32]}


def own_device(wanted: str, ranks: Ranks) -> str:
    """Where a process has its model: of several each has the GPU of its number."""
    return str(rank_device(wanted)) if ranks.several else wanted


@contextmanager
def locked(lock: RunLock | None, ranks: Ranks) -> Iterator[None]:
    """Nobody else writes where this is written as long as the context lasts; None locks nothing.

    Raises: ConfigError where another process is at it, on the first rank; OtherRankError on the others.
    """
    try:
        if lock is not None:
            ranks.alone(lock.take)
        yield
    finally:
        if lock is not None:
            lock.give_back()


@contextmanager
def shared(device: str, ranks: Ranks | None = None) -> Iterator[Ranks]:
    """The processes that a launcher started, met for as long as the context lasts; this one alone where there are none.

    Args:
        device: what a recipe or a user names.
        ranks: given, they are these, and nobody is met.
    """
    found = Ranks.join(rank_device(device)) if ranks is None else ranks
    try:
        yield found
    finally:
        if ranks is None:
            found.part()
