#!/usr/bin/env bash
# The tests: core tier by default; --full adds the slow tiers (kills, several hosts, ahead-of-time compiles).
#   bash launch/test.sh [--full] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
make_venv test
tier=(-m "not full")
if [ "${1:-}" = "--full" ]; then
  shift
  tier=()
fi
exec .venv/bin/python -m pytest -q -n "${SOFTMASK_JAX_TEST_WORKERS:-2}" --dist=loadgroup "${tier[@]}" "$@"
