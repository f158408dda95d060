"""Two models under one budget that holds one: swapped by parking or by reloading, without a leak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from modm_tasks.errors import ConfigError, OutOfMemoryError
from modm_tasks.settings import Settings, WorkerSettings
from workers.architectures import build
from workers.catalogue import ModelEntry
from workers.diffusers_engine import DiffusersEngine, pick_device
from workers.engine import GenerateParams
from workers.memory import rss_mib
from workers.options import check_options
from workers.pipelines import Pair, draw, load_pair
from workers.residency import Parking, Residency, weight_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # the libraries' own objects: collecting them takes half a second each time
    yield
    gc.unfreeze()
    torch.set_num_threads(kept)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    families = ("sd3", "sdxl", "flux", "sana")
    for family in families:
        build(family).save_pretrained(folder / family)
    keys = 'size = "32x32"\nmax_sequence_length = 16\n'
    text = "".join(f'[{family}]\nfolder = "{family}"\n{keys}' for family in families)
    (folder / "models.toml").write_text(text)
    return folder


class Block:
    """Eight MiB of weights, to see memory move."""

    def __init__(self, fill: float) -> None:
        self.net = torch.nn.utils.skip_init(torch.nn.Linear, 1024, 2048, bias=False)
        torch.nn.init.constant_(self.net.weight, fill)

    def modules(self) -> list[torch.nn.Module]:
        return [self.net]


MIB = 2**20


def live_weights() -> int:
    """Parameters that something in this process still refers to."""
    return sum(type(one) is torch.nn.Parameter for one in gc.get_objects())


@pytest.mark.parametrize("parking", ["host", "reload"])
def test_two_hundred_swaps_leave_memory_flat_and_weights_right(parking: Parking) -> None:
    residency = Residency(CPU, 12 * MIB, parking=parking)
    loads: list[str] = []

    def loader(name: str, fill: float) -> Callable[[], Block]:
        return lambda: (loads.append(name), Block(fill))[1]

    residency.add("a", loader("a", 1.0))
    residency.add("b", loader("b", 2.0))
    before = 0.0
    for i in range(200):
        name, fill = (("a", 1.0), ("b", 2.0))[i % 2]
        block, took_s = residency.ensure(name)
        assert residency.resident() == (name,)
        assert took_s > 0
        assert block.net.weight.data[0, 0].item() == fill
        if i == 40:
            gc.collect()
            before = rss_mib()
    gc.collect()
    assert rss_mib() - before < 160 * 8 / 8, "an eighth of what a block kept at each swap would take"
    assert len(loads) == (2 if parking == "host" else 200)
    assert set(residency.prices_s()) == {"a", "b"}
    assert all(price > 0 for price in residency.prices_s().values())


def test_what_fits_stays_and_costs_nothing() -> None:
    residency = Residency(CPU, 100 * MIB)
    for name, fill in (("a", 1.0), ("b", 2.0)):
        residency.add(name, lambda fill=fill: Block(fill))
        residency.ensure(name)
    residency.measure_prices()
    assert residency.ensure("a")[1] == 0.0
    assert residency.resident() == ("b", "a")
    assert residency.prices_s() == {"a": 0.0, "b": 0.0}
    assert residency.footprint("a") == weight_bytes(Block(0.0)) == 8 * MIB


def test_the_least_recently_used_leaves_and_one_too_big_says_so() -> None:
    residency = Residency(CPU, 20 * MIB)
    for name in ("a", "b", "c"):
        residency.add(name, lambda: Block(0.0))
    residency.ensure("a")
    residency.ensure("b")
    residency.ensure("a")
    residency.ensure("c")
    assert residency.resident() == ("a", "c")
    residency.working_bytes = 15 * MIB
    with pytest.raises(OutOfMemoryError, match="needs 23 MiB and the device has 20"):
        residency.ensure("b")


@pytest.mark.parametrize(
    ("parking", "pair"),
    [("host", ("sd3", "sdxl")), pytest.param("reload", ("flux", "sana"), marks=pytest.mark.slow)],
)
def test_two_hundred_swaps_of_real_pipelines_leave_memory_flat_and_images_the_same(
    folders: Path, parking: Parking, pair: tuple[str, str]
) -> None:
    """Every draw is of the model that is not there. Weights are counted one by one; resident memory also shows what is not
    Python's, but the allocator's own unevenness (12 MiB seen) is in it, so it only has to grow by clearly less than a model
    kept at each swap would make it."""
    worker = WorkerSettings(device="cpu", memory_mib=1)
    settings = Settings(models_file=folders / "models.toml", num_inference_steps=1, worker=worker)
    engine = DiffusersEngine(settings, parking=parking)
    sizes = [weight_bytes(load_pair(ModelEntry(name=f, folder=folders / f), worker, CPU)) for f in pair]
    engine._residency.budget = max(sizes) + 1
    engine.load(pair)
    gc.freeze()  # the modules that the first load imported
    assert engine.resident() == (pair[1],)
    assert all(price > 0 for price in engine.swap_s().values())
    first: dict[str, bytes] = {}
    settled_mib, settled_weights = 0.0, 0
    for i in range(240):
        name = pair[i % 2]
        drawn = engine.generate(GenerateParams(model=name, prompt="a fox", seed=1))
        assert drawn.load_s > 0
        assert engine.resident() == (name,)
        assert first.setdefault(name, drawn.image.tobytes()) == drawn.image.tobytes()
        if i == 39:
            gc.collect()
            settled_mib, settled_weights = rss_mib(), live_weights()
    gc.collect()
    assert live_weights() == settled_weights, "what was loaded at first is frozen and not counted"
    assert rss_mib() - settled_mib < 0.75 * 200 * sum(sizes) / len(sizes) / MIB


def test_both_pipelines_share_one_set_of_weights(folders: Path) -> None:
    pair = load_pair(ModelEntry(name="sdxl", folder=folders / "sdxl"), WorkerSettings(), CPU)
    assert pair.text.unet is pair.image.unet
    assert pair.text.vae is pair.image.vae
    assert pair.text.scheduler is not pair.image.scheduler


def test_options_change_how_it_runs_and_not_what_it_draws(folders: Path) -> None:
    entry = ModelEntry(name="sdxl", folder=folders / "sdxl")

    def image(pair: Pair) -> bytes:
        return draw(pair, prompt="p", seed=0, steps=2, size=(32, 32), on_step=lambda done, total: None)[0].tobytes()

    plain = load_pair(entry, WorkerSettings(), CPU)
    options = WorkerSettings(channels_last=True, vae_slicing=True, vae_tiling=True, attention_backend="native")
    tuned = load_pair(entry, options, CPU)
    assert tuned.text.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert tuned.text.vae.use_tiling
    a, b = image(plain), image(tuned)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 2, "channels-last sums in another order"


def test_options_that_cannot_be_had_are_one_line(folders: Path) -> None:
    entry = ModelEntry(name="sd3", folder=folders / "sd3")
    with pytest.raises(ConfigError, match=r"worker.attention_backend = 'no-such'"):
        load_pair(entry, WorkerSettings(attention_backend="no-such"), CPU)
    for options in (WorkerSettings(offload="model"), WorkerSettings(quantise="int8")):
        with pytest.raises(ConfigError, match="needs a GPU"):
            check_options(options, CPU)
    with pytest.raises(ConfigError, match=r"worker\.device"):
        pick_device("tpu")
