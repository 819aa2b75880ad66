# One image for the MLflow server and the workers; docker-compose.yml gives each its command.
FROM python:3.12-slim

# PyTorch's CPU build, a tenth of the size of the default one; for GPUs: --build-arg TORCH=https://pypi.org/simple
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH" torch torchvision

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
