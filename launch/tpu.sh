#!/usr/bin/env bash
# A training run on a Cloud TPU, one VM or a slice of many: created, set up, started, followed, resumed, deleted.
#
#   bash launch/tpu.sh ACTION --name=NAME --project=PROJECT --zone=ZONE --type=TYPE [OPTIONS] [-- FLAGS OF THE TRAINING]
#
#   create   ask for the TPU by a queued resource and wait until it is there; again: wait on
#   setup    bring the code, install, look whether the bucket can be written, on all hosts; again: renew
#   start    python -m softmask_jax.supervise on all hosts, detached; each has its log
#   follow   the log of the first host until the run ends; with --watch, bring it back until it is finished
#   resume   bring back what was preempted or stopped: delete the remains, create, setup, start from the last checkpoint
#   run      a command (after --) on the first host, with the project's Python: a conversion, an export
#   fetch    copy --from=PATH on the first host to --to=PATH here
#   delete   save and end the run, and give the TPU back; the bucket stays
#
# Machines:  --type=v5litepod-16 (also v6e-8, v5p-8 ...)   --spot   --reserved   --network=NAME   --subnetwork=NAME
#            --runtime=VERSION (chosen by type)
# Folder:    --bucket=gs://BUCKET[/FOLDER]; or what is mounted at --mount=/shared: --nfs=ADDRESS:/SHARE (Filestore), or
#            --disk=DISK (a persistent disk, one host)
# Training:  --config=FILE[:VARIANT]   --workdir=DIR (in the bucket: runs/CONFIG[-VARIANT]); all else after --
# Code:      this working tree, or --repo=URL [--ref=BRANCH]; --dir=softmask_jax on the hosts; --extras=tpu,chat,hf,hub[,gcs]
# Secrets:   --secret=HF_TOKEN (again for more): a variable set here, carried to the hosts in a file of mode 600
# Waiting:   --wait=7200 seconds for the TPU   --poll=30 seconds between looks   --watch   --restarts=5 without progress
# Also:      --dry-run prints every command and runs none
#
# Example:
#   tpu=(--name=dream --project=my-project --zone=us-west4-a --type=v5litepod-16 --spot --bucket=gs://my-bucket)
#   bash launch/tpu.sh create "${tpu[@]}"
#   bash launch/tpu.sh setup  "${tpu[@]}" --secret=HF_TOKEN
#   bash launch/tpu.sh start  "${tpu[@]}" --config=configs/dream7b.py -- --restarts=5
#   bash launch/tpu.sh follow "${tpu[@]}" --config=configs/dream7b.py --watch -- --restarts=5
#   bash launch/tpu.sh delete "${tpu[@]}"
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/bucket.sh
source launch/bucket.sh

actions="create setup start follow resume run fetch delete"
options="name project zone type runtime network subnetwork bucket nfs disk mount config workdir repo ref dir extras secret"
options+=" wait poll restarts from to"
switches="spot reserved watch dry-run"
opt=([dir]=softmask_jax [mount]=/shared [extras]="tpu,chat,hf,hub" [wait]=7200 [poll]=30 [restarts]=5)
parse "$@"
required project zone
need gcloud "Install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
if [ -n "${opt[spot]:-}" ] && [ -n "${opt[reserved]:-}" ]; then die 2 "--spot or --reserved, not both"; fi
if [ -n "${opt[nfs]:-}" ] && [ -n "${opt[disk]:-}" ]; then die 2 "--nfs or --disk, not both: they are mounted in one place"; fi
bucket nfs disk
place_flags=(--project="${opt[project]}" --zone="${opt[zone]}")

# The software that Google asks for on each kind of TPU.
runtime() {
  case "${opt[type]}" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) die 2 "--type=${opt[type]}: known are v5litepod-N, v6e-N, v5p-N, v4-N; for others give --runtime" ;;
  esac
}

queued() { run gcloud compute tpus queued-resources "$1" "${opt[name]}" "${place_flags[@]}" "${@:2}" --quiet; }

describe() { queued describe --format='value(state.state)'; }

# state: the queued resource's, NONE where there is none, UNKNOWN where nobody says; sets state and reason.
state() {
  local answer
  reason=""
  if answer="$(describe 2>&1)"; then
    state="$(tail -n 1 <<< "$answer")"
  elif grep -q -i 'not.found' <<< "$answer"; then
    state=NONE
  else
    state=UNKNOWN reason="$(grep -m 1 ERROR <<< "$answer" || tail -n 1 <<< "$answer")"
  fi
}

# state, but where nobody says it, gcloud's reason is shown and it is asked again, five times at most.
known_state() {
  local silent=0
  state
  while [ "$state" = UNKNOWN ]; do
    silent=$((silent + 1))
    [ "$silent" -le 5 ] || die 1 "what there is of ${opt[name]} cannot be asked; gcloud said why above."
    say "$reason"
    sleep "${opt[poll]}"
    state
  done
}

