# The gateway: HTTP in front, no torch. Build from the repository's root.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
ARG CONSTRAINTS=requirements/cpu.txt
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=

WORKDIR /build
# dependencies first: they change less often than the code
COPY pyproject.toml README.md ./
COPY requirements requirements
COPY scripts/pip_install.sh scripts/
RUN mkdir src && bash scripts/pip_install.sh python3 . && python3 -m pip uninstall --quiet --yes scission

COPY . .
RUN python3 -m pip install --no-deps --quiet . && rm -rf build src/*.egg-info

# the worker image makes the same user and folders: they share volumes
RUN useradd --uid 10001 --create-home scission \
    && mkdir /cache /model \
    && chown scission /cache /model
USER scission
WORKDIR /home/scission
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface

EXPOSE 8000 8010
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=6 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["scission"]
CMD ["gateway"]
