"""Encoders that are trained on the normals at hand, shared by the confusion evaluator and by detectors."""
