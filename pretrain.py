"""Make the baby weights: pre-train every network on the toy world, the video model WITHOUT music.

Concept   MusicInfuser adapts a text-to-video model that already knows how to dance but cannot hear. On a laptop that
          prior does not exist, so this command makes one, in stages that follow the real history of the big networks:
            world    render the clips (toy.py), with several captions each
            vae      encoder and decoder together: L1 + L2 + KL, on single frames and short clips
            decoder  the decoder alone, behind the frozen encoder; both are written, then every clip is encoded once
            audio    Wav2Vec2, self-supervised: predict the masked log-mel spectrogram. It never sees a beat label
            prior    T5 and the DiT, jointly: flow matching of latents given captions, no sound anywhere
            export   the rest in the official layouts, bf16
Paper     "Text-to-video models already know how to dance" (Sec. 4, v2) is what the prior is for; the paper itself
          starts from Mochi 1 and Wav2Vec2-base-960h. Sizes and recipe are ours.
Resume    every stage goes on from its last checkpoint, and a finished stage is not run again.
"""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import audio
import drawing
import mochi_vae
import t5
import tensors
import toy
from config import from_cli, make_folder, run
from mochi_dit import KEEP_FLOAT32, MochiDiT, compile_blocks
from model import MusicInfuser
from pretrain_audio import train_audio
from pretrain_fit import FRAMES, HELD_OUT, SIZE, PretrainConfig, fit, on_device, pool
from pretrain_vae import draw_latent, encode_world, export_vae, load_vae, to_frames, train_decoder, train_vae
from sample import sample
from schedule import linear_quadratic
from stages import pick_device

LONGEST = 64  # tokens of a caption that the prior reads; its own captions are shorter
PROMPT = (  # what sample.py shows when nobody says what to show
    "a professional female dancer wearing a red shirt and blue trousers dancing Pop in a studio with a white "
    "backdrop, captured from a front view"
)


# ---------------------------------------------------------------- the world


def make_world(cfg: PretrainConfig) -> tuple[np.ndarray, list[list[str]]]:
    """Render the clips once: frames (N, F, H, W, 3) uint8, mapped from disk, and four captions of each clip.

    Half of them look like AIST (a studio with a white backdrop), half like clips from the web.
    """
    path, notes = cfg.out / "world.npy", cfg.out / "world.json"
    shape = (cfg.clips, FRAMES, SIZE, SIZE, 3)
    if notes.exists():
        world = json.loads(notes.read_text())
        if world["seed"] == cfg.seed and world["clips"] == cfg.clips:
            return np.load(path, mmap_mode="r"), world["captions"]
    cfg.out.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with pool(cfg) as processes:
        made = processes.imap(partial(write_clip, path, cfg.seed), range(cfg.clips), chunksize=16)
        captions = list(tqdm(made, "world", cfg.clips, unit="clip", dynamic_ncols=True))
    notes.write_text(json.dumps({"seed": cfg.seed, "clips": cfg.clips, "captions": captions}))
    return np.load(path, mmap_mode="r"), captions


def write_clip(path: Path, seed: int, index: int) -> list[str]:
    """Render a clip to its place in the file of all frames; returns its captions."""
    frames, captions = make_clip(seed, index)
    np.load(path, mmap_mode="r+")[index] = frames
    return captions


def make_clip(seed: int, index: int) -> tuple[np.ndarray, list[str]]:
    """Frames and captions of clip number `index` of the world of this seed."""
    rng = np.random.default_rng([seed, index])
    clip = toy.sample_clip(rng, wild=index % 2 == 1)
    return toy.render(clip, FRAMES, SIZE), [toy.prior_caption(clip, rng) for _ in range(4)]


# ---------------------------------------------------------------- the prior


