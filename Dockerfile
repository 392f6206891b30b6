# syntax=docker/dockerfile:1
# torch's wheels bring CUDA along, so a slim Python image is enough; the host needs only the NVIDIA driver and its container
# toolkit. For a machine without GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The largest layer first: it changes only with torch.
RUN --mount=type=cache,target=/root/.cache/pip pip install --index-url "${TORCH_INDEX}" "torch==${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY adapters adapters
COPY clients clients
RUN --mount=type=cache,target=/root/.cache/pip pip install ".[server]"

FROM python:${PYTHON}-slim-bookworm
# Triton compiles its kernels' launchers with a C compiler when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin loraplex \
    && install --directory --owner loraplex --group loraplex /data /opt/loraplex
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_PORT=8000 \
    LORAPLEX_DATA_DIR=/data/adapters \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/cache/triton \
    XDG_CACHE_HOME=/data/cache
# A path that does not change with Python's version, for the embedded demo model.
RUN ln -s "$(python -c 'import loraplex_server.demo as demo; print(demo.__path__[0])')" /opt/loraplex/demo
USER loraplex
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --retries=3 --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["loraplex", "serve"]
