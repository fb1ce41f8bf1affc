"""The claim of soft-masking, reproduced small: runs over seeds, few-step samples, a checkable task, one page."""
