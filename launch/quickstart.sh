#!/usr/bin/env bash
# From a bare machine with Python 3.11+ to a trained soft-masked model: makes .venv, installs the package, shows plain and
# soft masks side by side (demo.html), trains.
#   bash launch/quickstart.sh [--config.train.steps=300 ...]
# An NVIDIA GPU or a TPU is found and used; SOFTMASK_JAX_EXTRA=cpu, cuda12, cuda13 or tpu decides otherwise.
# Run again, it continues, or says that it is done. Arguments are passed on.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
extra="${SOFTMASK_JAX_EXTRA:-$(accelerator)}"
make_venv .venv "${extra#cpu}"
[ -e demo.html ] || .venv/bin/python -m softmask_jax.generate.demo || echo "No demo; training goes on." >&2
exec .venv/bin/python -m softmask_jax.main --config=configs/stdlib.py "$@"