def baby_prior(vocab: int) -> nn.ModuleDict:
    text = t5.T5(vocab=vocab, width=64, depth=2, heads=4, kv=16, ffn=128)
    dit = MochiDiT(depth=6, width=192, text_width=48, num_heads=6, text_dim=64)
    dit.initialise(((FRAMES - 1) // 6 + 1, SIZE // 16, SIZE // 16))
    return nn.ModuleDict({"t5": text, "dit": dit})


def train_tokenizer(cfg: PretrainConfig, captions: list[list[str]]) -> t5.Tokenizer:
    """A sentencepiece model of the captions, with T5's special tokens: </s> is 1, padding 0."""
    path = cfg.out / "t5" / "spiece.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for several in captions for text in several]),
            model_prefix=str(path.with_suffix("")),
            model_type="bpe",  # whole words; the unigram model spells them, and the baby would have to learn to read
            vocab_size=512,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return t5.Tokenizer(path)


def train_prior(cfg: PretrainConfig, captions: list[list[str]], mean: Tensor, logvar: Tensor, decoder: nn.Module):
    """Flow matching: E || pred(z_sigma, sigma, c) - (z0 - eps) ||^2 with sigma = sigmoid(N(0.3, 1))."""
    torch.manual_seed(cfg.seed + 2)
    tokenizer = train_tokenizer(cfg, captions)
    networks = baby_prior(tokenizer.vocab_size).to(cfg.device)
    if cfg.compile:
        compile_blocks(networks["dit"])
    train_count = len(mean) - HELD_OUT
    ids, masks = tokenizer([text for several in captions for text in several], length=LONGEST)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        clips = torch.randint(train_count, (cfg.prior_batch,), generator=generator)
        which = torch.randint(4, (cfg.prior_batch,), generator=generator)
        kept = torch.rand(cfg.prior_batch, 1, generator=generator) >= 0.1  # caption dropout, for guidance
        mask = masks[4 * clips + which] & kept  # (B, L), on the host, where the transformer looks at it
        text = ids[4 * clips + which].to(cfg.device)
        features = networks["t5"](text, mask.to(cfg.device)).masked_fill(~mask.to(cfg.device)[..., None], 0)
        picked = clips.to(cfg.device)
        z = mochi_vae.to_dit_space(draw_latent(mean[picked].float(), logvar[picked].float(), generator))
        sigma = torch.sigmoid(0.3 + torch.randn(cfg.prior_batch, generator=generator)).to(cfg.device)
        s = sigma.view(-1, 1, 1, 1, 1)
        eps = torch.randn(z.shape, generator=on_device(generator, cfg.device), device=cfg.device)
        velocity = networks["dit"]((1 - s) * z + s * eps, sigma, features, mask)
        return F.mse_loss(velocity.float(), z - eps)

    @torch.no_grad()
    def held_out() -> float:
        """The loss on the held-out clips at fixed noise."""
        generator, losses = torch.Generator().manual_seed(0), []
        for index in range(train_count, len(mean), 16):
            z = mochi_vae.to_dit_space(mean[index : index + 16].float()).to(cfg.device)
            texts = [several[0] for several in captions[index : index + 16]]
            features, mask = t5.encode(networks["t5"], tokenizer, texts, cfg.device)
            sigma = torch.linspace(0.05, 0.95, len(z), device=cfg.device)
            s, eps = sigma.view(-1, 1, 1, 1, 1), torch.randn(z.shape, generator=generator).to(z)
            velocity = networks["dit"]((1 - s) * z + s * eps, sigma, features, mask)
            losses.append(F.mse_loss(velocity.float(), z - eps).item())
        return float(np.mean(losses))

    @torch.no_grad()
    def look() -> str:
        rows = []
        for index in range(train_count, train_count + 6):
            frames = sample_prior(networks, tokenizer, decoder, captions[index][0], seed=index)
            rows.append((frames, captions[index][0]))
        drawing.sheet(cfg.out / "prior.png", rows)
        return f"held-out loss {held_out():.4f}, see {cfg.out / 'prior.png'}"

    return fit("prior", cfg, networks, cfg.prior_steps, 2e-3, 0.998, loss_of, look)


@torch.no_grad()
def sample_prior(
    networks: nn.ModuleDict, tokenizer: t5.Tokenizer, decoder: nn.Module, caption: str, seed: int
) -> np.ndarray:
    """One clip of the prior for one caption: (F, H, W, 3) uint8."""
    features, mask = t5.encode(networks["t5"], tokenizer, [caption, ""], next(networks.parameters()).device)
    latent = (1, 12, (FRAMES - 1) // 6 + 1, SIZE // 8, SIZE // 8)
    noise = torch.randn(latent, generator=torch.Generator().manual_seed(seed)).to(features)
    text, null_text = (features[:1], mask[:1]), (features[1:], mask[1:])
    z_dit = sample(MusicInfuser(copy.deepcopy(networks["dit"])), noise, linear_quadratic(24), text, null_text, cfg=3.0)
    return to_frames(decoder(mochi_vae.to_vae_space(z_dit)))[0]


# ---------------------------------------------------------------- export, and the command


def export(cfg: PretrainConfig, encoder: audio.Wav2Vec2, prior: nn.ModuleDict) -> None:
    """Write all but the VAE in the official layouts, in bf16 but for the few tensors that stay float32."""
    islands = {name: t for name, t in prior["dit"].state_dict().items() if name.endswith(KEEP_FLOAT32)}
    for network in (encoder, prior):
        network.bfloat16()
    size = {"default_height": str(SIZE), "default_width": str(SIZE)}
    defaults = size | {"default_steps": "24", "default_cfg": "3.0", "default_prompt": PROMPT}
    tensors.save(cfg.weights / "dit.safetensors", prior["dit"].state_dict() | islands, defaults)
    audio.save_wav2vec2(encoder, cfg.weights / "wav2vec2" / "model.safetensors")
    t5.save_t5(prior["t5"], cfg.weights / "t5" / "model.safetensors")
    shutil.copyfile(cfg.out / "t5" / "spiece.model", cfg.weights / "t5" / "spiece.model")
    total = sum(file.stat().st_size for file in cfg.weights.rglob("*") if file.is_file())
    print(f"wrote {cfg.weights} ({total / 1e6:.1f} MB)")


def main() -> None:
    cfg = from_cli(PretrainConfig)
    pick_device(cfg.device)
    given = load_vae(cfg) if cfg.vae else None  # a wrong folder is told at once
    make_folder(cfg.out, "--out")
    make_folder(cfg.weights, "--weights")

    def wanted(*stages: str) -> bool:
        return cfg.stage in ("all", *stages)

    # a stage that is needed by the wanted one and finished costs no more than reading its checkpoint
    if wanted("audio", "export"):
        encoder = train_audio(cfg)
    if cfg.stage == "audio":
        return
    frames, captions = make_world(cfg)
    if wanted("vae", "decoder", "prior", "export"):
        vae = given or train_vae(cfg, frames)
    if wanted("decoder", "export"):
        vae = train_decoder(cfg, frames, vae)
        export_vae(cfg, vae)
    if wanted("prior", "export"):
        mean, logvar = encode_world(cfg, frames, vae["encoder"])
        prior = train_prior(cfg, captions, mean, logvar, vae["decoder"])
    if wanted("export"):
        export(cfg, encoder, prior)


if __name__ == "__main__":
    run(main)
