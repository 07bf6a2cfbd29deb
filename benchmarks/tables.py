"""Writes the tables of `README.md` and `docs/results.md` from `benchmarks/results/*.json`: `benchmarks/tables.py`.

Each table stands between a pair of comments that name it; what is outside them is written by hand. `--check` only says
whether the documents are up to date.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from kka_ray import assets
from kka_ray.benchmark import in_words
from kka_ray.detectors import DETECTORS, tuned
from kka_ray.detectors.sources import KINDS
from kka_ray.report import wording

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ARMS = {name: words.removesuffix(" (control)") for name, words in wording.ARMS.items()}

_RATIOS = {
    "captions_over_reference": ("captions, over one prompt at a time without a cache", "≥", 30.0),
    "captions_over_generate_float32": ("captions, over batched `generate` in float32", "≥", 1.8),
    "captions_over_generate_bf16": ("captions, over batched `generate` in bf16", "≥", 1.15),
    "vllm_over_transformers": ("captions, vLLM on the CPU over our transformers engine", "≥", 0.8),
    "dpo_over_trl": ("DPO steps, over TRL without gradient checkpointing", "≥", 2.0),
    "pool_overhead": ("pool, over the bare stage in a loop, less 1", "≤", 0.05),
    "overlap": ("three stages streamed over one after another, simulated devices", "≤", 0.45),
    "scaling_64": ("64 simulated workers, of the ideal", "≥", 0.9),
    "scaling_256": ("256 simulated workers, of the ideal", "≥", 0.8),
    "orchestration_share": ("run of three rounds: part of the time in which no stage computes", "≤", 0.1),
}

_OVERVIEW = {
    "cifar100_furniture": "CIFAR-100, furniture",
    "oxford102": "Oxford-102, poppies",
    "ucm_captions": "UC Merced, tanks and courts",
    "folder": "magnetic tiles, as a folder",
}

_SOURCES = {
    "none": "normals only",
    **{name: _ARMS[name] for name in KINDS},
    "cifar10": "real (CIFAR-10)",
}


def demo(result: Mapping[str, Any]) -> str:
    """The checks, and the detectors by arms."""
    rows = [["measure", "mean ± std", "wanted", ""]]
    for name, check in result["checks"].items():
        verdict = "yes" if check["passed"] else "**no**"
        if check["passed"] and check.get("low") == 0 and check["mean"] < check["std"]:
            verdict = "within the spread"
        rows.append([name, in_words(check), check["wanted"], verdict])
    head = f"Mean and standard deviation over {result['seeds']} seeds of the whole loop.\n"
    signals = [run["text_signal"] for run in result["runs"] if run.get("text_signal", {}).get("hard_auc") is not None]
    signal = ""
    if signals:
        auc, rank = (_spread([signal[name] for signal in signals]) for name in ("hard_auc", "spearman"))
        signal = (
            f"\nFrom a line's text alone a linear model tells whether its image is hard, or rejected, with an AUC of "
            f"{auc}, and how hard it is with a rank correlation of {rank}.\n"
        )
    old = _outdated(result.get("made_with", {}), _shipped())
    return f"{head}{old}\n{_table(rows)}{signal}\nAUC on the test images:\n\n{_detectors(result['auc'])}"


def ceiling(result: Mapping[str, Any]) -> str:
    """Detectors by the number of anomalies."""
    rows = result["rows"]
    counts = sorted({row["count"] for row in rows})
    table = [["detector", *(f"{n} anomalies" if n else "normals only" for n in counts)]]
    for detector in _distinct(rows, "detector"):
        own = [row for row in rows if row["detector"] == detector]
        table.append([detector, *(_spread([r["auc"] for r in own if r["count"] == n]) for n in counts)])
    seeds, budget = len({row["seed"] for row in rows}), rows[0]["budget"]
    old = _outdated(result.get("made_with", {}))
    return f"{seeds} seeds. The demo keeps {budget} images.\n{old}\n{_table(table)}"


def real_data(result: Mapping[str, Any]) -> str:
    """A case after the other."""
    parts = []
    shipped = _shipped()
    for name, case in result.items():
        said = "".join(f"\nThe run warned: {w}\n" for w in case["warnings"])
        said += _outdated(case.get("made_with", {}), shipped)
        rates = ", ".join(f"{r['hard_rate']:.2f}" for r in case["rounds"])
        stalled = [str(number) for number, r in enumerate(case["rounds"]) if r["status"] != "ok"]
        if stalled:
            rates += f"; without preference training before round {' and '.join(stalled)}"
        parts.append(
            f"### {name}\n\n{case['normals']} normals, {case['test']['normals']} + {case['test']['anomalies']} test "
            f"images (normal + anomalous), budget {case['budget']}, {sum(case['kept'].values())} kept; hard rate by "
            f"round {rates}; {case['wall_seconds']:.0f} s.\n{said}\n{_detectors(case['detectors'])}"
        )
    return "\n".join(parts)


def overview(result: Mapping[str, Any]) -> str:
    """The cases of real images without another mode in one table, each a row."""
    arms = {
        "k-NN": ("knn", "baseline"),
        "SimpleNet, normals only": ("simplenet", "baseline"),
        "SimpleNet, KKA": ("simplenet", "kka"),
        "head + k-NN, zero-th": ("fused", "zeroth"),
        "head + k-NN, KKA": ("fused", "kka"),
        "head + k-NN, drawn normals": ("fused", "drawn_normals"),
    }
    rows, old, shipped = [["run", "normals", *arms, "hard rate"]], "", _shipped()
    for name, case in result.items():
        if name in _OVERVIEW:
            if changed := _changed(case.get("made_with", {}), shipped):
                old += f"\n{_OVERVIEW[name]}: measured with earlier {changed}.\n"
            scores = (case["detectors"].get(detector, {}).get(arm) for detector, arm in arms.values())
            rates = [case["rounds"][0]["hard_rate"], case["rounds"][-1]["hard_rate"]]
            rows.append(
                [
                    _OVERVIEW[name],
                    f"{case['normals']:,}",
                    *(f"{score['mean']:.3f}" if score else "" for score in scores),
                    " → ".join(f"{rate:.0%}".replace("%", " %") for rate in rates),
                ]
            )
    return _table(rows) + old


def _shipped() -> set[str]:
    """Identities of the built-in renderers."""
    return {assets.resolve(f"builtin:{name}").identity for name in assets.SHIPPED}


def _outdated(made_with: Mapping[str, Any], shipped: Container[str] | None = None) -> str:
    """The line that says what has changed since a measurement; see `_changed`."""
    changed = _changed(made_with, shipped)
    return f"\nMeasured with earlier {changed}.\n" if changed else ""


def _changed(made_with: Mapping[str, Any], shipped: Container[str] | None) -> str:
    """What has changed since a measurement; `shipped` are the identities of the built-in renderers, None where none
    drew."""
    changed = ["weights of the renderer"] if shipped is not None and made_with.get("renderer") not in shipped else []
    changed += ["versions of the detectors"] if made_with.get("detectors") != tuned.VERSION else []
    return " and ".join(changed)


_PAPER = 0.7462
"""AUC that the paper gives for SimpleNet on CIFAR-100 without generated anomalies."""


def detectors(result: Mapping[str, Any]) -> str:
    """A table a data set, detectors by sources with their times, and what is said of those at 32 px."""
    rows = result["rows"]
    parts = []
    for data in _distinct(rows, "data"):
        own = [row for row in rows if row["data"] == data]
        sources = [s for s in _SOURCES if any(row["source"] == s for row in own)]
        sources += [s for s in _distinct(own, "source") if s not in _SOURCES]
        seeds = len({r["seed"] for r in own})
        table = [["detector", *(_SOURCES.get(s, s.replace("_", " ")) for s in sources), "fit, s", "ms an image"]]
        for detector in _distinct(own, "detector"):
            fits = [row for row in own if row["detector"] == detector]
            cells = [_of_seeds([r["auc"] for r in fits if r["source"] == s], seeds) for s in sources]
            times = (statistics.median(r[k] for r in fits) for k in ("fit_seconds", "ms_per_image"))
            table.append([detector, *cells, *(f"{t:.1f}" for t in times)])
        counts = sorted({r["count"] for r in own if r["count"]})
        given = f", {' or '.join(str(c) for c in counts)} anomalies" if counts else ""
        parts.append(f"### {data}\n\n{seeds} seeds{given}.\n\n{_table(table)}")
    said = (_against_knn(rows), _at_32px(rows, result.get("at_32px", {})), _earlier(rows), _not_measured(rows))
    return "\n".join(parts) + "".join(said)


def _against_knn(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much better SimpleNet is than k-NN on each data set, both fitted to normals only."""
    auc: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["source"] == "none":
            auc.setdefault((row["data"], row["detector"]), []).append(row["auc"])
    better = [
        f"{data} {statistics.fmean(auc[data, 'simplenet']) - statistics.fmean(auc[data, 'knn']):+.4f}"
        for data in _distinct(rows, "data")
        if {(data, "simplenet"), (data, "knn")} <= auc.keys()
    ]
    return f"\nSimpleNet less k-NN, fitted to normals only: {', '.join(better)}.\n" if better else ""


