"""Dance to music: the ODE of Eq. (2) by Euler steps, with guidance; and the command that makes an mp4 of it.

Concept   start from noise, follow the velocity of the model from sigma = 1 to 0, decode the latent into frames.
          Guidance adds differences of velocities: with and without the prompt (CFG), a block (layer skip), the music.
Paper     arXiv 2503.14505v2, Eq. (2) ODE, Eq. (3) CFG, Eq. (4) layer-skip guidance, Sec. 5.1 (CFG scale 6), Fig. 7
          (speed of the music). In flow coordinates (see schedule.py) D - x is proportional to the velocity, so that
          each equation keeps its form with velocities in place of (D - x) / s.
Differs   the published code crops the music at a random place: ours starts at 0 or at --start.
          In the published code the unconditional pass hears the music too, so CFG amplifies the prompt only; an adapter
          whose header says null_audio = drop leaves the music out there, so that CFG amplifies both.
          Music guidance is ours: Eq. (3) once more, with the music alone taken away.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import audio
import mochi_vae
from check import ADAPTER, DECODER, Files, check_networks, find_files, made_for
from config import UserError, check_frames, flag, from_cli, run
from mochi_dit import compile_blocks
from model import NULL_AUDIO, Condition, MusicInfuser, load_musicinfuser
from schedule import linear_quadratic
from stages import (
    Text,
    check_output,
    encode_music,
    encode_text,
    join_others,
    load_latents,
    read_section,
    save_latents,
    stage,
    write_video,
)


@torch.no_grad()
def sample(
    m: MusicInfuser,
    noise: Tensor,
    sigmas: Sequence[float],
    text: Text,
    null_text: Text,
    audio: Tensor | None = None,
    null_audio: str | None = None,
    cfg: float = 6.0,
    skip_layers: Collection[int] = (),
    skip_scale: float = 0.0,
    music_scale: float = 1.0,
    rescale: float = 0.0,
    progress: bool = False,
    side_by_side: bool = False,
) -> Tensor:
    """Noise (B, C, T, H, W) -> z_dit (B, C, T, H, W) float32, by Euler steps along `sigmas`, from 1 to 0.

        dz/dsigma = -v                                                   Eq. (2)
        v = cfg v(z | c, a) + (1 - cfg) v(z)                             Eq. (3)
        v = v + skip_scale (v(z | c, a) - v_skip(z | c, a))              Eq. (4)
        v = v + (music_scale - 1) (v(z | c, a) - v(z | c))               Eq. (3) for the music alone
        v = v (rescale std(v(z | c, a)) / std(v) + 1 - rescale)          std over one sample

    text, null_text          features (B, L, F) and mask (B, L) of the prompt and of the empty prompt
    audio                    (B, A, audio_dim) or None
    null_audio               does v(z) hear the music: "keep" yes, "drop" no, None as the adapter was made for
    cfg                      1 runs no unconditional pass
    skip_layers, skip_scale  v_skip passes these blocks by; 0 runs no such pass
    music_scale              1 runs no pass without the music
    rescale                  in [0, 1]: how much of the spread that guidance adds is taken back
    side_by_side             share the passes of a step among the processes of torch.distributed; all return the same z
    """
    if null_audio is None:
        null_audio = m.adapters.null_audio if m.adapters else "keep"
    z = noise.float()
    grid = m.dit.grid_of(z)
    # what no noise level changes, once: text, music, positions
    rope, levels = m.dit.embed_positions(grid), torch.tensor(sigmas, device=z.device)
    given = m.condition(*text, audio, grid[0])  # c, a
    passes = {"given": (given, ())}
    if cfg != 1:
        passes["empty"] = m.condition(*null_text, audio if null_audio == "keep" else None, grid[0]), ()
    if skip_scale and skip_layers:
        passes["skipped"] = given, skip_layers
    if music_scale != 1 and given.heard:
        passes["deaf"] = given._replace(heard={}), ()  # c
    for i in tqdm(range(len(sigmas) - 1), "sampling", disable=not progress):
        told = velocities(m, z, levels[i].expand(len(z)), rope, passes, side_by_side)
        v = conditional = told["given"]
        if "empty" in told:
            v = cfg * conditional + (1 - cfg) * told["empty"]  # Eq. (3)
        if "skipped" in told:
            v = v + skip_scale * (conditional - told["skipped"])  # Eq. (4)
        if "deaf" in told:
            v = v + (music_scale - 1) * (conditional - told["deaf"])
        if rescale:
            v = v * (rescale * spread(conditional) / spread(v) + 1 - rescale)
        z = z + (sigmas[i] - sigmas[i + 1]) * v  # Eq. (2)
    return z


def velocities(
    m: MusicInfuser,
    z: Tensor,
    level: Tensor,
    rope: Tensor,
    passes: dict[str, tuple[Condition, Collection[int]]],
    side_by_side: bool,
) -> dict[str, Tensor]:
    """{name: velocity (B, C, T, H, W) float32} of all passes, each a condition and the blocks that it skips."""
    if not side_by_side:
        return {name: m.velocity(z, level, given, rope, skip).float() for name, (given, skip) in passes.items()}
    rank, world, told = dist.get_rank(), dist.get_world_size(), {}
    for k, (name, (given, skip)) in enumerate(passes.items()):
        mine = k % world == rank
        v = m.velocity(z, level, given, rope, skip).float() if mine else torch.empty_like(z)
        told[name] = v.contiguous()  # what is broadcast is memory
    for k, name in enumerate(told):
        dist.broadcast(told[name], src=k % world)
    return told


def spread(v: Tensor) -> Tensor:
    """Standard deviation of each sample of a batch, (B, 1, 1, 1, 1)."""
    return v.std((1, 2, 3, 4), keepdim=True)


def null_of(text: Text) -> Text:
    """The empty prompt in the shape of `text`: features zero, mask all False."""
    features, mask = text
    return torch.zeros_like(features), torch.zeros_like(mask)


# ------------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class SampleConfig:
    """Make a video that dances to a piece of music: an mp4 with the music on it, and a filmstrip of it as a PNG.

    With torchrun --nproc_per_node=N the samples are divided among N devices; two of them share the passes of one."""

    audio: Path = flag(help="music: any audio file, or a video with sound")
    prompt: str | None = flag(None, help="what to show (default: what the weights were made for)")
    weights: Path = flag(Path("weights/baby"), help="folder of checkpoints: dit.safetensors, t5, ...")
    adapter: Path | None = flag(ADAPTER, help="file, sought in --weights first; none: deaf")
    out: Path | None = flag(None, help="mp4 to write (default: out/AUDIO_SEED.mp4)")
    num_samples: int = flag(1, help="videos, with consecutive seeds; above 1 they are called OUT_SEED.mp4")
    batch: int = flag(1, help="videos to sample at once")
    frames: int = flag(73, help="video frames, 1 + 6k, at 30 a second")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for, else 64)")
    cfg: float | None = flag(None, help="classifier-free guidance scale (default: of the weights, else 6)")
    null_audio: str | None = flag(
        None, help="keep or drop the music in the unconditional pass (default: as the adapter was made for)"
    )
    music_scale: float = flag(1.0, help="guidance scale of the music alone; 1: none")
    skip_layer: str | None = flag(None, help="block left out for layer-skip guidance, or several: 3,4")
    skip_scale: float = flag(1.0, help="scale of layer-skip guidance, with --skip-layer")
    rescale: float = flag(0.0, help="share of the contrast added by guidance that is taken back, 0 to 1")
    seed: int = flag(0, help="of the noise: another seed, another dance")
    start: float = flag(0.0, help="second of the music to start at")
    speed: float = flag(1.0, help="play the music this many times as fast, 0.25 to 4")
    height: int | None = flag(None, help="pixels, a multiple of 16 (default: of the weights, else 480)")
    width: int | None = flag(None, help="pixels, a multiple of 16 (default: of the weights, else 848)")
    latents: Path | None = flag(
        None, help="decode these again: what an earlier run left beside its mp4, with its music"
    )
    compile: bool = flag(False, help="compile the transformer's blocks first: a minute, then faster on a GPU")
    device: str | None = flag(None, help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")

    def __post_init__(self):
        check_frames(self.frames)
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and (pixels < 16 or pixels % 16):
                raise UserError(f"--{name} {pixels}: expected a multiple of 16; use {max(16, pixels // 16 * 16)}")
        for name in ("steps", "num_samples", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if not 0.25 <= self.speed <= 4:
            raise UserError(f"--speed {self.speed}: expected 0.25 to 4 times as fast; 1 leaves the music alone")
        if not 0 <= self.start < math.inf:
            raise UserError(f"--start {self.start}: expected seconds from the beginning of the music, 0 or more")
        for name in ("cfg", "skip_scale", "music_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a finite number")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"--rescale {self.rescale}: expected a share, 0 to 1")
        if self.null_audio not in (None, *NULL_AUDIO):
            raise UserError(f"--null-audio {self.null_audio}: expected {' or '.join(NULL_AUDIO)}")
        if not 0 <= self.seed < 2**63 - self.num_samples:
            raise UserError(f"--seed {self.seed}: expected 0 to 2^63 - 1")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16 (float16 overflows in T5)")
        if self.out is not None and self.out.suffix != ".mp4":
            raise UserError(f"--out {self.out}: expected a name that ends in .mp4")
        self.skip_layers()

    def skip_layers(self) -> tuple[int, ...]:
        """--skip-layer as block numbers."""
        try:
            return tuple(int(i) for i in self.skip_layer.split(",")) if self.skip_layer is not None else ()
        except ValueError as error:
            raise UserError(f"--skip-layer {self.skip_layer}: expected block numbers such as 3 or 3,4") from error

    def outputs(self) -> dict[int, Path]:
        """{seed: mp4} of every video."""
        out, seeds = self.out or Path("out") / f"{self.audio.stem}.mp4", range(self.seed, self.seed + self.num_samples)
        if self.out and self.num_samples == 1:
            return {self.seed: out}
        return {seed: out.with_name(f"{out.stem}_{seed}.mp4") for seed in seeds}


def dance(
    args: SampleConfig,
    files: Files,
    heard: Tensor,
    videos: dict[int, Path],
    device: torch.device,
    dtype: torch.dtype,
    side_by_side: bool = False,
) -> None:
    """Text, music, sampling, one network in memory after the other: {seed: mp4} -> the latents beside each mp4."""
    with stage("text", device, "try --device cpu"):
        text = encode_text(files, [args.prompt], device, dtype)
    with stage("music", device, "take fewer --frames, or --device cpu"):
        music = encode_music(files, heard, args.frames, device) if files.adapter else None
    shape, seeds = (12, (args.frames - 1) // 6 + 1, args.height // 8, args.width // 8), list(videos)
    small = "take fewer --frames, a smaller --height and --width, a smaller --batch, or --dtype bfloat16"
    with stage("sample", device, small):
        m = load_musicinfuser(files.dit, files.adapter, device=device, dtype=dtype)
        m.merge()
        if args.compile:
            compile_blocks(m.dit)
        for some in (seeds[k : k + args.batch] for k in range(0, len(seeds), args.batch)):
            draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in some]
            noise = torch.stack(draws).to(device)  # drawn one by one on the CPU: the same in any batch, on any device
            words = text[0].expand(len(some), -1, -1), text[1].expand(len(some), -1)
            sound = None if music is None else music.expand(len(some), -1, -1)
            guidance = args.null_audio, args.cfg, args.skip_layers(), args.skip_scale, args.music_scale, args.rescale
            z = sample(
                m, noise, linear_quadratic(args.steps), words, null_of(words), sound, *guidance,
                progress=True, side_by_side=side_by_side,
            )  # fmt: skip
            if not z.isfinite().all():
                raise UserError("the sampler left the range of numbers; use a smaller --cfg, or --dtype float32")
            for seed, one in zip(some, z.split(1)):  # before decoding: a decode that fails loses nothing
                if not side_by_side or dist.get_rank() == 0:
                    save_latents(latents_of(videos[seed]), one, asdict(replace(args, seed=seed)))
                    print(f"wrote      {latents_of(videos[seed])}", flush=True)


def latents_of(video: Path) -> Path:
    """Where the latents of an mp4 are kept."""
    return video.with_suffix(".latents.safetensors")


def share(args: SampleConfig, rank: int, world: int) -> tuple[dict[int, Path], bool]:
    """This process's part of {seed: mp4}, and whether two processes make one video side by side."""
    videos = args.outputs()
    if world == 2 and len(videos) == 1:
        return videos, True
    if world > len(videos):
        raise UserError(f"--num-samples {len(videos)}: fewer than the {world} processes; give at least {world}")
    return {seed: videos[seed] for seed in list(videos)[rank::world]}, False


