"""What soft-masking costs: scripts that print a table for any machine.

`two_pass`: seconds of a train step with one pass and with two, memory and seconds of the chunked vocabulary against the
dense one. What it gains is `softmask_jax.evaluate.compare`'s to tell. `convert`: time and memory of converting a 7B model's
weights, against copying the files. `answer_shapes`: what the shape of a right answer costs in HumanEval and MBPP.
"""
