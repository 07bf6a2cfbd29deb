"""Direct preference optimisation of a LoRA adapter with TRL. One process; `kka_ray.cluster` runs it as a Ray Train job.

TRL keeps policy, reference and adapter; the log-probabilities are computed on packed batches (`packing`, `trainer`),
several times faster than one padded row a line.

The adapter is always one on the raw base model, whatever the round: with `reference: base` a round continues the last
adapter against the base model as reference; with `reference: previous` it continues it against the last adapter itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig

from kka_ray import assets
from kka_ray.amounts import amount
from kka_ray.config.models import PreferenceConfig
from kka_ray.errors import ConfigError, StageError
from kka_ray.preference.packing import Packer, check_packed, mask_of
from kka_ray.preference.trainer import Checkpoints, PackedDPOTrainer, trainable
from kka_ray.records import PreferencePair

VERSION = 7
CHECKPOINT_STEPS = 10
"""Steps between two checkpoints."""


@dataclass(frozen=True)
class DpoResult:
    """What a training did. Losses are in nats; the margin is that of the implicit rewards, beta included."""

    pairs: int
    steps: int
    loss_first: float
    loss_last: float
    margin: float
    history: tuple[dict[str, float], ...]
    """A row a step: step, loss, margin, accuracy, learning_rate."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def train_dpo(
    pairs: Sequence[PreferencePair],
    model: str,
    previous: Path | None,
    config: PreferenceConfig,
    seed: int,
    target: Path,
    work: Path,
    *,
    cpu: bool,
    workers: int = 1,
    trust_remote_code: bool = False,
    checkpoints: Checkpoints | None = None,
) -> DpoResult:
    """Trains an adapter on `pairs` and writes it to `target` (PEFT's format, safetensors).

    Args:
        model: reference of the base model (see `kka_ray.assets`).
        previous: the last round's adapter, or None for a new one.
        work: folder for TRL's own files.
        cpu: compute on the CPU, whatever GPUs this process sees.
        workers: processes that take part, each with a shard of every batch.
        checkpoints: where the state is kept every `CHECKPOINT_STEPS` steps, and what is there goes on, with the result
            of an uninterrupted training; by default, and with a sharded model, nothing is kept.

    Raises StageError if the loss is not finite, no weight changed or `config.max_length` cuts off all that a pair
    differs by; ConfigError for impossible settings, or a model that cannot be trained on packed batches.
    """
    sharded = config.sharding == "fsdp"
    if sharded and cpu:
        raise ConfigError("preference.sharding: fsdp needs GPUs, and this computes on a CPU: set it to none")
    if config.batch % (workers * config.micro_batch):
        raise ConfigError(
            f"preference.batch ({config.batch}) must be a multiple of workers x micro_batch "
            f"({workers} x {config.micro_batch})"
        )
    path = assets.resolve(model).path
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = _load_base(path, config, trust_remote_code)
    continued = previous is not None and config.reference == "previous"
    packer = Packer(config.max_length, mask_of(base), tokenizer.eos_token_id)
    policy = PeftModel.from_pretrained(base, str(previous), is_trainable=True) if continued else base
    trainer = PackedDPOTrainer(
        model=policy,
        args=_arguments(config, seed, work, workers, cpu=cpu, checkpoints=checkpoints is not None and not sharded),
        data_collator=packer,
        train_dataset=Dataset.from_list(
            [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
        ),
        processing_class=tokenizer,
        peft_config=None if continued else _lora(config),
        checkpoints=checkpoints,
    )
    if len(trainer.train_dataset) < len(pairs):  # TRL leaves out what has no room for a line, and says nothing
        raise StageError(
            f"{len(pairs) - len(trainer.train_dataset)} of {amount(len(pairs), 'pair')} have prompts of "
            f"{config.max_length} tokens or more (preference.max_length): raise it, or lower describe.examples"
        )
    if previous is not None and not continued:
        # Given a plain model TRL takes the model without its adapter as reference; the adapter may then be continued.
        set_peft_model_state_dict(trainer.model, load_file(previous / "adapter_model.safetensors"))
    if not sharded:  # whose parts lie nowhere yet
        exact = config.dtype == "float32" and not config.load_in_4bit
        check_packed(trainer.model, packer, trainer.train_dataset, model, exact=exact)
    before = trainable(trainer.model)
    trainer.train_on(work / "resumed")
    after = trainable(trainer.model)
    if all(torch.equal(before[k], after[k]) for k in before):
        raise StageError("DPO changed no weight of the adapter; is the learning rate zero?")
    history = tuple(_row(log) for log in trainer.state.log_history if "loss" in log)
    if not all(torch.isfinite(torch.tensor(row["loss"])) for row in history):
        raise StageError("the DPO loss is not finite; lower preference.learning_rate or use dtype float32")
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(target, selected_adapters=["default"], state_dict=after, safe_serialization=True)
    return DpoResult(
        pairs=len(pairs),
        steps=len(history),
        loss_first=history[0]["loss"],
        loss_last=history[-1]["loss"],
        margin=history[-1]["margin"],
        history=history,
    )


def _load_base(path: Path, config: PreferenceConfig, trust_remote_code: bool) -> torch.nn.Module:
    quantised = None
    if config.load_in_4bit:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, config.dtype),
        quantization_config=quantised,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )


def _lora(config: PreferenceConfig) -> LoraConfig:
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _arguments(
    config: PreferenceConfig, seed: int, work: Path, workers: int, *, cpu: bool, checkpoints: bool = False
) -> DPOConfig:
    sharding: dict[str, Any] = {}
    if config.sharding == "fsdp":
        # Version 2 shards each parameter by itself, so frozen ones and those of the adapter may lie in one block.
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    return DPOConfig(
        **sharding,
        output_dir=str(work),
        beta=config.beta,
        **({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.sft]} if config.sft else {}),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch // (workers * config.micro_batch),
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup,
        lr_scheduler_type="cosine",
        max_length=config.max_length,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=cpu,
        logging_steps=1,
        save_strategy="steps" if checkpoints else "no",
        save_steps=CHECKPOINT_STEPS,
        report_to="none",
        disable_dropout=not config.lora_dropout,  # by default TRL would turn the adapter's off too
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )


def _row(log: dict[str, float]) -> dict[str, float]:
    return {
        "step": float(log.get("step", 0)),
        "loss": float(log["loss"]),
        "margin": float(log.get("rewards/margins", 0.0)),
        "accuracy": float(log.get("rewards/accuracies", 0.0)),
        "learning_rate": float(log.get("learning_rate", 0.0)),
    }
