# AMD image. TORCH_INDEX is required: a package index with ROCm builds of torch. The host needs the amdgpu driver.
FROM python:3.11-slim
ARG TORCH_INDEX
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 libelf1 libdrm-amdgpu1 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 modm && mkdir -p /app /var/lib/modm && chown modm:modm /app /var/lib/modm
USER modm
WORKDIR /app
COPY --chown=modm:modm . .
RUN TORCH=rocm TORCH_INDEX="$TORCH_INDEX" ops/setup.sh && rm -rf ~/.cache && mkdir -p ~/.cache/huggingface
ENV PATH=/app/.venv/bin:$PATH MODM_HOME=/var/lib/modm PYTHONUNBUFFERED=1
# A named volume takes the owner of the folder that it covers, so both exist and are modm's.
VOLUME /var/lib/modm
ENTRYPOINT ["modm"]
CMD ["--help"]