def _earlier(rows: Sequence[Mapping[str, Any]]) -> str:
    """Detectors with rows that the present version of the detectors did not make."""
    old = [f"`{name}`" for name in _distinct([r for r in rows if r["version"] != tuned.VERSION], "detector")]
    return f"\nBy an earlier version of the detectors (`version` in the JSON): {', '.join(old)}.\n" if old else ""


def _not_measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """Detectors without any row, and data sets and sources that a detector has none of."""
    sets, sources = _distinct(rows, "data"), set(_distinct(rows, "source")) - {"none"}
    lacking = [f"`{kind}`" for kind in DETECTORS if not any(row["detector"] == kind for row in rows)]
    for detector in _distinct(rows, "detector"):
        own = [row for row in rows if row["detector"] == detector]
        if absent := [s for s in sets if s not in _distinct(own, "data")]:
            lacking.append(f"`{detector}` on {', '.join(absent)}")
        given = sources & set(_distinct(own, "source"))
        if given and (absent := [words for s, words in _SOURCES.items() if s in sources - given]):
            lacking.append(f"`{detector}` with {', '.join(absent)}")
    return f"\nNot measured: {'; '.join(lacking)}.\n" if lacking else ""


def _at_32px(rows: list[dict[str, Any]], names: Mapping[str, str]) -> str:
    """Which rows are the frozen detectors at 32 px, and how far SimpleNet's AUC is from the paper's.

    `names`: their rows' names, by their kind.
    """
    there = [f"`{name}`" for name in names.values() if any(row["detector"] == name for row in rows)]
    if not there:
        return ""
    text = (
        f"\nFrom pixels at 32 px, without a pretrained backbone, as frozen in `configs/detectors_32px.yaml`: "
        f"{', '.join(there)}.\n"
    )
    wanted = ("cifar100_furniture", names.get("simplenet_pixels"), "none")
    found = [row["auc"] for row in rows if (row["data"], row["detector"], row["source"]) == wanted]
    if found:
        difference = 100 * (statistics.fmean(found) - _PAPER)
        text += (
            f"\nSimpleNet at 32 px, fitted to normals only, has an AUC of {_spread(found)} on CIFAR-100 furniture, "
            f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'} the {_PAPER} that the paper gives "
            "for SimpleNet on CIFAR-100. The two are not one measurement. SimpleNet's published code reports the epoch "
            "that is best on the test images, ours is scored after the last one. The set here has half of CIFAR-100's "
            "training pictures; of its 1,250 normals 250 validate and are not learned from, and copies of normals are "
            "not tested on. The paper does not say which encoder its "
            "SimpleNet has at 32 px; ours is an autoencoder of the normals.\n"
        )
    return text


