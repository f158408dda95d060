from __future__ import annotations

import json
from pathlib import Path

import pytest

from modm_tasks.errors import ConfigError
from modm_tasks.settings import Settings
from workers.catalogue import canonical, check_pair, find, load_catalogue, missing_weights

SHIPPED = {
    "scenes-large", "scenes-small", "stable-diffusion-3.5-large", "stable-diffusion-3.5-large-turbo", "FLUX.1-dev",
    "FLUX.1-schnell", "stable-diffusion-xl-base-1.0", "Sana_1600M_1024px_BF16", "Sana_Sprint_1600M_1024px",
    "Z-Image-Turbo", "Qwen-Image",
}  # fmt: skip


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(text)
    return path


def test_every_shipped_entry_is_valid_and_complete() -> None:
    entries = load_catalogue()
    assert set(entries) == SHIPPED
    for entry in entries.values():
        assert entry.licence
        assert entry.steps is not None or entry.folder is not None
        assert entry.memory_gib > 0 or entry.folder is not None


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("flux", "FLUX.1-dev"),
        ("sd3.5", "stable-diffusion-3.5-large"),
        ("sdxl", "stable-diffusion-xl-base-1.0"),
        ("sana", "Sana_1600M_1024px_BF16"),
        ("SDXL", "stable-diffusion-xl-base-1.0"),
    ],
)
def test_the_reference_short_names_are_aliases(alias: str, name: str) -> None:
    assert find(alias).name == name
    assert canonical(alias, Settings()) == name


def test_the_bundled_models_bring_their_own_defaults() -> None:
    for name in ("scenes-large", "scenes-small"):
        entry = find(name)
        assert missing_weights(entry) is None
        assert entry.size == "64x64"
        assert entry.steps == 50
        assert 1 < entry.guidance_scale < 5


def test_a_user_file_adds_and_overrides(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "modm.json").write_text(json.dumps({"steps": 7, "size": 128, "guidance_scale": 1.5, "note": "ignored"}))
    path = write(tmp_path, '[mine]\nfolder = "mine"\naliases = ["m"]\n[FLUX-2]\nrepo = "a/b"\nsize = "768x512"\n')
    mine = find("m", path)
    assert (mine.steps, mine.size_px, mine.guidance_scale) == (7, (128, 128), 1.5)
    assert find("FLUX-2", path).size_px == (768, 512)
    assert find("flux", path).name == "FLUX.1-dev"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[x]\nrepo = 'a/b'\nstepz = 3\n", "model 'x', field 'stepz'"),
        ("[x]\nrepo = 'a/b'\nsteps = 0\n", "model 'x', field 'steps'"),
        ("[x]\nrepo = 'a/b'\nfolder = 'c'\n", "either a repo or a folder"),
        ("[x]\nsteps = 3\n", "either a repo or a folder"),
        ("[x]\nrepo = 'a/b'\nsize = '100x100'\n", "multiple of 8"),
        ("[x]\nfolder = 'c'\nrevision = 'abc'\n", "revision and variant belong to a repo"),
        ("x = 3\n", "must be a table"),
        ("[x\n", "cannot read the catalogue"),
        ("[x]\nrepo = 'a/b'\naliases = ['flux']\n", "both called 'flux'"),
    ],
)
def test_a_bad_entry_is_one_line_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_catalogue(write(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_and_an_unknown_name_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the catalogue"):
        load_catalogue(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"no model 'dall-e'.*scenes-large"):
        find("dall-e")


def test_the_pair_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, '[gone]\nfolder = "nowhere"\n')
    with pytest.raises(ConfigError, match="there is no folder"):
        check_pair(Settings(small_model="gone", models_file=path))
    with pytest.raises(ConfigError, match="may not be the small model"):
        check_pair(Settings(small_model="qwen-image"))
    half = tmp_path / "half"
    half.mkdir()
    (half / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    path = write(tmp_path, '[half]\nfolder = "half"\n')
    with pytest.raises(ConfigError, match="lacks its vae folder"):
        check_pair(Settings(large_model="half", models_file=path))


def test_steps_come_from_the_request_then_explicit_settings_then_the_model() -> None:
    plain, explicit = Settings(), Settings(num_inference_steps=20)
    sdxl, schnell = find("sdxl"), find("schnell")
    assert sdxl.steps_for(12, explicit) == 12
    assert sdxl.steps_for(None, explicit) == 20
    assert sdxl.steps_for(None, plain) == 50
    assert schnell.steps_for(None, plain) == 4
    assert schnell.steps_for(50, explicit) == 8, "a distilled model never runs more than its maximum"
