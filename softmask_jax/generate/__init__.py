"""Trained models in use: loading, prompts, batched generation, notebooks."""
