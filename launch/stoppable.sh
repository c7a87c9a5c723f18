#!/usr/bin/env bash
# Runs a command on a worker so that whoever started it learns whether it is done, or was told to stop.
#
#   launch/stoppable.sh [--as=NAME] COMMAND...
#   launch/stoppable.sh --stop=NAME
#
# A program of ours that gets SIGTERM saves and ends with status 0, as it does when it is done. Here SIGTERM is passed on
# to the command, and the status is then 143, also where the command's is 0. With --as, a second command of that name on the
# same machine is refused; --stop tells that command to stop, and waits for it, at most a minute.

set -euo pipefail
name=''
case ${1:-} in
  --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  --as=* | --stop=*) name=${1#*=} ;;
esac
file=${TMPDIR:-/tmp}/${name:-none}.running

if [[ ${1:-} == --stop=* ]]; then
  if [[ ! -s $file ]] || flock --nonblock "$file" true; then
    echo "stoppable: nothing runs as $name on $(hostname)"
    exit 0
  fi
  kill -TERM "$(cat "$file")"
  flock --timeout 60 "$file" true || {
    echo "stoppable: $name on $(hostname) has not stopped within a minute" >&2
    exit 1
  }
  exit 0
fi

if [[ $name ]]; then
  shift
  exec 9>>"$file" # held, until the last process that has it open is gone
  flock --nonblock 9 || {
    echo "stoppable: $(hostname): $name runs here already, as process $(cat "$file"); expected none" >&2
    exit 1
  }
  echo $$ >"$file"
fi
(($#)) || {
  echo "stoppable: the command is missing" >&2
  exit 2
}

told=0 child=''
trap 'told=$((told + 1)); [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
"$@" &
child=$!
((told == 0)) || kill -TERM "$child" 2>/dev/null || true
while :; do
  before=$told status=0
  wait "$child" || status=$?
  ((told > before)) || break # a signal ends the waiting, not the command
done
((told == 0 || status != 0)) || status=143
echo "stoppable: $(hostname) ended with status $status"
exit "$status"
