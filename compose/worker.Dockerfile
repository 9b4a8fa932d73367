# Prefill and decode workers. Build from the repository's root.
#   CPU   the default
#   GPU   CONSTRAINTS= takes pip's own choice of torch; BASE may be an image that has a torch already
ARG BASE=python:3.11-slim-bookworm

# dependencies first: they change less often than the code, and torch is large
FROM ${BASE} AS dependencies
ARG CONSTRAINTS=requirements/cpu.txt
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
WORKDIR /build
# sees the torch that BASE has, and keeps it
RUN python3 -m venv --system-site-packages /venv
COPY pyproject.toml ./
COPY requirements requirements
COPY scripts/pip_install.sh scripts/
COPY compose/wheels wheels
RUN mkdir src && touch README.md \
    && PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS="/build/wheels $PIP_FIND_LINKS" \
    bash scripts/pip_install.sh /venv/bin/python '.[worker]' \
    && /venv/bin/python -m pip uninstall --quiet --yes scission

FROM dependencies AS package
COPY . .
RUN /venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

FROM ${BASE}
# Debian's; Triton wants a C compiler where the model runs
ARG PACKAGES=
RUN test -z "$PACKAGES" || { apt-get update --quiet=2 \
    && apt-get install --yes --quiet=2 --no-install-recommends $PACKAGES \
    && rm -rf /var/lib/apt/lists/*; }
# the gateway image makes the same user and folders: they share volumes
RUN useradd --uid 10001 --create-home scission \
    && mkdir /cache /model /keys \
    && chown scission /cache /model /keys \
    && chmod 700 /keys
COPY --from=dependencies /venv /venv
COPY --from=package /build/dist /tmp/dist
RUN /venv/bin/python -m pip install --quiet --no-index --no-deps --compile /tmp/dist/*.whl \
    && rm -r /tmp/dist
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER scission
WORKDIR /home/scission
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton

EXPOSE 8011 8012 8013
HEALTHCHECK --interval=5s --timeout=4s --start-period=120s --retries=6 \
    CMD ["scission", "health", "127.0.0.1:8011"]
ENTRYPOINT ["scission"]
CMD ["prefill"]
