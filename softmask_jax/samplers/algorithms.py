"""The samplers' algorithms by name, and their steps; without JAX, for command lines."""

# Moves of MDLM's sampler: the classes of these names in `transitions`.
TRANSITIONS = {
    "mdlm": "Mdlm", "remdm_cap": "RemdmCap", "remdm_rescale": "RemdmRescale", "remdm_conf": "RemdmConf",
    "remdm_loop": "RemdmLoop",
}  # fmt: skip
# MDLM's grid is independent of the length; 128 steps are the fewest that ReMDM's and the soft-masking paper report.
MDLM_STEPS = 128
# Of Dream's sampler, the confidence that each ranks predictions by; all but `origin` unmask the surest first.
DREAM = {
    "origin": "none", "maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy",
    "confidence_threshold": "probability", "confidence_factor": "probability",
    "low_confidence": "unfiltered", "random": "none",
}  # fmt: skip
LLADA = ("low_confidence", "random")


def check_steps(steps: int | None) -> None:
    """ValueError for a number of steps below 1; None is no limit."""
    if steps is not None and steps < 1:
        raise ValueError(f"A sampler needs at least 1 step, not {steps}.")
