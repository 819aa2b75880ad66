# One image for the MLflow server, its migrations, the workers and Optuna's dashboard; docker-compose.yml gives each its
# command. tests/acceptance/test_dockerfile.py reads this file: the steps that need no engine are run there.
FROM python:3.12.12-slim-trixie AS build

RUN python -m venv /opt/hpo
ENV PATH=/opt/hpo/bin:$PATH

# --build-arg TORCH_INDEX=URL takes PyTorch from another index: its CPU build is a tenth of the size of the default one.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.8,<3" "torchvision>=0.23,<1"

WORKDIR /src
COPY pyproject.toml README.md ./
COPY hpo hpo
COPY models models
COPY data_pipeline data_pipeline
RUN pip install --no-cache-dir ".[server]"

FROM python:3.12.12-slim-trixie

RUN useradd --uid 10001 --create-home hpo && install -d -o hpo -g hpo /artifacts /home/hpo/mlruns
COPY --from=build /opt/hpo /opt/hpo
ENV PATH=/opt/hpo/bin:$PATH HPO_HOME=/home/hpo/mlruns TORCH_HOME=/home/hpo/mlruns/torch MPLCONFIGDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
WORKDIR /home/hpo
USER 10001:10001
CMD ["hpo", "--help"]
