# What every process of a job needs; sourced by the batch scripts. Each value can be set before `sbatch` and then stays.

# Python of the environment that mmtrain is installed in
PYTHON="${MMTRAIN_PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}"

# Where the output of each process goes
LOGS="${MMTRAIN_LOGS:-slurm-logs}/$SLURM_JOB_ID"
mkdir -p "$LOGS"

# Rendezvous: the first host of the job, and a port that jobs on the same host do not share
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}"

# Cores of a process: since Slurm 22.05 srun does not take them over from sbatch, and a process would have a single one
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"; fi

# Threads of a process for work on the CPU: few, since the cores are for the loader's workers
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$([ "${SLURM_CPUS_PER_TASK:-1}" -gt 8 ] && echo 4 || echo 1)}"
# waiting threads sleep instead of spinning on a core that a worker needs
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

# NCCL: an error or a timeout in a collective ends the process, which would otherwise wait for ever; 3 leaves out the
# cleaning up, which can hang too and keeps the records below from being written
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# on a timeout each process writes down its last 2,000 collectives; compare: torchfrtrace -p collectives-rank- FOLDER
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$LOGS/collectives-rank-}"
# only warnings; INFO shows which network NCCL took, when it is slow
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# the network between hosts, where NCCL or gloo pick the wrong one: NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

export PYTHONUNBUFFERED=1   # logs as they happen, not when a buffer is full
export PYTHONFAULTHANDLER=1 # stacks of all threads when a process dies of a signal such as SIGSEGV

# GPUs: all of a host, statistics of BatchNorm over all processes; CPUs: gloo
if nvidia-smi -L >/dev/null 2>&1; then LAYER=cluster; else LAYER=cluster_cpu; fi

# Runs `python -m mmtrain WORDS` in every process of the job and returns its exit code; signals that reach the batch
# script are handed on.
in_all_processes() {
  local step="" told=0 code
  trap '[ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
  trap 'told=143; [ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM
  srun --kill-on-bad-exit=1 --output="$LOGS/rank-%t.log" --error="$LOGS/rank-%t.log" --open-mode=append \
    "$PYTHON" -m mmtrain "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # `wait` also ends when a signal was handed on
  wait "$step"
  code=$?
  if [ "$code" = 0 ]; then code=$told; fi # of a step that a failed host or scancel cut off srun may say 0
  trap - USR1 TERM
  if [ "$code" != 0 ]; then tail -n 5 "$LOGS"/rank-*.log; fi
  return "$code"
}

# Ends the batch script with a code of `in_all_processes`. 138: the processes were told to make room and have saved, so
# the job waits in the queue again. All else is not made better by another try; a failed host is Slurm's --requeue.
finish() {
  local code=$1 most="${MMTRAIN_MAX_RESTARTS:-50}"
  if [ "$code" = 138 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most" ]; then
    echo "saved; back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $most)"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
  echo "ended with exit code $code; logs of the processes: $LOGS/rank-*.log"
  exit "$code"
}
