"""The service on Ray Serve: ingress replicas that check requests, detector replicas that score batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from kka_ray.cluster.placement import DIED
from kka_ray.config.serve import ServeConfig
from kka_ray.places import is_uri
from kka_ray.scoring import detector_folder, load_detector
from kka_ray.serving.app import create_app
from kka_ray.serving.refusal import Refusal
from kka_ray.serving.scorer import ImageScorer, Item, Judgement, Unreadable


class DetectorReplica:
    """One detector with its backbone. Images of several requests are scored together."""

    def __init__(self, model: str, config: ServeConfig) -> None:
        import torch

        torch.set_num_threads(config.threads)
        device = "cuda" if config.gpus else "cpu"
        self._scorer = ImageScorer(load_detector(model, device, config.engine), config)
        self.score.set_max_batch_size(config.batch)
        self.score.set_batch_wait_timeout_s(config.batch_wait)

    @serve.batch
    async def score(self, items: list[Item]) -> list[Judgement | Unreadable]:
        """Called with one image, answered with its judgement; Serve makes lists of both."""
        # In a thread, so that the next batch is collected meanwhile.
        return await asyncio.to_thread(self._scorer.score, items)

    async def describe(self) -> dict[str, Any]:
        """What is served."""
        return self._scorer.describe()


class _RemoteScorer:
    """Detector replicas behind a handle."""

    def __init__(self, detector: DeploymentHandle) -> None:
        self._detector = detector

    async def score(self, items: Sequence[Item]) -> list[Judgement | Unreadable]:
        # An image a call, so that Serve spreads them over replicas and batches them with those of other requests.
        try:
            return list(await asyncio.gather(*(self._detector.score.remote(item) for item in items)))
        except (*DIED, BackPressureError, DeploymentUnavailableError) as error:
            raise _unavailable() from error

    async def describe(self) -> dict[str, Any]:
        try:
            return dict(await self._detector.describe.remote())
        except (*DIED, BackPressureError, DeploymentUnavailableError) as error:
            raise _unavailable() from error


def _unavailable() -> Refusal:
    return Refusal(503, "unavailable", "no detector is available at the moment; try again")


@serve.ingress()
class Ingress:
    """The HTTP interface. It holds the digest of the token only."""

    def __init__(self, detector: DeploymentHandle, config: ServeConfig, token_digest: bytes) -> None:
        self._arguments = (_RemoteScorer(detector), config, token_digest)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(*self._arguments)


def build_application(model: str | Path, config: ServeConfig, token_digest: bytes) -> Application:
    """The application that `serve.run` takes. Raises AssetError if there is no detector in `model`."""
    with detector_folder(model) as found:
        folder = str(model if is_uri(model) else found.resolve())
    detector = (
        serve.deployment(DetectorReplica)
        .options(
            num_replicas=config.replicas,
            ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
            # A batch is being scored while the next one is collected.
            max_ongoing_requests=2 * config.batch,
        )
        .bind(folder, config)
    )
    return (
        serve.deployment(Ingress)
        .options(
            num_replicas=config.ingress_replicas,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=config.ongoing,
            max_queued_requests=config.queued,
        )
        .bind(detector, config, token_digest)
    )
