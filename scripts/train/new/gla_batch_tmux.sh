#!/usr/bin/env bash
# Runs a suite with several seeds and data sets in one tmux session; see docs/suites.md.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "${PYTHON:-$python}" -m ssm_train.launch.batch "$@"
