"""The report's words: names that people use, numbers as they are written, and the result in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kka_ray.amounts import amount
from kka_ray.config.models import IGNORE_ANOMALIES

DETECTORS = {
    "simplenet": "SimpleNet",
    "knn": "k-NN",
    "mahalanobis": "Mahalanobis",
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "head": "linear head",
    "fused": "linear head + k-NN",
    "mlp_head": "MLP head",
    "energy_head": "energy head",
    "simplenet_pixels": "SimpleNet from pixels",
    "beatgan": "BEAT-GAN",
    "genias": "GenIAS",
    "deep_svdd": "Deep SVDD",
    "deep_sad": "Deep SAD",
    "ae_svdd": "AE-SVDD",
}
ARMS = {
    "baseline": "normals only",
    "zeroth": "zero-th iteration",
    "kka": "KKA",
    "noise": "noise (control)",
    "cutpaste": "CutPaste (control)",
    "blur": "blur (control)",
    "patch_shuffle": "patch shuffle (control)",
    "patch_swap": "patch swap (control)",
    "mixup": "MixUp (control)",
    "perlin": "Perlin textures (control)",
    "genias": "GenIAS (control)",
    "outside": "outside images (control)",
    "drawn_normals": "drawn normals (control)",
    "normal_views": "views of normals (control)",
}
LABELS = {
    "normal": "validation normals",
    "normal_like": "normal-like",
    "hard": "hard",
    "between": "between",
    "easy": "easy",
    "unjudged": "not judged",
}
REASONS = {
    "normal_class": "describes the normal class",
    "duplicate": "said before",
    "near_duplicate": "nearly said before",
    "too_short": "too short",
    "too_long": "too long or cut off",
    "malformed": "malformed",
    "empty": "empty",
}
REJECTED = {"easy": "easy ones", "normal_like": "normal-like ones", "guarded": "those that the guard refused"}
_LITTLE = 0.6
"""AUC below which the texts tell too little of what is hard."""
STAGES = {
    "prefer": "preference training",
    "describe_and_render": "describe and draw",
    "judge": "measure and judge",
    "describe_work": "describing, all workers",
    "render_work": "drawing, all workers",
}


def arms(summary: Mapping[str, Any]) -> dict[str, str]:
    """The names of the arms. Where no round followed the zero-th, its set is the last one: no set is KKA's."""
    if len(summary["rounds"]) > 1:
        return ARMS
    return {arm: ARMS["zeroth"] if arm == "kka" else words for arm, words in ARMS.items() if arm != "zeroth"}


def ours(summary: Mapping[str, Any]) -> str:
    """Whose the last set is, within a sentence."""
    return "KKA" if len(summary["rounds"]) > 1 else "the zero-th iteration"


def plain(name: str, names: Mapping[str, str]) -> str:
    """A name as people write it; one that is not known keeps its own, underscores aside."""
    return names.get(name, name.replace("_", " "))


def listed(things: Sequence[str]) -> str:
    """Things one after the other: 'a', 'a and b', 'a, b and c'."""
    return ", ".join([*things[:-2], " and ".join(things[-2:])])


def short(arm: str) -> str:
    """An arm's name where it is said, or room is too little to say, that it is a control."""
    return arm.removesuffix(" (control)")


def count(value: int) -> str:
    """A whole number with thousands marked."""
    return f"{value:,}"


