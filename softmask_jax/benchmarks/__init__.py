"""Measurements on any machine, printed as tables: speed, memory, accuracy; see README.md."""
