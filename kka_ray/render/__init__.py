"""Descriptions in, images out: diffusers pipelines, and training of the built-in text-to-image model.

Importing `kka_ray.render.pipeline` makes `KkaFlowPipeline` known to diffusers, so that
`diffusers.DiffusionPipeline.from_pretrained(FOLDER)` loads the built-in pipeline without remote code. This package
imports nothing of itself: whoever only reads a pipeline's index need not wait for diffusers.
"""
