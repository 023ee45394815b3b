# The training stack as an image, made by the same `make setup` as everywhere else.
#   docker build -t shardrec:$(shardrec --version) .
#   docker build -t shardrec:$(shardrec --version)-cuda --build-arg DEVICE=cuda .
FROM debian:bookworm-slim
ARG DEVICE=cpu
# gcc and the headers are for Triton, which builds its launchers where it runs.
# NCCL needs the ibverbs and rdmacm libraries with their drivers, or it sends over TCP.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev make python3-dev python3-venv \
        ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/shardrec
COPY pyproject.toml README.md LICENSE Makefile ./
COPY src ./src
COPY kernels ./kernels
COPY modules ./modules
COPY pipeline ./pipeline
COPY launch ./launch
RUN make setup DEVICE=$DEVICE
ENV PATH=/opt/shardrec/.venv/bin:$PATH
ENV PYTHONSAFEPATH=1
WORKDIR /data
CMD ["shardrec", "--help"]
