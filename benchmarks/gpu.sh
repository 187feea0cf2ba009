#!/usr/bin/env bash
# Speed and memory on one CUDA card in at most 8 minutes; without one: benchmarks/gpu.sh --device cpu --tiny
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
python=${PYTHON:-.venv/bin/python}
told=$(mktemp)
trap 'rm -f "$told"' EXIT
timeout 480 "$python" -m benchmarks.gpu "$@" | tail -n 1 | tee "$told"
if ! grep -q '"machine": "a dry run' "$told"; then
    cp "$told" benchmarks/results/gpu.json
    "$python" scripts/write_benchmarks.py
fi
