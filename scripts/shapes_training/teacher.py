"""The teacher: a small SD3 pipeline whose text encoders are trained together with the transformer."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from scripts.shapes_training.data import make_pictures
from scripts.shapes_training.loop import muon_and_adamw, read_weights, run
from scripts.shapes_training.tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

PROMPT_DROPOUT = 0.1
EMA_DECAY = 0.999
WIDTH, HEADS, LAYERS = 160, 5, 4
TEXT_WIDTH = 128


class Teacher(nn.Module):
    """Transformer and text encoders under one roof, so that one state dictionary and one EMA hold both."""

    def __init__(self) -> None:
        super().__init__()
        clip = clip_tokenizer()
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=8,
        )
        clip_config = CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=TEXT_WIDTH // 2,
            intermediate_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH // 2,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
        self.clip_1 = CLIPTextModelWithProjection(clip_config)
        self.clip_2 = CLIPTextModelWithProjection(clip_config)
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer()),
                d_model=TEXT_WIDTH,
                d_kv=32,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=16,
                dropout_rate=0.0,
            )
        )

    def conditioning(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids to (embeddings [B,L,D], pooled [B,P]), as the stock pipeline's `encode_prompt`."""
        outputs = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.clip_1, self.clip_2)]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return torch.cat([clip, self.t5(t5_ids)[0]], dim=1), pooled

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity [B,8,8,8] at latents x and noise levels sigma [B]."""
        embeds, pooled = self.conditioning(clip_ids, t5_ids)
        velocity: Tensor = self.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0]
        return velocity


@dataclass(frozen=True)
class Latents:
    """x [N,8,8,8] normalised; clip_ids [N,13], t5_ids [N,12]; the empty prompt's ids, [1,13] and [1,12]."""

    x: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    blank_clip: Tensor
    blank_t5: Tensor


def token_ids(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids for CLIP and T5, padded to their full lengths."""
    clip = clip_tokenizer()(
        texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt"
    )
    t5 = t5_tokenizer()(
        texts, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
    )
    return clip.input_ids, t5.input_ids


@torch.no_grad()
def make_latents(
    vae: AutoencoderKL, count: int, seed: int, device: torch.device
) -> tuple[Latents, float, float]:
    """Encode `count` fresh pictures; returns them normalised, with shift and scale for the VAE's config."""
    pictures = make_pictures(count, seed)
    chunks = []
    for images in pictures.images.split(512):
        x = (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            chunks.append(vae.encode(x).latent_dist.mean.float().contiguous())
    x = torch.cat(chunks)
    shift, scale = float(x.mean()), float(1 / x.std())
    ids = token_ids([caption.text for caption in pictures.captions])
    return Latents((x - shift) * scale, *(i.to(device) for i in (*ids, *token_ids([""])))), shift, scale


def _noise_levels(batch: int, generator: torch.Generator) -> Tensor:
    """sigma [B]: logit-normal pushed by the scheduler's shift of 3, one in ten uniform."""
    u = torch.sigmoid(torch.randn(batch, generator=generator))
    sigma = 3 * u / (1 + 2 * u)
    uniform = torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < 0.1, uniform, sigma)


def train(
    folder: Path,
    data: Latents,
    device: torch.device,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    save_every: int = 1000,
) -> Teacher:
    """Flow matching on the latents with prompt dropout; returns the model with its EMA weights.

    Under torch.distributed every process takes its share of the same batch, and gradients are averaged.
    """
    torch.manual_seed(seed)
    model = Teacher().to(device)
    optimizers = muon_and_adamw(model, lr)
    live = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    ema = {name: value.detach().clone() for name, value in live.items()}

    def update(step: int) -> dict[str, float]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = _flow_matching_loss(
            model, data, device, torch.Generator().manual_seed(seed * 1_000_003 + step), batch
        )
        loss.backward()
        _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), list(live.values()), 1 - decay)
        return {"loss": loss.item()}

    run(folder, model, optimizers, update, steps, warmup=500, extra=ema, save_every=save_every)
    model.load_state_dict(ema, strict=False)
    return model.eval()


def load(folder: Path) -> tuple[Teacher, int]:
    """The teacher of a training folder, averaged weights, on the CPU, and its step. DataError without one."""
    model = Teacher()
    step, weights = read_weights(folder, "extra")
    buffers = {name for name, value in model.state_dict().items() if not value.is_floating_point()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= buffers and not unexpected, (missing, unexpected)
    return model.eval(), step


def _flow_matching_loss(
    model: Teacher, data: Latents, device: torch.device, generator: torch.Generator, batch: int
) -> Tensor:
    """Mean squared error of the velocity on this process's share of a random batch."""
    index = torch.randint(len(data.x), (batch,), generator=generator)
    sigma = _noise_levels(batch, generator)
    noise = torch.randn((batch, 8, 8, 8), generator=generator)
    dropped = torch.rand(batch, generator=generator) < PROMPT_DROPOUT
    mine = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
    index, sigma, noise, dropped = (t[mine].to(device) for t in (index, sigma, noise, dropped))
    x0 = data.x[index]
    clip_ids = torch.where(dropped[:, None], data.blank_clip, data.clip_ids[index])
    t5_ids = torch.where(dropped[:, None], data.blank_t5, data.t5_ids[index])
    level = sigma[:, None, None, None]
    # on CPU the fused bfloat16 attention is ten times slower than the plain one at this size
    backends = (
        [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(backends):
        velocity = model((1 - level) * x0 + level * noise, sigma, clip_ids, t5_ids)
    loss: Tensor = (velocity.float() - (noise - x0)).square().mean()
    return loss


def _average_gradients(model: Teacher) -> None:
    """One all-reduce of every gradient, laid end to end."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def to_pipeline(model: Teacher, vae: AutoencoderKL, shift: float, scale: float) -> StableDiffusion3Pipeline:
    """The stock pipeline around the trained parts; the VAE's config carries the latents' shift and scale."""
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=model.clip_1,
        tokenizer=clip_tokenizer(),
        text_encoder_2=model.clip_2,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=model.t5,
        tokenizer_3=t5_tokenizer(),
    )
