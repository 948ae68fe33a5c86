#!/usr/bin/env bash
# Tokenizes a corpus under SLURM, one shard per task of a job array; the number of shards comes first, then flags of the tool:
#   sbatch --array=0-63 tools/tokenize_slurm.sh 64 --input web/ --tokenizer data/tokenizer --output data/web/text
# Submit it from the project's folder, which all nodes must share. A task that was killed or preempted resumes when it is requeued;
# submit the array again to complete what is missing, as a task whose shard is complete ends at once.
#SBATCH --job-name=tokenize
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tokenize-%A_%a.log
set -euo pipefail

shards=${1:?"give the number of shards first, then the flags of tools/tokenize_corpus.py"}
shift
exec python tools/tokenize_corpus.py --shard "${SLURM_ARRAY_TASK_ID:?"submit it with --array=0-$((shards - 1))"}/$shards" "$@"
