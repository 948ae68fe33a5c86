#!/usr/bin/env bash
# Runs on one or more nodes under SLURM, requeued until the run is done:
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 launch/slurm.sh --config configs/cloud.yaml [--section.key value ...]
# Submit it from the project's folder. All nodes must share that folder and run.directory. Where a job gets one core unless it asks
# for more, add for example --cpus-per-task 64 (of a node, for all of its GPUs) or --exclusive. Flags of launch/supervise.py may come
# first: launch/slurm.sh --force -- --config configs/cloud.yaml
#SBATCH --job-name=pretrain
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@120
set -euo pipefail

flags=()
if [[ " $* " == *" -- "* ]]; then
  while [ "$1" != -- ]; do
    flags+=("$1")
    shift
  done
  shift
fi

# Wrong settings end the job here with status 2, once for all nodes: requeueing would not fix them.
folder=$(python -c 'import sys; from pretrain.config import ConfigError, load
try:
    run = load(sys.argv[1:], world_size=None).run
except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(f"{run.directory}/{run.name}")' "$@")
saved() {  # the step of the newest checkpoint
  python -c 'import sys; from pathlib import Path; from pretrain.run.directory import read_state
print(read_state(Path(sys.argv[1])).get("saved_step"))' "$folder"
}

# On each node: its GPUs, which may differ from those of another. SLURM does not always count them; then torch does.
# shellcheck disable=SC2016  # expanded on the nodes
node='gpus=${SLURM_GPUS_ON_NODE:-}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || gpus=$(python -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -gt 0 ] || { echo "no GPU for this job on $(hostname): request them, as with --gpus-per-node 8" >&2; exit 2; }
cores=$(python -c "import os; print(len(os.sched_getaffinity(0)))")
[ "$cores" -ge "$gpus" ] || {
  echo "$cores cores for $gpus GPUs on $(hostname), so that ranks would share a core:" \
    "request more, as with --cpus-per-task $((8 * gpus)) or --exclusive" >&2
  exit 2
}
exec python launch/supervise.py --wait-seconds 300 "$@"'

# Two minutes of notice (--signal above): the supervisors save for at most 110 s. They find each other by the variables of SLURM, and
# end together: none is stopped because another one has already ended.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # since SLURM 22.05, srun does not inherit it
saved_before=$(saved) status=0
srun --kill-on-bad-exit=0 bash -c "$node" supervise ${flags[@]+"${flags[@]}"} -- --checkpoint.deadline_seconds 110 "$@" || status=$?
echo "the job ended with status $status"

case "$status" in
  0 | 2 | 70 | 73 | 74 | 76 | 77 | 130) exit "$status" ;;
  75) most=2 ;;  # a notice, or a node that did not come, before the first checkpoint: this many times in a row
  *) most=0 ;;   # a supervisor crashed or was killed, and without a new checkpoint would be again
esac
idle="$folder/.requeued_without_progress"  # number of times in a row
if [ "$(saved)" = "$saved_before" ]; then
  times=$(($(cat "$idle" 2> /dev/null || echo 0) + 1))
  if [ "$times" -gt "$most" ]; then
    echo "no new checkpoint since the start: not requeued" >&2
    exit "$((status == 75 ? 70 : status))"
  fi
  mkdir -p "$folder" && echo "$times" > "$idle"
else
  rm -f "$idle"
fi
scontrol requeue "$SLURM_JOB_ID" || { echo "cannot be requeued; submit the same command again" >&2; exit 75; }
