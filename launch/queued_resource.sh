#!/usr/bin/env bash
# Asks for a TPU, waits for it, runs a command on all its workers, brings the results here, and gives the TPU back.
#
#   launch/queued_resource.sh --name=NAME --zone=ZONE --project=PROJECT --accelerator=TYPE --runtime=VERSION [--spot]
#       [--retries=N] [--collect=FROM:TO] [--directory=DIR] [--setup=LINE] [--poll=SECONDS] [--dry_run] -- COMMAND...
#
# --accelerator, --runtime  as gcloud calls them: v5litepod-16, v2-alpha-tpuv5-lite.
# --spot       a cheaper TPU that may be taken away at any time.
# --retries    how often to ask again where it was taken away, or the connection was lost: 0. The run goes on where its
#              checkpoints stand, so these have to be in a folder that outlives the TPU (--setup can mount one).
# --collect    copy FROM, a path on worker 0, to TO, a folder here, after the command, whether it went well or not.
# --poll       seconds between two looks at the TPU's state: 30.
# --directory, --setup, and what of the environment is passed on: see launch/run_tpu.sh. The last commit is installed.
# --dry_run    print the commands, run none.
#
# The TPU is deleted in the end whatever happened, also on an interrupt. Status: the command's, by the worst worker; 1 where
# there was no TPU; 130 or 143 when interrupted.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

name='' zone='' project='' accelerator='' runtime='' spot='' retries=0 collect='' directory='' setup='' poll=30 dry_run=''
read_flags 'name zone project accelerator runtime' 'retries collect directory setup poll' 'spot dry_run' "$@"
expect name '[a-z]([-a-z0-9]*[a-z0-9])?' "a TPU's name: small letters, digits and hyphens"
expect retries '[0-9]+' 'a number'
expect poll '[0-9]+([.][0-9]+)?' 'seconds'
[[ -z $collect ]] || expect collect '[^:]+:.+' 'FROM:TO'
need gcloud
need_commit

queue=(gcloud compute tpus queued-resources)
tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$zone" "--project=$project" --quiet)
create=("${queue[@]}" create "$name" "${where[@]}" "--node-id=$name" "--accelerator-type=$accelerator"
  "--runtime-version=$runtime" ${spot:+--spot} --async)
describe=("${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)')
delete=("${queue[@]}" delete "$name" "${where[@]}" --force)
reach=("${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command=true)
run=("$root/launch/run_tpu.sh" "--name=$name" "--zone=$zone" "--project=$project" ${directory:+"--directory=$directory"}
  --install ${setup:+"--setup=$setup"})
copy=("${tpu[@]}" scp --recurse "$name:${collect%%:*}" "${collect#*:}" "${where[@]}" --worker=0)

if [[ $dry_run ]]; then
  echo "# At most $((retries + 1)) times, as long as the TPU is taken away:"
  step "${create[@]}"
  echo "until [ \"\$($(quote "${describe[@]}"))\" = ACTIVE ]; do sleep $poll; done # or ends where it says FAILED or SUSPENDED"
  echo "until $(quote "${reach[@]}"); do sleep $poll; done # at most ten times"
  "${run[@]}" --dry_run -- "${COMMAND[@]}"
  [[ -z $collect ]] || step "${copy[@]}"
  step "${delete[@]}"
  exit 0
fi

pause() {
  sleep "$poll" &
  sleeping=$!
  wait "$sleeping" # unlike the sleep itself, this ends when a signal comes
  sleeping=''
}

# The state of the request; GONE where there is none; nothing where gcloud could not say.
state() {
  local found
  if found=$("${describe[@]}" 2>"$errors" </dev/null); then
    echo "$found"
  elif grep -qi -e NOT_FOUND -e 'not found' "$errors"; then
    echo GONE
  else
    cat "$errors" >&2
  fi
}

owned='' running='' sleeping='' errors=$(mktemp)
give_back() {
  local try
  [[ $owned ]] || return 0
  for try in 1 2 3; do
    if "${delete[@]}" </dev/null || [[ $(state) == GONE ]]; then
      owned=''
      return 0
    fi
    say "deleting $name failed ($try of 3)"
    sleep "$poll"
  done
  say "$name is not deleted, and costs money: $(quote "${delete[@]}")"
  return 1
}
# shellcheck disable=SC2329 # the traps call it
end() {
  local status=$?
  trap '' INT TERM HUP
  [[ -z $sleeping ]] || kill "$sleeping" 2>/dev/null || true
  if [[ $running ]]; then # it lets the command save first
    kill -TERM "$running" 2>/dev/null || true
    wait "$running" || true
  fi
  give_back || status=1
  rm -f "$errors"
  exit "$status"
}
trap end EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Returns 1 where the request was taken away before the TPU could be used.
await() {
  local now before='' failures=0 tries=0
  while :; do
    now=$(state)
    case $now in
      ACTIVE) break ;;
      FAILED) fail 1 "the request for $name failed: a wrong type, version or zone, or too little quota; gcloud's describe says which" ;;
      SUSPENDING | SUSPENDED | GONE) return 1 ;;
      '') ((++failures < 5)) || fail 1 "gcloud could not tell the state of $name five times in a row" ;;
      *) failures=0 ;;
    esac
    [[ $now == "$before" ]] || say "$name: ${now:-no answer}"
    before=$now
    pause
  done
  say "$name: ACTIVE"
  until "${reach[@]}" </dev/null; do # workers answer a little later
    ((++tries < 10)) || return 1
    pause
  done
}

collected() {
  local try
  [[ $collect ]] || return 0
  mkdir -p "${collect#*:}"
  for try in 1 2 3; do
    ! "${copy[@]}" </dev/null || return 0
    say "collecting ${collect%%:*} failed ($try of 3)"
    pause
  done
  return 1
}

now=$(state)
[[ $now == GONE ]] || fail 1 "$name is there already (${now:-gcloud cannot tell its state}); expected a new name"
for ((attempt = 0; ; attempt++)); do
  owned=yes
  if ! said=$("${create[@]}" 2>&1 </dev/null); then
    [[ $said != *ALREADY_EXISTS* ]] || owned='' # somebody else's, since a moment ago
    fail 1 "asking for $name failed: $said"
  fi
  taken=yes status=1
  if await; then
    "${run[@]}" -- "${COMMAND[@]}" &
    running=$!
    status=0
    wait "$running" || status=$?
    running='' taken=''
    if ((status)); then
      pause # the state follows what the workers feel
      now=$(state)
      if [[ $now != ACTIVE || $status == 143 || $status == 255 ]]; then
        taken=yes
        say "$name was taken away (status $status, state ${now:-unknown})"
      fi
    fi
    if [[ -z $taken ]] && ! collected; then
      say "${collect%%:*} is not collected"
      ((status)) || status=1
    fi
  else
    say "$name was taken away before the command could begin"
  fi
  give_back || exit 1
  [[ $taken ]] || exit "$status"
  if ((attempt >= retries)); then
    fail "$status" "$name was taken away $((attempt + 1)) times; --retries=$retries allows no more"
  fi
done
