"""Image anomaly detectors under one contract: fit, score, heatmap, save, load."""
