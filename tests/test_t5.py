"""Tokenizer rules, bias buckets, padding that nothing sees, streaming, files and refusals of t5.py."""

import json
import math
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

import t5
import tensors
from config import UserError

SENTENCES = [
    "a professional female dancer dancing break in a studio with a white backdrop",
    "a man dancing on a rooftop at sunset, captured from a front view",
    "the quick brown fox jumps over the lazy dog 0123456789 <extra_id_0> </s>",
]
MANIFEST = Path(__file__).parent / "manifests" / "t5_v1_1_xxl_encoder.json"


def train_vocabulary(folder, **ids):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | ids),
    )
    return folder / "spiece.model"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return t5.Tokenizer(train_vocabulary(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = t5.T5(vocab=220, width=24, depth=3, heads=3, kv=8, ffn=40).eval().requires_grad_(False)
    torch.nn.init.normal_(model.bias.weight)  # a bias large enough to matter
    return model


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "model.safetensors"
    t5.save_t5(model, path)
    return path


def ids_and_mask(lengths, total, seed=0):
    ids = torch.randint(3, 220, (len(lengths), total), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(total) < torch.tensor(lengths)[:, None]


# ---------------------------------------------------------------- tokenizer


def test_every_prompt_ends_with_eos_then_padding(tok):
    ids, mask = tok(["a dancer", "a professional dancer dancing"], length=30)
    for row, seen in zip(ids, mask):
        n = int(seen.sum())
        assert seen[:n].all() and row[n - 1] == 1 and (row[:n] > 0).all() and not row[n:].any()
    assert ids.shape == mask.shape == (2, 30) and ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_ids_are_sentencepiece_ids_for_text_without_special_tokens(tok):
    for text in [
        "a dancer",
        "Tänzer naïve ﬁ",
        "🕺 dance 💃🏽",
        "中文",
        "e\u0301",
        "\u00a0x\u200b",
        "x\x00y",
        "<s> <extra_id_100>",
    ]:
        assert tok.ids(text) == tok.pieces.encode(text), text


def test_a_long_prompt_is_cut_to_255_ids_and_eos(tok):
    ids, mask = tok(["dancing fox " * 300])
    assert ids.shape == (1, 256) and mask.all() and ids[0, -1] == 1
    assert ids[0, :-1].tolist() == tok.ids("dancing fox " * 300)[:255]


def test_a_prompt_of_exactly_255_ids_is_not_cut(tok):
    text = "a " * 255
    assert len(tok.ids(text)) == 255
    assert tok([text])[0][0].tolist() == [*tok.ids(text), 1]


def test_empty_and_blank_prompts_are_eos_alone(tok):
    for text in ["", " ", "\n\t  "]:
        ids, mask = tok([text], length=4)
        assert ids.tolist() == [[1, 0, 0, 0]] and mask.tolist() == [[True, False, False, False]]


def test_newlines_and_runs_of_spaces_count_as_one_space(tok):
    assert tok.ids("  a\n\n dancer\t on   a rooftop ") == tok.ids("a dancer on a rooftop")


def test_names_of_special_tokens_in_a_prompt_become_these_tokens(tok):
    top = len(tok.pieces) + 100
    assert tok.vocab_size == top
    assert tok.ids("<pad>") == [0] and tok.ids("</s>") == [1] and tok.ids("<unk>") == [2]
    assert [tok.ids(f"<extra_id_{i}>") for i in (0, 7, 99)] == [[top - 1], [top - 8], [top - 100]]
    assert tok.ids("a</s>fox") == [*tok.ids("a"), 1, *tok.ids("fox")]


def test_unfinished_and_unknown_names_of_special_tokens_stay_text(tok):
    for text in ["<extra_id_100>", "<extra_id_07>", "fox<extra_id_100>fox", "</S>", "< pad >", "<s>", "<extra_id_"]:
        assert tok.ids(text) == tok.pieces.encode(text)


def test_eos_is_not_doubled_when_the_prompt_ends_with_one(tok):
    assert tok(["fox</s>"], length=20)[1].sum() == tok(["fox"], length=20)[1].sum()


def test_a_prompt_that_is_no_utf8_is_refused(tok):
    with pytest.raises(UserError, match="UTF-8"):
        tok(["a \udcff dancer"])


def test_a_missing_or_broken_or_foreign_vocabulary_is_refused(tmp_path, capfd):
    with pytest.raises(UserError, match="no such file"):
        t5.Tokenizer(tmp_path / "spiece.model")
    (tmp_path / "broken.model").write_bytes(b"not a vocabulary")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        t5.Tokenizer(tmp_path / "broken.model")
    with pytest.raises(UserError, match="not a T5 vocabulary"):
        t5.Tokenizer(train_vocabulary(tmp_path, pad_id=3, eos_id=2, unk_id=0, bos_id=1))
    capfd.readouterr()


# ---------------------------------------------------------------- encode


def test_trimmed_features_equal_those_of_prompts_padded_to_256(model, tok):
    prompts = ["a dancer", "a man dancing on a rooftop at sunset", "fox"]
    features, mask = t5.encode(model, tok, prompts)
    full_ids, full_mask = tok(prompts)
    full = model(full_ids, full_mask)[:, : mask.shape[1]]
    assert mask.shape[1] == mask.sum(1).max() < 60
    assert torch.equal(mask, full_mask[:, : mask.shape[1]])
    assert (features - full)[mask].abs().max() <= 1e-5 * full.abs().max()


def test_features_are_zero_where_the_mask_is_false(model, tok):
    features, mask = t5.encode(model, tok, ["a dancer", "a man dancing on a rooftop at sunset"])
    assert not mask.all() and not features[~mask].any() and features[mask].abs().amin(-1).max() > 0


def test_empty_prompt_has_zero_features_and_a_mask_all_false(model, tok):
    features, mask = t5.encode(model, tok, ["a dancer", ""])
    assert not mask[1].any() and not features[1].any() and mask[0].any()
    features, mask = t5.encode(model, tok, ["", ""])
    assert features.shape == (2, 1, 24) and not mask.any() and not features.any()


def test_encode_lets_gradients_through(tok):
    torch.manual_seed(0)
    fresh = t5.T5(vocab=tok.vocab_size, width=16, depth=1, heads=2, kv=8, ffn=16)
    t5.encode(fresh, tok, ["a dancer", ""])[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in fresh.parameters())


def test_encode_accepts_a_function_that_streams(model, tok, path):
    features, mask = t5.encode(lambda ids, mask: t5.stream_t5(path, ids, mask), tok, ["a dancer"])
    assert torch.equal(features, t5.encode(model, tok, ["a dancer"])[0])


# ---------------------------------------------------------------- encoder


def test_bucket_table_is_exact_near_and_logarithmic_far():
    distance = torch.tensor(
        [0, -1, -7, -8, -15, -16, -22, -23, -32, -64, -127, -128, -5000, 1, 7, 8, 16, 127, 128, 9999]
    )
    rows = [0, 1, 7, 8, 9, 10, 10, 11, 12, 14, 15, 15, 15, 17, 23, 24, 26, 31, 31, 31]
    assert t5.bucket(distance).tolist() == rows
    for d in range(8, 128):  # the formula, in double precision away from the exact edges of a bucket
        row = 8 + math.log(d / 8) / math.log(128 / 8) * 8
        if abs(row - round(row)) > 1e-4:
            assert t5.bucket(torch.tensor(-d)) == math.floor(row)


def test_rms_norm_divides_by_the_root_mean_square_without_removing_the_mean():
    norm = t5.RMSNorm(4)
    torch.nn.init.constant_(norm.weight, 3.0)
    x = torch.tensor([[1.0, 1.0, 1.0, 5.0]])
    assert torch.allclose(norm(x), 3 * x / math.sqrt(7 + 1e-6))


def test_padding_is_invisible_to_the_other_tokens(model):
    ids, mask = ids_and_mask([5, 9], 9)
    other = torch.where(mask, ids, 3)
    assert not torch.equal(ids, other)
    assert torch.equal(model(ids, mask)[mask], model(other, mask)[mask])


def test_rows_without_valid_tokens_and_their_gradients_are_finite_also_under_autocast(model):
    ids, mask = ids_and_mask([0, 3], 6)
    assert model(ids, mask).isfinite().all()
    torch.manual_seed(0)
    fresh = t5.T5(vocab=220, width=24, depth=2, heads=3, kv=8, ffn=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = fresh(ids, mask)
    features.float().square().sum().backward()
    assert features.isfinite().all() and all(p.grad.isfinite().all() for p in fresh.parameters())
    assert fresh.bfloat16()(ids, mask).isfinite().all()
    assert torch.tensor(t5.HIDDEN).bfloat16().isfinite()  # whatever a kernel does with rows of -inf


def test_order_of_tokens_matters(model):
    ids, mask = ids_and_mask([6], 6)
    assert (model(ids, mask).flip(1) - model(ids.flip(1), mask)).abs().max() > 1e-2


def test_bfloat16_stays_near_float32(model, path):
    ids, mask = ids_and_mask([12], 12)
    exact, rough = model(ids, mask), t5.load_t5(path, dtype=torch.bfloat16)(ids, mask)
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_norms_of_bfloat16_input_are_computed_in_float32():
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)  # a bfloat16 running sum of squares would stop at 256
    assert torch.allclose(t5.RMSNorm(4096).bfloat16()(x).float(), torch.ones(4096), atol=1e-2)
    assert t5.RMSNorm(2)(torch.tensor([[300.0, 300.0]]).bfloat16()).tolist() == [[1.0, 1.0]]


# ---------------------------------------------------------------- files


def test_saved_and_loaded_model_is_the_same(model, path):
    ids, mask = ids_and_mask([5, 9], 9)
    loaded = t5.load_t5(path)
    assert torch.equal(loaded(ids, mask), model(ids, mask))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_encoder_equals_whole_encoder_exactly(path, dtype):
    ids, mask = ids_and_mask([4, 140], 140)
    streamed = t5.stream_t5(path, ids, mask, dtype=dtype)
    assert streamed.dtype == dtype and not streamed.requires_grad
    assert torch.equal(streamed, t5.load_t5(path, dtype=dtype)(ids, mask))


def test_streaming_holds_the_weights_of_one_part_at_a_time(path, monkeypatch):
    held = []
    forward = t5.Block.forward

    def watch(block, x, bias):
        held.append(block)
        real = [b for b in held if any(not p.is_meta for p in b.parameters())]
        assert real == [block]
        return forward(block, x, bias)

    monkeypatch.setattr(t5.Block, "forward", watch)
    t5.stream_t5(path, *ids_and_mask([4], 4))
    assert len(held) == 3 and all(p.is_meta for p in held[-1].parameters())


def test_streaming_reads_only_the_rows_of_the_embedding_that_the_prompts_use(path, monkeypatch):
    taken = {}
    read = tensors.Weights.read

    def watch(w, name, *arguments):
        tensor = read(w, name, *arguments)
        taken[name] = len(tensor)
        return tensor

    monkeypatch.setattr(tensors.Weights, "read", watch)
    ids = torch.tensor([[7, 9, 7, 1], [9, 9, 1, 0]])
    t5.stream_t5(path, ids, ids > 0)
    assert taken["shared.weight"] == 4 and taken["encoder.block.0.layer.0.SelfAttention.q.weight"] == 24


def test_decoder_and_copies_of_the_embedding_are_left_unread(model, path, tmp_path):
    w = tensors.open_weights(path)
    state = {name: w.read(name) for name in w.shapes}
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2)}
    copy = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    ids, mask = ids_and_mask([5], 5)
    expected = model(ids, mask)
    tensors.save(tmp_path / "full.safetensors", state | extra | copy)
    assert torch.equal(t5.load_t5(tmp_path / "full.safetensors")(ids, mask), expected)
    del state["shared.weight"]
    tensors.save(tmp_path / "renamed.safetensors", state | copy)
    assert torch.equal(t5.load_t5(tmp_path / "renamed.safetensors")(ids, mask), expected)
    assert torch.equal(t5.stream_t5(tmp_path / "renamed.safetensors", ids, mask), expected)


def test_a_folder_of_shards_loads_and_streams(model, path, tmp_path):
    w = tensors.open_weights(path)
    names = sorted(w.shapes)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, file in enumerate(files):
        tensors.save(tmp_path / file, {name: w.read(name) for name in names[i::2]})
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ids, mask = ids_and_mask([5], 5)
    assert torch.equal(t5.load_t5(tmp_path)(ids, mask), model(ids, mask))
    assert torch.equal(t5.stream_t5(tmp_path, ids, mask), model(ids, mask))


def test_official_size_has_exactly_the_published_names_and_shapes():
    published = {name: tuple(shape) for name, (shape, _) in json.loads(MANIFEST.read_text())["tensors"].items()}
    with torch.device("meta"):
        model = t5.T5(vocab=32128, width=4096, depth=24, heads=64, kv=64, ffn=10240)
    assert {t5.official_name(name): tuple(p.shape) for name, p in model.state_dict().items()} == published


def test_float16_is_refused(path):
    with pytest.raises(UserError, match="overflows in float16: use bfloat16 or float32"):
        t5.load_t5(path, dtype=torch.float16)
    with pytest.raises(UserError, match="overflows in float16"):
        t5.stream_t5(path, *ids_and_mask([4], 4), dtype=torch.float16)


def test_a_file_that_is_not_a_t5_is_refused_with_names(path, tmp_path):
    tensors.save(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    with pytest.raises(UserError, match="not a T5 v1.1 encoder.*relative_attention_bias"):
        t5.load_t5(tmp_path / "x.safetensors")
    w = tensors.open_weights(path)
    state = {name: w.read(name) for name in w.shapes}
    gone = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    del state[gone]
    tensors.save(tmp_path / "y.safetensors", state | {"stray": torch.ones(1)})
    for read in (t5.load_t5, lambda file: t5.stream_t5(file, *ids_and_mask([4], 4))):
        with pytest.raises(UserError, match=f"missing: {gone}.*unexpected: stray"):
            read(tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="no such"):
        t5.load_t5(tmp_path / "nowhere")
    shutil.copy(path, tmp_path / "z.safetensors")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors.save(tmp_path / "z.safetensors", state | {gone: torch.ones(24, 40), bias: torch.ones(32, 5)})
    with pytest.raises(UserError, match="queries of width 24 do not divide into 5 heads"):
        t5.load_t5(tmp_path / "z.safetensors")
