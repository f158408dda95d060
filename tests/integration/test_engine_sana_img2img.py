"""SANA image-to-image against a straight-line implementation that shares no code with it but the networks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from workers.architectures import build
from workers.sana_img2img import SanaImg2ImgPipeline

STEPS, SKIPPED, SEED, GUIDANCE = 8, 3, 11, 4.5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.fixture(scope="module")
def pipeline() -> SanaImg2ImgPipeline:
    text = build("sana", seed=3)
    made = SanaImg2ImgPipeline(**text.components)
    made.set_progress_bar_config(disable=True)
    return made


def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    return Image.fromarray(
        np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], -1)
    )


@torch.no_grad()
def straight_line(pipe: SanaImg2ImgPipeline, prompt: str, image: Image.Image) -> torch.Tensor:
    """The final latent by DPM-Solver++(2M) in the flow parametrisation, written out: x = (1 - s) x0 + s eps."""
    # Schedule: T + 1 even fractions from 1 to 1/1000, shifted by 3, the last dropped for exact 0.
    even = np.linspace(1.0, 1 / 1000, STEPS + 1)
    sigma = 1.0 - even
    sigma = np.flip(3.0 * sigma / (1 + 2.0 * sigma))[:-1]
    times = (sigma * 1000).astype(np.int64)
    sigma = np.append(sigma, 0.0).astype(np.float32)

    # Text: tokens of instruction and prompt, then of the empty negative, padded on the right.
    from workers.sana_img2img import default_instruction

    chi = "\n".join(default_instruction())
    length = len(pipe.tokenizer.encode(chi)) + 300 - 2
    kept = [0, *range(-300 + 1, 0)]

    def encode(text: str, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = pipe.tokenizer(text, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
        return pipe.text_encoder(out.input_ids, attention_mask=out.attention_mask)[0], out.attention_mask

    embeds, mask = encode(chi + prompt.lower().strip(), length)
    embeds, mask = embeds[:, kept], mask[:, kept]
    empty, empty_mask = encode("", 300)

    # Image to latent, noise from the same generator.
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    clean = pipe.vae.encode(pixels).latent * 0.41407
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))
    x = (1 - sigma[SKIPPED]) * clean + sigma[SKIPPED] * noise

    previous: torch.Tensor | None = None
    for i in range(SKIPPED, STEPS):
        t = torch.full((1,), float(times[i]))
        guided = pipe.transformer(x, embeds, t, encoder_attention_mask=mask, return_dict=False)[0]
        free = pipe.transformer(x, empty, t, encoder_attention_mask=empty_mask, return_dict=False)[0]
        x0 = x - sigma[i] * (free + GUIDANCE * (guided - free))
        if i == STEPS - 1:
            return x0  # at sigma 0 the first-order step is the prediction itself
        lam = [
            np.log((1 - s) / s) for s in (sigma[i - 1] if previous is not None else sigma[i], sigma[i], sigma[i + 1])
        ]
        h = lam[2] - lam[1]
        change = (1 - sigma[i + 1]) * np.expm1(-h)
        new = (sigma[i + 1] / sigma[i]) * x - change * x0
        if previous is not None:
            new = new - 0.5 * change * (x0 - previous) * (h / (lam[1] - lam[0]))
        x, previous = new, x0
    raise AssertionError("unreachable")


def refine(pipe: SanaImg2ImgPipeline, prompt: str, strength: float, **extra: object) -> torch.Tensor:
    out = pipe(
        prompt, picture(), strength=strength, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=64, width=64,
        generator=torch.Generator().manual_seed(SEED), output_type="latent", **extra,
    )  # fmt: skip
    return torch.as_tensor(out.images)


def test_it_equals_the_straight_line(pipeline: SanaImg2ImgPipeline) -> None:
    steps: list[int] = []

    def count(pipe: object, i: int, t: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(i)
        assert kwargs["latents"].dtype == torch.float32
        return kwargs

    ours = refine(pipeline, "a red fox", 1 - SKIPPED / STEPS, callback_on_step_end=count)
    theirs = straight_line(pipeline, "a red fox", picture())
    assert steps == list(range(STEPS - SKIPPED))
    assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-3), float((ours - theirs).abs().max())
    assert float((ours - refine(pipeline, "a blue cat", 1 - SKIPPED / STEPS)).abs().max()) > 1e-3, "the prompt matters"


def test_strength_that_leaves_no_step_is_refused(pipeline: SanaImg2ImgPipeline) -> None:
    with pytest.raises(ValueError, match="leaves no step"):
        refine(pipeline, "a fox", 0.05)
