# Prefill and decode workers. Build from the repository's root.
#   CPU   the default
#   GPU   CONSTRAINTS= takes pip's own choice of torch; BASE may be an image that has a torch already
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
ARG CONSTRAINTS=requirements/cpu.txt
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=

WORKDIR /build
# dependencies first: they change less often than the code, and torch is large
COPY pyproject.toml README.md ./
COPY requirements requirements
COPY scripts/pip_install.sh scripts/
RUN mkdir src && bash scripts/pip_install.sh python3 '.[worker]' && python3 -m pip uninstall --quiet --yes scission

COPY . .
RUN python3 -m pip install --no-deps --quiet . && rm -rf build src/*.egg-info

# the gateway image makes the same user and folders: they share volumes
RUN useradd --uid 10001 --create-home scission \
    && mkdir /cache /model /keys \
    && chown scission /cache /model /keys \
    && chmod 700 /keys
USER scission
WORKDIR /home/scission
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface

EXPOSE 8011 8012 8013
HEALTHCHECK --interval=5s --timeout=4s --start-period=120s --retries=6 \
    CMD ["scission", "health", "127.0.0.1:8011"]
ENTRYPOINT ["scission"]
CMD ["prefill"]
