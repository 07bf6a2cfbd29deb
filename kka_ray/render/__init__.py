"""Descriptions in, images out: diffusers pipelines, and training of the built-in text-to-image model.

Importing this package makes `KkaFlowPipeline` known to diffusers, so that
`diffusers.DiffusionPipeline.from_pretrained(FOLDER)` loads the built-in pipeline without remote code.
"""

from kka_ray.render.pipeline import KkaFlowPipeline

__all__ = ["KkaFlowPipeline"]
