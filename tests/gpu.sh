#!/usr/bin/env bash
# The tests that need a GPU, on a machine that has torch, transformers, accelerate, pandas, scikit-learn and pytest: none
# of the night's other libraries, and no installed `overnight`. Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"
exec "${PYTHON:-python3}" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -W ignore -m gpu tests/test_gpu.py "$@"
