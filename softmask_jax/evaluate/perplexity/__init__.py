"""The task `perplexity`: NELBO of held-out text, or the validation loss of a model fine-tuned on conversations."""
