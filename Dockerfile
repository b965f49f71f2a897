# The demo, offline and on the CPU, on a machine that has nothing but a container engine:
#
#   docker build --tag retort .
#   docker run --name demo retort                                # the pipeline, minutes; ends with the table
#   docker cp demo:/home/retort/project/results .                # students, caches, report.html
#   docker run --rm retort .venv/bin/snakemake -n                # or any other command
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home retort && install --directory --owner retort /home/retort/project

USER retort
WORKDIR /home/retort/project
# PyTorch's CPU build, which satisfies requirements.lock and is a tenth of the size.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1

# A layer of its own: it changes with the versions alone.
COPY --chown=retort requirements.lock ./
RUN python3 -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock

COPY --chown=retort . ./
RUN make environment

CMD ["make", "demo"]
