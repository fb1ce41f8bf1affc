#!/usr/bin/env bash
# A training run on GPUs under SLURM: set up, submitted, followed, resumed, cancelled. To be run on a login node, in a
# copy of the project on the file system that all nodes share.
#
#   bash launch/slurm.sh ACTION --name=NAME --workdir=DIR [OPTIONS] [-- FLAGS OF THE TRAINING]
#
#   setup    install into .venv here
#   start    write WORKDIR/launch/NAME.sbatch and submit it; logs are in WORKDIR/logs/, one a process
#   follow   wait for the job and show the log of its first process until it ends
#   resume   submit the same script again, which goes on from the last checkpoint
#   delete   cancel the job: it saves and ends                  (create: there is nothing to create)
#
# The job asks for --requeue: preempted, or two minutes before its time is up, it saves, goes back into the queue, and
# goes on. A run that is finished does not.
#
# Job:       --nodes=1   --gpus=8 (of a node; one process each)   --partition=P   --account=A   --time=1-00:00:00
#            --sbatch=FLAG (one more #SBATCH line, such as --sbatch=--constraint=a100; again for more)
# Training:  --config=FILE[:VARIANT]   --workdir=DIR; all else after --
# Setup:     --extras=cuda12,chat,hf,hub (a login node may have no GPU, so the CUDA version is not guessed)
# Secrets:   --secret=HF_TOKEN (again for more): a variable set here, written to ~/.softmask_jax/secrets, mode 600; the
#            job reads that file and is submitted with --export=NONE
# Waiting:   --poll=30 seconds between looks
# Also:      --dry-run prints every command, and the script, and runs none
#
# Example:
#   job=(--name=owt --workdir=/scratch/me/runs/owt)
#   bash launch/slurm.sh setup  "${job[@]}"
#   bash launch/slurm.sh start  "${job[@]}" --config=configs/mdlm_owt.py --nodes=2 --gpus=8 --partition=gpu
#   bash launch/slurm.sh follow "${job[@]}"
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

actions="create setup start follow resume delete"
options="name nodes gpus partition account time sbatch config workdir extras secret poll"
switches="dry-run"
opt=([nodes]=1 [gpus]=8 [time]="1-00:00:00" [extras]="cuda12,chat,hf,hub" [poll]=30)
parse "$@"
if [ "$action" = create ]; then
  say "Nothing to create: the cluster is there. setup comes first."
  exit 0
fi
for key in partition account time sbatch; do
  text="${opt[$key]:-x}"
  if [ "$key" = sbatch ]; then text="${text// /}"; fi
  [[ "$text" =~ ^[A-Za-z0-9_.,:=@+/-]+$ ]] || die 2 "--$key=${opt[$key]}: a character that #SBATCH does not take"
done

job() {
  local tasks=$((opt[nodes] * opt[gpus])) secrets="\$HOME/.softmask_jax/secrets" log line more=()
  log="$(quote "${opt[workdir]}/logs/${opt[name]}-%t.log")"
  if [ -n "${opt[partition]:-}" ]; then more+=(--partition="${opt[partition]}"); fi
  if [ -n "${opt[account]:-}" ]; then more+=(--account="${opt[account]}"); fi
  for line in ${opt[sbatch]:-}; do more+=("$line"); done
  cat << SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=${opt[name]}
#SBATCH --nodes=${opt[nodes]}
#SBATCH --ntasks-per-node=${opt[gpus]}
#SBATCH --gpus-per-node=${opt[gpus]}
#SBATCH --time=${opt[time]}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --export=NONE
SCRIPT
  for line in "${more[@]}"; do echo "#SBATCH $line"; done
  cat << SCRIPT
# $tasks processes, one a GPU. Written by launch/slurm.sh.
cd $(quote "$PWD") || exit 1
if [ -r "$secrets" ]; then set -a; . "$secrets"; set +a; fi
again=""
# srun hands a signal on to all processes: they save and end.
trap 'again=yes; kill -TERM "\$run"' USR1
trap 'kill -TERM "\$run"' TERM
srun --export=ALL --wait=0 --kill-on-bad-exit=0 --open-mode=append --output=$log \\
  .venv/bin/python -m softmask_jax.supervise \\
  $(quote --config="${opt[config]}" --workdir="${opt[workdir]}" "${args[@]}") &
run=\$!
code=0
while kill -0 "\$run" 2> /dev/null; do wait "\$run" && code=0 || code=\$?; done
if [ -n "\$again" ] && ! bash launch/node.sh finished --workdir=$(quote "${opt[workdir]}"); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
SCRIPT
}

