"""Prompts in, descriptions out: prompt building, samplers, guards, drift measures."""
