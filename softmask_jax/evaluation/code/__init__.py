"""Code that a model writes: problems, prompts, programs out of answers, and a sandbox that tries them."""
