#!/usr/bin/env bash
# Trains on one node; "On a Slurm cluster" in docs/running.md says more. From the repository's root:
#   sbatch slurm/train_single_node.sh CONFIG [key=value ...]
#   ENGINE=ddp sbatch --gpus-per-node=8 --cpus-per-task=64 slurm/train_single_node.sh CONFIG
#SBATCH --job-name=ssm_train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source slurm/env.sh
source ssm_train/launch/slurm_job.sh
train_on_nodes "accelerate_configs/one_node/${ENGINE:-single}_${PREC:-bf16}.yaml" "$@"
