"""TRL's DPO trainer on packed batches, and its state between two steps as one safetensors file.

TRL itself would pickle the state of the optimizer, of the scheduler and of the random numbers, and it knows nothing of
the reference's log-probabilities, which are computed once and would be others, by rounding, in another batch.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from kka_ray.encoders.state import optimizer_state, part, restore_optimizer
from kka_ray.preference.packing import Line, SamePromptSampler, log_probs

CHECKPOINT = "training"


class Checkpoints(Protocol):
    """Where states are kept under their names, in reach of every process of a training."""

    def read(self, name: str) -> bytes | None:
        """The last state that was written whole, None if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Replaces the state."""


class PackedDPOTrainer(DPOTrainer):
    """TRL's trainer with the losses sigmoid and sft on packed batches; the reference reads each line once."""

    def __init__(self, checkpoints: Checkpoints | None = None, **arguments: Any) -> None:
        """`checkpoints` is where the state is kept as often as `save_steps` says, and gone on from."""
        super().__init__(**arguments)
        self._reference: dict[Line, Tensor] = {}
        self._checkpoints = checkpoints
        self._facts: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}

    def train_on(self, folder: Path) -> None:
        """Trains from the last checkpoint on if there is one, which is copied into `folder`."""
        # One for all: another job with the same training may write or delete it between two readers.
        reader = self._checkpoints if self.is_world_process_zero() else None
        (content,) = broadcast_object_list([reader.read(CHECKPOINT) if reader else None])
        if content is None:
            self.train()
            return
        folder.mkdir(parents=True)
        file = folder / f"{CHECKPOINT}.safetensors"
        file.write_bytes(content)
        with safe_open(file, "pt") as opened:
            self._facts = json.loads(opened.metadata()["facts"])
        self._tensors = load_file(file)
        # Trainer reads it from there, and calls the methods below for the rest.
        (folder / TRAINER_STATE_NAME).write_text(json.dumps(self._facts["trainer"]))
        self.train(resume_from_checkpoint=str(folder))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SamePromptSampler:
        pairs = train_dataset if train_dataset is not None else self.train_dataset
        prompts = [tuple(ids) for ids in pairs["prompt_ids"]]
        self._order = SamePromptSampler(prompts, self.args.per_device_train_batch_size, self.args.data_seed)
        return self._order

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Mean of -log sigmoid of the reward margins (Rafailov et al., 2023, equation 7), and what `sft` adds."""
        lines = log_probs(model, inputs)
        gain = self.beta * (lines - self._reference_log_probs(inputs))
        chosen, rejected = gain[inputs["chosen"]], gain[inputs["rejected"]]
        margins = self.accelerator.gather(chosen - rejected).detach()
        self._metrics["train"]["rewards/margins"].append(margins.mean().item())
        self._metrics["train"]["rewards/accuracies"].append((margins > 0).float().mean().item())
        loss = -F.logsigmoid(chosen - rejected).mean()
        if "sft" in self.loss_types:
            tokens = inputs["line_of"].bincount(minlength=len(lines))[inputs["chosen"]].sum()
            weight = self.loss_weights[self.loss_types.index("sft")]
            loss = loss - weight * lines[inputs["chosen"]].sum() / tokens
        return loss

    def _reference_log_probs(self, batch: dict[str, Any]) -> Tensor:
        # Where the model is sharded each pass takes all workers, whose lines are known at different steps.
        if self.is_fsdp_enabled or any(line not in self._reference for line in batch["lines"]):
            model = self.accelerator.unwrap_model(self.model)
            name = "ref" if "ref" in model.peft_config else None
            training = model.training
            model.eval()  # it is kept for the whole training: not one draw of dropout
            with torch.no_grad(), use_adapter(model, name), self.accelerator.autocast():
                found = log_probs(model, batch)
            model.train(training)
            self._reference |= dict(zip(batch["lines"], found, strict=True))
        return torch.stack([self._reference[line] for line in batch["lines"]])

    # --- in place of what Trainer writes and reads ---

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.state.global_step == self.state.max_steps:
            return  # no step is left to go on with
        assert self._checkpoints
        reference = {line: value.cpu() for line, value in self._reference.items()}
        every = gather_object([(self._random_states(), reference)])
        if not self.is_world_process_zero():
            return
        tensors = {f"adapter.{k}": v for k, v in trainable(self.model).items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_state(self.optimizer).items()}
        for number, (random, known) in enumerate(every):
            tensors |= {f"random.{number}.{k}": v for k, v in random.items()}
            tensors[f"reference.{number}"] = torch.stack(list(known.values()))
        facts = {
            "trainer": asdict(self.state),
            "scheduler": self.lr_scheduler.state_dict(),
            "lines": [list(known) for _, known in every],
        }
        self._checkpoints.write(CHECKPOINT, save(tensors, {"facts": json.dumps(facts)}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights = part(self._tensors, "adapter")
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(weights[name])
        number = self.args.process_index
        lines = [(tuple(prompt), tuple(line)) for prompt, line in self._facts["lines"][number]]
        values = self._tensors[f"reference.{number}"].to(self.args.device)
        self._reference = dict(zip(lines, values, strict=True))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        restore_optimizer(self.optimizer, part(self._tensors, "optimizer"))
        self.lr_scheduler.load_state_dict(self._facts["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self._order.epoch = int(self.state.epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        states = part(self._tensors, f"random.{self.args.process_index}")
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.args.device)

    def _random_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.args.device)
        return states


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a model's trainable parameters on the CPU, by name; of a sharded one whole, if all workers ask."""
    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return {k: (p.full_tensor() if isinstance(p, DTensor) else p).to("cpu", copy=True) for k, p in parameters.items()}
