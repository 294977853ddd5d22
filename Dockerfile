# One image for every role: `worker` on a host, `flower`, and the commands of a user.
# Debian 13, whose runsc works on today's kernels: that of 12 has no systrap, that of sid panics.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md ./
COPY worker worker
COPY tasks tasks
COPY cli cli
# An environment of its own: sandbatch is an application, and its packages have common names.
RUN python3 -m venv /opt/sandbatch \
 && /opt/sandbatch/bin/pip install --no-cache-dir --disable-pip-version-check .

FROM ${BASE}
# What `sandbatch doctor` asks for, and python3, which is also what sandboxes of rootfs `host` find in /usr.
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates \
      conmon \
      containernetworking-plugins \
      iproute2 \
      iptables \
      kmod \
      nftables \
      python3 \
      runsc \
      skopeo \
      tini \
      umoci \
      util-linux \
 && rm -rf /var/lib/apt/lists/*
# The same place as in the first stage: the scripts of an environment name their interpreter by its path.
COPY --from=build /opt/sandbatch /opt/sandbatch
ENV PATH=/opt/sandbatch/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1
ENTRYPOINT ["sandbatch"]
CMD ["--help"]
