"""Self-contained HTML pages: training runs, comparisons, the denoising process."""
