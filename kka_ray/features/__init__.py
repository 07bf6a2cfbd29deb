"""Frozen encoders that several stages need: image backbones and text embeddings."""
