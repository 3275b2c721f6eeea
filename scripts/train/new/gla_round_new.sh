#!/usr/bin/env bash
# Runs a suite of configs in rounds: gla_round_new.sh [SUITE] [ROUND ...|all]; see docs/suites.md.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "${PYTHON:-$python}" -m ssm_train.launch.rounds "$@"
