# One image for the MLflow server and the workers; docker-compose.yml gives each its command.
FROM python:3.12-slim

# --build-arg TORCH_INDEX=URL takes PyTorch from another index: its CPU build is a tenth of the size of the default one.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision

WORKDIR /app
COPY pyproject.toml README.md ./
COPY hpo hpo
COPY models models
COPY data_pipeline data_pipeline
RUN pip install --no-cache-dir .

RUN useradd --create-home hpo && mkdir /artifacts && chown hpo /artifacts
USER hpo
ENV HPO_HOME=/home/hpo/mlruns
CMD ["hpo", "--help"]
