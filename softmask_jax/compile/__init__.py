"""Ahead-of-time compilation for TPUs on a machine without one: whether programs fit, and how fast they would be."""
