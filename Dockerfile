# docker build -t gradpruner .          for a GPU: --build-arg BASE=an image that has CUDA and Python >= 3.11
# docker run --rm -v "$PWD:/data" gradpruner shrink my-model --data train.jsonl --eval-data test.jsonl --out small
ARG BASE=python:3.13-slim
FROM ${BASE}
WORKDIR /opt/gradpruner
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gradpruner gradpruner
RUN pip install --no-cache-dir --constraint constraints.txt .
RUN useradd --create-home --uid 1000 user && mkdir /data && chown user /data
USER 1000
WORKDIR /data
ENTRYPOINT ["gradpruner"]
CMD ["--help"]
