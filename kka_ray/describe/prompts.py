"""Few-shot prompts from representative normal samples."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans

from kka_ray.config.models import DescribeConfig
from kka_ray.data.base import ImageSet
from kka_ray.data.captions import without_article
from kka_ray.records import Prompt

VERSION = 3


def build_prompts(
    normals: ImageSet, pooled: np.ndarray, subject: str, config: DescribeConfig, seed: int
) -> list[Prompt]:
    """One prompt a group of representative normals.

    The training normals' features (`pooled`, (N, D)) are clustered by k-means into as many groups as there are
    prompts; a prompt lists the captions of the images nearest to its group's centre, no caption twice. A language
    model without instruction tuning to speak of continues such a list; asked as a chat it copies the examples. Where
    `config.contrast` is given it ends the list of normal captions and heads that of the lines to be written.
    """
    groups = min(config.prompts, len(normals))
    means = KMeans(groups, random_state=seed, n_init=3).fit(pooled)
    # "Many different a steel screw" would be no English.
    many = subject if without_article(subject) == subject else f"pictures of {subject}"
    heading = config.instruction or f"A list of descriptions of many different {many}:"
    turn = f"{config.contrast}\n" if config.contrast else ""
    prompts = []
    for group in range(groups):
        distance = np.linalg.norm(pooled - means.cluster_centers_[group], axis=1)
        rows = _nearest_distinct(distance, normals.captions, config.examples)
        lines = "".join(f"- {normals.captions[i]}\n" for i in rows)
        prompts.append(Prompt(f"p{group:03d}", f"{heading}\n{lines}{turn}-", tuple(normals.ids[i] for i in rows)))
    return prompts


def _nearest_distinct(distance: np.ndarray, captions: tuple[str, ...], count: int) -> list[int]:
    rows: list[int] = []
    seen: set[str] = set()
    for i in np.argsort(distance, kind="stable"):
        if captions[i] not in seen:
            rows.append(int(i))
            seen.add(captions[i])
        if len(rows) == count:
            break
    return rows
