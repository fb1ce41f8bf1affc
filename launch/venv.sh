# shellcheck shell=bash
# Sourced by the scripts beside it. make_venv [EXTRAS]: a .venv in the current folder with this package installed in it.
make_venv() {
  local extras="${1:+[$1]}" python="${PYTHON:-python3}" stamp=".venv/.softmask_jax-${1:-core}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "softmask_jax needs Python 3.11 or later; '$python' is $("$python" --version 2>&1 || echo missing). Set PYTHON=/path/to/python3." >&2
    return 1
  fi
  if [ ! -x .venv/bin/pip ]; then
    "$python" -m venv .venv || { echo "Could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; return 1; }
  fi
  if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    echo "Installing softmask_jax$extras into .venv ..."
    .venv/bin/pip install --quiet --disable-pip-version-check --editable ".$extras"
    touch "$stamp"
  fi
}
