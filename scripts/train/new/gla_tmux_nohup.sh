#!/usr/bin/env bash
# Runs a suite in a tmux session with a log file; see docs/suites.md.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "${PYTHON:-$python}" -m ssm_train.launch.tmux "$@"