def detector_speed(result: Mapping[str, Any]) -> str:
    """Scoring as multiples of the bare backbone, and SimpleNet's training beside the authors'."""
    theirs = result.get("anomalib", {})
    rows = [["detector", "scoring", "scoring, anomalib", "fit, s", "fit, s, anomalib"]]
    for name, row in result["scoring"].items():
        other = theirs.get(name)
        scoring, fits = (
            [f"{r[key]:.2f}" if r and r[key] is not None else "" for r in (row, other)]
            for key in ("times_backbone", "fit_seconds")
        )
        rows.append([name, *scoring, *fits])
    text = (
        f"Scoring as a multiple of the bare backbone, {result['threads']} thread(s); fits to "
        f"{result['fitted_to'] // 2} images, ours with features given, anomalib's from images.\n\n{_table(rows)}"
    )
    if "training" in result:
        step, whole = result["step"], result["training"]
        text += (
            f"\nSimpleNet against the authors' code on the same backbone: a step on {step['patches']} patches takes "
            f"them {step['authors_times_ours']:.1f} times as long; a whole training on {whole['images']} images "
            f"{whole['authors_times_ours']:.1f} times as long with our extraction of features included, and "
            f"{whole['authors_times_fit']:.1f} times with features in the store.\n"
        )
        if whole["authors_epochs_run"] < 160:
            text += f"Their time is scaled up from {whole['authors_epochs_run']} of 160 epochs.\n"
        if "auc" in whole:
            text += f"AUC: ours {whole['auc']:.4f}, theirs after the last epoch {whole['authors_auc']:.4f}.\n"
    return text


