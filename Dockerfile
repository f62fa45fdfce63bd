# constellation, Ray and torch in one image, the same for head and workers:
#
#     docker build -t registry.example.com/constellation:0.1.0 .                          processors alone
#     docker build -t registry.example.com/constellation:0.1.0 --build-arg DEVICE=cuda .  NVIDIA GPUs too
#     docker run --rm registry.example.com/constellation:0.1.0 constellation doctor
#
# The C library of decoding is compiled here for every level of processor that the image may meet; at run time there is
# no compiler. KubeRay wants bash and wget, which it looks with whether Ray is well.
FROM python:3.11-slim-bookworm AS build
ARG DEVICE=cpu
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev
COPY . /source
RUN /source/deploy/image/install.sh /source /opt/constellation "$DEVICE"

FROM python:3.11-slim-bookworm
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends bash wget libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 constellation
COPY --from=build /opt/constellation /opt/constellation
ENV PATH=/opt/constellation/bin:$PATH \
    CONSTELLATION_NATIVE_BUILT=/opt/constellation/lib/constellation \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER constellation
WORKDIR /home/constellation
CMD ["constellation", "--help"]
