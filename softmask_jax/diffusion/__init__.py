"""The method of the paper as pure functions of arrays: noise, soft-masking, objectives, the chunked vocabulary."""
