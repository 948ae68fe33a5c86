#!/usr/bin/env bash
# Runs on one or more nodes under SLURM, requeued until the run is done:
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 launch/slurm.sh --config configs/cloud.yaml [--section.key value ...]
# Submit it from the project's folder. All nodes must share that folder and run.directory. Where a job gets one core unless it asks
# for more, add for example --cpus-per-task 64 (of a node, for all of its GPUs) or --exclusive.
#SBATCH --job-name=pretrain
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@120
set -euo pipefail

# Wrong settings end the job here with status 2: requeueing would not fix them.
folder=$(python -c 'import sys; from pretrain.config import ConfigError, load
try:
    run = load(sys.argv[1:], world_size=None).run
except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(f"{run.directory}/{run.name}")' "$@")
state() {  # attempt, saved_step, exit_status and reason, in one line
  python -c 'import sys; from pathlib import Path; from pretrain.run.directory import read_state
state = read_state(Path(sys.argv[1]))
print(*map(state.get, ("attempt", "saved_step", "exit_status")), *str(state.get("reason")).splitlines()[:1])' "$folder"
}

# The GPUs of a node, which may differ from those of another. SLURM does not always count them; then torch does.
count='gpus=${SLURM_GPUS_ON_NODE:-}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || gpus=$(python -c "import torch; print(torch.cuda.device_count())")'
if ! [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[1-9][0-9]*$ ]]; then
  srun bash -c "$count"'; [ "$gpus" -gt 0 ] || { echo "no GPU for this job on $(hostname)" >&2; exit 2; }' ||
    { echo "request GPUs, as with --gpus-per-node 8" >&2; exit 2; }
fi

# Since SLURM 22.05, srun does not inherit what sbatch was given.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
enough='cores=$(python -c "import os; print(len(os.sched_getaffinity(0)))")
[ "$cores" -ge "$gpus" ] || {
  echo "$cores cores for $gpus GPUs on $(hostname), so that ranks would share a core:" \
    "request more, as with --cpus-per-task $((8 * gpus)) or --exclusive" >&2
  exit 2
}'

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
before=$(state)
read -r attempt_before saved_before _ <<< "$before"
# Two minutes of notice (--signal above): save for at most 110 s, and let the launcher wait for that long. It passes these on.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=115 TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2,SIGXCPU
# The port depends on the job id, so that jobs on one node do not collide. accelerate wants nodes times the processes of this node.
code=0
srun bash -c "$count"$'\n'"$enough"'
exec accelerate launch --config_file launch/accelerate/machines.yaml --num_machines "$SLURM_NNODES" \
  --num_processes "$((SLURM_NNODES * gpus))" --machine_rank "$SLURM_NODEID" --main_process_ip "$0" \
  --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" launch/pretrain.py --checkpoint.deadline_seconds 110 "$@"' "$head" "$@" \
  || code=$?

after=$(state)
read -r attempt saved status reason <<< "$after"
if [ "$attempt" = "$attempt_before" ]; then  # run_state.json is of an earlier job
  echo "the job ended with status $code before it opened $folder: not requeued" >&2
  exit "$((code == 0 ? 1 : code))"
fi
echo "the run ended with status $status: $reason"
idle="$folder/.requeued_without_progress"  # number of times in a row
if [ "$saved" = "$saved_before" ]; then
  echo "$(($(cat "$idle" 2> /dev/null || echo 0) + 1))" > "$idle"
else
  rm -f "$idle"
fi
most=0  # a crash before a new checkpoint would happen again
case "$status" in
  75) [[ $reason == peer_lost* ]] || most=2 ;;  # a notice that came before the first step
  1 | None) ;;                                  # failed or killed
  *) exit "$status" ;;
esac
if [ "$(cat "$idle" 2> /dev/null || echo 0)" -gt "$most" ]; then
  echo "no new checkpoint since the start: not requeued" >&2
  exit 70
fi
scontrol requeue "$SLURM_JOB_ID" || { echo "cannot be requeued; submit the same command again" >&2; exit 75; }
