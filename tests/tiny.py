"""Tiny random weights in the official layouts and tiny videos, so that whole commands run in a test in a second."""

import numpy as np
import sentencepiece
import torch

import audio
import media
import mochi_vae
import t5
import tensors
from mochi_dit import MochiDiT

FRAMES, SIZE = 7, 16  # two latent frames of 2x2
AUDIO_DIM = 64


def make_tiny_weights(folder, seed=0, depth=2):
    """Write dit, encoder, decoder, t5/ and wav2vec2/ of a few thousand random parameters each; returns the folder."""
    torch.manual_seed(seed)
    vae = {"norm_groups": "2"}
    reductions = ((1, 4, 4), (2, 2, 2), (3, 1, 1))
    encoder = mochi_vae.Encoder((8, 8, 8, 8), (1,) * 5, reductions, (False,) * 5, 2)
    decoder = mochi_vae.Decoder((8, 8, 8, 8), (1,) * 5, reductions, 2)
    tensors.save(folder / "encoder.safetensors", encoder.state_dict(), vae)
    tensors.save(folder / "decoder.safetensors", decoder.state_dict(), vae)
    make_vocabulary(folder / "t5")
    vocab = t5.Tokenizer(folder / "t5" / "spiece.model").vocab_size
    t5.save_t5(t5.T5(vocab=vocab, width=16, depth=1, heads=2, kv=8, ffn=16), folder / "t5" / "model.safetensors")
    wav2vec2 = audio.Wav2Vec2(AUDIO_DIM, depth=1, ffn=32, heads=1, conv_widths=(8,) * 7, pos_kernel=4, pos_groups=4)
    audio.save_wav2vec2(wav2vec2, folder / "wav2vec2" / "model.safetensors")
    dit = MochiDiT(depth=depth, width=48, text_width=24, num_heads=2, text_dim=16)
    size = {"default_height": str(SIZE), "default_width": str(SIZE)}
    tensors.save(folder / "dit.safetensors", dit.state_dict(), size)
    return folder


def make_vocabulary(folder):
    """A sentencepiece vocabulary with T5's special tokens."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a professional dancer dancing break in a studio with a white backdrop"]),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )


def write_video(path, dur_s=1.0, size=SIZE, seed=0, sound=True):
    """A square that moves over coloured noise, 30 frames a second, with a tone under it; returns the path."""
    rng = np.random.default_rng(seed)
    count = round(dur_s * 30)
    frames = np.repeat(rng.integers(0, 255, (1, size, size, 3), np.uint8), count, 0)
    for i in range(count):
        frames[i, :, i % size] = 255
    tone = np.sin(np.arange(round(dur_s * 16000)) * (0.05 + 0.02 * seed)).astype(np.float32) / 2
    media.write_mp4(path, frames, 30, tone if sound else None, 16000 if sound else None)
    return path
