#!/usr/bin/env bash
# From nothing to a picture: makes the environment, renders scenes, packs, trains, converts, evaluates, reports,
# predicts.
#   bash launch/quickstart.sh [FOLDER]      results go to FOLDER, by default ./quickstart
# Trains on all GPUs, or on two CPU ranks where there is none.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-quickstart}
marker=$folder/.made-by-quickstart
if [ -e "$folder" ] && [ ! -e "$marker" ]; then
    echo "error: $folder exists and was not made by this script; name another folder" >&2
    exit 2
fi
# shellcheck disable=SC1091
. "$here/environment.sh" # sets root
SECONDS=0

ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
batch=$((ranks * ((8 + ranks - 1) / ranks)))
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
start="deepspeed --num_gpus $ranks --master_port $port"
rm -rf "$folder"
mkdir -p "$folder"
touch "$marker"

step() {
    echo
    echo "\$ ${*//$root\//}"
    # DeepSpeed says at length what it starts; that is kept in a file.
    "$@" 2>&1 | tee -a "$folder/output.log" | sed -u -E '/\[(INFO|WARNING)\] \[|built successfully$/d'
}

step python "$root/shards/synthesize.py" "$folder/scenes"
step python "$root/shards/create.py" "$folder/scenes" "$folder/shards"
step python "$root/shards/verify.py" "$folder/shards" --deep
# shellcheck disable=SC2086
step $start "$root/launch/train.py" --shards "$folder/shards" --output "$folder/run" \
    --recipe "$root/launch/recipes/quickstart.yaml" \
    --deepspeed_config "$root/launch/zero/zero2_fp32.json" --set "train.global_batch=$batch"
step python "$root/launch/convert.py" "$folder/run" "$folder/model.safetensors"
# shellcheck disable=SC2086
step $start "$root/launch/evaluate.py" --model "$folder/model.safetensors" --shards "$folder/shards" \
    --json "$folder/scores.json" --sheet "$folder/sheet.png"
step python "$root/launch/report.py" "$folder/run"
step python "$root/launch/predict.py" "$folder/model.safetensors" "$folder/scenes/images/validation" \
    --output "$folder/predictions"

echo
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; the run on one page: $folder/run/report.html"
echo "image, truth and prediction side by side: $folder/sheet.png"
echo "to go on in this shell: . .venv/bin/activate"
