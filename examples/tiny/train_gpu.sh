#!/usr/bin/env bash
# One stage of training with the recipe for a GPU, on a machine without a network:
#     bash train_gpu.sh SECONDS OUTPUT [PREVIOUS]
# This folder, which `examples/tiny/pack.py` makes, must be in a checkout or next to one. After SECONDS, the model of the
# newest checkpoint is written to the folder OUTPUT: a tar archive in at most four parts of 15 MB. The stage starts
# from random weights, or from the model in such parts in the folder PREVIOUS.
set -euo pipefail
pack=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
seconds=$1 output=$2 previous=${3:-}

for checkout in "$pack"/../* "$pack"/../.. ""; do
    [ -f "$checkout/examples/tiny/train.py" ] && break
done
if [ -z "$checkout" ]; then
    echo "error: there is no checkout beside $pack" >&2
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
$python "$checkout/examples/tiny/wheels.py" "$pack/wheels" "$work/site"
export PYTHONPATH="$checkout/src:$work/site" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TQDM_MININTERVAL=60
ln -s "$pack/world" "$work/world"
options=(--recipe gpu --work_dir "$work" --output_dir "$work/finished" --num_workers "$(($(nproc) - 1))")
if [ -n "$previous" ]; then
    mkdir "$work/previous"
    cat "$previous"/model.tar.* | tar -x -C "$work/previous"
    options+=(--init "$work/previous" --seed "$RANDOM") # with another order of the samples
fi

status=0
timeout --signal=INT --kill-after=15 "$seconds" $python "$checkout/examples/tiny/train.py" "${options[@]}" || status=$?
case $status in 124 | 137) status=0 ;; esac # the time has run out
$python "$checkout/examples/tiny/export.py" "$work/checkpoints" "$work/model" --world "$pack/world" --recipe gpu
mkdir -p "$output"
rm -f "$output"/model.tar.*
tar -c -C "$work/model" . | split -b 15MB - "$output/model.tar."
parts=("$output"/model.tar.*)
if [ "${#parts[@]}" -gt 4 ]; then
    echo "error: the model has ${#parts[@]} parts" >&2
    exit 1
fi
exit "$status" # not 0 if the training failed; its newest checkpoint is still saved
