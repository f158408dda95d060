# NVIDIA image. The lock's torch brings its CUDA libraries; the host needs the driver and the NVIDIA container toolkit.
FROM python:3.11-slim
RUN useradd --create-home --uid 10001 modm && mkdir -p /app /var/lib/modm && chown modm:modm /app /var/lib/modm
USER modm
WORKDIR /app
COPY --chown=modm:modm . .
RUN TORCH=cuda ops/setup.sh && rm -rf ~/.cache && mkdir -p ~/.cache/huggingface
ENV PATH=/app/.venv/bin:$PATH MODM_HOME=/var/lib/modm PYTHONUNBUFFERED=1
# A named volume takes the owner of the folder that it covers, so both exist and are modm's.
VOLUME /var/lib/modm
ENTRYPOINT ["modm"]
CMD ["--help"]
