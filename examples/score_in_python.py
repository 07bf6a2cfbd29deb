"""Scores images with a run's detector in this process: `python examples/score_in_python.py runs/demo a.png`."""

from __future__ import annotations

import sys
from pathlib import Path

from kka_ray.data.decode import decode
from kka_ray.scoring import load_detector, verdict


def main(run: str, *files: str) -> None:
    """Prints a line a file."""
    detector = load_detector(Path(run))
    scores = detector.score_images([decode(Path(file).read_bytes(), file) for file in files])
    for file, score, z, anomalous in zip(files, scores.score, scores.robust_z, scores.anomalous, strict=True):
        print(f"{file}: {verdict(anomalous)}, score {score:.3f}, {z:+.1f} MADs from the median of the normals")


if __name__ == "__main__":
    main(*sys.argv[1:])
