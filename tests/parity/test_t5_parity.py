"""t5.py against transformers: the encoder on random weights, and the tokenizer on a small vocabulary."""

import pytest
import sentencepiece
import torch

import t5
import tensors

transformers = pytest.importorskip("transformers", reason="the reference T5 lives in transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference on random weights, and our encoder loaded from the file that it would save."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=220, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu"
    )
    reference = transformers.T5EncoderModel(config).eval().requires_grad_(False)
    for name, p in reference.named_parameters():
        if p.ndim == 1:
            p.uniform_(0.5, 1.5)
        else:  # q and k a bit larger than usual, so that attention is far from uniform
            p.normal_(std=1.0 if "bias" in name or "shared" in name else 1.5 * p.shape[1] ** -0.5)
    path = tmp_path_factory.mktemp("t5") / "model.safetensors"
    tensors.save(path, {name: p.clone() for name, p in reference.state_dict().items()})
    return reference, t5.load_t5(path), path


@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1], [200, 130, 5], [256, 20]])
def test_our_encoder_matches_the_reference_encoder(pair, lengths):
    reference, ours, path = pair
    total = max(lengths) + 4 * (len(lengths) > 1)  # batches also with columns that are padding in every row
    ids = torch.randint(0, 220, (len(lengths), total), generator=torch.Generator().manual_seed(total))
    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    expected = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    for got in (ours(ids, mask), t5.stream_t5(path, ids, mask)):
        error = (got - expected)[mask].abs().max() / expected[mask].abs().max()
        print(f"lengths {lengths}: largest error / largest output {error:.1e}")
        assert error <= 5e-5


def test_the_reference_reads_the_file_that_we_save(pair, tmp_path):
    reference, ours, _ = pair
    t5.save_t5(ours, tmp_path / "ours.safetensors")
    w = tensors.open_weights(tmp_path / "ours.safetensors")
    state = {name: w.read(name) for name in w.shapes}
    fresh = transformers.T5EncoderModel(reference.config).eval().requires_grad_(False)
    result = fresh.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"encoder.embed_tokens.weight"}
    ids = torch.arange(10)[None]
    assert torch.equal(fresh(ids).last_hidden_state, reference(ids).last_hidden_state)


def test_buckets_match_the_reference_for_every_distance():
    distance = torch.arange(-600, 601)
    reference = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    assert torch.equal(t5.bucket(distance), reference(distance, bidirectional=True, num_buckets=32, max_distance=128))


PROMPTS = [
    "a professional female dancer dancing break in a studio with a white backdrop",
    "",
    " ",
    "  two  spaces  ",
    "new\nline\ttab\r\nend \n",
    "Tänzer naïve ﬁ ① Ｆｕｌｌ Café Cafe\u0301",
    "🕺 dance 💃🏽 🇨🇭",
    "\u200bzero\u00a0width\u2028line\u3000ideographic\ufeffbom",
    "中文字符 и русский عربى",
    "▁under a ▁ b",
    "İ ß ſ ½ ² ™ … “quotes” — dash",
    "x\x00nul\x01",
    "A" * 300,
    "dancing fox " * 300,
    "a " * 255,
    "a " * 256,
    "<extra_id_0>",
    "hi <extra_id_0> there <extra_id_99>",
    "hi<extra_id_5>there",
    "<extra_id_100> <extra_id_ <s> </S> < pad >",
    "a <pad> b<unk>c",
    "a </s> b",
    "a</s>b",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model with protobuf")
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [*PROMPTS[:1], "a man on a rooftop, captured from a front view", "Tänzer Café <0123/_>"]
        ),
        model_prefix=str(folder / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    return transformers.T5Tokenizer.from_pretrained(folder), t5.Tokenizer(folder / "spiece.model")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_our_ids_and_mask_are_those_of_the_reference(tokenizers, prompt):
    reference, ours = tokenizers
    expected = reference([prompt], padding="max_length", max_length=256, truncation=True, return_tensors="pt")
    ids, mask = ours([prompt])
    assert ids.tolist() == expected.input_ids.tolist()
    assert mask.tolist() == expected.attention_mask.bool().tolist()


def test_sentinels_come_after_the_pieces_as_in_the_reference(tokenizers):
    reference, ours = tokenizers
    assert ours.vocab_size == len(reference)
    for i in (0, 1, 50, 99):
        assert ours.ids(f"<extra_id_{i}>") == [reference.convert_tokens_to_ids(f"<extra_id_{i}>")]
