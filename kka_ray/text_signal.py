"""Whether the texts tell how hard their images are: what preference training can learn from.

A preference pair says that one line is better than another. Where the verdict follows from chance in drawing and
judging and not from what a line says, there is nothing to learn, however many pairs there are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict

from kka_ray.features.text import TextEncoder
from kka_ray.loop import LoopResult

FOLDS = 10
LEAST = 50
"""Lines for the one figure, hard ones and as many others for the other: with fewer it is left out."""


def measure(result: LoopResult, encoder: TextEncoder, rejected: Collection[str]) -> dict[str, Any]:
    """`told` of the lines that the auditor judged, by the embeddings of their texts.

    `rejected` are the labels that hard ones are preferred to. Lines whose image does not show them say nothing,
    nor do images whose evaluator collapsed.
    """
    text = {d.id: d.text for r in result.rounds for d in r.descriptions}
    mismatched = {id_ for r in result.rounds for id_ in r.drawn.mismatched}
    verdicts = [v for v in result.audit.sound if v.id not in mismatched] if result.audit else []
    labels = np.array([v.label for v in verdicts])
    embedded = encoder.embed([text[v.id] for v in verdicts]) if verdicts else np.zeros((0, 1))
    return told(embedded, np.array([v.hardness for v in verdicts]), labels == "hard", np.isin(labels, list(rejected)))


def told(embedded: np.ndarray, hardness: np.ndarray, hard: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """How well linear models tell from N embeddings (N, D) how hard an image is, on lines that they were not fitted to.

    `spearman`: rank correlation of `hardness` (N,) with what ridge regression predicts, within each fold and on average
    over them: from fold to fold a prediction falls as the hardness held out rises, for it lacks in the mean. 0 where
    nothing can be told. `hard_auc`: of the probability that a logistic regression gives to being one of `hard` (N,),
    bool, and not of `others` (N,), bool; 0.5 where nothing can be told. None where there are too few lines, or none but
    one value.
    """
    out: dict[str, Any] = {"lines": len(hardness), "spearman": None, "hard_auc": None}
    if len(hardness) >= LEAST and np.ptp(hardness) > 0:
        folds = KFold(FOLDS, shuffle=True, random_state=0)
        found = cross_val_predict(RidgeCV(np.logspace(-2, 3, 11)), embedded, hardness, cv=folds)
        pairs = [(hardness[rows], found[rows]) for _, rows in folds.split(embedded)]
        within = [spearmanr(*pair).statistic for pair in pairs if all(np.ptp(values) > 0 for values in pair)]
        out["spearman"] = float(np.mean(within)) if within else None
    if min(hard.sum(), others.sum()) >= LEAST:
        rows = hard | others
        strata = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        model = LogisticRegression(max_iter=1000)
        likely = cross_val_predict(model, embedded[rows], hard[rows], cv=strata, method="predict_proba")[:, 1]
        out["hard_auc"] = float(roc_auc_score(hard[rows], likely))
    return out
