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

# Packages that this machine has are used as they are.
missing=$($python -c '
from importlib.util import find_spec
names = """
diffusers importlib_metadata zipp requests urllib3 charset_normalizer peft pycocotools hypothesis sortedcontainers
"""
print(*(name for name in names.split() if find_spec(name) is None))')
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # one word for each package
    $python -m pip install --quiet --no-index --no-deps --no-compile --find-links "$bundle/wheels" --target "$site" $missing
fi
export PYTHONPATH="$checkout/src:$site" HF_HUB_OFFLINE=1
# Without progress bars, a log stays readable. `train` shows its bar all the same, but seldom.
export TQDM_DISABLE=1 TQDM_MININTERVAL=60
$python "$checkout/tests/cuda/acceptance.py" --data "$bundle/data" "$@"
