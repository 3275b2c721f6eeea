# shellcheck shell=bash
# What is special about a cluster; every script in slurm/ reads it first. Change it once, here.

# Modules, and the environment that has ssm_train.
# module load cuda/12.8
export PYTHON="${PYTHON:-.venv/bin/python}"

# The network between the nodes, where the first one that is found is not the right one
# (`ip -brief address` on a node lists them).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Compute nodes often have no way to the internet: fetch models and data on a login node.
# export HF_HUB_OFFLINE=1

# Directories that all nodes see; the defaults lie in the directory of the job and in $HOME.
# export HF_HOME=/shared/huggingface
# export SSM_TRAIN_OUTPUT=/shared/output SSM_TRAIN_DATA=/shared/data SSM_TRAIN_CACHE=/shared/cache

# Lines appear in the job's file as they are printed.
export PYTHONUNBUFFERED=1
