#!/usr/bin/env bash
# One page about a GPU: is bfloat16 right, how fast are training and decoding? Ten minutes on one H100 or H200.
#   bash launch/gpu_bench.sh [--wheels=DIR] [--torch] [--out=gpu_bench.md] [FLAGS OF softmask_jax.benchmarks.gpu]
#     --wheels=DIR   install from the wheels in DIR, without a network; on a machine with one, and the same Python:
#                    pip download --dest=DIR '.[cuda12]' setuptools wheel
#     --torch        install PyTorch, too, for its step beside ours (with --wheels: DIR has torch)
#     --toy          tiny sizes, in a minute on any machine: does everything run?
# SOFTMASK_JAX_EXTRA=cpu, cuda12 or cuda13 decides which JAX is installed, PYTHON=/path/to/python3 which Python is used.
# It has not met a GPU yet.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
flags=() torch=""
for word in "$@"; do
  case "$word" in
    --wheels=*)
      if [ ! -d "${word#*=}" ]; then echo "--wheels=${word#*=} is not a folder" >&2; exit 2; fi
      # pip reads these; they hold for the packages that building needs, too.
      PIP_NO_INDEX=1 PIP_FIND_LINKS="$(cd "${word#*=}" && pwd)"
      export PIP_NO_INDEX PIP_FIND_LINKS
      ;;
    --torch) torch=torch ;;
    *) flags+=("$word") ;;
  esac
done
extra="${SOFTMASK_JAX_EXTRA:-$(accelerator)}"
make_venv .venv-gpu "${extra#cpu}"
if [ -n "$torch" ]; then .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check torch; fi
exec .venv-gpu/bin/python -m softmask_jax.benchmarks.gpu --out=gpu_bench.md ${flags[@]+"${flags[@]}"}
