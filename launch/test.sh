#!/usr/bin/env bash
# The tests. The core tier by default; arguments after the tier go to pytest.
#   bash launch/test.sh [--full | --soak | --oldest] [PYTEST ARGUMENTS]
#     --full    also the slow tiers: kills, several hosts, every mesh, ahead-of-time compiles for TPU, pages in a browser
#     --soak    what takes too long for CI: more kills, prompts and hosts, more compiles for TPU
#     --oldest  the core tier with exactly the lowest versions that setup.cfg allows
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

# A browser opens the report pages. Where it cannot be installed those tests are skipped, in CI they fail.
ensure_browser() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" > /dev/null; then return; fi
  done
  if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get > /dev/null; then
    echo "Installing Chromium, for the tests of the report pages ..."
    if apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; then return; fi
  fi
  echo "No Chromium or Chrome for the tests of the report pages; on Debian, as root: apt-get install chromium" >&2
}

venv=.venv tier=(-m "not full and not soak")
case "${1:-}" in
  --full | --soak)
    tier=(-m "not soak")
    if [ "$1" = --soak ]; then tier=(-m soak); fi
    shift
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
    ensure_browser
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
# A file's tests share what was compiled and made for them, so one process runs them all.
exec $venv/bin/python -m pytest -q -n "${SOFTMASK_JAX_TEST_WORKERS:-2}" --dist=loadfile --no-loadscope-reorder "${tier[@]}" "$@"
