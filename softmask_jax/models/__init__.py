"""Models: networks (`nn`), PyTorch key tables (`keys`) and builders, which return a `Denoiser`."""
