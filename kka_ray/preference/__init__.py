"""Verdicts in, tuned adapter out: preference pairs and direct preference optimisation (TRL, PEFT)."""
