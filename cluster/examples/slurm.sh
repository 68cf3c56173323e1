#!/usr/bin/env bash
# Made by: pixart render, from the recipe pixart-alpha. Change that instead.
# Submit it from its folder: sbatch --export=ALL,PIXART_BIN=/path/to/.venv/bin slurm.sh
#SBATCH --job-name=pixart-alpha
#SBATCH --requeue
#SBATCH --open-mode=append
# reading
#SBATCH --nodes=35 --ntasks-per-node=1 --cpus-per-task=15 --mem=28G
#SBATCH hetjob
# encoding
#SBATCH --nodes=64 --ntasks-per-node=1 --cpus-per-task=7 --mem=28G --gpus-per-node=1
#SBATCH hetjob
# training
#SBATCH --nodes=8 --ntasks-per-node=1 --cpus-per-task=89 --mem=962G --gpus-per-node=8
set -euo pipefail
export PATH="${PIXART_BIN:?where pixart and ray are installed}:$PATH"
: "${MLFLOW_TRACKING_URI:?where the registry is}"

# Nobody without this token can use the cluster; it lives as long as the job, in its environment.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
HEAD=$(hostname -s)
export RAY_AUTH_MODE RAY_AUTH_TOKEN HEAD
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

ray start --block --num-cpus=15 --labels=pixart-role=reading --head --port=6379 --dashboard-host=127.0.0.1 &
until ray health-check --address="$HEAD:6379" >/dev/null 2>&1; do sleep 2; done
srun --het-group=0 --nodes=34 --ntasks=34 --exclude="$HEAD" ray start --block --num-cpus=15 --labels=pixart-role=reading --address="$HEAD:6379" &
srun --het-group=1 --nodes=64 --ntasks=64 ray start --block --num-cpus=7 --num-gpus=1 --labels=pixart-role=encoding --address="$HEAD:6379" &
srun --het-group=2 --nodes=8 --ntasks=8 ray start --block --num-cpus=89 --num-gpus=8 --labels=pixart-role=training --address="$HEAD:6379" &

RAY_ADDRESS="$HEAD:6379" pixart run "$SLURM_SUBMIT_DIR/recipe.yaml" --root /shared/pixart-alpha
