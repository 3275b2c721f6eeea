#!/usr/bin/env bash
# Trains many runs as a job array, one an element; "On a Slurm cluster" in docs/running.md says more.
# RUNS is a text file with a run a line, `CONFIG [key=value ...]`. A suite as such a file, and four
# of its runs at a time, from the repository's root:
#   python -m ssm_train.launch.slurm_sweep E5 > runs.txt
#   sbatch --array="1-$(wc -l <runs.txt)%4" slurm/sweep_array.sh runs.txt
#SBATCH --job-name=ssm_train_sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
source slurm/env.sh
source ssm_train/launch/slurm_job.sh
runs=${1:?the file with the runs; see the lines at the top of slurm/sweep_array.sh}
element=${SLURM_ARRAY_TASK_ID:?submit it with --array=1-N, where N is the number of runs}
line=$(sed -n "${element}p" "$runs")
if [[ -z $line ]]; then
    echo "error: $runs has no line $element" >&2
    exit 2
fi
# xargs takes quotes off as a shell does, and runs nothing.
mapfile -d '' -t words < <(xargs printf '%s\0' <<<"$line")
train_on_nodes "accelerate_configs/one_node/${ENGINE:-single}_${PREC:-bf16}.yaml" "${words[@]}"
