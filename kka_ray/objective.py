"""What a sweep maximises: AUC of normals against one set of drawn anomalies, without the test images.

Half of it is the AUC against the validation normals, half that against drawn normals: images of normal captions by the
same renderer. A detector that was fitted with drawn anomalies tells drawn images from real ones and so has the first at
1.000, whatever it has learned of anomalies; only the second, where both sides are drawn, is about what they show
(`benchmarks/objective.py` holds both against the test AUC). Drawn normals that train a detector
(`detect.drawn_normals`) are not among those that measure it.

The anomalies are the same for every trial, else trials could not be compared: images that the base configuration draws
in a zero-th round and that its auditor calls hard or between (an easy image is told apart by any detector, a
normal-like one should not be). They must not have trained what they measure, neither the detector nor the language
model. So that round is drawn with a seed of its own, which no trial has: trials lose none of their images to it, and no
verdict on its images teaches their language model. Should a trial write one of its descriptions again, that image is
kept out of the trial's anomaly set, and the next best takes its place.

The auditor sees that round alone: with later rounds, what counts as hard would lean towards the base configuration's
own.

Being drawn, the reference measures the boundary against drawn anomalies and not against real ones; and validation
normals set the hard band and a detector's scale. Hence the champion's figure is the test AUC, which is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from kka_ray.amounts import amount
from kka_ray.cluster.streaming import Pools, Progress
from kka_ray.config.models import SEEDS, RunConfig
from kka_ray.describe.guard import words_of
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import StageError
from kka_ray.evaluation import UNSEEN, fit_headline
from kka_ray.features.base import Features
from kka_ray.loop import Loop, LoopResult
from kka_ray.prepare import Prepared, extract_images
from kka_ray.records import Description
from kka_ray.store import Store

FEWEST = 5
"""Images that a reference has at least."""
_LABELS = ("hard", "between")
_APART = 500_000
"""What is added to the configuration's seed."""


@dataclass(frozen=True)
class Reference:
    """The images that every trial is measured with, beside its validation normals.

    ids, images: the anomalies, uint8 (H, W, 3), in the order of ids. normals: drawn normals, likewise; none if the
    base configuration draws none. withheld: the words of all descriptions of that round, as the guard compares them.
    """

    ids: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    normals: tuple[np.ndarray, ...]
    withheld: frozenset[str]

    def withholds(self, description: Description) -> bool:
        """Whether the description's image must stay out of a trial's anomaly set."""
        return words_of(description.text) in self.withheld


def make_reference(config: RunConfig, store: Store, prepared: Prepared, progress: Progress) -> Reference:
    """Runs a zero-th round of the base configuration, or finds it in the store, and takes the reference from it.

    The seed of that round is not the configuration's; the normals are. Raises StageError if fewer than `FEWEST` images
    are hard or between, or fewer drawn normals are left to measure with.
    """
    loop = config.loop.model_copy(update={"rounds": 0})
    zeroth = config.model_copy(update={"loop": loop, "seed": (config.seed + _APART) % SEEDS})
    with closing(Pools(zeroth, store.uri)) as pools:
        return reference_of(Loop(zeroth, store, prepared, progress, pools).run())


def reference_of(result: LoopResult) -> Reference:
    """The reference in a loop's zero-th round. Raises StageError if it is too small."""
    assert result.audit is not None
    first, sound = result.rounds[0], result.audit.sound
    # Images of an evaluator that collapsed are between as well: it says nothing of them.
    wanted = {v.id for v in sound if v.label in _LABELS}
    ids = tuple(sorted(id_ for id_ in first.drawn.ids if id_ in wanted))
    if len(ids) < FEWEST:
        labels = sorted(v.label for v in result.audit.verdicts)
        counts = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels)) or "none"
        collapsed = len(result.audit.verdicts) - len(sound)
        raise StageError(
            f"a zero-th round of the base configuration has {len(ids)} hard or between images, fewer than {FEWEST}: "
            f"nothing to measure trials with (drawn: {counts}"
            + (f"; evaluators that collapsed judged {collapsed} of them" if collapsed else "")
            + "). Raise run.loop.lines, or run.confusion.upper for a "
            "wider hard band"
        )
    withheld = frozenset(words_of(d.text) for d in first.descriptions if d.text)
    unseen = result.normals.ids[UNSEEN]
    if len(unseen) < FEWEST:
        raise StageError(
            f"{amount(len(unseen), 'drawn normal')} to measure trials with, fewer than {FEWEST}: every detector tells "
            "drawn images from photographs, and all trials would come out alike. Set run.render.normals to "
            f"{2 * FEWEST} or more"
        )
    normals = result.normals.images(unseen)
    return Reference(ids, tuple(result.images(list(ids))), tuple(normals), withheld)


def validation_auc(
    config: RunConfig, store: Store, prepared: Prepared, result: LoopResult, reference: Reference
) -> list[float]:
    """AUC of the headline detector, one a seed: the mean of those against validation normals and against drawn ones.

    The detector is fitted with the training normals and the loop's last kept set. Raises StageError if that set holds
    an image of the reference.
    """
    kept = {k.id for k in result.rounds[-1].kept}
    texts = {d.id: d for r in result.rounds for d in r.descriptions}
    leaked = sorted(id_ for id_ in kept if reference.withholds(texts[id_]))
    if leaked:
        raise StageError(
            f"the kept set holds {len(leaked)} withheld images ({leaked[0]}, ...); give the loop `withheld`"
        )
    detectors = fit_headline(config, store, prepared, result)
    anomalies, drawn = (
        extract_images(store, prepared.backbone, images, prepared.patches)
        for images in (reference.images, reference.normals)
    )
    kinds = [prepared.validation, drawn]
    return mean_aucs(detectors, kinds, anomalies)


def mean_aucs(detectors: Sequence[TunedDetector], kinds: Sequence[Features], anomalies: Features) -> list[float]:
    """Each detector's AUC over one kind of normals and the anomalies, the mean over the kinds."""
    positive = [d.score(anomalies).score for d in detectors]
    return [
        float(np.mean([_auc(d.score(normals).score, scores) for normals in kinds]))
        for d, scores in zip(detectors, positive, strict=True)
    ]


def _auc(normals: np.ndarray, anomalies: np.ndarray) -> float:
    truth = np.r_[np.zeros(len(normals), bool), np.ones(len(anomalies), bool)]
    return float(roc_auc_score(truth, np.r_[normals, anomalies]))
