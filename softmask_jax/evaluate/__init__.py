"""Benchmarks of trained models: perplexity, generative quality, code, lm-evaluation-harness."""
