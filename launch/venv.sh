# shellcheck shell=bash
# Sourced by the scripts beside it.
# make_venv FOLDER [EXTRAS [CONSTRAINTS]]: a virtual environment with this package installed in it, unless it is there.
make_venv() {
  local folder="$1" extras="${2:+[$2]}" constraints="${3:-}" python="${PYTHON:-python3}" stamp="$1/.installed-${2:-core}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "softmask_jax needs Python 3.11 or later; '$python' is $("$python" --version 2>&1 || echo missing). Set PYTHON=/path/to/python3." >&2
    return 1
  fi
  if [ ! -x "$folder/bin/pip" ]; then
    "$python" -m venv "$folder" || { echo "Could not make $folder; on Debian and Ubuntu: apt install python3-venv" >&2; return 1; }
  fi
  if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    echo "Installing softmask_jax$extras into $folder ..."
    "$folder/bin/pip" install --quiet --disable-pip-version-check ${constraints:+--constraint "$constraints"} --editable ".$extras"
    touch "$stamp"
  fi
}
