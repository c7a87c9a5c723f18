#!/usr/bin/env bash
# Submits a job of GPU nodes to Slurm: one process a node, which has all its GPUs.
#
#   launch/slurm.sh --job_name=NAME --nodes=N --gpus_per_node=N [--partition=P] [--time=T] [--cpus_per_node=N]
#       [--dry_run] -- COMMAND...
#
# --gpus_per_node  0 for nodes without.
# --time           as Slurm writes it: 12:00:00, 1-00:00:00. Two minutes before, the run saves, and the job queues again.
# --cpus_per_node  for decoding and packing; without it Slurm gives each process one.
# --dry_run        print what would be submitted, as a command to paste.
#
# The command gets --coordinator, --processes and --process_id behind its own flags. It runs in the folder this is started
# in, which every node has to see; its .venv/bin comes first on PATH. The log is NAME-JOB.log there. Lost nodes and
# preemption queue the job again too. To end it: scancel JOB.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

job_name='' nodes='' gpus_per_node='' partition='' time='' cpus_per_node='' dry_run=''
read_flags 'job_name nodes gpus_per_node' 'partition time cpus_per_node' dry_run "$@"
expect job_name '[A-Za-z0-9_.-]+' 'letters, digits and _.-'
expect nodes '[1-9][0-9]*' 'a number'
expect gpus_per_node '[0-9]+' 'a number'
[[ -z $partition ]] || expect partition '[A-Za-z0-9_.,-]+' "a partition's name"
[[ -z $time ]] || expect time '([0-9]+-)?[0-9]+(:[0-9]+){0,2}' 'minutes, or [days-]hours:minutes:seconds'
[[ -z $cpus_per_node ]] || expect cpus_per_node '[1-9][0-9]*' 'a number'
need sbatch

option() { [[ -z $2 ]] || echo "#SBATCH --$1=$2"; } # option NAME VALUE
devices=''
for ((gpu = 0; gpu < gpus_per_node; gpu++)); do devices+="${devices:+,}$gpu"; done
script=$(
  echo '#!/bin/bash'
  option job-name "$job_name"
  option nodes "$nodes"
  option ntasks-per-node 1
  ((gpus_per_node == 0)) || option gpus-per-node "$gpus_per_node"
  option cpus-per-task "$cpus_per_node"
  option partition "$partition"
  option time "$time"
  option output "$job_name-%j.log"
  echo '#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
'
  echo "cd $(quote "$PWD") || exit 1"
  # By itself jax takes one GPU a process where it finds itself in Slurm.
  ((gpus_per_node == 0)) || echo "export JAX_LOCAL_DEVICE_IDS=$devices"
  cat <<'BODY'
export PATH="$PWD/.venv/bin:$PATH"
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((61440 + SLURM_JOB_ID % 4096))
told=0
trap 'told=$((told + 1)); scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the processes; this script goes on
BODY
  # The rank is known to each process alone, so that a shell on its node puts it in.
  # shellcheck disable=SC2016
  task='exec bash "$0" "$@" --process_id="$SLURM_PROCID"'
  echo "srun --kill-on-bad-exit=1 $(quote bash -c "$task" "$root/launch/stoppable.sh" "${COMMAND[@]}") \\"
  cat <<'BODY'
  --coordinator="$first:$port" --processes="$SLURM_JOB_NUM_NODES" &
srun=$!
while :; do
  before=$told
  wait "$srun"
  status=$?
  [ "$told" -gt "$before" ] || break # a signal ends the waiting, not srun
done
if [ "$status" -eq 143 ]; then
  echo "told to stop, and saved: the job queues again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
BODY
)
if [[ $dry_run ]]; then
  mark=SCRIPT
  while [[ $script == *"$mark"* ]]; do mark+=_; done
  printf "sbatch <<'%s'\n%s\n%s\n" "$mark" "$script" "$mark"
else
  sbatch <<<"$script"
fi