ask() {
  local flags=() said runtime
  runtime="${opt[runtime]:-$(runtime)}"
  check_bucket
  flags+=(--node-id="${opt[name]}" --accelerator-type="${opt[type]}" --runtime-version="$runtime")
  flags+=(${opt[spot]:+--spot} ${opt[reserved]:+--reserved} ${opt[network]:+--network="${opt[network]}"})
  flags+=(${opt[subnetwork]:+--subnetwork="${opt[subnetwork]}"})
  flags+=(${opt[disk]:+--data-disk="source=projects/${opt[project]}/zones/${opt[zone]}/disks/${opt[disk]},mode=read-write"})
  if dry; then
    queued create "${flags[@]}"
  elif ! said="$(queued create "${flags[@]}" 2>&1)"; then
    say "$said"
    if grep -q -i -E 'quota|RESOURCE_EXHAUSTED' <<< "$said"; then
      die 1 "no quota for ${opt[type]}${opt[spot]:+ (spot)} in ${opt[zone]}; nothing was created." \
        "Ask for it under IAM, Quotas, or try another zone."
    fi
    die 1 "the TPU was not created; gcloud said why above."
  fi
}

# Ask where nothing is asked yet, and wait until it is there.
create() {
  local until=$((SECONDS + opt[wait])) told=""
  required type
  run_folder
  if dry; then
    ask
    echo "# every ${opt[poll]} s until it says ACTIVE, for ${opt[wait]} s at most:"
    describe
    return
  fi
  known_state
  if [ "$state" = NONE ]; then
    ask
    known_state
  fi
  while true; do
    if [ "$state" != "$told" ]; then
      say "${opt[name]}: $state"
      told="$state"
    fi
    case "$state" in
      ACTIVE) return ;;
      FAILED)
        reason="$(queued describe --format='value(state.failedData.error.message)' 2> /dev/null || true)"
        die 1 "the request failed${reason:+: $reason}. It still stands there, without a TPU: delete removes it."
        ;;
      SUSPENDING | SUSPENDED) die 1 "${opt[name]} was preempted; resume brings it back, delete removes what is left." ;;
      DELETING | NONE) die 1 "${opt[name]} is being deleted; create it again when it is gone." ;;
    esac
    if [ "$SECONDS" -ge "$until" ]; then
      die 1 "no TPU within ${opt[wait]} s ($state). The request stands in the queue: create waits on, delete withdraws it."
    fi
    sleep "${opt[poll]}"
    known_state
  done
}

# on WORKERS COMMAND: on all hosts or one; what it prints.
on() {
  run gcloud compute tpus tpu-vm ssh "${opt[name]}" "${place_flags[@]}" --worker="$1" --command="$2" \
    --ssh-flag="-o ConnectTimeout=20" --ssh-flag="-o ServerAliveInterval=15" --ssh-flag="-o ServerAliveCountMax=4" \
    --quiet < /dev/null
}

copy() { run gcloud compute tpus tpu-vm scp "$@" "${place_flags[@]}" --quiet; }

# on_all WHAT COMMAND: everywhere; where it fails on some, they are named and this script ends.
on_all() {
  local count addresses worker bad=()
  if on all "$2"; then return; fi
  # gcloud names no host that does not answer; so each is asked on its own.
  addresses="$(gcloud compute tpus tpu-vm describe "${opt[name]}" "${place_flags[@]}" \
    --format='value(networkEndpoints[].ipAddress)' --quiet 2> /dev/null || true)"
  count=$(tr ';,' '  ' <<< "$addresses" | wc -w)
  for ((worker = 0; worker < count; worker++)); do
    if ! on "$worker" "$2" > /dev/null 2>&1; then bad+=("$worker"); fi
  done
  die 1 "$1 failed on host ${bad[*]:-(which one is not known)} of ${opt[name]}; its lines are above. $3"
}

# Sets folders: flags by which launch/node.sh sets up the run's folder.
run_folder() {
  folders=()
  if [ -n "${opt[bucket]:-}" ]; then
    folders=(--bucket="${opt[bucket]}")
  elif [ -n "${opt[nfs]:-}" ]; then
    folders=(--nfs="${opt[nfs]}" --mount="${opt[mount]}")
  elif [ "${opt[type]##*-}" -gt 8 ] 2> /dev/null; then # chips or cores of several hosts
    die 2 "${opt[type]} has several hosts, which need a folder that all share: --bucket=gs://BUCKET or --nfs=ADDRESS:/SHARE"
  elif [ -n "${opt[disk]:-}" ]; then
    folders=(--disk --mount="${opt[mount]}")
  else
    say "Note: without --bucket, --nfs or --disk the run's folder is on the boot disk and is lost with the TPU."
  fi
}

