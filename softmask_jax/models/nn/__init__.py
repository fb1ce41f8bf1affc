"""Networks in Flax NNX with parameters as nested dicts of arrays; independent of masks, losses and samplers."""
