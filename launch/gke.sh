#!/usr/bin/env bash
# A training run on GKE's TPUs by xpk: cluster, workload, log, resumption, deletion.
#
#   bash launch/gke.sh ACTION --name=NAME --project=PROJECT --zone=ZONE --type=TYPE [OPTIONS] [-- FLAGS OF THE TRAINING]
#
#   create   a cluster with a node pool of TPUs
#   setup    nothing: start builds the image
#   start    build an image of the code on --base and submit the workload; what fails is restarted by Kubernetes
#   follow   the log of the first pod until the workload ends
#   resume   delete the workload and submit it again; it goes on from the last checkpoint
#   delete   delete the workload; with --with-cluster the cluster too, which costs as long as it stands
#
# Cluster:   --type=v5litepod-16 (also v6e-8 ...)   --cluster=NAME (the run's name)   --slices=1   --spot | --reservation=R
# Folder:    --bucket=gs://BUCKET[/FOLDER]; or --filestore=INSTANCE[/SHARE] ("share"), mounted at --mount=/shared
# Training:  --config=FILE[:VARIANT]   --workdir=DIR (in the bucket: runs/CONFIG[-VARIANT]); all else after --
# Image:     --base=python:3.12 with this working tree in it; --extras=tpu,chat,hf,hub[,gcs] are installed when a pod
#            starts. --image=IMAGE is used as it is: the project in /app, installed in /app/.venv, [gcs] for a bucket
# Secrets:   --secret=HF_TOKEN (again for more): xpk takes a variable set here by its name; it stands in the pod's
#            definition, so whoever may read pods of this cluster can read it
# Waiting:   --poll=30 seconds between looks   --restarts=10 of the workload by Kubernetes
# Also:      --dry-run prints every command and runs none
#
# Example:
#   gke=(--name=owt --project=my-project --zone=us-west4-a --type=v5litepod-16 --bucket=gs://my-bucket)
#   bash launch/gke.sh create "${gke[@]}" --spot
#   bash launch/gke.sh start  "${gke[@]}" --spot --config=configs/mdlm_owt.py
#   bash launch/gke.sh follow "${gke[@]}"
#   bash launch/gke.sh delete "${gke[@]}" --with-cluster
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/bucket.sh
source launch/bucket.sh

actions="create setup start follow resume delete"
options="name project zone type cluster slices reservation bucket filestore mount config workdir base image extras secret"
options+=" poll restarts"
switches="spot with-cluster dry-run"
opt=([mount]=/shared [slices]=1 [base]="python:3.12" [extras]="tpu,chat,hf,hub" [poll]=30 [restarts]=10)
parse "$@"
required project zone
if [ "$action" = setup ]; then
  say "Nothing to set up: start builds the image."
  exit 0
fi
opt[cluster]="${opt[cluster]:-${opt[name]}}"
bucket filestore
place_flags=(--cluster="${opt[cluster]}" --project="${opt[project]}" --zone="${opt[zone]}")
capacity=()
if [ -n "${opt[spot]:-}" ]; then capacity=(--spot); fi
if [ -n "${opt[reservation]:-}" ]; then capacity=(--reservation="${opt[reservation]}"); fi

need_xpk() { need xpk "Install it: pip install xpk (it needs gcloud, kubectl and docker too)."; }

