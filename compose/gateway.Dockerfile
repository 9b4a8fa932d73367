# The gateway: HTTP in front, no torch. Build from the repository's root.
ARG BASE=python:3.11-slim-bookworm

# dependencies first: they change less often than the code
FROM ${BASE} AS dependencies
ARG CONSTRAINTS=requirements/cpu.txt
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
WORKDIR /build
RUN python3 -m venv /venv
COPY pyproject.toml ./
COPY requirements requirements
COPY scripts/pip_install.sh scripts/
COPY compose/wheels wheels
RUN mkdir src && touch README.md \
    && PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS="/build/wheels $PIP_FIND_LINKS" \
    bash scripts/pip_install.sh /venv/bin/python . \
    && /venv/bin/python -m pip uninstall --quiet --yes scission

FROM dependencies AS package
COPY . .
RUN /venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

FROM ${BASE}
# the worker image makes the same user and folders: they share volumes
RUN useradd --uid 10001 --create-home scission \
    && mkdir /cache /model \
    && chown scission /cache /model
COPY --from=dependencies /venv /venv
COPY --from=package /build/dist /tmp/dist
RUN /venv/bin/python -m pip install --quiet --no-index --no-deps --compile /tmp/dist/*.whl \
    && rm -r /tmp/dist
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER scission
WORKDIR /home/scission
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface

EXPOSE 8000 8010
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=6 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["scission"]
CMD ["gateway"]
