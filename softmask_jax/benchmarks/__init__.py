"""What soft-masking costs, and what it gains: scripts that print a table for any machine.

`two_pass`: seconds of a train step with one pass and with two, memory and seconds of the chunked vocabulary against the
dense one. `binary_vs_soft`: the validation NELBO of two finished runs on the same masks, beside what they cost.
"""
