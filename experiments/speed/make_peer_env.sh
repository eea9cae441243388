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
"${pip[@]}" torch==2.13.0 numpy transformers safetensors
# Without their dependencies, which would pull in far more than the benchmark needs.
"${pip[@]}" --no-deps torchvision==0.28.0 avalanche-lib==0.6.0
# What avalanche imports at start.
"${pip[@]}" pillow psutil gputil scikit-learn matplotlib pytorchcv tqdm torchmetrics gdown \
    qpsolvers quadprog dill packaging tensorboard wandb setuptools

# learn2learn does not build on recent Pythons; its MAML is three files of plain Python.
unpacked=$(mktemp -d)
"$1/bin/python" -m pip download --no-deps --no-binary :all: --dest "$unpacked" learn2learn==0.2.0
tar --extract --gzip --file "$unpacked"/learn2learn-0.2.0.tar.gz --directory "$unpacked" --strip-components 1
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site"/learn2learn/{algorithms,utils}
touch "$site"/learn2learn/__init__.py "$site"/learn2learn/algorithms/__init__.py
cp "$unpacked"/learn2learn/algorithms/{maml,base_learner}.py "$site"/learn2learn/algorithms/
cp "$unpacked"/learn2learn/utils/__init__.py "$site"/learn2learn/utils/
rm -r "$unpacked"
