# posttrain on NVIDIA GPUs, with DeepSpeed and vLLM. The driver is the host's. From the project's folder:
#   docker build --file launch/docker/cuda.Dockerfile --tag posttrain:cuda .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/runs" posttrain:cuda train recipe.yaml
# `--build-arg EXTRAS=deepspeed` leaves vLLM out. torch, DeepSpeed and vLLM are not locked here (docs/security.md).
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# DeepSpeed and Triton compile at their first start, which takes a compiler and the headers of CUDA and Python.
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
# The user 1000 of the image is replaced by one of that number here.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
    bubblewrap build-essential git iproute2 ninja-build python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv \
 && userdel --remove ubuntu \
 && useradd --create-home --uid 1000 posttrain
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/posttrain
ARG EXTRAS=deepspeed,vllm
COPY . ./
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]"

USER 1000
WORKDIR /runs
ENTRYPOINT ["posttrain"]
CMD ["--help"]
