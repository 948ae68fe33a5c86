#!/usr/bin/env bash
# Runs on one or more nodes under SLURM, requeued until the run is done:
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 launch/slurm.sh --config configs/cloud.yaml [--section.key value ...]
# Submit it from the project's folder. All nodes must share that folder, run.directory and the data.
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
state() {
  python -c 'import sys; from pathlib import Path; from pretrain.run.directory import read_state
print(read_state(Path(sys.argv[1])).get(sys.argv[2]))' "$folder" "$1"
}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
saved_before=$(state saved_step)
# Two minutes of notice (--signal above): save for at most 110 s, and let the launcher wait for that long.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=115
# The port depends on the job id, so that jobs on one node do not collide.
srun bash -c 'exec accelerate launch --config_file launch/accelerate/machines.yaml --num_machines "$SLURM_NNODES" \
  --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --machine_rank "$SLURM_NODEID" --main_process_ip "$0" \
  --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" launch/pretrain.py --checkpoint.deadline_seconds 110 "$@"' "$head" "$@" || true

status=$(state exit_status)
echo "the run ended with status $status: $(state reason)"
case "$status" in
  75) scontrol requeue "$SLURM_JOB_ID" ;;  # saved
  1 | None)                                # failed or killed: requeue only if it made progress
    [ "$(state saved_step)" != "$saved_before" ] || { echo "no new checkpoint since the start: not requeued"; exit 70; }
    scontrol requeue "$SLURM_JOB_ID" ;;
  *) exit "$status" ;;
esac