_RENDERER = {
    "class_top1": ("class fidelity, top-1", ">= 0.32"),
    "class_top5": ("class fidelity, top-5", ">= 0.65"),
    "frechet_ratio": ("Fréchet distance to test images, over that of train images", "falling"),
    "knn_auc": ("k-NN, no anomalies: AUC", ""),
    "usefulness_auc": ("fused, 62 drawn from descriptions: AUC", ">= 0.969"),
    "real_images_auc": ("fused, 62 real train images of other classes: AUC", ""),
    "control_auc": ("fused, 62 drawn from normal captions: AUC", ">= k-NN - 0.005"),
    "meaning_gain": ("drawn from descriptions minus drawn from normal captions", ">= +0.014"),
    "real_vs_drawn_auc": ("real against drawn normals, linear classifier: AUC", "<= 0.85"),
    "unseen_gain_ratio": ("gain on superclasses never seen, over the gain when seen", ">= 0.5"),
    "images_per_second": ("images a second", ">= 100"),
    "times_plain_sampler": ("the same over 25 plain guided steps", ""),
}


def renderer(result: Mapping[str, Any]) -> str:
    """A measure a row."""
    rows = [["measure", "mean ± std", "wanted"]]
    for name, (words, wanted) in _RENDERER.items():
        if result[name] is None:
            rows.append([words, f"not measured: {result['unseen_gain_reason']}", wanted])
            continue
        spread = f" ± {result[f'{name}_std']:.4f}" if f"{name}_std" in result else ""
        rows.append([words, f"{result[name]:.4f}{spread}", wanted])
    noted = "made_with" in result
    old = _outdated(result["made_with"], _shipped()) if noted else "\nMeasured before versions were noted with it.\n"
    of_fidelity = f" (fidelity: {result['fidelity_seeds']})" if "fidelity_seeds" in result else ""
    return (
        f"`{result['renderer']}`, {result['steps']} steps, guidance {result['guidance']}, {result['seeds']} seeds"
        f"{of_fidelity}, {result['threads']} thread(s).\n{old}\n{_table(rows)}"
    )


def flower_renderer(result: Mapping[str, Any]) -> str:
    """What is read off the images, by whose they are."""
    of = {"drawn": "drawn", "by_the_domain": "by the domain itself", "chance": "drawn for another caption"}
    kinds = {"shown": "combinations that were shown", "held_out": "combinations never shown"}
    names = list(result["shown"]["drawn"])
    rows = [["images", *("all of them" if name == "all" else name for name in names)]]
    for kind, words in kinds.items():
        for whose, whose_words in of.items():
            cells = [f"{value['mean']:.3f} ± {value['std']:.3f}" for value in result[kind][whose].values()]
            rows.append([f"{words}, {whose_words}", *cells])
    seeds = len(result["shown"]["drawn"]["all"]["per_seed"])
    return (
        f"`{result['renderer']}`, {result['steps']} steps, {seeds} seeds of {result['captions']} captions.\n\n"
        f"{_table(rows)}"
    )


def redraw(result: Mapping[str, Any]) -> str:
    """How often an image is hard, by the label of another one of its text."""
    labels = {"hard": "hard", "normal_like": "normal-like", "between": "between", "easy": "easy"}
    rows = [
        ["another image of the text is", "share of images that are hard"],
        ["not looked at", f"{result['hard']:.2f}"],
    ]
    for label, words in labels.items():
        share = result[f"hard_elsewhere_if_{label}"]
        rows.append([words, "there is none" if share is None else f"{share:.2f}"])
    return (
        f"{result['texts']} lines of the zero-th round, {result['draws']} images each. Between texts lie "
        f"{result['variance_between_texts']:.0%} of the variance of log-hardness; two images of the same text have a "
        f"rank correlation of {result['rank_correlation']:.2f}.\n\n{_table(rows)}"
    )