def main() -> None:
    args = from_cli(SampleConfig)
    # everything that can be wrong is found out first
    rank, world, device = join_others(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.latents:
        args, decoder = replace(args, **load_latents(args.latents)[1]), DECODER.find(args.weights)
        mochi_vae.load_decoder(decoder, "meta")
        name = args.latents.name.removesuffix(".safetensors").removesuffix(".latents")
        videos, side_by_side = {args.seed: args.out or args.latents.with_name(f"{name}.mp4")}, world > 1
    else:
        files = find_files(args.weights, args.adapter)
        checked, decoder = check_networks(files), files.decoder
        depth = len(checked.dit.blocks)
        if any(not 0 <= layer < depth for layer in args.skip_layers()):
            raise UserError(f"--skip-layer {args.skip_layer}: expected 0 to {depth - 1}")
        args = replace(args, **{k: value for k, value in made_for(files.dit).items() if getattr(args, k) is None})
        videos, side_by_side = share(args, rank, world)
    dur_s = audio.clip_samples(args.frames) / audio.SR_HZ  # of the music that the model hears: a little more than shown
    heard = read_section(args.audio, audio.SR_HZ, args.start, dur_s, args.speed)
    audio.prepare(heard, args.frames)
    for video in videos.values():
        check_output(video)

    end_s = args.start + len(heard) / audio.SR_HZ * args.speed
    silence_s = dur_s - len(heard) / audio.SR_HZ
    print(f"music      {args.audio}, {args.start:.2f} to {end_s:.2f} s" + f", at {args.speed:g}x" * (args.speed != 1))
    if silence_s > 0.5 / audio.SR_HZ:
        print(f"           it ends {silence_s:.2f} s before the clip does: silence from there on")
    print(f"prompt     {args.prompt}")
    print(f"video      {args.frames} frames of {args.width}x{args.height}, 30 a second")
    if not args.latents:
        print(f"weights    {files.dit} with {files.adapter or 'no adapter: it does not hear the music'}")
        print(f"sampler    {args.steps} steps, cfg {args.cfg:g}, seed {', '.join(map(str, videos))}")
        dance(args, files, heard, videos, device, dtype, side_by_side)
    for video in videos.values() if not side_by_side or rank == 0 else ():
        write_video(args.latents or latents_of(video), args.audio, video, decoder, device, dtype)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
