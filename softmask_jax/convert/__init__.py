"""Weights of the PyTorch references to and from our parameter trees: declarative key tables and safe readers."""
