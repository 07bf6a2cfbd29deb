"""Measures of semantic drift: does the language model still say many different things after preference training?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

VERSION = 2
"""Part of the store's keys."""


def diversity(embeddings: np.ndarray) -> float:
    """Mean pairwise cosine distance of L2-normalised sentence embeddings (N, D); 0 for fewer than two lines."""
    count = len(embeddings)
    if count < 2:
        return 0.0
    total = float(np.square(embeddings.sum(0, dtype=np.float64)).sum())
    return 1.0 - (total - count) / (count * (count - 1))


def distinct_2(lines: Sequence[str]) -> float:
    """Share of distinct word pairs among all pairs of neighbouring words (Li et al., 2016); 0 where there are none."""
    pairs = [pair for line in lines for pair in itertools.pairwise(line.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def unique_share(lines: Sequence[str]) -> float:
    """Different lines as a share of all, letter case and outer blanks aside: of copies one counts; 0 for none."""
    return len({line.strip().lower() for line in lines}) / len(lines) if lines else 0.0


def perplexity(log_probs: Sequence[Sequence[float]]) -> float:
    """exp of the mean negative log-probability of a token, over all lines; 1 where no token is given."""
    values = [value for line in log_probs for value in line]
    return float(np.exp(-np.mean(values))) if values else 1.0
