# docker build -t layerwise .
# docker run --gpus all --ipc=host -v "$PWD/runs:/app/runs" -v "$PWD/datasets:/app/datasets" layerwise train MODEL=ResNet DATA=CIFAR10
# (any make target; without a GPU leave out --gpus. The two folders must be writable for user 1000, or add --user.)
FROM python:3.12-slim
# torch.compile needs a compiler; CUDA comes with torch
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home user && mkdir -p /app/runs /app/datasets && chown -R user /app
USER user
WORKDIR /app
COPY --chown=user requirements.txt requirements-dev.txt Makefile ./
RUN make venv && rm -rf ~/.cache
COPY --chown=user . .
RUN touch .venv/.complete
ENTRYPOINT ["make"]
CMD ["help"]
