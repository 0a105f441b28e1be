# A server for one bundle on a CPU: the base package, a backend and `serve`; no torch, no transformers, no root.
#
#     docker build --tag himap-serve .                                  # or --build-arg BACKEND=onnxruntime
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/engines:/bundle:ro" himap-serve
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG BACKEND=openvino
COPY . /source
RUN pip wheel --no-cache-dir --constraint /source/constraints.txt --wheel-dir /wheels "/source[${BACKEND},serve]"

FROM python:${PYTHON}-slim
ARG BACKEND=openvino
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels "himap-export[${BACKEND},serve]" \
    && useradd --uid 10001 --no-create-home himap
USER 10001
EXPOSE 8000
# The first start compiles: until every plan has answered a question, it is not healthy, and that is no failure.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready')"]
STOPSIGNAL SIGTERM
# The log is JSON lines on standard error. --drain-timeout is below the orchestrator's grace period.
ENTRYPOINT ["himap-serve", "/bundle", "--host", "0.0.0.0", "--drain-timeout", "25"]
