"""The error budget: how many rows of a round may fail before the run ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kka_ray.config.models import ClusterConfig, share_of
from kka_ray.errors import StageError


class BudgetError(StageError):
    """More rows failed than may."""


class ErrorBudget:
    """Counts the rows of a stage that failed. A row is counted once, however often it is added.

    Args:
        what: the stage and round, for messages.
        rows: rows that the stage has in the round.
        config: the largest share and number of them that may fail.
    """

    def __init__(self, what: str, rows: int, config: ClusterConfig) -> None:
        self.what, self.rows = what, rows
        self.allowed = share_of(config.max_failed_share, rows)
        if config.max_failed_rows is not None:
            self.allowed = min(self.allowed, config.max_failed_rows)
        self.failed: dict[str, str] = {}

    def add(self, ids: Iterable[str], reason: str) -> None:
        """Counts rows that failed for a reason. Raises BudgetError with the reasons if there are too many."""
        for id_ in ids:
            self.failed.setdefault(id_, reason)
        if len(self.failed) <= self.allowed:
            return
        first = ", ".join(list(self.failed)[:5]) + (", ..." if len(self.failed) > 5 else "")
        reasons = "\n".join(f"  {count} x {text[:300]}" for text, count in Counter(self.failed.values()).most_common(5))
        raise BudgetError(
            f"{self.what}: {len(self.failed)} of {self.rows} rows failed, and only {self.allowed} may "
            f"(cluster.max_failed_share, cluster.max_failed_rows):\n{reasons}\n"
            f"They are {first}. Mend what the reasons name or allow for more; the same command then goes on and tries "
            "the failed rows again"
        )
