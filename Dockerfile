# segjax in a container, for CPU or, by its extra, for GPU or TPU; JAX's CUDA wheels bring CUDA, so one base does for all:
#
#   docker build -t segjax .
#   docker build -t segjax:cuda --build-arg EXTRA=cuda12 .
#   docker run --rm -v "$PWD/runs:/runs" segjax --config=quickstart --workdir=/runs/quickstart
#   docker run --rm --gpus=all -v "$PWD/DATA:/data" -v "$PWD/runs:/runs" segjax:cuda --config=unet_camvid --config.data.dir=/data --workdir=/runs/camvid
#
# launch/jobset.yaml runs it on Kubernetes.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
# "", cuda12, cuda13, tpu, or several extras: cuda12,tensorflow.
ARG EXTRA=""
WORKDIR /segjax
COPY . .
# pip refuses empty brackets.
RUN pip install --no-cache-dir -e ".${EXTRA:+[$EXTRA]}"
ENTRYPOINT ["python", "-u", "-m", "segjax.main"]
