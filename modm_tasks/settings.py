"""All settings, one model: command line over ``MODM_`` environment over ``modm.toml`` over these defaults.

Nested fields use two underscores: ``MODM_CACHE__CAPACITY=20000``. Unknown keys are errors, in the file and in the
environment alike, because a misspelt limit that is silently ignored is found out in an outage.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from modm_tasks.errors import ConfigError

PositiveS = Annotated[float, Field(gt=0)]


def _plain(value: object) -> object:
    """A NUL in a path is an exception in the depth of whatever opens it, a line break forges a line of a log."""
    if isinstance(value, str | Path) and any(ord(c) < 32 or ord(c) == 127 for c in str(value)):
        raise ValueError("must be text without control characters")
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    _text = field_validator("*", mode="before")(_plain)


class ApiSettings(Section):
    """HTTP service."""

    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback an API key is required.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 picks a free one (written to MODM_HOME/stack.json).")
    allow_open: bool = Field(False, description="Listen beyond loopback without keys. Say so explicitly or not at all.")
    keys_file: Path | None = Field(None, description="JSON file of hashed API keys; `modm keys add` writes it.")
    requests_per_min_per_client: int = Field(0, ge=0, description="Rate limit for each client; 0 = none.")
    open_requests_per_client: int = Field(0, ge=0, description="Bound on a client's unfinished requests; 0 = none.")
    on_disconnect: Literal["keep", "cancel"] = Field(
        "keep", description="What a client that hangs up in a synchronous call leaves behind."
    )


class CacheSettings(Section):
    """Image cache."""

    capacity: int = Field(10_000, ge=1, description="Images kept per namespace.")
    admission: Literal["all", "large-only"] = Field("all", description="Which finished images enter the cache.")
    eviction: Literal["fifo", "lru", "utility"] = Field("fifo", description="Which images leave when it is full.")
    scope: Literal["shared", "per-client"] = Field("shared", description="Whether clients share images.")
    max_depth: int = Field(6, ge=0, description="Deepest refinement generation that may serve as a source.")
    quantisation: Literal["auto", "none", "int8", "binary"] = Field(
        "auto", description="Codes used before exact rescoring; auto chooses by the capacity."
    )


class RoutingSettings(Section):
    """Hit or miss, and how many steps to skip."""

    policy: str = Field("modm-plus", description="modm | modm-plus | large-only | small-only.")
    ladder_file: Path | None = Field(
        None, description="Ladder JSON, as `modm calibrate` writes it; default: the one shipped with the embedder."
    )
    features: str = Field("", description="Comma list of modm-plus mechanisms to turn on by themselves.")
    repeat_max_k: int = Field(25, ge=0, le=50, description="Most steps skipped for a repeated prompt without a seed.")
    wait_bound_s: PositiveS = Field(600.0, description="Longest wait on an unfinished source, counted from its turn.")
    wait_depth: int = Field(8, ge=1, description="Longest chain of requests that wait on one another.")
    escalation_rate: float = Field(
        0.1, ge=0, le=1, description="Largest share of hits redrawn by the large model; falls with the backlog."
    )


class WorkerSettings(Section):
    """GPU workers."""

    mode: Literal["pooled", "roles"] = Field("roles", description="pooled: every worker serves both queues.")
    engine: Literal["diffusers", "fake"] = Field("diffusers", description="fake is the shipped test double.")
    fake_large_s: float = Field(0.2, ge=0, description="Seconds of a fake 50-step large image.")
    fake_small_s: float = Field(0.04, ge=0, description="Seconds of a fake 50-step small image.")
    fake_swap_s: float = Field(0.0, ge=0, description="Above 0: one fake model fits at a time, loaded in this time.")
    device: str = Field("auto", description="auto | cpu | cuda | mps.")
    device_name: str = Field("", description="Workers of one name share learned speeds; default: what the device says.")
    threads: int = Field(0, ge=0, description="CPU threads of one worker; 0 = cores divided by workers.")
    lease_s: PositiveS = Field(15.0, description="Life of a claim without renewal.")
    max_attempts: int = Field(3, ge=1, description="Attempts before a request is reported failed.")
    soft_shutdown_s: PositiveS = Field(30.0, description="Grace for running work at a cold shutdown.")
    task_time_limit_s: PositiveS = Field(600.0, description="Hard limit of one task.")
    memory_mib: int = Field(0, ge=0, description="Device memory budget for resident models; 0 = ask the device.")
    compile: bool = Field(False, description="torch.compile the denoiser.")
    channels_last: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    attention_backend: str = Field("", description="diffusers attention backend name; empty = library default.")
    offload: Literal["none", "model", "sequential"] = "none"
    quantise: Literal["", "int8", "int4"] = Field("", description="Quantisation through diffusers' own config.")


class ControllerSettings(Section):
    """Rate controller."""

    allocation: str = Field("slo", description="static | modm-quality | modm-throughput | slo.")
    variant: Literal["paper", "code"] = Field("paper", description="Where paper and reference code differ.")
    static_large: int = Field(1, ge=0, description="Large workers under allocation=static.")
    profile: str = Field("", description="Device profile to price by until learned; default MODM_HOME/profile.toml.")
    period_s: PositiveS = Field(180.0, description="Seconds between decisions (the paper's 180).")
    window_s: PositiveS = Field(180.0, description="Observation window.")
    bucket_s: float = Field(10.0, ge=0.01, le=3600, description="Granularity of the window.")
    min_dwell_s: float = Field(20.0, ge=0, description="Shortest stay of a worker in a role under allocation=slo.")
    leader_ttl_s: PositiveS = Field(6.0, description="Life of the leader lock without renewal.")
    reconcile_s: PositiveS = Field(1.0, description="Seconds between looks at what the workers really consume.")
    away_grace_s: float = Field(20.0, ge=0, description="How long a vanished worker keeps its place in the allocation.")
    history: int = Field(200, ge=1, le=10_000, description="Decisions kept for `modm controller explain`.")
    metrics_host: str = Field("127.0.0.1", description="Address of the controller's Prometheus endpoint.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of that endpoint; 0 = off.")


class SloSettings(Section):
    """Service-level objective and overload."""

    multiple: PositiveS = Field(2.0, description="Default deadline as a multiple of the large model's latency.")
    large_latency_s: float = Field(0.0, ge=0, description="Latency of one large image; 0 = measured.")
    max_open_requests: int = Field(10_000, ge=1, description="Requests accepted and unfinished before 429.")
    max_backlog_s: float = Field(0.0, ge=0, description="Predicted seconds of queued work before 429; 0 = no bound.")
    degrade: bool = Field(False, description="Lower quality within the floors before refusing.")
    floor_threshold_rungs: int = Field(1, ge=0, description="How many rungs the hit threshold may fall.")
    floor_steps: int = Field(30, ge=1, le=1000, description="Fewest steps of a large image under degradation.")
    fallback_small_model: str = Field(
        "", description="Faster small model for the last step of degradation; empty = none."
    )


class Settings(BaseSettings):
    """Settings of every MoDM process."""

    model_config = SettingsConfigDict(
        env_prefix="MODM_", env_nested_delimiter="__", extra="forbid", frozen=True, toml_file="modm.toml"
    )

    _text = field_validator("*", mode="before")(_plain)

    home: Path = Field(Path(".modm"), description="Directory of all state: Redis, vectors, images, logs, reports.")
    redis_url: SecretStr | None = Field(None, description="Redis; default: the one that `modm up` starts.")
    redis_fsync: Literal["everysec", "always"] = Field(
        "everysec", description="Of the Redis that `modm up` starts: always = no acknowledged write is lost by a kill."
    )
    qdrant_url: str = Field("edge:", description="edge: | local:DIR | http(s)://HOST:PORT")
    qdrant_api_key: SecretStr | None = None
    image_url: str = Field("", description="fsspec URL of the image store; default MODM_HOME/images.")
    url: str = Field("", description="Orchestrator that the CLI talks to; default: the one of MODM_HOME.")
    api_key: SecretStr | None = Field(None, description="Key that the CLI sends.")
    embedder: str = Field("scenes-clip", description="scenes-clip, or open_clip MODEL/CHECKPOINT (ViT-L-14/openai).")
    large_model: str = Field("scenes-large", description="Catalogue name of the large model.")
    small_model: str = Field("scenes-small", description="Catalogue name of the small model.")
    models_file: Path | None = Field(None, description="TOML with further catalogue entries.")
    num_inference_steps: int = Field(50, ge=1, le=1000, description="Steps T of a full image.")
    redis_prefix: str = Field("modm:", pattern=r"^[a-zA-Z0-9:_-]*$", description="Prefix of every Redis key of ours.")
    log_format: Literal["auto", "json", "human"] = "auto"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_redact: bool = Field(
        False, description="Log errors by type and place only: their texts may quote input. Prompts are never logged."
    )
    safety_hook: str = Field("", description="module:callable called with prompts and images; empty = none.")
    api: ApiSettings = ApiSettings()
    cache: CacheSettings = CacheSettings()
    routing: RoutingSettings = RoutingSettings()
    worker: WorkerSettings = WorkerSettings()
    controller: ControllerSettings = ControllerSettings()
    slo: SloSettings = SloSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get("MODM_CONFIG", "modm.toml"))
        return init_settings, env_settings, toml

    @property
    def image_root(self) -> str:
        """fsspec URL of the image store."""
        return self.image_url or str(self.home.absolute() / "images")


def unknown_environment(environ: dict[str, str]) -> list[str]:
    """Names that start with MODM_ and name no setting. Pydantic ignores unknown environment names; we do not."""
    known = {"MODM_CONFIG"}
    for name, field in Settings.model_fields.items():
        known.add(f"MODM_{name.upper()}")
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            known |= {f"MODM_{name.upper()}__{sub.upper()}" for sub in section.model_fields}
    ours = (k for k in environ if k.startswith("MODM_") and not k.startswith("MODM_TEST_"))
    return sorted(k for k in ours if k.upper() not in known)


def load_settings(**overrides: object) -> Settings:
    """Read and check the settings once. Raises ConfigError with one line that names the field."""
    if unknown := unknown_environment(dict(os.environ)):
        raise ConfigError(f"unknown setting in the environment: {', '.join(unknown)}", field=unknown[0])
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"setting {field!r}: {first['msg']}", field=field) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the settings: {error}") from error


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings. Long-running processes read them once; tests call ``get_settings.cache_clear()``."""
    return load_settings()
