#!/usr/bin/env bash
# The tests: core tier by default; --full adds the slow tiers (kills, several meshes, ahead-of-time compiles for TPU).
#   bash launch/test.sh [--full] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
make_venv test
tier=(-m "not full")
if [ "${1:-}" = "--full" ]; then
  shift
  tier=()
  # The TPU compiler stays out of site-packages, where every start of JAX would look for a TPU.
  if [ ! -e .venv/aot/.complete ]; then
    echo "Installing the TPU compiler into .venv/aot ..."
    .venv/bin/pip install --quiet --disable-pip-version-check --target .venv/aot --no-deps libtpu
    touch .venv/aot/.complete
  fi
  export PYTHONPATH="$PWD/.venv/aot${PYTHONPATH:+:$PYTHONPATH}"
fi
exec .venv/bin/python -m pytest -q -n "${SOFTMASK_JAX_TEST_WORKERS:-2}" --dist=loadgroup "${tier[@]}" "$@"