# The numbers of jobs of this name in the queue.
queued() { run squeue --noheader --me --name="${opt[name]}" --format=%i; }

submit() {
  local id command=(sbatch --parsable --output="${opt[workdir]}/logs/${opt[name]}.sbatch.log" "$script")
  if dry; then
    queued
    run "${command[@]}"
    return
  fi
  need sbatch "Run this on a login node of the cluster."
  id="$(queued)" || die 1 "squeue failed; nothing was submitted."
  id="${id%%$'\n'*}"
  [ -z "$id" ] || die 1 "${opt[name]} is in the queue already (job $id); follow shows it, delete cancels it."
  id="$("${command[@]}")" ||
    die 1 "sbatch refused the job and said why above; nothing was submitted. The script is $script"
  id="${id%%;*}"
  echo "$id" > "${opt[workdir]}/launch/${opt[name]}.job"
  say "Job $id. Logs: ${opt[workdir]}/logs/${opt[name]}-0.log"
}

setup() { run bash launch/node.sh setup --extras="${opt[extras]}"; }

start() {
  required config
  [[ "${opt[workdir]}" != *%* ]] || die 2 "--workdir with a % in it, which SLURM takes for a pattern"
  [[ "${opt[workdir]}" != gs://* ]] || die 2 "--workdir=${opt[workdir]}: the job and its logs need a folder on the shared disk"
  check_secrets
  if dry; then
    run mkdir -p "${opt[workdir]}/launch" "${opt[workdir]}/logs"
    if [ -n "${opt[secret]:-}" ]; then secrets_to ~/.softmask_jax/secrets; fi
    printf "cat > %s << 'SCRIPT'\n" "$(quote "$script")"
    job
    echo SCRIPT
  else
    [ -x .venv/bin/python ] || die 1 "not set up: no .venv in $PWD; setup comes first"
    mkdir -p "${opt[workdir]}/launch" "${opt[workdir]}/logs" ~/.softmask_jax
    if [ -n "${opt[secret]:-}" ]; then secrets_to ~/.softmask_jax/secrets; fi
    job > "$script"
  fi
  submit
}

resume() {
  dry || [ -e "$script" ] || die 1 "there is no $script; start comes first"
  submit
}

follow() {
  local id state shown="" silent=0 log="${opt[workdir]}/logs/${opt[name]}-0.log"
  if dry; then
    run tail -n 50 -F "$log"
    echo "# meanwhile every ${opt[poll]} s, until the job is over:"
    run squeue --noheader --me --name="${opt[name]}" --format=%T
    run bash launch/node.sh finished --workdir="${opt[workdir]}"
    return
  fi
  need squeue "Run this on a login node of the cluster."
  id="$(cat "${opt[workdir]}/launch/${opt[name]}.job" 2> /dev/null)" ||
    die 1 "there is no job of ${opt[name]}; start comes first"
  mkdir -p "${opt[workdir]}/logs" && touch "$log"
  tail -n 50 -F "$log" 2> /dev/null &
  tail=$!
  trap 'kill "$tail" 2> /dev/null || true' EXIT
  while true; do
    # A job that is over is unknown to squeue after a while. A controller that is busy knows nothing at all.
    if state="$(squeue --noheader --job="$id" --format=%T 2>&1)"; then
      state="$(tail -n 1 <<< "$state")" silent=0
    elif grep -q -i 'invalid job' <<< "$state"; then
      state=""
    else
      silent=$((silent + 1))
      [ "$silent" -le 5 ] || die 1 "squeue does not answer ($(tail -n 1 <<< "$state")); the job was not touched. Follow it later."
      sleep "${opt[poll]}"
      continue
    fi
    if [ "$state" != "$shown" ]; then say "Job $id: ${state:-not in the queue}"; fi
    shown="$state"
    case "$state" in
      "" | COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE) break ;;
    esac
    sleep "${opt[poll]}"
  done
  if bash launch/node.sh finished --workdir="${opt[workdir]}"; then
    say "Finished."
  else
    die 1 "job $id is over and the run is not finished${state:+ ($state)}. The log says why; resume goes on from the last" \
      "checkpoint."
  fi
}

delete() {
  if dry; then
    run scancel --me --name="${opt[name]}"
    return
  fi
  need scancel "Run this on a login node of the cluster."
  scancel --me --name="${opt[name]}" || die 1 "scancel failed; the job may still be there."
  say "Cancelled. ${opt[workdir]} stays."
}

required workdir
script="${opt[workdir]}/launch/${opt[name]}.sbatch"
"$action"
