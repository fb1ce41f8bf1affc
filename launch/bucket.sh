# shellcheck shell=bash
# Sourced by tpu.sh and gke.sh after common.sh: a bucket for the run's folder, by --bucket.

# bucket OTHERS: makes --workdir, by default of the name that training gives it, a folder of --bucket, and the hosts
# install its extra. OTHERS: options that give another folder.
bucket() {
  local key name
  if [ -z "${opt[bucket]:-}" ]; then
    [[ "${opt[workdir]:-}" != gs://* ]] || die 2 "--workdir=${opt[workdir]} needs --bucket=gs://BUCKET, at setup too"
    return
  fi
  for key; do [ -z "${opt[$key]:-}" ] || die 2 "--bucket or --$key, not both: the run has one folder"; done
  [[ "${opt[bucket]}" =~ ^gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^[:space:]]*)?$ ]] ||
    die 2 "--bucket=${opt[bucket]}: it is gs://BUCKET, or a folder in one"
  opt[bucket]="${opt[bucket]%/}"
  [[ ",${opt[extras]}," == *,gcs,* ]] || opt[extras]+="${opt[extras]:+,}gcs"
  if [ -z "${opt[workdir]:-}" ] && [ -n "${opt[config]:-}" ]; then
    name="${opt[config]##*/}"
    opt[workdir]="runs/${name/.py:/-}"
    opt[workdir]="${opt[workdir]%.py}"
  fi
  case "${opt[workdir]:-}" in
    '' | gs://*) ;;
    /* | "~"*) die 2 "--workdir=${opt[workdir]} is not in ${opt[bucket]}: give a name in it, such as runs/x" ;;
    *) opt[workdir]="${opt[bucket]}/${opt[workdir]}" ;;
  esac
}

# check_bucket: before anything is created, ends with one line where --bucket is not there, and names the right that
# hosts lack, as far as that can be seen from here. A watch that brings a run back has it behind it.
check_bucket() {
  local name="${opt[bucket]:-}" region="${opt[zone]%-*}" account answer see number rights
  if [ -z "$name" ] || [ -n "${SOFTMASK_JAX_RESTART:-}" ]; then return 0; fi
  name="${name#gs://}" name="gs://${name%%/*}"
  see=(gcloud storage buckets describe "$name" --format='value(location)')
  number=(gcloud projects describe "${opt[project]}" --format='value(projectNumber)')
  rights=(gcloud storage buckets get-iam-policy "$name" --flatten='bindings[].members'
    --format='csv[no-heading](bindings.members,bindings.role)')
  need gcloud "Install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
  if dry; then
    run "${see[@]}"
    run "${number[@]}"
    run "${rights[@]}"
    return
  fi
  if ! answer="$("${see[@]}" 2>&1)"; then
    say "$answer"
    die 1 "nothing was created: gcloud cannot see $name (its message is above). To create the bucket:" \
      "gcloud storage buckets create $name --project=${opt[project]} --location=$region --soft-delete-duration=0"
  fi
  answer="${answer##*$'\n'}"
  if [[ "${region^^}" != "$answer"* ]]; then # US holds US-WEST4
    say "Note: $name is in $answer, the machines are in $region: what they read and write there is slower and costs more."
  fi
  account="serviceAccount:$("${number[@]}" 2> /dev/null || echo NUMBER)-compute@developer.gserviceaccount.com"
  answer="$("${rights[@]}" 2> /dev/null || true)"
  if ! grep -q -E "^$account,roles/storage\.(admin|object(Admin|User))\$" <<< "$answer"; then
    say "Note: unless the project lets ${account#*:} write $name:" \
      "gcloud storage buckets add-iam-policy-binding $name --member=$account --role=roles/storage.objectAdmin"
  fi
}
