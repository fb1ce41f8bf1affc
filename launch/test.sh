#!/usr/bin/env bash
# The tests. The core tier by default; arguments after the tier go to pytest.
#   bash launch/test.sh [--full | --oldest] [PYTEST ARGUMENTS]
#     --full    also the slow tiers: kills, several hosts, every mesh, ahead-of-time compiles for TPU
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
      rm -rf $venv/aot
      $venv/bin/python -m pip install --quiet --disable-pip-version-check --target $venv/aot --no-deps "$(
        $venv/bin/python -c 'import importlib.metadata as m; print(next(r for r in m.requires("jax") if r.startswith("libtpu")).split(";")[0])'
      )"
      touch $venv/aot/.complete
    fi
    export PYTHONPATH="$PWD/$venv/aot${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  --oldest)
    shift
    venv=.venv-oldest
    oldest="$(mktemp)"
    sed -n '/^install_requires/,/^$/s/^ *\(.*\)>=\(.*\)/\1==\2/p' setup.cfg > "$oldest"
    make_venv $venv test "$oldest"
    ;;
  *) make_venv $venv test ;;
esac
exec $venv/bin/python -m pytest -q -n "${SOFTMASK_JAX_TEST_WORKERS:-2}" --dist=loadgroup "${tier[@]}" "$@"
