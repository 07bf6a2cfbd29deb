"""Fitting detectors as a Ray Train job: the workers share out whole fits, or the gradient steps of each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kka_ray.cluster.checkpoints import Checkpoints
from kka_ray.cluster.leases import open_store
from kka_ray.cluster.train import rank
from kka_ray.cluster.workers import check_identity
from kka_ray.detectors.training import Training
from kka_ray.detectors.tuned import VERSION, TunedDetector
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.cache import read_features
from kka_ray.store import Attempt, Store, stage_key

CHECKPOINT_SECONDS = 30.0
"""Least time between two checkpoints of a fit."""


class SharedTraining(Training):
    """The gradient steps of one fit, shared by the workers of a job, with checkpoints in the store."""

    def __init__(self, store: Store, key: str, number: int = 0, workers: int = 1) -> None:
        self._number, self._workers = number, workers
        self._checkpoints = Checkpoints(store, "fit", key)
        self._kept = time.monotonic()

    def rows(self, count: int) -> slice:
        return slice(self._number * count // self._workers, (self._number + 1) * count // self._workers)

    def add(self, gradients: Iterable[Tensor]) -> None:
        if self._workers == 1:
            return
        parts = list(gradients)
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))

    def read(self, name: str) -> bytes | None:
        if self._workers == 1:
            return self._checkpoints.read(name)
        # One for all: another job with the same fit may write or delete it between two readers.
        read = [self._checkpoints.read(name) if self._number == 0 else None]
        dist.broadcast_object_list(read, 0)
        return read[0]

    def keep(self, name: str, content: Callable[[], bytes]) -> None:
        if self._number > 0 or time.monotonic() - self._kept < CHECKPOINT_SECONDS:
            return
        self._checkpoints.write(name, content())
        self._kept = time.monotonic()

    def clear(self) -> None:
        """Deletes the checkpoints, once the fit is done."""
        if self._number == 0:
            self._checkpoints.clear()


def fit_worker(arguments: dict[str, Any]) -> None:
    """One worker of a fitting job. `arguments["share"]` says what the workers share.

    `fits`: of the fits each does every n-th. `steps`: all do every fit together, and the first commits it. A fit is
    committed as soon as it is done.
    """
    torch.set_num_threads(arguments["threads"])
    number, workers = rank()
    together = arguments["share"] == "steps" and workers > 1
    # A worker that waits for a lease would keep the others waiting in the middle of a step.
    store = Store(arguments["store"]) if together else open_store(arguments["store"])
    fits = _missing(store, arguments["fits"]) if together else arguments["fits"][number::workers]
    fitter = Fitter(store, arguments)
    for fit in fits:
        key = stage_key("fit", VERSION, fit["inputs"])
        if not together:
            training = SharedTraining(store, key)
            store.get_or_make("fit", VERSION, fit["inputs"], partial(fitter.make, fit=fit, training=training))
        else:
            training = SharedTraining(store, key, number, workers)
            attempt = Attempt(store, "fit", key)
            fitter.make(attempt if number == 0 else None, fit, training)
            if number == 0:
                store.commit(attempt, fit["inputs"])
        training.clear()


def _missing(store: Store, fits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those fits that the first worker does not find in the store; the same list on every worker."""
    missing = torch.tensor([store.find("fit", stage_key("fit", VERSION, fit["inputs"])) is None for fit in fits])
    dist.broadcast(missing, 0)
    return [fit for fit, wanted in zip(fits, missing.tolist(), strict=True) if wanted]


class Fitter:
    """Fits detectors to features in the store; those of normals are read once."""

    def __init__(self, store: Store, arguments: dict[str, Any]) -> None:
        self._store, self._arguments = store, arguments
        self._backbone = Backbone.load(arguments["backbone"], "cpu")
        check_identity("the backbone", self._backbone.identity, arguments["backbone_identity"])
        self._normals: dict[str, Features | None] = {}

    def make(self, attempt: Attempt | None, fit: dict[str, Any], training: Training) -> None:
        """Fits and writes into the attempt; without one nothing is written."""
        known, anomalies = self._read_once(fit["train"]), self._features(fit["anomalies"])
        if fit["views"]:
            of_normals, of_anomalies = (self._features(key) for key in fit["views"])
            known = replace(known, views=of_normals)
            anomalies = replace(anomalies, views=of_anomalies) if anomalies is not None else None
        if fit["weights"]:
            anomalies = replace(anomalies, weights=np.array(fit["weights"], np.float32))
        validation = self._read_once(self._arguments["validation"])
        started = time.perf_counter()
        tuned = TunedDetector.fit(
            fit["detector"],
            self._backbone,
            known,
            anomalies,
            validation,
            seed=fit["seed"],
            false_positive_rate=self._arguments["false_positive_rate"],
            training=training,
        )
        seconds = time.perf_counter() - started
        if attempt is None:
            return
        with tempfile.TemporaryDirectory(prefix="kka-fit-") as folder:
            tuned.save(Path(folder) / "detector")
            attempt.folder(Path(folder))
        attempt.json({"fit_seconds": round(seconds, 3)}, "fit")

    def _read_once(self, key: str) -> Any:
        if key not in self._normals:
            self._normals[key] = self._features(key)
        return self._normals[key]

    def _features(self, key: str | None) -> Any:
        if key is None:
            return None
        return read_features(self._store.reported("features", key), patches=self._arguments["patches"])
