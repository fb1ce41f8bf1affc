#!/usr/bin/env bash
# The tests. The core tier by default; arguments after the tier go to pytest.
#   bash launch/test.sh [--full | --soak | --oldest | --newest | --freeze] [PYTEST ARGUMENTS]
#     --full    also the slow tiers: kills, several hosts, every mesh, ahead-of-time compiles for TPU, pages in a browser
#     --soak    what takes too long for CI: more kills, prompts and hosts, more compiles for TPU
#     --oldest  the core tier with exactly the lowest versions that setup.cfg allows
#     --newest  the core tier on the newest Python of this machine: 3.13, else 3.12
#     --freeze  the core tier and the compiles for TPU with the newest version of every package; if they pass, the
#               versions go to launch/constraints-3.x.txt, from which launchers build hosts
# PYTHON=/path/to/python3 chooses the interpreter.
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

# The TPU compiler stays out of site-packages, where every start of JAX would look for a TPU.
ensure_tpu_compiler() {
  local wanted
  wanted="$($venv/bin/python -c '
import importlib.metadata as m
print(next(r for r in m.requires("jax") if r.startswith("libtpu")).split(";")[0])')"
  if [ "$(cat $venv/aot/.complete 2>/dev/null)" != "$wanted" ]; then
    echo "Installing the TPU compiler into $venv/aot ..."
    rm -rf $venv/aot
    $venv/bin/python -m pip install --quiet --disable-pip-version-check --target $venv/aot --no-deps "$wanted"
    echo "$wanted" > $venv/aot/.complete
  fi
  export PYTHONPATH="$PWD/$venv/aot${PYTHONPATH:+:$PYTHONPATH}"
}

# A file's tests share what was compiled and made for them, so one process runs them all.
run() { $venv/bin/python -m pytest -q -n "${SOFTMASK_JAX_TEST_WORKERS:-2}" --dist=loadfile --no-loadscope-reorder "$@"; }

venv=.venv markers="not full and not soak"
tier="${1:-}"
case "$tier" in
  --full | --soak | --oldest | --newest | --freeze) shift ;;
esac
case "$tier" in
  --full | --soak)
    make_venv $venv test
    ensure_tpu_compiler
    ensure_browser
    if [ "$tier" = --soak ]; then markers=soak; else markers="not soak"; fi
    ;;
  --oldest)
    venv=.venv-oldest
    oldest="$(mktemp)"
    sed -n '/^install_requires/,/^$/s/^ *\([^;]*\)>=\([^;]*\)/\1==\2/p' setup.cfg > "$oldest"
    make_venv $venv test "$oldest"
    ;;
  --newest)
    venv=.venv-newest
    PYTHON="$(newest_python)" || { echo "No Python 3.12 or 3.13 here: install one, or bash .ci/python.sh" >&2; exit 1; }
    make_venv $venv test
    ;;
  --freeze)
    venv=.venv-freeze
    rm -rf $venv # what an earlier one installed is not the newest
    make_venv $venv test,chat,eval,gcs,hf,hub,parquet,tfds,wandb,zst
    run -m "$markers" "$@"
    ensure_tpu_compiler
    run -m full tests/compile/test_compile.py tests/compile/test_tpu_compile.py tests/models/nn/test_splash.py
    file="launch/constraints-$($venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"
    {
      echo "# $($venv/bin/python --version): versions that the tests passed with. \`bash launch/test.sh --freeze\` renews them."
      { $venv/bin/python -m pip freeze --exclude-editable; $venv/bin/python -m pip freeze --path $venv/aot; } | sort -f
    } > "$file.new"
    mv "$file.new" "$file"
    echo "Wrote $file"
    exit
    ;;
  *) make_venv $venv test ;;
esac
run -m "$markers" "$@"
