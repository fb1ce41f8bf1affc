#!/usr/bin/env bash
# A training run on machines that answer to ssh: set up, started, followed, resumed, ended.
#
#   bash launch/ssh.sh ACTION --name=NAME --hosts=A,B,... [OPTIONS] [-- FLAGS OF THE TRAINING]
#
#   setup    bring the code and install, on all hosts; again: renew
#   start    python -m softmask_jax.supervise on all hosts, detached, the first one coordinates; logs are in WORKDIR/logs/
#   follow   the log of the first host until the run ends; with --watch, start again until it is finished
#   resume   end what is left of the run and start from the last checkpoint, also with other hosts
#   run      a command (after --) on the first host, with the project's Python
#   fetch    copy --from=PATH on the first host to --to=PATH here
#   delete   save and end the run; code and folders stay     (create: there is nothing to create)
#
# Hosts:     --hosts=A,B,... or --hosts-file=FILE (one a line): names or USER@NAME; keys must be in the agent or the config
#            --coordinator=ADDRESS of the first host as the others reach it (its name)   --port=8482
#            --nfs=ADDRESS:/SHARE mounted at --mount=/shared, where the hosts share no folder yet (needs sudo there)
# Training:  --config=FILE[:VARIANT]   --workdir=DIR (shared, or gs:// with the extra gcs); all else after --
# Code:      this working tree, or --repo=URL [--ref=BRANCH]; --dir=softmask_jax on the hosts; --extras=auto,chat,hf,hub
# Secrets:   --secret=HF_TOKEN (again for more): a variable set here, written on the hosts to a file of mode 600
# Waiting:   --poll=30 seconds between looks   --watch   --restarts=5 without progress
# Also:      --dry-run prints every command and runs none
#
# Example:
#   nodes=(--name=owt --hosts=node1,node2)
#   bash launch/ssh.sh setup  "${nodes[@]}"
#   bash launch/ssh.sh start  "${nodes[@]}" --config=configs/mdlm_owt.py --workdir=/shared/runs/owt
#   bash launch/ssh.sh follow "${nodes[@]}"
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

actions="create setup start follow resume run fetch delete"
options="name hosts hosts-file coordinator port nfs mount config workdir repo ref dir extras secret poll restarts from to"
switches="watch dry-run"
opt=([dir]=softmask_jax [mount]=/shared [extras]="auto,chat,hf,hub" [port]=8482 [poll]=30 [restarts]=5)
parse "$@"
if [ "$action" = create ]; then
  say "Nothing to create: the hosts are there. setup comes first."
  exit 0
fi
need ssh "Install the OpenSSH client."
ssh_flags=(-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)

hosts=() commands=()
if [ -n "${opt[hosts-file]:-}" ]; then
  [ -r "${opt[hosts-file]}" ] || die 2 "--hosts-file=${opt[hosts-file]} cannot be read"
  mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "${opt[hosts-file]}")
elif [ -n "${opt[hosts]:-}" ]; then
  IFS=, read -r -a hosts <<< "${opt[hosts]}"
fi
[ "${#hosts[@]}" -gt 0 ] || die 2 "give --hosts=A,B,... or --hosts-file=FILE"
for host in "${hosts[@]}"; do
  [[ "$host" =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ ]] || die 2 "'$host' is no host's name"
done
[ -z "$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)" ] || die 2 "a host is named twice"

on() { run ssh "${ssh_flags[@]}" "$1" "$2"; }
on_first() { on "${hosts[0]}" "$1" < /dev/null; }

# each FILE: commands[i] on host i, on all at once, FILE as their standard input; sets bad, the hosts where it failed.
each() {
  local i ends=() input="${1:-/dev/null}"
  bad=()
  for i in "${!hosts[@]}"; do
    if dry; then
      printf '%s%s\n' "$(on "${hosts[$i]}" "${commands[$i]}")" "${1:+ < $(quote "$1")}"
    else
      (on "${hosts[$i]}" "${commands[$i]}" < "$input" 2>&1 | sed "s/^/[${hosts[$i]}] /" >&2) &
      ends[i]=$!
    fi
  done
  for i in "${!ends[@]}"; do
    wait "${ends[$i]}" || bad+=("${hosts[$i]}")
  done
}

