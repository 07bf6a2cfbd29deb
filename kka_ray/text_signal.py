"""Whether the texts tell how hard their images are: what preference training can learn from.

A preference pair says that one line is better than another. Where the verdict follows from chance in drawing and
judging and not from what a line says, there is nothing to learn, however many pairs there are.
"""

from __future__ import annotations

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


def measure(result: LoopResult, encoder: TextEncoder) -> dict[str, Any]:
    """`told` of all lines that the auditor judged, by the embeddings of their texts."""
    text = {d.id: d.text for r in result.rounds for d in r.descriptions}
    verdicts = result.audit.verdicts if result.audit else []
    if not verdicts:
        return told(np.zeros((0, 1)), np.zeros(0), np.zeros(0, bool))
    embedded = encoder.embed([text[v.id] for v in verdicts])
    hardness = np.array([v.hardness for v in verdicts])
    return told(embedded, hardness, np.array([v.label == "hard" for v in verdicts]))


def told(embedded: np.ndarray, hardness: np.ndarray, hard: np.ndarray) -> dict[str, Any]:
    """How well linear models tell from N embeddings (N, D) how hard an image is, on lines that they were not fitted to.

    `spearman`: rank correlation of `hardness` (N,) with what ridge regression predicts. `hard_auc`: of the probability
    that a logistic regression gives to `hard` (N,), bool; 0.5 where nothing can be told. Both None where there are too
    few lines, or none but one value.
    """
    count = len(hardness)
    out: dict[str, Any] = {"lines": count, "spearman": None, "hard_auc": None}
    if count >= LEAST and np.ptp(hardness) > 0:
        folds = KFold(FOLDS, shuffle=True, random_state=0)
        found = cross_val_predict(RidgeCV(np.logspace(-2, 3, 11)), embedded, hardness, cv=folds)
        statistic = float(spearmanr(hardness, found).statistic)
        out["spearman"] = statistic if np.isfinite(statistic) else None
    if min(hard.sum(), (~hard).sum()) >= LEAST:
        strata = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        model = LogisticRegression(max_iter=1000)
        likely = cross_val_predict(model, embedded, hard, cv=strata, method="predict_proba")[:, 1]
        out["hard_auc"] = float(roc_auc_score(hard, likely))
    return out
