#!/usr/bin/env bash
# Runs in the image. Settings alone start the supervisor, on each machine of the job; anything else is a command:
#   docker run pretrain --config configs/cloud.yaml --run.name first
#   docker run pretrain --wait-seconds 3600 -- --config configs/cloud.yaml     # with flags of the supervisor
#   docker run pretrain python tools/plan_run.py --config configs/cloud.yaml
# exec: the program takes the place of this shell, receives the signals of the container, and its status is the container's.
# The supervisor handles them and waits for every process of the run, so that no init (tini, --init) is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:---help}" in
  --help | -h) exec python launch/supervise.py --help ;;
  -*) ;;
  *) exec "$@" ;;
esac
for word in "$@"; do
  [ "$word" != -- ] || exec python launch/supervise.py "$@"
done
exec python launch/supervise.py -- "$@"
