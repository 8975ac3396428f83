#!/usr/bin/env bash
# The CUDA acceptance run of a checkout, on a machine with one GPU and no network:
#     bash run.sh [--cpu] [--output FOLDER]
# This folder, which `make bundle` makes, must be beside or in the checkout. acceptance.json and acceptance.md are
# written to the output folder (default: the current one). --cpu rehearses the run in miniature.
set -euo pipefail
bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

for checkout in "$bundle"/../* "$bundle"/../.. ""; do
    [ -f "$checkout/tests/cuda/acceptance.py" ] && break
done
if [ -z "$checkout" ]; then
    echo "error: there is no checkout beside $bundle" >&2
    exit 2
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
$python "$checkout/examples/tiny/wheels.py" "$bundle/wheels" "$site"
export PYTHONPATH="$checkout/src:$site" HF_HUB_OFFLINE=1
# Without progress bars, a log stays readable. `train` shows its bar all the same, but seldom.
export TQDM_DISABLE=1 TQDM_MININTERVAL=60
$python "$checkout/tests/cuda/acceptance.py" --data "$bundle/data" "$@"
