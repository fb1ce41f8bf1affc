"""The training loop: step, state, optimiser, tasks, metrics."""
