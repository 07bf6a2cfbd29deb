"""What the service is: where it listens, what it accepts, and what it computes with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kka_ray.config.models import Engine, Strict

Format = Literal["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]


class ServeConfig(Strict):
    """Limits, replicas and address of the service."""

    host: str = Field("127.0.0.1", description="0.0.0.0 opens it to the network; put TLS in front of it then")
    port: int = Field(8000, ge=1, le=65535)

    formats: tuple[Format, ...] = Field(("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"), min_length=1)
    max_bytes: int = Field(8_000_000, ge=1, description="bytes of one image, encoded")
    max_total_bytes: int = Field(32_000_000, ge=1, description="bytes of a request's whole body")
    max_pixels: int = Field(20_000_000, ge=1, description="of one image, checked before it is decoded")
    max_images: int = Field(16, ge=1, description="images of a request")

    replicas: int = Field(1, ge=1, description="copies of the detector, each with its own backbone")
    ingress_replicas: int = Field(1, ge=1, description="processes that read and check requests")
    cpus: float = Field(1, ge=0, description="logical CPUs of a detector replica")
    gpus: float = Field(0, ge=0, description="GPUs of a detector replica, fractions allowed")
    engine: Engine = Field("torch", description="what runs the backbone; onnx: ONNX Runtime, on the CPU")
    threads: int = Field(1, ge=1, description="threads that a detector replica computes with")
    batch: int = Field(16, ge=1, description="images of one or more requests that are scored together")
    batch_wait: float = Field(0.01, ge=0, description="seconds to wait for a batch to fill")
    ongoing: int = Field(8, ge=1, description="requests that an ingress replica holds at once, each with its images")
    queued: int = Field(
        16, ge=1, description="requests that may wait, their bodies in memory; more are answered with 503"
    )
    timeout: float = Field(60, gt=0, description="seconds after which a request is given up, reading it included")

    @model_validator(mode="after")
    def _fits_together(self) -> ServeConfig:
        if self.max_bytes > self.max_total_bytes:
            raise ValueError(f"max_bytes {self.max_bytes} is more than max_total_bytes {self.max_total_bytes}")
        if self.engine == "onnx" and self.gpus:
            raise ValueError("the engine onnx computes on the CPU: leave gpus at 0, or use the engine torch")
        return self
