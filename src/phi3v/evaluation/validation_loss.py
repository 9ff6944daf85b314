"""The loss of a validation: a mean over all trained tokens, with an interval over its rows.

In come batches as a model answers them, with the loss that it gave; out come the numbers of a line in metrics.jsonl.
The mean is that of the model's own losses; of single rows the losses are computed from its logits once more, for the
interval alone, which is that of the loss in an evaluation. Knows nothing of trainers.
"""

import numpy as np
import torch

from phi3v.evaluation.intervals import estimate
from phi3v.evaluation.row_scores import Column, Groups
from phi3v.ranks import ALONE, Ranks


class ValidationLoss:
    """The loss of one validation, gathered batch by batch.

    Example: batches of loss 2.0 over 3 tokens and 1.0 over 1 are {"eval_loss": 1.75}; where their rows are known too
    there are "eval_loss_low" and "eval_loss_high", the ends of the interval.
    """

    def __init__(self, groups: Groups | None = None) -> None:
        """No batch yet.

        Args:
            groups: which rows are about the same images, a number for each in their order; None where each stands for
                itself.
        """
        self._groups = groups
        self._batches: list[tuple[float, int]] = []
        self._rows: list[list[tuple[float, int]]] = []
        self._seen: list[tuple[float, int]] = []

    def see(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Looks at the logits of a batch, whose loss `add` tells.

        Args:
            logits: `[trained tokens, vocabulary]`, those of the first row first; others say nothing about rows.
            labels: `[rows, columns]`, -100 where nothing is learned; a token is predicted by the column before it.
        """
        counts = (labels[:, 1:] != -100).sum(1).tolist()
        if logits.dim() != 2 or len(logits) != sum(counts):
            return
        targets = labels[:, 1:][labels[:, 1:] != -100]
        sums = [
            torch.nn.functional.cross_entropy(some.float(), wanted, reduction="sum")
            for some, wanted in zip(logits.split(counts), targets.split(counts), strict=True)
        ]
        self._seen = list(zip(torch.stack(sums).tolist(), counts, strict=True))

    def add(self, loss: float, labels: torch.Tensor) -> None:
        """A batch is done: its loss per trained token, which is no number where it has none, and its labels."""
        tokens = int((labels[:, 1:] != -100).sum())
        self._batches.append((loss * tokens if tokens else 0.0, tokens))
        # rows without a token keep the others at their places
        self._rows.append(self._seen if tokens else [(0.0, 0)] * len(labels))
        self._seen = []

    def metrics(self, name: str, ranks: Ranks = ALONE) -> dict[str, float]:
        """The mean under a name, and the ends of its interval where there is one; the same on all ranks.

        Batches of several ranks are put into the order that they have in one process, where they are dealt in turn.
        """
        total, tokens = ranks.totals([sum(one) for one in zip(*self._batches, strict=True)] or [0.0, 0])
        found = {name: total / max(tokens, 1)}
        dealt = ranks.gathered(self._rows)
        rows = [row for turn in zip(*dealt, strict=True) for batch in turn for row in batch]
        count = len(rows) if self._groups is None else len(self._groups)  # behind them are copies that even out ranks
        if sum(its for _, its in rows[:count]) != tokens or not count <= len(rows) or not tokens:
            return found
        sums, counts = np.array(rows[:count], dtype=np.float64).T
        means = np.divide(sums, counts, out=np.full(count, np.nan), where=counts > 0)
        its = estimate([Column("loss", None, means, counts, self._groups)])[0][0]
        return (
            found if its.low is None or its.high is None else found | {f"{name}_low": its.low, f"{name}_high": its.high}
        )
