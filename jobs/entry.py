"""What a job runs on the cluster: `python -m jobs.entry run|sweep CONFIG [-o ...]`, from the repository's folder.

It is `kka` with two of its verbs. The driver joins the cluster that started it, by the RAY_ADDRESS that Ray sets, and
its exit status becomes the job's.
"""

from __future__ import annotations

import sys

from kka_ray.cli import main

VERBS = ("run", "sweep")


def check(arguments: list[str]) -> None:
    """Exits with status 2 unless the first argument is one of the verbs."""
    if not arguments or arguments[0] not in VERBS:
        print(f"usage: python -m jobs.entry {'|'.join(VERBS)} CONFIG [-o section.key=value]", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    check(sys.argv[1:])
    main()
