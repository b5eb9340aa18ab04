# Images of erniekit, for a CPU or for NVIDIA GPUs:
#
#   docker build --target cpu -t erniekit:cpu .
#   docker build --target gpu -t erniekit:gpu --build-arg PADDLE_INDEX=... .
#
# docs/docker.md says how they are used, and what of this has been tried.

ARG PYTHON=3.11

# The package as a wheel, so that the images do not hold the sources.
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY erniekit ./erniekit
# The wheel itself asks for no Paddle: each image installs its own.
RUN ERNIEKIT_PADDLE=none pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
# libgomp1: Paddle's threads. A version of it is not pinned, since Debian keeps one version of a package at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 erniekit \
    && install --directory --owner=erniekit /work
COPY --from=wheel /wheels /wheels
WORKDIR /work
ENTRYPOINT ["erniekit"]
CMD ["help"]

FROM base AS cpu
ARG EXTRAS=serve,video,tensorboard
RUN pip install --no-cache-dir "$(echo /wheels/erniekit-*.whl)[cpu,${EXTRAS}]"
USER 1000

# The CUDA libraries come with Paddle's wheel; the driver is the host's (NVIDIA Container Toolkit).
FROM base AS gpu
ARG EXTRAS=serve,video,tensorboard
# The package index that PaddlePaddle's installation guide names for your CUDA.
ARG PADDLE_INDEX
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN test -n "${PADDLE_INDEX}" || { echo "set --build-arg PADDLE_INDEX=..., see docs/docker.md" >&2; exit 1; } \
    && pip install --no-cache-dir --extra-index-url "${PADDLE_INDEX}" \
    "$(echo /wheels/erniekit-*.whl)[gpu,${EXTRAS}]"
USER 1000
