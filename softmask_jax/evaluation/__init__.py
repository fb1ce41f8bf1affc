"""Metrics of the paper; perplexity for now."""