def percent(share: float) -> str:
    """A share in 0..1 as percent, one decimal below 10 %."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


def signed(value: float, digits: int) -> str:
    """A number with its sign, none where it is 0 as written."""
    rounded = round(value, digits)
    sign = "+" if rounded > 0 else "\u2212" if rounded < 0 else ""
    return f"{sign}{abs(rounded):.{digits}f}"


def position(value: float) -> str:
    """A hardness, one decimal."""
    return signed(value, 1).removeprefix("+")


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def varies(spread: Mapping[str, Any]) -> bool:
    """Whether the fits differ at all: those of some detectors are the same whatever their seed, and have no spread."""
    return len(set(spread["per_seed"])) > 1


def auc(spread: Mapping[str, Any]) -> str:
    """A mean, and its standard deviation where there is one."""
    mean = f"{spread['mean']:.4f}"
    return f"{mean}\u00a0±\u00a0{spread['std']:.4f}" if varies(spread) else mean  # not to be broken over two lines


def budget_rule(summary: Mapping[str, Any]) -> str:
    """Which of the two rules set the budget."""
    rule = "share" if summary["budget_rule"] == "share" else "least number"
    return f"the {rule} that the configuration asks for"


def has_auc(summary: Mapping[str, Any]) -> bool:
    """Whether the headline detector was tried on test anomalies at all."""
    return any(spread is not None for spread in summary["auc"].values())


def reading(summary: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    """The result in a paragraph of plain language."""
    parts = _result(summary) if has_auc(summary) else _without_anomalies(summary, calibration)
    return " ".join([*parts, *_loop(summary)])


def _result(summary: Mapping[str, Any]) -> Iterator[str]:
    detector = plain(summary["detector"], DETECTORS)
    baseline, zeroth, kka = (summary["auc"][arm] for arm in ("baseline", "zeroth", "kka"))
    kept = amount(sum(summary["kept"].values()), "kept image")
    if kka is None:
        yield f"{detector} trained on normal images alone reaches an AUC of {auc(baseline)} on the test images."
        others = any("kka" in row for row in summary["detectors"].values())
        if summary["detector"] in IGNORE_ANOMALIES:
            shown = "; the table shows the others" if others else ""
            yield f"It ignores anomalies, so the kept images make no difference to it{shown}."
        elif zeroth is not None:
            yield f"With the zero-th set it reaches {auc(zeroth)}; in the end no drawn image was kept."
        else:
            yield "No drawn image was kept, so there is nothing to compare it with."
        return
    if baseline is None:
        yield f"{detector} needs anomalies to train on; with {ours(summary)}'s {kept} it reaches an AUC of {auc(kka)}."
    else:
        yield f"{detector} trained on normal images alone reaches an AUC of {auc(baseline)} on the test images."
        yield f"With {ours(summary)}'s {kept} it reaches {auc(kka)}: {_change(baseline, kka)}."
        if viewed := _controls(summary).get("normal_views"):
            yield (
                f"With normals and the views of them that go with the images, but no image, it reaches "
                f"{auc(viewed)}; from there it is {_change(viewed, kka)}."
            )
    if zeroth is not None and len(summary["rounds"]) > 1:
        yield f"The zero-th iteration, drawn before any preference training, gives {auc(zeroth)}."
    controls = {arm: spread for arm, spread in _controls(summary).items() if arm != "normal_views"}
    if controls:
        name, best = max(controls.items(), key=lambda item: item[1]["mean"])
        gap = kka["mean"] - best["mean"]
        yield (
            f"The best control made without a language model, {short(plain(name, ARMS))}, gives "
            f"{auc(best)}; {ours(summary)}'s distance to it is {signed(gap, 4)}."
        )


def _without_anomalies(summary: Mapping[str, Any], calibration: Mapping[str, Any]) -> Iterator[str]:
    detector = plain(summary["detector"], DETECTORS)
    kept = sum(summary["kept"].values())
    yield "This data set has no test anomalies, so there is no AUC to give."
    if summary["detector"] in IGNORE_ANOMALIES:
        yield f"{detector} was fitted to normal images alone, as it ignores anomalies."
    elif kept:
        yield f"{detector} was trained on the normal images and {ours(summary)}'s {amount(kept, 'kept image')}."
    else:
        yield f"{detector} was trained on normal images alone, as no drawn image was kept."
    yield (
        f"It calls an image anomalous whose score exceeds {calibration['threshold']:.4g}, a threshold that lets "
        f"{percent(summary['validation_flagged'])} of the validation normals be called so by mistake. The normals "
        "that it finds most anomalous are shown below: faults among them belong out of the training images."
    )


def _loop(summary: Mapping[str, Any]) -> Iterator[str]:
    rounds = summary["rounds"]
    if not rounds:
        return
    first, last = rounds[0], rounds[-1]
    if len(rounds) == 1:
        hard = percent(first["hard_rate"])
        yield f"One round was run, the zero-th, without preference training; {hard} of its lines became hard images."
        return
    before, after = (f"{row['diversity']:.2f}" for row in (first, last))
    diversity = f"stayed at {after}" if before == after else f"went from {before} to {after}"
    yield (
        f"Of the lines that the language model wrote, {percent(first['hard_rate'])} became hard images in round 0 and "
        f"{percent(last['hard_rate'])} in round {len(rounds) - 1}, while the diversity of the lines {diversity}."
    )


def cautions(summary: Mapping[str, Any]) -> list[str]:
    """What a reader should know before believing the result, each a sentence; often none."""
    return [
        *_cautions_of_result(summary),
        *_cautions_of_threshold(summary),
        *_cautions_of_rounds(summary),
        *_cautions_of_texts(summary),
        *_cautions_of_judge(summary["audit"]),
    ]


def _cautions_of_result(summary: Mapping[str, Any]) -> Iterator[str]:
    kka, zeroth = summary["auc"]["kka"], summary["auc"]["zeroth"]
    if kka is None:
        return
    if len(kka["per_seed"]) == 1:
        yield "Only one seed was run, so nothing is known of the spread: small differences may be chance."
    elif not varies(kka):
        yield "Every fit gives the same figure, so nothing is known of the spread: small differences may be chance."
    for name, control in _controls(summary).items():
        perfect = kka["mean"] == 1.0  # there is no other way to get them all right
        if len(kka["per_seed"]) > 1 and control["per_seed"] == kka["per_seed"] and not perfect:
            yield (
                f"The control {short(plain(name, ARMS))} has {ours(summary)}'s very figures, seed "
                "by seed: the images had no part in them, and what differs from normals only is not their doing."
            )
    for name, control in _controls(summary).items():
        if control["mean"] >= kka["mean"]:
            yield (
                f"The control {short(plain(name, ARMS))} does at least as well as "
                f"{ours(summary)}: this run shows no gain from what the language model knows."
            )
    baseline = summary["auc"]["baseline"]
    if "normal_views" not in _controls(summary) and baseline is not None:
        if baseline["mean"] >= kka["mean"]:
            yield (
                "The detector that was fitted to normals only does at least as well: the drawn images do not help it "
                "here. Another detector may make more of them (detect.headline)."
            )
        if summary.get("views"):
            yield (
                "With the drawn images go views of normals (detect.views), which the detector that was fitted to "
                "normals only has not: a part of any change is theirs. The control normal_views says how much."
            )
    if "drawn_normals" not in _controls(summary):
        yield (
            "No control with drawn normals was evaluated: a part of any gain may come from telling drawn images from "
            "the normals' own, whatever they show."
        )
    if zeroth is not None and len(summary["rounds"]) > 1 and zeroth["mean"] >= kka["mean"]:
        yield "The zero-th iteration does at least as well as the full loop: the later rounds brought no gain here."
    if any(count for label, count in summary["kept"].items() if label == "easy"):
        yield (
            f"The kept set holds {amount(summary['kept']['easy'], 'easy image')}: there were too few others, or (with "
            "loop.mode=add, which lets none go) they were kept before they were found easy."
        )


def _cautions_of_threshold(summary: Mapping[str, Any]) -> Iterator[str]:
    normals, wanted = summary.get("validation_normals"), summary.get("false_positive_rate")
    if normals is not None and wanted is not None and 1 / (normals + 1) > wanted:
        yield (
            f"The threshold is the worst score of {amount(normals, 'validation normal')}, which about one new normal "
            f"image in {normals + 1} will exceed: to hold {percent(wanted)} (detect.false_positive_rate) takes "
            f"{math.ceil(1 / wanted - 1e-9) - 1} of them."
        )


def _cautions_of_rounds(summary: Mapping[str, Any]) -> Iterator[str]:
    rounds = summary["rounds"]
    for number, row in enumerate(rounds):
        if row["status"] != "ok":
            yield f"Round {number} was {row['status']}. DPO was left out before it."
    if len(rounds) > 1:
        first, last = rounds[0], rounds[-1]
        if last["diversity"] < 0.7 * first["diversity"]:
            yield (
                f"The descriptions lost diversity ({first['diversity']:.2f} to {last['diversity']:.2f}): the language "
                "model may be collapsing to a few sentences."
            )
        if last["normal_class_rate"] > first["normal_class_rate"] + 0.1:
            yield (
                f"More lines describe the normal class itself ({percent(first['normal_class_rate'])} in round 0, "
                f"{percent(last['normal_class_rate'])} in the last): the guard stops them, but lines are wasted."
            )
    unwritten = sum(row["rejected"].get("error", 0) for row in rounds)
    if unwritten:
        yield f"{amount(unwritten, 'line')} could not be written."
    failed = sum(row["failed"] for row in rounds)
    if failed > 0.02 * sum(row["rendered"] + row["failed"] for row in rounds):
        yield f"{amount(failed, 'image')} could not be drawn."
    mismatched = sum(row["mismatched"] for row in rounds)
    if mismatched:
        yield (
            f"{amount(mismatched, 'image')} of {sum(row['rendered'] for row in rounds)} did not show what their texts "
            "say, however often they were drawn again; these lines were left out of the preference training."
        )


def _cautions_of_texts(summary: Mapping[str, Any]) -> Iterator[str]:
    told = summary.get("text_signal", {}).get("hard_auc")
    if told is not None and told < _LITTLE and any(row["dpo"] for row in summary["rounds"]):
        yield (
            "Which lines become hard images and which are rejected can hardly be told from their texts (AUC "
            f"{told:.2f} for a linear model, 0.5 being chance), so preference training has little to learn from. A "
            "renderer that follows its texts more closely would help, as would a hard band that most images lie on one "
            "side of (confusion.upper)."
        )


def _cautions_of_judge(audit: Mapping[str, Any]) -> Iterator[str]:
    if audit.get("collapsed_folds"):
        yield (
            f"{amount(int(audit['collapsed_folds']), 'fold')} of the auditor collapsed to one point; its images count "
            "as between."
        )
    if audit.get("band_empty"):
        yield (
            f"The hard band is empty: its lower edge ({audit['band_lower']:.2f}, set by the validation normals) is not "
            f"below its upper edge ({audit['band_upper']:.2f}). Raise confusion.upper, or use a better backbone."
        )


def _controls(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    row = summary["detectors"].get(summary["detector"], {})
    return {arm: spread for arm, spread in row.items() if arm not in ("baseline", "zeroth", "kka")}


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    gain = after["mean"] - before["mean"]
    pairs = list(zip(before["per_seed"], after["per_seed"], strict=True))
    better = sum(b < a for b, a in pairs)
    if len(pairs) == 1:
        return f"a change of {signed(gain, 4)}, with one seed"
    if not (varies(before) or varies(after)):
        return f"a change of {signed(gain, 4)}, the same in every fit"
    fits = f"all {len(pairs)}" if better == len(pairs) else f"{better} of {len(pairs)}"
    return f"a change of {signed(gain, 4)}, better in {fits} fits"
