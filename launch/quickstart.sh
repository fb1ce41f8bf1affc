#!/usr/bin/env bash
# From a bare machine with Python 3.11+ to a trained soft-masked model: makes .venv, installs the package, trains.
#   bash launch/quickstart.sh                 CPU
#   SOFTMASK_JAX_EXTRA=cuda bash launch/quickstart.sh   NVIDIA GPU (or tpu on a Cloud TPU machine)
# Run again, it continues, or says that it is done. Arguments are passed on: bash launch/quickstart.sh --config.train.steps=300
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
make_venv .venv "${SOFTMASK_JAX_EXTRA:-}"
exec .venv/bin/python -m softmask_jax.main --config=configs/stdlib.py --workdir=runs/stdlib "$@"