create() {
  local share="${opt[filestore]:-}"
  required type
  need_xpk
  check_bucket
  run xpk cluster create "${place_flags[@]}" --tpu-type="${opt[type]}" --num-slices="${opt[slices]}" \
    "${capacity[@]:---on-demand}" ${share:+--enable-gcpfilestore-csi-driver} ||
    die 1 "xpk did not make the cluster ${opt[cluster]} and said why above (quota?)." \
      "A part of it may stand and cost: delete --with-cluster."
  if [ -z "$share" ]; then
    [ -n "${opt[bucket]:-}" ] || say "Note: without --bucket or --filestore pods have no folder that outlives them."
    return
  fi
  [[ "$share" == */* ]] || share+=/share
  run xpk storage attach "${share%%/*}" "${place_flags[@]}" --type=gcpfilestore \
    --instance="${share%%/*}" --vol="${share#*/}" --mount-point="${opt[mount]}" \
    --access-mode=ReadWriteMany --readonly=false --auto-mount=true ||
    die 1 "the file share was not attached. The cluster ${opt[cluster]} stands and costs: create again, or" \
      "delete --with-cluster."
}

start() {
  local command flags=() names=() setup=(--extras="${opt[extras]}" ${opt[bucket]:+--bucket="${opt[bucket]}"})
  required type config workdir
  need_xpk
  check_secrets
  scratch
  # `exec`: the pod's SIGTERM must reach the training, which saves.
  command="exec bash launch/node.sh attend $(quote --name="${opt[name]}" --workdir="${opt[workdir]}" -- \
    --config="${opt[config]}" --workdir="${opt[workdir]}" "${args[@]}")"
  if [ -n "${opt[image]:-}" ]; then
    command="cd /app && $command"
    flags+=(--docker-image="${opt[image]}")
  else
    command="bash launch/node.sh setup $(quote "${setup[@]}") && $command"
    pack "$folder/code.tgz"
    run mkdir "$folder/code"
    run tar --extract --gzip --directory="$folder/code" --file="$folder/code.tgz"
    flags+=(--base-docker-image="${opt[base]}" --script-dir="$folder/code")
  fi
  if [ -n "${opt[secret]:-}" ]; then
    # A name alone: xpk looks up the value.
    read -r -a names <<< "${opt[secret]}"
    if dry; then
      echo "$(quote printf '%s\n' "${names[@]}") > $(quote "$folder/env")"
    else
      printf '%s\n' "${names[@]}" > "$folder/env"
    fi
    flags+=(--env-file="$folder/env")
  fi
  # 1: a supervisor gave up, perhaps because another pod was lost. 75: stopped and saved, not finished.
  run xpk workload create "${place_flags[@]}" --workload="${opt[name]}" --tpu-type="${opt[type]}" \
    --num-slices="${opt[slices]}" --command="$command" --max-restarts="${opt[restarts]}" --restart-on-exit-codes=1,75 \
    --termination-grace-period-seconds=120 "${capacity[@]:---on-demand}" "${flags[@]}" ||
    die 1 "xpk did not submit ${opt[name]} and said why above. The cluster ${opt[cluster]} stands and costs."
}

follow() {
  local state shown="" silent=0 context logs jobset
  # xpk's clusters are regional. Named, so that another cluster that kubectl looks at is never asked.
  context="gke_${opt[project]}_${opt[zone]%-*}_${opt[cluster]}"
  logs=(kubectl --context="$context" logs --follow --tail=50 --max-log-requests=64
    --selector="xpk.google.com/workload=${opt[name]},batch.kubernetes.io/job-completion-index=0")
  jobset=(kubectl --context="$context" get jobset "${opt[name]}"
    --output='jsonpath={.status.conditions[?(@.status=="True")].type}')
  if dry; then
    run "${logs[@]}"
    echo "# every ${opt[poll]} s until it says Completed or Failed:"
    run "${jobset[@]}"
    return
  fi
  need kubectl "Install it: gcloud components install kubectl."
  while true; do
    if state="$("${jobset[@]}" 2>&1)"; then
      silent=0
    elif grep -q -i 'not *found' <<< "$state"; then
      die 1 "there is no workload ${opt[name]} in the cluster ${opt[cluster]}; start comes first."
    else
      say "$state"
      silent=$((silent + 1)) state=unknown
      [ "$silent" -le 5 ] || die 1 "the cluster ${opt[cluster]} does not answer; nothing was changed."
    fi
    case " $state " in
      *" Completed "*)
        say "Finished."
        return
        ;;
      *" Failed "*)
        die 1 "the workload failed, ${opt[restarts]} restarts included. resume goes on from the last checkpoint."
        ;;
    esac
    if [ "$state" != "$shown" ]; then say "${opt[name]}: ${state:-waiting}"; fi
    shown="$state"
    "${logs[@]}" 2> /dev/null || true # the pods are not there yet, or are being replaced
    sleep "${opt[poll]}"
  done
}

remove() {
  run xpk workload delete "${place_flags[@]}" --workload="${opt[name]}" --force ||
    die 1 "xpk did not delete the workload ${opt[name]} and said why above."
}

resume() {
  required type config workdir
  need_xpk
  remove
  start
}

delete() {
  need_xpk
  if [ -n "${opt[with-cluster]:-}" ]; then
    # Its workloads go with it.
    run xpk cluster delete "${place_flags[@]}" --force ||
      die 1 "the cluster ${opt[cluster]} was not deleted and may still cost."
  else
    remove
    dry || say "The cluster ${opt[cluster]} stands and costs; delete --with-cluster ends it."
  fi
}

"$action"
