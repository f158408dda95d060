# Laptop image. TORCH_INDEX, if given, is a package index with CPU builds of torch (a gigabyte instead of five).
FROM python:3.11-slim
ARG TORCH_INDEX=""
RUN useradd --create-home --uid 10001 modm && mkdir -p /app /var/lib/modm && chown modm:modm /app /var/lib/modm
USER modm
WORKDIR /app
COPY --chown=modm:modm . .
RUN if [ -n "$TORCH_INDEX" ]; then export TORCH=cpu TORCH_INDEX; fi; ops/setup.sh && rm -rf ~/.cache && mkdir -p ~/.cache/huggingface
ENV PATH=/app/.venv/bin:$PATH MODM_HOME=/var/lib/modm PYTHONUNBUFFERED=1
# A named volume takes the owner of the folder that it covers, so both exist and are modm's.
VOLUME /var/lib/modm
ENTRYPOINT ["modm"]
CMD ["--help"]
