# gold on NVIDIA GPUs. The base image has Python, PyTorch and its CUDA libraries; nothing of PyTorch is installed again.
#
#   docker build -t gold .
#   docker run --gpus all -v "$PWD:/work" -v ~/.cache:/root/.cache gold train run.yaml
#
# --build-arg BASE=… names another image with PyTorch >= 2.8, --build-arg EXTRAS=lora,vllm other extras.
ARG BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

ARG EXTRAS=lora,quantization,trackers,plots,tasks,gguf,data

# Triton compiles the launchers of GPU kernels with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gold ./gold
# The image's PyTorch stays: it is the only version that pip may choose.
RUN python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[${EXTRAS}]" \
    && rm /tmp/constraints.txt

WORKDIR /work
ENTRYPOINT ["gold"]
CMD ["--help"]
