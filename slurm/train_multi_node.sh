#!/usr/bin/env bash
# Trains on several nodes; "On a Slurm cluster" in docs/running.md says more. From the repository's
# root:
#   sbatch slurm/train_multi_node.sh CONFIG [key=value ...]
#   ENGINE=zero3 PREC=fp32 sbatch --nodes=4 slurm/train_multi_node.sh CONFIG
#SBATCH --job-name=ssm_train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source slurm/env.sh
source ssm_train/launch/slurm_job.sh
train_on_nodes "accelerate_configs/many_nodes/${ENGINE:-zero2}_${PREC:-bf16}.yaml" "$@"
