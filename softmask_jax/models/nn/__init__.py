"""Networks in Flax NNX, their parameters as nested dicts of arrays."""
