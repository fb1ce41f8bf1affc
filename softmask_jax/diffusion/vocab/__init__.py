"""Softmax statistics, cross-entropy and sampling over a large vocabulary, chunk by chunk."""
