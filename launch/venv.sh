# shellcheck shell=bash
# Sourced by the scripts beside it.

# make_venv FOLDER [EXTRAS [CONSTRAINTS]]: a virtual environment with this package installed in it. One that another
# Python made, that moved, or whose installation was interrupted is made or installed anew.
make_venv() {
  local folder="$1" extras="${2:+[$2]}" constraints="${3:-}" python="${PYTHON:-python3}" version made_by stamp
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "softmask_jax needs Python 3.11 or later; '$python' is $("$python" --version 2>&1 || echo missing). Set PYTHON=/path/to/python3." >&2
    return 1
  fi
  if [ ! -w . ]; then
    echo "$PWD cannot be written: copy the project to a folder of yours and run it there." >&2
    return 1
  fi
  version="$("$python" -c 'import sys; print(sys.version)') in $PWD"
  stamp="$folder/.installed-${2:-core}"
  made_by="$(cat "$folder/.made-by" 2>/dev/null || true)"
  if [ "${made_by:-$version}" != "$version" ] || ! "$folder/bin/python" -m pip --version > /dev/null 2>&1; then
    if [ -z "$made_by" ] && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
      echo "$PWD/$folder is not of this project and has no pip: move it away." >&2
      return 1
    fi
    # Marked before it is made, so that one whose making was interrupted is made anew.
    rm -rf "$folder" && mkdir "$folder" && echo "$version" > "$folder/.made-by"
    "$python" -m venv "$folder" || { echo "Could not make $folder; on Debian and Ubuntu: apt install python3-venv" >&2; return 1; }
  fi
  if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ] || { [ -n "$constraints" ] && [ "$constraints" -nt "$stamp" ]; }; then
    echo "Installing softmask_jax$extras into $folder ..."
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      ${constraints:+--constraint "$constraints"} --editable ".$extras" || return 1
    touch "$stamp"
  fi
}

# tested_versions: the constraints file of $PYTHON's version, launch/constraints-3.x.txt; nothing where there is none.
tested_versions() {
  local file
  file="launch/constraints-$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"
  if [ -e "$file" ]; then echo "$file"; fi
}

# newest_python: the newest interpreter of 3.13 and 3.12 on this machine, in PATH, of pyenv, or built by .ci/python.sh.
newest_python() {
  local version python
  for version in 3.13 3.12; do
    for python in "${PYTHON:-}" "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python3 \
      "${XDG_CACHE_HOME:-$HOME/.cache}"/softmask_jax/python-"$version".*/bin/python3; do
      if [ "$("$python" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
        command -v "$python"
        return
      fi
    done
  done
  return 1
}

# The extra that this machine's accelerator needs: cuda13, cuda12, tpu, or nothing.
accelerator() {
  local driver
  if driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" && [ -n "$driver" ]; then
    if [ "${driver%%.*}" -ge 580 ]; then echo cuda13; else echo cuda12; fi
  elif compgen -G '/dev/accel*' > /dev/null || compgen -G '/dev/vfio/[0-9]*' > /dev/null; then
    echo tpu
  fi
}
