#!/usr/bin/env bash
# Speed and memory on one CUDA card in at most 8 minutes; without one: benchmarks/gpu.sh --device cpu --tiny
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
told=$(mktemp)
trap 'rm -f "$told"' EXIT
timeout 480 "${PYTHON:-.venv/bin/python}" -m benchmarks.gpu "$@" | tee "$told"
case " $* " in *" --tiny "*) ;; *) tail -n 1 "$told" > benchmarks/results/gpu.json ;; esac
