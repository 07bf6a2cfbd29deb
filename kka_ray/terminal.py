"""What a run shows in the terminal: live progress, and the tables at its end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kka_ray import places
from kka_ray.amounts import amount
from kka_ray.report.wording import arms, auc, cautions

if TYPE_CHECKING:
    from kka_ray.cluster.estimate import Estimate
    from kka_ray.cluster.plan import Plan

_TITLES = {
    "prepare": "normals",
    "describe": "describe",
    "render": "render",
    "judge": "judge",
    "prefer": "prefer (DPO)",
    "audit": "audit",
    "detect": "detect",
    "evaluate": "test images",
    "import": "pictures",
}
_NAME = 32
"""Letters of a model's name that a terminal of 80 columns has room for."""


class Reporter:
    """Shows progress: live bars in a terminal, a line a finished stage elsewhere. Use as a context."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._tasks: dict[tuple[str, int], Any] = {}
        self._said: set[tuple[str, int]] = set()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def progress(self, stage: str, round: int, done: int, total: int) -> None:
        """See `kka_ray.loop.Progress`."""
        if stage not in _TITLES:
            return
        title = _TITLES[stage] if round < 0 else f"round {round}  {_TITLES[stage]}"
        key = (stage, round)
        if self.console.is_terminal:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(title, total=total)
            self._bars.update(self._tasks[key], completed=done, total=total)
        elif done < total:
            self._said.discard(key)  # the next run of several
        elif stage != "render" and key not in self._said:
            self._said.add(key)
            self.console.print(f"{title}: {done}", highlight=False)

    def warn(self, text: str) -> None:
        """Prints a warning at once."""
        show_warning(self.console, text)


def show_warning(console: Console, text: str) -> None:
    """Prints a warning as it is: names of files and what models write may look like markup."""
    console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def show_plan(
    plan: Plan, places: dict[tuple[str, str], dict[str, int]], times: list[Estimate], turns: bool, console: Console
) -> None:
    """Who runs where, what it loads, and how long it may take."""
    from kka_ray.cluster.estimate import total

    for phase in plan.phases:
        title = f"{phase.name}: {phase.cpus:g} CPU and {phase.gpus:g} GPU at once"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        engines = [share.engine.replace(": ", ":\n", 1) for share in phase.shares]
        longest = max(len(line) for engine in engines for line in engine.splitlines())
        for name in ("processes", "each", "engine", "weights each", "nodes"):
            # A model's name is long, and its end tells it from others: in narrow terminals the rest is folded first.
            table.add_column(name, no_wrap=name == "engine" and longest <= _NAME, overflow="fold")
        for share, engine in zip(phase.shares, engines, strict=True):
            threads = amount(share.threads, "thread")
            each = ",\n".join([f"{share.cpus:g} CPU", *([f"{share.gpus:g} GPU"] if share.gpus else []), threads])
            weights = "not fetched yet" if share.weights is None else f"{share.weights / 1e9:.2f} GB"
            where = ",\n".join(f"{count} on {node}" for node, count in places[phase.name, share.name].items())
            table.add_row(amount(share.processes, share.name.removesuffix("s")), each, engine, weights, where)
        console.print(table)
    for row in times:
        known = "nothing like it in the store yet" if row.seconds is None else f"about {_duration(row.seconds)}"
        console.print(f"{row.stage}: {row.work}, {known}", highlight=False)
    whole = total(times, turns=turns)
    if whole is not None:
        console.print(f"in all about {_duration(whole)}, the models' loading and the judging left out", highlight=False)
    console.print("it fits", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_summary(folder: str, summary: dict[str, Any], console: Console) -> None:
    """The tables at the end of a run, and where the report is."""
    console.print(_rounds(summary))
    if summary["auc"]["baseline"] is not None or summary["auc"]["kka"] is not None:
        console.print(_detectors(summary))
    else:
        console.print(
            "no test anomalies, hence no AUC; the report shows the normals that score highest", highlight=False
        )
    console.print(
        f"threshold of the {summary['detector']} detector: {summary['threshold']:.4g}; it flags "
        f"{summary['validation_flagged']:.1%} of the validation normals",
        highlight=False,
    )
    if summary.get("truth"):
        truth = summary["truth"]
        console.print(
            f"true attributes: Spearman {_signed(truth['spearman'])} of hardness with distance, "
            f"{truth['kept_normal_share']:.1%} of the kept images truly normal",
            highlight=False,
        )
    told = summary["text_signal"]
    if told["hard_auc"] is not None and any(r["dpo"] for r in summary["rounds"]):
        console.print(
            f"told from the texts alone: hard or not with AUC {told['hard_auc']:.2f} (0.5: not at all), hardness with "
            f"Spearman {_signed(told['spearman'])}; it is what preference training learns from",
            highlight=False,
        )
    drawn = summary["drawn_normals"]
    if drawn["count"]:
        console.print(
            f"drawn normals: the detector flags {drawn['flagged']:.1%} of {drawn['count']} (AUC {drawn['auc']:.2f} "
            "against real ones; 0.5 if being drawn made no difference)",
            highlight=False,
        )
    if "api" in summary:
        api = summary["api"]
        console.print(
            f"API: {amount(api.get('requests', 0), 'request')}, {amount(api.get('prompt_tokens', 0), 'prompt token')}, "
            f"{amount(api.get('completion_tokens', 0), 'written token')}, cost {api['cost']:.4f}",
            highlight=False,
        )
    rule = "the share" if summary["budget_rule"] == "share" else "the least number"
    console.print(
        f"described {summary['described_fraction']:.1%}, drawn {summary['drawn_fraction']:.1%}, kept "
        f"{summary['generated_fraction']:.1%} of {summary['normals']} normals (budget {summary['budget']}, {rule} of "
        f"loop); {summary['wall_seconds']:.0f} s",
        highlight=False,
    )
    for caution in cautions(summary):
        console.print(f"mind: {caution}", highlight=False, markup=False)
    console.print(f"report: {places.below(folder, 'report.html')}", highlight=False, markup=False, soft_wrap=True)


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def _rounds(summary: dict[str, Any]) -> Table:
    table = Table(title="rounds", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("round", "lines", "drawn", "hard", "easy", "normal-like", "hard rate", "diversity", "status"):
        table.add_column(name, justify="left" if name == "status" else "right")
    for i, r in enumerate(summary["rounds"]):
        table.add_row(
            str(i),
            str(r["described"]),
            str(r["rendered"]),
            str(r["hard"]),
            str(r["easy"]),
            str(r["normal_like"]),
            f"{r['hard_rate']:.3f}",
            f"{r['diversity']:.3f}",
            r["status"],
        )
    return table


def _detectors(summary: dict[str, Any]) -> Table:
    """A row a set of anomalies and a column a detector: there are few detectors, and a terminal is narrow."""
    detectors = summary["detectors"]
    title = "AUC on the test images, mean ± std over fits"
    table = Table(title=title, caption="* the headline detector, served", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("anomalies")
    for kind in detectors:
        table.add_column(kind + (" *" if kind == summary["detector"] else ""), justify="right", no_wrap=True)
    for arm, words in arms(summary).items():
        cells = [row.get(arm) for row in detectors.values()]
        if any(cells):
            name = f"baseline ({words})" if arm == "baseline" else words
            table.add_row(name, *(auc(c) if c else "" for c in cells))
    return table
