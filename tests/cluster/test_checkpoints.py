"""States of jobs, kept beside the output that is being made."""

from __future__ import annotations

import threading
from pathlib import Path

from kka_ray.cluster.checkpoints import Checkpoints
from kka_ray.store import Store

WRITES = 30


def test_two_runs_that_make_one_output_do_not_hinder_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        own = Checkpoints(Store(str(tmp_path)), "dpo", "k" * 24)
        try:
            for _ in range(WRITES):
                own.write("training", content)
                assert own.read("training") in states
        except BaseException as error:
            errors.append(error)

    states = [bytes([number]) * 1_000_000 for number in range(2)]
    runs = [threading.Thread(target=write, args=(content,)) for content in states]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert not errors
    last = Checkpoints(Store(str(tmp_path)), "dpo", "k" * 24)
    last.clear()
    last.clear()
    assert last.read("training") is None
