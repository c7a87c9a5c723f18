#!/usr/bin/env bash
# Runs the same command on every worker of a TPU VM that is there, and ends with the worst status of any of them.
#
#   launch/run_tpu.sh --name=TPU --zone=ZONE --project=PROJECT [--directory=DIR] [--install] [--setup=LINE] [--dry_run]
#       -- COMMAND...
#
# --directory  the checkout on the workers, absolute or below the home folder: ivcr_jax. Its .venv/bin comes first on PATH.
# --install    copy the last commit of this checkout there, and install it, before anything else.
# --setup      a line of shell that every worker runs after that, in the checkout: to mount what the run reads.
# --dry_run    print the commands, run none.
#
# Variables JAX_*, XLA_* and LIBTPU_* are passed on, but for JAX_PLATFORMS, which is of this machine; any other is given
# in the command: -- env NAME=VALUE python .... Programs of ours find the other workers by --distributed in the command.
# Interrupted, it tells the command on every worker to stop, waits until it has saved, and ends with 130 or 143. 143 is
# also the status where a worker was told to stop, and 255 where the connection was lost.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

name='' zone='' project='' directory=ivcr_jax install='' setup='' dry_run=''
read_flags 'name zone project' 'directory setup' 'install dry_run' "$@"
expect name '[a-z]([-a-z0-9]*[a-z0-9])?' "a TPU's name: small letters, digits and hyphens"
[[ $directory ]] || fail 2 "--directory is empty; expected a folder"
need gcloud
tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$zone" "--project=$project" --quiet --worker=all)

if [[ $install ]]; then
  need_commit
  archive=${TMPDIR:-/tmp}/$name-$(git -C "$root" rev-parse --short HEAD)-$$.tar.gz
  trap 'rm -f "$archive"' EXIT
  folder=$(quote "$directory")
  step git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  step "${tpu[@]}" scp "$archive" "$name:$directory.tar.gz" "${where[@]}"
  step "${tpu[@]}" ssh "$name" "${where[@]}" \
    "--command=mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder && bash $folder/launch/install_worker.sh"
fi
if [[ $setup ]]; then
  step "${tpu[@]}" ssh "$name" "${where[@]}" "--command=cd $(quote "$directory") && $setup"
fi

passed=()
while read -r variable; do
  case $variable in
    JAX_PLATFORMS) ;;
    JAX_* | XLA_* | LIBTPU_*) passed+=("$variable=${!variable}") ;;
  esac
done < <(compgen -e)
# shellcheck disable=SC2016 # the worker's PATH and folder, not ours
venv='export PATH="$PWD/.venv/bin:$PATH"'
line="cd $(quote "$directory") && $venv && exec $(quote env ${passed[@]+"${passed[@]}"} bash launch/stoppable.sh "--as=$name" "${COMMAND[@]}")"
run=("${tpu[@]}" ssh "$name" "${where[@]}" "--command=$line")
if [[ $dry_run ]]; then
  step "${run[@]}"
  exit 0
fi

# gcloud ends with the status of one worker that failed; which one is not said. stoppable.sh tells of each.
scratch=$(mktemp -d)
mkfifo "$scratch/output"
awk '{print; fflush()} match($0, /stoppable: .* ended with status [0-9]+$/) {if ($NF + 0 > worst) worst = $NF + 0}
  END {exit worst}' <"$scratch/output" &
reader=$!
"${run[@]}" >"$scratch/output" 2>&1 </dev/null &
child=$!
trap 'rm -rf "$scratch" "${archive:-}"' EXIT

# shellcheck disable=SC2329 # the traps call it
stop() { # stop STATUS
  trap '' INT TERM HUP
  say "stopping the command on every worker of $name"
  "${tpu[@]}" ssh "$name" "${where[@]}" "--command=cd $(quote "$directory") && bash launch/stoppable.sh --stop=$name" </dev/null ||
    say "$name may go on with its command: it could not be told to stop on every worker"
  for _ in 1 2 3 4 5; do # what the workers said last is still on its way
    kill -0 "$child" 2>/dev/null || break
    sleep 1
  done
  kill "$child" 2>/dev/null || true
  wait "$child" "$reader" || true
  exit "$1"
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
status=0 worst=0
wait "$child" || status=$?
wait "$reader" || worst=$?
exit $((status > worst ? status : worst))
