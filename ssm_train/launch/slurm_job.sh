# shellcheck shell=bash
# One training job on Slurm, from its start to its requeue. The scripts in slurm/, and those that
# `ssm-train slurm` writes, source this file and call
#   train_on_nodes ACCELERATE_CONFIG CONFIG [key=value ...]
# Variables:
#   PYTHON              interpreter that has ssm_train
#   MAX_RESTARTS        times that a job may start again (default: 20)
#   PROCESSES_PER_NODE  default: the GPUs of a node, else 1
#   SECONDS_TO_END      that nodes have to end once one has (default: 60)

SAVED=75 # exit code of a run that saved itself and wants to be started again

train_on_nodes() {
    local accelerate_config=$1
    shift
    if (($# == 0)); then
        echo "error: no run config; give one, such as cfg/quickstart/gla_lora.yaml" >&2
        exit 2
    fi
    if [[ ! -f $accelerate_config ]]; then
        echo "error: the Accelerate config $accelerate_config does not exist; see ENGINE and PREC" >&2
        exit 2
    fi

    name_job
    count_restarts
    local address
    address=$(find_address)
    local port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node need one each
    local per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    local cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
    local threads=$((cpus / per_node))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    say "nodes $SLURM_JOB_NODELIST, processes on each $per_node, meeting at $address:$port," \
        "restart $restarts of at most $max_restarts"

    signals=0
    asking=
    trap ask_to_stop USR1
    # A node that ends first may only be the first to have saved: the others get time to.
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --kill-on-bad-exit=0 --wait="${SECONDS_TO_END:-60}" \
        bash -c 'start_on_node "$@"' start_on_node \
        --config_file "$accelerate_config" \
        --num_machines "$SLURM_JOB_NUM_NODES" \
        --num_processes "$((SLURM_JOB_NUM_NODES * per_node))" \
        --main_process_ip "$address" --main_process_port "$port" \
        -m ssm_train.train --resume --cfg "$@" &
    wait_for "$!"
    if [[ -n $asking ]]; then
        kill "$asking" 2>/dev/null || true
    fi

    case $code in
        0) say "done" ;;
        "$SAVED") start_again ;;
        *) say "failed with exit code $code; the lines that begin with 'node' say where" ;;
    esac
    exit "$code"
}

# Sets `job`, by which scancel and scontrol know this job.
name_job() {
    job=$SLURM_JOB_ID
    # The last element of an array has the array's id as its own, and would speak for all of them.
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
}

# Sets `restarts` and `max_restarts`; ends a job that started too often. `start_again` never asks for
# such a start, but Slurm itself does where a node fails.
count_restarts() {
    restarts=${SLURM_RESTART_COUNT:-0} # Slurm leaves it unset at the first start
    max_restarts=${MAX_RESTARTS:-20}
    if ((restarts > max_restarts)); then
        say "start number $((restarts + 1)) is over the budget (MAX_RESTARTS=$max_restarts)"
        exit 1
    fi
}

# Prints where the nodes meet: the first one's address as Slurm itself uses it, since its name need
# not lead to it from another node.
find_address() {
    local head_node
    read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    scontrol show node --oneliner "$head_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# One task a node. Should somebody send USR1 to all of the job, only the training processes know what
# to do: the others have to ignore it, which a process inherits.
start_on_node() {
    trap '' USR1
    exec "$PYTHON" -m ssm_train.launch.slurm_node accelerate launch \
        --machine_rank "$SLURM_NODEID" "$@"
}
export -f start_on_node
export PYTHON

# Slurm sends USR1 to this shell alone, some time before the limit; the steps get it from here.
ask_to_stop() {
    signals=$((signals + 1))
    if [[ -n $asking ]]; then
        return
    fi
    say "USR1: the run is asked to save itself"
    # URG does nothing to a process that does not know it, such as a task that only starts or a
    # launcher. Again and again: a run that still loads its model does not listen yet.
    while true; do
        scancel --signal=URG "$job"
        sleep 5
    done &
    asking=$!
}

# Sets `code`. A signal that is trapped ends `wait` before its process has ended.
wait_for() {
    local heard
    while true; do
        heard=$signals
        code=0
        wait "$1" || code=$?
        if ((signals == heard)); then
            return
        fi
    done
}

start_again() {
    if ((restarts >= max_restarts)); then
        say "saved, but already restarted $restarts times (MAX_RESTARTS=$max_restarts);" \
            "submit it again to go on"
        return
    fi
    say "saved; restart $((restarts + 1)) of at most $max_restarts follows"
    if scontrol requeue "$job"; then
        sleep 600 # until Slurm ends this shell
    else
        say "Slurm does not requeue it; submit it again to go on"
    fi
}

say() {
    echo "[$(date '+%F %T')] job $job: $*"
}
