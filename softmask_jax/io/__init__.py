"""Files, checkpoints and run folders that survive interruption, on disk or in a bucket."""
