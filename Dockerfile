# The three trainings and their tools: docker build --tag mae . (docs/cluster/README.md has how to run it)
# PyTorch brings the CUDA libraries that it was built with, so the smallest image of that CUDA version is enough
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04

# gcc and Python's headers: what --compile generates is compiled here; tini: as process 1 it hands signals on
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY requirements.txt docs/cluster/constraints.txt /tmp/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt --constraint /tmp/constraints.txt

# nothing here needs root; the code is the user's, because ./output_dir is the default place of checkpoints
RUN useradd --create-home --uid 10001 mae && install --directory --owner=mae --group=mae /mae
USER mae
WORKDIR /mae
COPY --chown=mae:mae . .

ENTRYPOINT ["tini", "--"]
CMD ["python", "main_pretrain.py", "--help"]
