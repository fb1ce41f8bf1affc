#!/usr/bin/env bash
# What the launchers run on a host, in the project's folder there; by hand it does the same.
#   bash launch/node.sh setup    [--extras=tpu,chat] [--bucket=gs://BUCKET | --nfs=ADDRESS:/SHARE | --disk] [--mount=/shared]
#   bash launch/node.sh check    --name=NAME           exit status 0 where it is set up and NAME does not run
#   bash launch/node.sh start    --name=NAME --workdir=DIR [--label=HOST] [--unless-stopped] -- FLAGS OF supervise
#   bash launch/node.sh attend   --name=NAME --workdir=DIR -- FLAGS    the same in the foreground
#   bash launch/node.sh follow   --name=NAME           the log until the run ends
#   bash launch/node.sh status   --name=NAME           softmask_jax STATUS CODE STEP FINISHED
#   bash launch/node.sh finished --workdir=DIR         exit status 0 where the run in that folder made all its steps
#   bash launch/node.sh stop     --name=NAME [--wait=600] [--for-restart]   SIGTERM: all hosts save and end
#   bash launch/node.sh run      -- COMMAND            with the project's Python and the secrets
# After a stop that is not --for-restart, a start with --unless-stopped (a watch's) is refused, even one under way.
# STATUS is running, ended (CODE is its exit status), lost (no trace of its end) or absent. Logs are in DIR/logs/; of a DIR in a bucket
# they are in ~/.softmask_jax/NAME/ on each host, and copied to DIR/logs/ when the run ends.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
here="$HOME/.softmask_jax"

die() {
  echo "Error: $(uname -n): $*" >&2
  exit 1
}

name="" workdir="" label="" extras="" bucket="" nfs="" disk="" mount=/shared wait=600 unless_stopped="" for_restart="" words=()
action="${1:-}"
if [ $# -gt 0 ]; then shift; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --)
      shift
      words=("$@")
      break
      ;;
    --disk) disk=yes ;;
    --unless-stopped) unless_stopped=yes ;;
    --for-restart) for_restart=yes ;;
    --name=* | --workdir=* | --label=* | --extras=* | --bucket=* | --nfs=* | --mount=* | --wait=*)
      key="${1%%=*}"
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    *) die "launch/node.sh knows no '$1'" ;;
  esac
  shift
done
if [ "${workdir:0:1}" = "~" ]; then workdir="$HOME${workdir:1}"; fi
state="$here/${name:-none}"

# The Python of the system where it is new enough; otherwise one of its own by uv.
find_python() {
  local python
  for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      PYTHON="$(command -v "$python")"
      return
    fi
  done
  echo "No Python 3.11 or later here: installing one with uv ..."
  python3 -m pip install --quiet --user uv || die "neither Python 3.11 nor pip: install one of them"
  python3 -m uv python install --quiet 3.12 || die "uv could not install Python 3.12"
  PYTHON="$(python3 -m uv python find 3.12)"
}

mount_nfs() {
  if ! command -v mount.nfs > /dev/null; then
    { sudo apt-get update -qq && sudo apt-get install -y -qq nfs-common > /dev/null; } || die "could not install nfs-common"
  fi
  # Hosts tell each other news by new files: what was not there a second ago must not be taken for absent.
  sudo mount -t nfs -o hard,noatime,lookupcache=positive "$nfs" "$mount" ||
    die "could not mount $nfs: is it in this network and zone?"
}

# The one disk that is neither mounted nor divided; it gets a file system only where it has none.
mount_disk() {
  local device free=() kind=0
  for device in $(lsblk -dnpo NAME,TYPE | awk '$2 == "disk" { print $1 }'); do
    if [ "$(lsblk -nro NAME,MOUNTPOINT "$device" | wc -w)" = 1 ]; then free+=("$device"); fi
  done
  [ "${#free[@]}" = 1 ] || die "expected one free disk, found ${#free[@]}: ${free[*]}"
  sudo blkid "${free[0]}" > /dev/null || kind=$?
  if [ "$kind" = 2 ]; then
    sudo mkfs.ext4 -q -m 0 -E lazy_itable_init=0,lazy_journal_init=0,discard "${free[0]}" || die "mkfs failed"
  fi
  sudo mount -o discard,noatime "${free[0]}" "$mount" || die "could not mount ${free[0]}"
}

