# The environment for ENGINE=verl on NVIDIA GPUs (driver 580 or newer on the host). Never built where this was written.
#   docker build -t ups-rm .
#   docker run --rm -it --gpus all --ipc host --ulimit nofile=1048576 -v "$PWD/runs:/ups-rm/runs" -v "$PWD/merge:/ups-rm/merge" \
#     -v "$PWD/Data:/ups-rm/Data" -v "$HOME/.cache/ups-rm:/cache" -e UPS_RM_CACHE=/cache ups-rm
# Inside: ups-rm doctor --engine verl
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential git ibverbs-providers libibverbs1 python3.12-dev python3.12-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /ups-rm
# Versions first: a change of the code does not install them anew. MAX_JOBS bounds the memory of flash-attn's build.
COPY constraints-gpu.txt ./
RUN python3.12 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --no-deps -r constraints-gpu.txt
RUN MAX_JOBS=8 /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation flash-attn==2.8.3
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps -e . \
 && /opt/venv/bin/pip check

ENV PATH=/opt/venv/bin:$PATH \
    UPS_RM_VENV=/opt/venv \
    PYTHONUNBUFFERED=1
CMD ["bash"]
