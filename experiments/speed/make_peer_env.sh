#!/usr/bin/env bash
# Makes the virtual environment that the peer benchmarks run in: make_peer_env.sh DIR
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
python3 -m venv "$1"
pip=("$1/bin/python" -m pip install)

# Use the CPU build of torch (choose it by the package index that pip is set to).
"${pip[@]}" torch==2.13.0 numpy
# Without their dependencies, which would pull in far more than the benchmark needs.
"${pip[@]}" --no-deps torchvision==0.28.0 avalanche-lib==0.6.0
# What avalanche imports at start.
"${pip[@]}" pillow psutil gputil scikit-learn matplotlib pytorchcv tqdm torchmetrics gdown \
    qpsolvers quadprog dill packaging tensorboard wandb setuptools
