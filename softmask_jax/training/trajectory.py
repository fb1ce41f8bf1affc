"""A validation text denoised with plain and with soft masks, with the same draws: a page of the run's folder."""
import jax

from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.io.files import one_line, write_atomically
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.report import run_page, viewer

MOST_STEPS = 32  # the gain shows where steps are few


def write(folder: RunFolder, task, state) -> None:
    """Write the page, which the report shows; not of a binary model, nor without samples, nor on several hosts. A
    failure only warns."""
    try:
        _write(folder, task, state)
    except Exception as error:
        print(f"Warning: no {run_page.TRAJECTORY} was written ({one_line(error)}).", flush=True)


def _write(folder: RunFolder, task, state) -> None:
    sample, soft_mask = task.config.sample, SoftMask.from_config(task.config.soft_mask)
    if not (soft_mask.on and sample.count) or jax.process_count() > 1:
        return
    steps = min(sample.steps, MOST_STEPS)
    ways = {"plain masks": SoftMask(), "soft masks": soft_mask}
    made = {way: task.denoised(state, one, steps) for way, one in ways.items()}
    page = viewer.trajectory_page(
        {way: out for way, (out, _) in made.items()}, task.tokenizer, mask_token_id=task.denoiser.mask_token_id,
        title="A validation text, with plain and with soft masks",
        facts={"trained": f"{int(state.step):,} steps", "sampler": f"{steps} steps"},
        attention_mask=made["soft masks"][1],
    )  # fmt: skip
    write_atomically(folder.path / run_page.TRAJECTORY, page)
