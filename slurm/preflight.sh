#!/bin/bash
# Checks in two minutes, on one process, what would waste a big allocation: config, data, disk, two training steps.
#   slurm/preflight.sh configs/rankclip_cc3m.yaml --ranks 32 --vars.data /data
# Exit code 0 if all is well, else 1 with what to do.
PYTHON="${MMTRAIN_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}"
exec "$PYTHON" -m mmtrain.preflight -c "${1:?usage: slurm/preflight.sh CONFIG [--ranks N] [words for fit]}" "${@:2}"
