"""DPO jobs whose workers tell what they did, and may die, for tests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from kka_ray import assets
from kka_ray.cluster import train
from kka_ray.config.models import ClusterConfig, PreferenceConfig
from kka_ray.records import PreferencePair, to_table
from kka_ray.store import Output, Store, stage_key


def watched(arguments: dict[str, Any]) -> None:
    """A worker of a DPO job. Writes RANK.json into `arguments["reports"]`: the preferred lines of each micro-batch, as
    tokens with their prompts, the SHA-256 of the adapter that it ends with, and whether it holds a part of all weights.

    Where `arguments["mark"]` names a file that is not there, it is made with the first checkpoint, and the first worker
    ends its process. A model is sharded on CPUs as it would be on GPUs.
    """
    from safetensors.torch import save
    from torch.distributed.tensor import DTensor

    from kka_ray.preference import dpo
    from kka_ray.preference.trainer import trainable

    number, _ = train.rank()
    seen: list[Any] = []

    class Watched(dpo.PackedDPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
            seen.append([inputs["lines"][i] for i in inputs["chosen"].tolist()])
            return super().compute_loss(model, inputs, *others, **options)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            mark = arguments.get("mark")
            if mark and number == 0 and not Path(mark).exists():
                Path(mark).touch()
                os._exit(1)

        def train_on(self, folder: Path) -> None:
            super().train_on(folder)
            digest = hashlib.sha256(save(trainable(self.model))).hexdigest()
            sharded = all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
            report = {"seen": seen, "adapter": digest, "sharded": sharded}
            (Path(arguments["reports"]) / f"{number}.json").write_text(json.dumps(report))

    dpo.PackedDPOTrainer = Watched  # type: ignore[misc]
    if arguments["config"].sharding == "fsdp":
        _shard_on_cpus()
    train.dpo_worker(arguments)


def _shard_on_cpus() -> None:
    """Accelerate shards on GPUs alone, and so do our jobs; torch shards on CPUs too."""
    import torch
    from accelerate.state import AcceleratorState, DistributedType

    from kka_ray.preference import dpo

    made, arguments = AcceleratorState.__init__, dpo._arguments

    def make(self: Any, *positional: Any, **named: Any) -> None:
        made(self, *positional, **named)
        if named.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, named["fsdp_plugin"]

    AcceleratorState.__init__ = make  # type: ignore[method-assign]
    train.device = lambda cluster: torch.device("cuda")
    dpo._arguments = lambda *values, **named: arguments(*values, **{**named, "cpu": True})


def run(
    store: Store,
    reports: Path,
    pairs: list[PreferencePair],
    model: str,
    config: PreferenceConfig,
    cluster: ClusterConfig,
    mark: Path | None = None,
) -> tuple[Output, list[Any]]:
    """Runs a job of `config.workers` such workers; returns its output and the workers' reports."""
    from kka_ray.preference import dpo

    reports.mkdir()
    table = to_table(PreferencePair, pairs)
    inputs = {"reports": str(reports), "model": assets.resolve(model).identity}
    arguments = {
        "store": store.uri,
        "pairs": store.get_or_make("pairs", 1, {"pairs": len(pairs)}, lambda attempt: attempt.table(table)).key,
        "previous": None,
        "model": model,
        "config": config,
        "seed": 0,
        "inputs": inputs,
        "trust_remote_code": False,
        "cluster": cluster,
        "reports": str(reports),
        "mark": mark and str(mark),
    }
    train.run("dpo", watched, arguments, config.workers, cluster)
    output = store.reported("dpo", stage_key("dpo", dpo.VERSION, inputs))
    return output, [json.loads((reports / f"{number}.json").read_text()) for number in range(config.workers)]