# on_all WHAT COMMAND AFTERWARDS [FILE]: the same on each; where it fails on some, they are named and this script ends.
on_all() {
  local i
  for i in "${!hosts[@]}"; do commands[i]="$2"; done
  each "${4:-}"
  [ "${#bad[@]}" = 0 ] || die 1 "$1 failed on ${bad[*]}; their lines are above. $3"
}

setup() {
  local mounts=()
  check_secrets
  if [ -n "${opt[nfs]:-}" ]; then mounts+=(--nfs="${opt[nfs]}" --mount="${opt[mount]}"); fi
  on_all "Reaching the hosts" true "Nothing was done."
  scratch
  if [ -n "${opt[secret]:-}" ]; then
    secrets_to "$folder/secrets"
    on_all "Bringing the secrets" "umask 077 && mkdir -p .softmask_jax && cat > .softmask_jax/secrets" "" "$folder/secrets"
  fi
  if [ -n "${opt[repo]:-}" ]; then
    on_all "Bringing the code" "$(unpacking -)" "setup again."
  else
    pack "$folder/code.tgz"
    on_all "Bringing the code" "$(unpacking -)" "setup again." "$folder/code.tgz"
  fi
  on_all "Setup" "$(node setup --extras="${opt[extras]}" "${mounts[@]}")" "setup again."
  run rm -rf "$folder"
}

start() {
  local i host failed several=() count="${#hosts[@]}"
  required config workdir
  on_all "A look before the start" "$(node check --name="${opt[name]}")" \
    "Nothing was started. Do they answer, are they set up, and does nothing run there?"
  for i in "${!hosts[@]}"; do
    several=(--processes="$count")
    if [ "$count" -gt 1 ]; then
      several+=(--coordinator="${opt[coordinator]:-${hosts[0]##*@}}:${opt[port]}" --process="$i")
    fi
    commands[i]="$(node start --name="${opt[name]}" --workdir="${opt[workdir]}" --label="host-$i" \
      ${SOFTMASK_JAX_RESTART:+--unless-stopped} -- \
      --config="${opt[config]}" --workdir="${opt[workdir]}" "${several[@]}" "${args[@]}")"
  done
  each
  if [ "${#bad[@]}" -gt 0 ]; then
    failed=" ${bad[*]} "
    for i in "${!hosts[@]}"; do commands[i]="$(node stop --name="${opt[name]}" --wait=60 --for-restart)"; done
    each 2> /dev/null
    for host in "${bad[@]}"; do
      [[ "$failed" == *" $host "* ]] || die 1 "the run did not start on${failed% }, and does not end on $host; delete ends it."
    done
    die 1 "the run did not start on${failed% }, and was stopped on the others."
  fi
}

ask_status() { on_first "$(node status --name="${opt[name]}")"; }

show_log() { on_first "$(node follow --name="${opt[name]}")"; }

look() {
  place=up
  read_status "$(ask_status 2> /dev/null || true)"
}

resume() {
  required config workdir
  if dry; then
    ask_status
  else
    look
    if [ "$status" = running ]; then
      say "${opt[name]} runs already; follow shows it."
      return
    fi
  fi
  on_all "Ending what is left of the run" "$(node stop --name="${opt[name]}" --wait=120 --for-restart)" "Do the hosts answer?"
  start
}

fetch() {
  required from to
  need scp "Install the OpenSSH client."
  run scp -q -r "${ssh_flags[@]}" "${hosts[0]}:${opt[from]}" "${opt[to]}"
}

delete() {
  on_all "Ending the run" "$(node stop --name="${opt[name]}")" "Try again."
}

case "$action" in
  run)
    [ "${#args[@]}" -gt 0 ] || die 2 "run needs a command after --"
    on_first "$(node run -- "${args[@]}")"
    ;;
  follow)
    if [ -n "${opt[watch]:-}" ]; then required config workdir; fi
    follow
    ;;
  *) "$action" ;;
esac
