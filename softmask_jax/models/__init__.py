"""Network bodies: Flax NNX inside, nested dicts of arrays and pure functions outside.

Nothing here knows about masks, losses or samplers, and nothing here imports another part of the package.
"""
