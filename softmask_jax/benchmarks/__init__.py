"""Benchmarks of speed, memory and accuracy for any machine, printed as tables; see README.md."""
