# shellcheck shell=bash
# Sourced by tpu.sh, gke.sh, slurm.sh and ssh.sh: options, dry runs, quoting, secrets, and the watch over a run.
# They set: options (that take a value), switches, actions; and get: action, the array opt, args (what follows --).

declare -A opt=()
# The script itself, from wherever it was called; its options that name files here are seen from there.
self="$PWD/launch/${0##*/}" caller="${OLDPWD:-$PWD}" nested="" folder=""
action="" args=() place=unknown status=unknown code=1 step=-1 finished=no reason=""

say() { printf '%s\n' "$*" >&2; }

die() {
  local code="$1"
  shift
  say "Error: $*"
  exit "$code"
}

# The comment at the head of a script is its help.
usage() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$self"; }

# Words as a POSIX shell reads them again, one by one.
quote() {
  local word mark="'\\''" out=""
  for word; do
    case "$word" in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/"$mark"}'" ;;
    esac
    out+="${out:+ }$word"
  done
  printf '%s' "$out"
}

# parse ARGUMENTS: fills action, opt and args, or ends with one line and status 2.
parse() {
  local key value
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        args=("$@")
        break
        ;;
      --*)
        key="${1#--}"
        key="${key%%=*}"
        if [[ "$key" == *' '* ]]; then
          die 2 "there is no option --$key; ${0##*/} --help lists them"
        elif [[ " ${switches:?} " == *" $key "* ]]; then
          [ "$1" = "--$key" ] || die 2 "--$key takes no value"
          value=yes
        elif [[ " ${options:?} " != *" $key "* ]]; then
          die 2 "there is no option --$key; ${0##*/} --help lists them"
        elif [ "$1" != "--$key" ]; then
          value="${1#*=}"
        elif [ $# -gt 1 ]; then
          value="$2"
          shift
        else
          die 2 "--$key needs a value"
        fi
        if [ "$key" = secret ] || [ "$key" = sbatch ]; then
          [[ "$value" != *[[:space:]]* ]] || die 2 "--$key takes one word; give it again for more"
          value="${opt[$key]:-}${opt[$key]:+ }$value"
        fi
        opt[$key]="$value"
        ;;
      *)
        [ -z "$action" ] || die 2 "'$1' is one word too many after '$action'; what is meant for the training goes after --"
        action="$1"
        ;;
    esac
    shift
  done
  [ -n "$action" ] || die 2 "say what to do: ${actions:?}"
  [[ " $actions " == *" $action "* ]] || die 2 "there is no '$action'; there is: $actions"
  opt[name]="${opt[name]:-}"
  [[ "${opt[name]}" =~ ^[a-z][a-z0-9-]{0,38}[a-z0-9]$ ]] ||
    die 2 "--name='${opt[name]}': it is needed, 2 to 40 of a-z, 0-9 and -, a letter first"
  for key in wait poll restarts nodes gpus slices port; do
    [[ "${opt[$key]-0}" =~ ^[0-9]{1,9}$ ]] || die 2 "--$key=${opt[$key]} is not a whole number"
    if [ -n "${opt[$key]:-}" ]; then opt[$key]=$((10#${opt[$key]})); fi
  done
  for key in nodes gpus slices; do
    [ "${opt[$key]:-1}" -gt 0 ] || die 2 "--$key=0: at least one is needed"
  done
  for key in hosts-file to; do
    if [[ "${opt[$key]:-/}" != /* && "$caller" != "$PWD" ]]; then opt[$key]="$caller/${opt[$key]}"; fi
  done
  if [[ "${opt[*]}${args[*]-}" == *$'\n'* ]]; then die 2 "a line break in an argument"; fi
  trap interrupted INT TERM
}

interrupted() {
  if [ -n "$nested" ]; then exit 130; fi # the inner one has said it
  case "$action" in
    create | follow) say "Interrupted here only: what runs or waits for ${opt[name]} elsewhere was not touched." ;;
    *) say "Interrupted: '$action' of ${opt[name]} may be half done elsewhere; give it again to complete it." ;;
  esac
  exit 130
}

# This script once more, as another action with the same options: a failure in it does not end this one.
as() {
  local key value ended=0 words=()
  for key in "${!opt[@]}"; do
    if [[ " $switches " == *" $key "* ]]; then
      words+=("--$key")
    elif [ "$key" = secret ]; then
      for value in ${opt[secret]}; do words+=(--secret="$value"); done
    else
      words+=("--$key=${opt[$key]}")
    fi
  done
  nested=yes
  bash "$self" "$1" "${words[@]}" -- "${args[@]}" || ended=$?
  nested=""
  return "$ended"
}

# required NAMES: those options must have been given.
required() {
  local key
  for key; do [ -n "${opt[$key]:-}" ] || die 2 "$action needs --$key"; done
}

dry() { [ -n "${opt[dry-run]:-}" ]; }

# run COMMAND: or, in a dry run, print it.
run() { if dry; then printf '%s\n' "$(quote "$@")"; else "$@"; fi; }

# need PROGRAM HOW: end with one line where a program is not there.
need() { dry || command -v "$1" > /dev/null || die 1 "$1: command not found. $2"; }

# scratch: sets folder, a new one that is gone at the end of this script. In a dry run only its name and a command.
scratch() {
  if dry; then
    folder="${TMPDIR:-/tmp}/softmask_jax-${opt[name]}"
    run mkdir -m 700 "$folder"
    return
  fi
  folder="$(mktemp -d 2> /dev/null)" || die 1 "no temporary folder can be made; set TMPDIR to a folder that can be written."
  trap 'rm -rf "$folder"' EXIT
}

# pack FILE: what hosts need of the working tree, tracked and new files, nothing that git ignores.
pack() {
  local list=(git ls-files -z -co --exclude-standard -- ':!tests' ':!.assets')
  if dry; then
    printf '%s | tar --create --gzip --null --files-from=- --file=%s\n' "$(quote "${list[@]}")" "$(quote "$1")"
  else
    # A file that is tracked but deleted here is left out.
    "${list[@]}" | while IFS= read -r -d '' tracked; do
      if [ -e "$tracked" ]; then printf '%s\0' "$tracked"; fi
    done | tar --create --gzip --null --files-from=- --file="$1" || die 1 "could not pack the working tree"
  fi
}

# What a host does to have the code: from a packed file ("-" is standard input), or from --repo at --ref.
unpacking() {
  local to
  to="$(quote "${opt[dir]}")"
  if [ -n "${opt[repo]:-}" ]; then
    echo "git init -q $to && cd $to && git fetch -q --depth 1 $(quote "${opt[repo]}" "${opt[ref]:-HEAD}") &&" \
      "git checkout -q -f FETCH_HEAD && cd \"\$HOME\""
  else
    # A module that is gone must be gone on every host, or they would not run the same code.
    echo "mkdir -p $to && rm -rf $to/softmask_jax $to/configs $to/launch && tar xzf $1 -C $to"
  fi
}

# node WORDS: the command that runs launch/node.sh on a host.
node() { echo "cd $(quote "${opt[dir]}") && bash launch/node.sh $(quote "$@")"; }

# secrets_to FILE: values of the variables named by --secret, for launch/node.sh; readable by the owner alone. The
# values are never words of a command.
secrets_to() {
  local name
  check_secrets
  if dry; then
    echo "# $(quote "$1"), of mode 600, then holds the values of ${opt[secret]}"
    return
  fi
  (umask 077 && : > "$1")
  for name in ${opt[secret]}; do printf '%s=%s\n' "$name" "$(quote "${!name}")" >> "$1"; done
}

check_secrets() {
  local name
  for name in ${opt[secret]:-}; do
    [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      die 2 "--secret takes the name of an environment variable, such as HF_TOKEN, and no value"
    [ -n "${!name:-}" ] || die 2 "--secret=$name: this variable is not set here (export $name first)"
  done
}

# follow: the log of the first host until the run is finished; with --watch, whatever ends it before is followed by a new
# start, until --restarts in a row came to no newer checkpoint. Uses of its caller:
#   show_log     prints the log while the run goes on; returns when it ended or the connection is lost
#   ask_status   the commands by which look finds out (only printed, in a dry run)
#   look         sets place (up | gone | deleted | unknown), status (running | ended | lost | absent | unknown), code, step,
#                finished
# What brings machines and run back is the action resume, with SOFTMASK_JAX_RESTART=yes: by then the run may have been
# stopped by hand.
# Status: 0 finished; 3 the machines are gone; otherwise the run's own, or 1.
follow() {
  local furthest=-1 fruitless=0 silent=0 tried="" shown="" why
  if dry; then
    echo "# every ${opt[poll]} s until the run has ended:"
    ask_status
    show_log
    if [ -n "${opt[watch]:-}" ]; then
      echo "# whatever ends it before is followed by a resume:"
      SOFTMASK_JAX_RESTART=yes as resume
    fi
    return
  fi
  look
  while true; do
    if [ "${step:--1}" -gt "$furthest" ]; then furthest="$step" fruitless=0; fi
    if [ "$place" = up ] && [ "$status" = running ]; then
      show_log || true
      look
    elif [ "$place" = up ] && [ "$status" = ended ] && [ -z "$shown" ]; then
      show_log || true # its end, at least
    fi
    shown=yes
    if [ "$place" = up ] && [ "$status" = running ]; then
      silent=0 tried=""
      sleep "${opt[poll]}"
      continue
    elif [ "$place" = unknown ] || { [ "$place" = up ] && [ "$status" = unknown ]; }; then
      silent=$((silent + 1))
      [ "$silent" -le 5 ] || die 1 "${opt[name]} does not answer; nothing was changed. Try follow again later."
      sleep "${opt[poll]}"
      look
      continue
    elif [ "$place" = deleted ] && [ -z "$tried" ]; then
      say "${opt[name]} was deleted; there is nothing to follow."
      return 3
    elif [ "$place" != up ]; then
      why="The machines of ${opt[name]} are gone${reason:+ ($reason)}" code=3
    elif [ "$status" = ended ] && [ "$finished" = yes ]; then
      say "Finished at step $step."
      return 0
    elif [ "$status" = absent ] && [ "$fruitless" -gt 0 ]; then
      why="${opt[name]} is not started" code=1
    elif [ "$status" = absent ]; then
      die 1 "${opt[name]} was not started there; use start."
    elif [ "$status" = ended ] && [ "$code" = 0 ]; then
      why="Stopped and saved at step $step, not finished" code=1
    else
      why="The run ended $([ "$status" = lost ] && echo 'without a word' || echo "with status $code") after step $step"
      if [ "$status" = lost ]; then code=1; fi
    fi
    silent=0
    if [ -z "${opt[watch]:-}" ] || [ "$code" = 2 ] || [ "$code" = 130 ]; then
      say "$why. The log says more; resume goes on from the last checkpoint."
      return "$code"
    fi
    if [ "$step" -gt "$furthest" ]; then furthest="$step" fruitless=0; fi
    fruitless=$((fruitless + 1))
    if [ "$fruitless" -gt "${opt[restarts]}" ]; then
      say "$why. Given up: ${opt[restarts]} restarts in a row came to no newer checkpoint than step $furthest."
      return "$code"
    fi
    say "$why. Restart $fruitless of ${opt[restarts]}, from the last checkpoint."
    if SOFTMASK_JAX_RESTART=yes as resume; then shown=""; else say "That did not bring it back."; fi
    tried=yes
    look
  done
}

# read_status LINE: what `launch/node.sh status` printed; sets status, code, step, finished.
read_status() {
  local line
  line="$(grep '^softmask_jax ' <<< "$1" | tail -n 1)" || true
  status=unknown code=1 finished=no
  if [ -n "$line" ]; then read -r _ status code step finished <<< "$line"; fi
}
