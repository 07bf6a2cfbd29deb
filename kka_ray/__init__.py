"""Key Knowledge Augmentation for image anomaly detection, on Ray (after arXiv 2502.14880)."""

__version__ = "0.1.0"