setup() {
  required type
  run_folder
  check_secrets
  scratch
  if [ -n "${opt[secret]:-}" ]; then
    secrets_to "$folder/secrets"
    copy "$folder/secrets" "${opt[name]}:softmask_jax-secrets" --worker=all || die 1 "the secrets could not be copied."
    on_all "Bringing the secrets" \
      "chmod 600 softmask_jax-secrets && mkdir -p .softmask_jax && mv softmask_jax-secrets .softmask_jax/secrets" ""
  fi
  if [ -z "${opt[repo]:-}" ]; then
    pack "$folder/code.tgz"
    copy "$folder/code.tgz" "${opt[name]}:softmask_jax-code.tgz" --worker=all ||
      die 1 "the code could not be copied to all hosts. The TPU is there and costs: setup again, or delete."
  fi
  on_all "Setup" "$(unpacking softmask_jax-code.tgz) && $(node setup --extras="${opt[extras]}" "${folders[@]}")" \
    "The TPU is there and costs: setup again, or delete."
  run rm -rf "$folder"
}

start() {
  required config workdir
  on_all "A look before the start" "$(node check --name="${opt[name]}")" \
    "Nothing was started. Is it set up, and not running?"
  if ! on all "$(node start --name="${opt[name]}" --workdir="${opt[workdir]}" -- \
    --config="${opt[config]}" --workdir="${opt[workdir]}" "${args[@]}")"; then
    on all "$(node stop --name="${opt[name]}" --wait=60 --for-restart)" > /dev/null 2>&1 || true
    die 1 "the run did not start on all hosts, and was stopped on the others."
  fi
}

ask_status() {
  describe
  on 0 "$(node status --name="${opt[name]}")"
}

show_log() { on 0 "$(node follow --name="${opt[name]}")"; }

look() {
  state
  case "$state" in
    ACTIVE)
      place=up
      read_status "$(on 0 "$(node status --name="${opt[name]}")" 2> /dev/null || true)"
      ;;
    UNKNOWN) place=unknown ;;
    # Not by a preemption: somebody wanted it away.
    NONE | DELETING) place=deleted reason="$state" ;;
    *) place=gone reason="$state" ;;
  esac
}

# Away with a request whose TPU is gone; then all anew. On a TPU that is there the run is only started.
resume() {
  required config workdir type
  check_secrets
  if dry; then
    ask_status
    echo "# where the TPU is gone (SUSPENDED, FAILED), first its remains:"
    queued delete --force
  else
    look
    case "$state" in
      UNKNOWN) die 1 "${opt[name]}: $reason" ;;
      ACTIVE)
        if [ "$status" = running ]; then
          say "${opt[name]} runs already; follow shows it."
          return
        elif [ "$status" = ended ] || [ "$status" = lost ]; then
          # The others end with the first, but not at once.
          on_all "Ending what is left of the run" "$(node stop --name="${opt[name]}" --wait=120 --for-restart)" "resume again, or delete."
          start
          return
        fi
        ;;
      SUSPENDING | SUSPENDED | FAILED) queued delete --force || die 1 "what is left of ${opt[name]} could not be deleted." ;;
    esac
  fi
  create
  setup
  start
}

fetch() {
  required from to
  [[ "${opt[from]}" != gs://* ]] || die 2 "from a bucket: gcloud storage cp $(quote "${opt[from]}" "${opt[to]}") --recursive"
  copy "${opt[name]}:${opt[from]}" "${opt[to]}" --recurse
}

delete() {
  if dry; then
    describe
  else
    state
    if [ "$state" = NONE ]; then
      say "There is no ${opt[name]} in ${opt[zone]}; nothing to delete."
      return
    fi
  fi
  # A signal on one host saves on all. What does not answer is deleted all the same.
  if dry || [ "$state" = ACTIVE ]; then on 0 "$(node stop --name="${opt[name]}")" || true; fi
  queued delete --force || die 1 "${opt[name]} was not deleted and may still cost; try again, or use the console."
  if dry; then return; fi
  say "Deleted ${opt[name]}.${opt[disk]:+ Disk ${opt[disk]} stays and costs.}" \
    "${opt[nfs]:+The file share ${opt[nfs]} stays and costs.}${opt[bucket]:+What is in ${opt[bucket]} stays and costs.}"
}

case "$action" in
  run)
    [ "${#args[@]}" -gt 0 ] || die 2 "run needs a command after --"
    on 0 "$(node run -- "${args[@]}")"
    ;;
  follow)
    if [ -n "${opt[watch]:-}" ]; then required config workdir type && check_secrets; fi
    follow
    ;;
  *) "$action" ;;
esac