setup() {
  # shellcheck source=launch/venv.sh
  source launch/venv.sh
  if [ -n "$nfs$disk" ] && ! mountpoint -q "$mount"; then
    sudo mkdir -p "$mount"
    if [ -n "$nfs" ]; then mount_nfs; else mount_disk; fi
    sudo chmod a+rwx "$mount"
  fi
  if [[ ",$extras," == *,auto,* ]]; then
    extras=",$extras,"
    extras="${extras/,auto,/,$(accelerator),}"
    extras="$(tr -s , <<< "$extras")"
    extras="${extras#,}" extras="${extras%,}"
  fi
  find_python
  export PYTHON
  tested="$(tested_versions)"
  [ -n "$tested" ] || echo "Not tested with $("$PYTHON" --version 2>&1): installing the newest version of every package."
  make_venv .venv "$extras" "$tested" || die "the installation failed"
  if [ -n "$bucket" ]; then check_bucket; fi
  echo "Ready: $(uname -n)"
}

# An object is put there and removed again.
check_bucket() {
  .venv/bin/python - "$bucket" << 'PYTHON' || die "the run's folder cannot be in $bucket"
import sys
from softmask_jax.io.paths import to_path
try:
    (to_path(sys.argv[1]) / "setup").check_writable()
except (ImportError, OSError) as error:
    sys.exit(getattr(error, "strerror", None) or str(error))
PYTHON
}

load_secrets() {
  if [ -r "$here/secrets" ]; then
    set -a
    # shellcheck disable=SC1091
    source "$here/secrets"
    set +a
  fi
}

# is FILE TEXT: whether the process whose number is in the file is there and has the text in its command.
is() { [ -e "$state/$1" ] && { tr '\0' ' ' < "/proc/$(cat "$state/$1")/cmdline"; } 2> /dev/null | grep -q "$2"; }

# A run that has ended counts as alive until its exit status is written.
alive() { is pid softmask_jax.supervise || { [ ! -e "$state/rc" ] && is attendant "node.sh attend"; }; }

# Whether the run made all the steps that its config asks for.
finished() {
  .venv/bin/python - "$workdir" 2> /dev/null << 'PYTHON'
import json, sys
from softmask_jax import config
from softmask_jax.io.paths import to_path
folder = to_path(sys.argv[1])
done = json.loads((folder / "summary.json").read_text())
sys.exit(done["step"] < config.from_dict(json.loads((folder / "config.json").read_text())).updates)
PYTHON
}

