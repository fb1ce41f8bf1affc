#!/usr/bin/env bash
# The tests. The core tier by default; arguments after the tier go to pytest.
#   bash launch/test.sh [--full | --oldest] [PYTEST ARGUMENTS]
#     --full    also the slow tiers: kills, several meshes, ahead-of-time compiles for TPU
#     --oldest  the core tier with exactly the lowest versions that setup.cfg allows
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
venv=.venv tier=(-m "not full")
case "${1:-}" in
  --full)
    shift
    tier=()
    make_venv $venv test
    # The TPU compiler stays out of site-packages, where every start of JAX would look for a TPU.
    if [ ! -e $venv/aot/.complete ]; then
      echo "Installing the TPU compiler into $venv/aot ..."
      $venv/bin/pip install --quiet --disable-pip-version-check --target $venv/aot --no-deps libtpu
      touch $venv/aot/.complete
    fi
    export PYTHONPATH="$PWD/$venv/aot${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  --oldest)
    shift
    venv=.venv-oldest
    mkdir -p $venv
    sed -n '/^install_requires/,/^$/s/^ *\(.*\)>=\(.*\)/\1==\2/p' setup.cfg > $venv/oldest.txt
    make_venv $venv test $venv/oldest.txt
    ;;
  *) make_venv $venv test ;;
esac
exec $venv/bin/python -m pytest -q -n "${SOFTMASK_JAX_TEST_WORKERS:-2}" --dist=loadgroup "${tier[@]}" "$@"