def objective(result: Mapping[str, Any]) -> str:
    """What each measure without the test images gives the arms, and how it ranks detectors."""
    names = ["test", "validation", "drawn", "objective"]
    rows = [["fitted with", "test", "validation normals", "drawn normals", "mean of the two: the objective"]]
    rows += [[_ARMS.get(row["arm"], row["arm"]), *(f"{row[n]:.4f}" for n in names)] for row in result["arms"]]
    ranks = result["rank_correlation"]
    rows.append(["rank correlation with the test AUC", "", *(f"{ranks[n]:.2f}" for n in names[1:])])
    drawn = result["rank_correlation_of_drawn"]
    words = "the same, of zero-th iteration and KKA alone"
    rows.append([words, "", *("" if drawn[n] is None else f"{drawn[n]:.2f}" for n in names[1:])])
    runs = len({row["run"] for row in result["rows"]})
    return f"{result['detector']}, {len(result['rows'])} detectors of {runs} runs. AUC over:\n\n{_table(rows)}"


def throughput(result: Mapping[str, Any]) -> str:
    """A row a ratio; those that are not measured yet say so."""
    rows = [["measure", "measured", "wanted", ""]]
    for name, (words, sign, bound) in _RATIOS.items():
        value = result.get(name)
        passed = value is not None and (value >= bound if sign == "≥" else value <= bound)
        measured = "not measured yet" if value is None else f"{value:.3g}"
        rows.append([words, measured, f"{sign} {bound:g}", "" if value is None else "yes" if passed else "**no**"])
    parts = [f"Measured on {result['machine']}.\n\n{_table(rows)}"]
    if "scaling_details" in result:
        table = [["simulated workers", "of the ideal", "chunks", "longest chunk, s", "driver, ms a chunk"]]
        for workers, row in result["scaling_details"]["workers"].items():
            cells = [f"{row['of_ideal']:.3f}", str(row["chunks"])]
            table.append([workers, *cells, f"{row['longest_seconds']:.1f}", f"{row['driver_ms_a_chunk']:.1f}"])
        parts.append(f"The scaling, by number of workers:\n\n{_table(table)}")
    return "\n".join(parts)


def chaos(result: Mapping[str, Any]) -> str:
    """Kills by kind, and what came of the runs."""
    rows = [["killed", "times"], *([kind, str(count)] for kind, count in result["kills"].items())]
    rows.append(["in all", str(result["kills_in_all"])])
    runs, failed = result["runs_with_the_undisturbed_result"], result["failed_tests"]
    return f"{_table(rows)}\n{runs} runs ended with the undisturbed result; {failed} tests failed.\n"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "renderer": renderer,
    "renderer_natural": renderer,
    "flower_renderer": flower_renderer,
    "demo": demo,
    "redraw": redraw,
    "objective": objective,
    "ceiling": ceiling,
    "real_data": real_data,
    "overview": overview,
    "detectors": detectors,
    "detector_speed": detector_speed,
    "throughput": throughput,
    "chaos": chaos,
}

_FILES = {"overview": "real_data"}
"""Of tables that are not named as their JSON."""


def written(document: str) -> str:
    """The document with every table written anew; a table whose JSON is not there says so."""

    def fill(match: re.Match[str]) -> str:
        file = RESULTS / f"{_FILES.get(match[2], match[2])}.json"
        body = TABLES[match[2]](json.loads(file.read_text())) if file.is_file() else "Not measured yet.\n"
        return f"{match[1]}\n{body}\n{match[3]}"

    return _PLACE.sub(fill, document)


def _detectors(detectors: Mapping[str, Mapping[str, Any]]) -> str:
    arms = [a for a in _ARMS if any(a in row for row in detectors.values())]
    rows = [["detector", *(_ARMS[a] for a in arms)]]
    for kind, row in detectors.items():
        rows.append([kind, *(in_words(row[a]) if row.get(a) else "" for a in arms)])
    return _table(rows) if arms else "There are no test anomalies, hence no AUC.\n"


def _distinct(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _spread(values: list[float]) -> str:
    """Mean and standard deviation of the sample; nothing for no values."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def _of_seeds(values: list[float], seeds: int) -> str:
    """As `_spread`, with the number of values where it is less than that of the seeds; of one there is no spread."""
    if len(values) in (0, seeds):
        return _spread(values)
    return f"{_spread(values) if len(values) > 1 else format(values[0], '.4f')} ({len(values)})"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    for file in DOCUMENTS:
        text = file.read_text()
        new = written(text)
        if "--check" not in sys.argv:
            file.write_text(new)
        elif new != text:
            raise SystemExit(f"{file} is out of date: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