# The step of the last checkpoint, -1 without one.
last_step() {
  local entry step=-1
  if [[ "$workdir" == gs://* ]]; then
    .venv/bin/python - "$workdir" 2> /dev/null << 'PYTHON' || echo -1
import sys
from softmask_jax.io.paths import to_path
from softmask_jax.io.step_folders import step_folders
print(max(step_folders(to_path(sys.argv[1]) / "checkpoints").all(), default=-1))
PYTHON
    return
  fi
  for entry in "$workdir"/checkpoints/*/; do
    entry="$(basename "$entry")"
    if [[ "$entry" =~ ^[0-9]+$ ]] && [ "$entry" -gt "$step" ]; then step="$entry"; fi
  done
  echo "$step"
}

# A log that stands on this host, to the run's folder in a bucket.
copy_log() {
  .venv/bin/python - "$log" "$workdir/logs/${log##*/}" 2> /dev/null << 'PYTHON' || echo "This log was not copied to $workdir/logs/."
import pathlib, sys
from softmask_jax.io.paths import to_path
to_path(sys.argv[2]).write_bytes(pathlib.Path(sys.argv[1]).read_bytes())
PYTHON
}

# In the foreground. A run that was stopped and saved ends with 75, "try again", so that whoever restarts what failed
# does not take it for a finished one.
attend() {
  local child code=0 log="${1:-}"
  load_secrets
  echo "$$" > "$state/attendant"
  .venv/bin/python -m softmask_jax.supervise "${words[@]}" &
  child=$!
  trap 'kill -TERM "$child" 2> /dev/null || true' TERM
  echo "$child" > "$state/.pid" && mv "$state/.pid" "$state/pid"
  # A signal ends `wait`, not the process.
  while kill -0 "$child" 2> /dev/null; do wait "$child" && code=0 || code=$?; done
  if [ -n "$log" ] && [[ "$workdir" == gs://* ]]; then copy_log; fi
  echo "$code" > "$state/.rc" && mv "$state/.rc" "$state/rc"
  if [ "$code" = 0 ] && ! finished; then exit 75; fi
  exit "$code"
}

# Until the end of this process, or unlock: a stop sees a start that is under way, or the start sees the stop.
lock() {
  exec 9> "$state/lock"
  flock 9
}
unlock() { exec 9>&-; }

check() {
  [ -n "$name" ] || die "$action needs --name"
  [ -x .venv/bin/python ] || die "not set up: no .venv in $PWD"
  if alive; then die "$name runs here already (process $(cat "$state/pid"))"; fi
}

prepare() {
  check
  [ -n "$workdir" ] || die "$action needs --workdir"
  mkdir -p "$state"
  rm -f "$state"/{pid,attendant,rc,stopped}
  printf '%s\n' "$workdir" > "$state/workdir"
}

start() {
  local log i logs="$workdir/logs"
  mkdir -p "$state"
  lock
  if [ -n "$unless_stopped" ] && [ -e "$state/stopped" ]; then die "$name was stopped by hand"; fi
  prepare
  if [[ "$workdir" == gs://* ]]; then logs="$state"; fi
  mkdir -p "$logs" || die "$workdir cannot be written: is the shared folder mounted?"
  log="$logs/${label:-$(uname -n)}.log"
  printf '%s\n' "$log" > "$state/log"
  printf '\n== %s: %s on %s\n' "$(date -u +%FT%TZ)" "$name" "$(uname -n)" >> "$log"
  nohup setsid bash launch/node.sh attend_detached --name="$name" --workdir="$workdir" -- "${words[@]}" \
    >> "$log" 2>&1 < /dev/null 9>&- &
  for ((i = 0; i < 100; i++)); do
    if [ -e "$state/pid" ]; then
      echo "Started on $(uname -n); its log is $log"
      return
    fi
    sleep 0.1
  done
  die "$name did not start; its log is $log"
}

follow() {
  local log
  log="$(cat "$state/log" 2> /dev/null)" || die "no run $name here"
  if alive; then tail -n 50 -F --pid="$(cat "$state/pid")" "$log" 2> /dev/null; else tail -n 50 "$log"; fi
}

status() {
  local condition=absent code=- step complete=no
  workdir="$(cat "$state/workdir" 2> /dev/null || true)"
  # In this order: a run may end, and its exit status be written, between two looks.
  if [ ! -e "$state/rc" ] && alive; then
    condition=running
  elif [ -e "$state/rc" ]; then
    condition=ended code="$(cat "$state/rc")"
  elif [ -e "$state/pid" ]; then
    condition=lost
  fi
  step="$(last_step)"
  if [ "$condition $code" = "ended 0" ] && finished; then
    complete=yes
  elif [ "$condition" != running ] && [ -e "$state/stopped" ]; then
    condition=ended code=130 # an interruption, which nobody restarts
  fi
  echo "softmask_jax $condition $code $step $complete"
}

stop() {
  local i pid
  if [ -d "$state" ]; then
    lock
    if [ -z "$for_restart" ]; then touch "$state/stopped"; fi
    unlock
  fi
  if ! alive; then
    echo "$name does not run on $(uname -n)"
    return
  fi
  pid="$(cat "$state/pid")"
  kill -TERM "$pid" 2> /dev/null || true
  for ((i = 0; i < wait; i++)); do
    if ! alive || [ "$(cat "$state/pid")" != "$pid" ]; then
      echo "$name ended on $(uname -n)"
      return
    fi
    sleep 1
  done
  die "$name does not end within $wait s"
}

case "$action" in
  setup | check | start | follow | status | stop | finished) "$action" ;;
  attend)
    prepare
    attend
    ;;
  attend_detached) attend "$(cat "$state/log")" ;;
  run)
    load_secrets
    export PATH="$PWD/.venv/bin:$PATH"
    exec "${words[@]}"
    ;;
  *) die "launch/node.sh knows no '$action'; its first lines say what it knows" ;;
esac
