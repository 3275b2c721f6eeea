#!/usr/bin/env bash
# Runs a suite in a tmux session with a log file; see docs/suites.md.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
"$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' || {
    echo "$python has no torch; make .venv with make quickstart, or set PYTHON to what has it" >&2
    exit 1
}
exec "$python" -m ssm_train.launch.tmux "$@"
