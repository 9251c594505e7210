# docker build -t randomized-smoothing . && docker run -it -p 8888:8888 randomized-smoothing
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /smoothing
COPY requirements.txt pyproject.toml Makefile README.md ./
COPY lib/__init__.py lib/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN make setup TORCH_INDEX=$TORCH_INDEX
COPY . .
CMD [".venv/bin/jupyter", "lab", "--ip=0.0.0.0", "--allow-root", "--notebook-dir=notebooks"]
