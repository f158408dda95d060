"""Image-to-image for SANA, which diffusers lacks: SDEdit in SANA's own schedule.

A subclass that shares every weight with `SanaPipeline`. The clean latent x0 = scale * E(image) is noised to the sigma
of step k = T - T * strength, by the scheduler's own forward process (flow matching: (1 - sigma) x0 + sigma eps), and
the remaining T - k steps run as usual (MoDM paper, eq. 2). Latents and timesteps stay float32 however small the
weights' type is: bfloat16 has 8 bits, so a timestep near 1000 would be off by up to 2 (the reference's error).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class SanaImg2ImgPipeline(SanaPipeline):
    """As `SanaPipeline`, starting from ``image``. Sizes are multiples of 32 pixels; no resolution binning."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(
        self,
        prompt: str,
        image: Image.Image,
        *,
        strength: float,
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        height: int = 1024,
        width: int = 1024,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
        max_sequence_length: int = 300,
        complex_human_instruction: list[str] | None = None,
    ) -> SanaPipelineOutput:
        """One image. ``complex_human_instruction`` None = the text pipeline's default; [] = none.

        Raises ValueError for a size that is no multiple of 32, or a strength that leaves no step to run.
        """
        start = num_inference_steps - int(num_inference_steps * strength)
        if not 0 <= start < num_inference_steps:
            raise ValueError(f"strength {strength} leaves no step of {num_inference_steps}")
        self.check_inputs(prompt, height, width, ["latents"], negative_prompt)
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, None, False
        device = self._execution_device
        embeds, mask = self._prompt(prompt, negative_prompt, device, max_sequence_length, complex_human_instruction)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps[start * self.scheduler.order :]
        self.scheduler.set_begin_index(start * self.scheduler.order)
        latents = self._noised(image, (width, height), timesteps[:1], generator, device)

        self._num_timesteps = len(timesteps)
        for i, t in enumerate(timesteps):
            latents = self._step(latents, t, embeds, mask)
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
        out: Any = latents
        if output_type != "latent":
            scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            out = self.image_processor.postprocess(
                self.vae.decode(scaled, return_dict=False)[0], output_type=output_type
            )
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=out)

    def _prompt(
        self, prompt: str, negative: str, device: torch.device, length: int, instruction: list[str] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if instruction is None:
            instruction = default_instruction()
        embeds, mask, negative_embeds, negative_mask = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt=negative,
            device=device,
            max_sequence_length=length,
            complex_human_instruction=instruction,
        )
        if self.do_classifier_free_guidance:
            return torch.cat([negative_embeds, embeds]), torch.cat([negative_mask, mask])
        return embeds, mask

    def _noised(
        self,
        image: Image.Image,
        size: tuple[int, int],
        timestep: torch.Tensor,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> torch.Tensor:
        width, height = size
        pixels = self.image_processor.preprocess(image.convert("RGB"), height=height, width=width)
        clean = self.vae.encode(pixels.to(device=device, dtype=self.vae.dtype)).latent.float()
        clean = clean * self.vae.config.scaling_factor
        noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=torch.float32)
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(clean, timestep, noise)
        return self.scheduler.add_noise(clean, noise, timestep)

    def _step(self, latents: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        guided, dtype = self.do_classifier_free_guidance, self.transformer.dtype
        model_input = torch.cat([latents] * 2) if guided else latents
        predicted = self.transformer(
            model_input.to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            encoder_attention_mask=mask,
            timestep=t.expand(model_input.shape[0]) * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()
        if guided:
            without, with_text = predicted.chunk(2)
            predicted = without + self.guidance_scale * (with_text - without)
        if self.transformer.config.out_channels // 2 == self.transformer.config.in_channels:
            predicted = predicted.chunk(2, dim=1)[0]  # learned sigma is not used
        return self.scheduler.step(predicted, t, latents, return_dict=False)[0]


def default_instruction() -> list[str]:
    """The instruction that `SanaPipeline` puts before every prompt."""
    import inspect

    return list(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
