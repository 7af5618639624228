"""Text encoders against plain transformers calls, one text at a time, on tiny random models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from encoding import text_features
from tiny_models import BERT_SHAPE, BERT_VOCABULARY, BERT_WORDS, bert_tokenizer, save_transformer
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizerFast,
    T5Config,
    T5Model,
)

from feats.encoders import huggingface_text as hf_text_encoder
from feats.encoders.base import Encoder
from feats.encoders.registry import load_encoder
from feats.encoders.weights import sha256_of
from feats.errors import UsageError

TEXTS = ["a good day", "", "the very very bad movie of the rain and the sun it is", "love", "we hate 🙂 it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders: bert, bert-mlm (no pooler), shallow (2 layers), roberta, gpt2, t5, vision."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    of_bert = bert_tokenizer(root)
    config = {"vocab_size": len(BERT_VOCABULARY), "max_position_embeddings": 16, **BERT_SHAPE}
    save_transformer(root / "bert", BertModel(BertConfig(num_hidden_layers=5, **config)), of_bert)
    save_transformer(root / "bert-mlm", BertForMaskedLM(BertConfig(num_hidden_layers=4, **config)), of_bert)
    save_transformer(root / "shallow", BertModel(BertConfig(num_hidden_layers=2, **config)), of_bert)
    t5 = T5Model(T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    save_transformer(root / "t5", t5, of_bert)
    save_transformer(
        root / "vision", ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), of_bert
    )

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(BERT_WORDS)] * 5, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    (root / "bpe").mkdir()
    bpe.save_model(str(root / "bpe"))
    roberta_tokenizer = RobertaTokenizerFast(
        str(root / "bpe" / "vocab.json"), str(root / "bpe" / "merges.txt"), model_max_length=512
    )
    config = RobertaConfig(
        vocab_size=len(roberta_tokenizer), num_hidden_layers=4, max_position_embeddings=18, pad_token_id=1, **BERT_SHAPE
    )
    save_transformer(root / "roberta", RobertaModel(config, add_pooling_layer=False), roberta_tokenizer)
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")
    save_transformer(
        root / "gpt2", GPT2Model(GPT2Config(vocab_size=400, n_positions=16, n_embd=32, n_layer=4, n_head=4)), plain
    )
    return root


def load(folder: Path, pooling: str = "mean", **options) -> Encoder:
    return load_encoder("roberta", str(folder), pooling=pooling, **options)


def reference(folder: Path, text: str, pooling: str, max_length: int = 16) -> torch.Tensor:
    """One text through plain transformers: no padding, so no mask."""
    model = AutoModel.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.inference_mode():
        out = model(input_ids=inputs["input_ids"], output_hidden_states=True)
    return {
        "mean": lambda: out.last_hidden_state[0].mean(0),
        "cls": lambda: out.last_hidden_state[0, 0],
        "pooler": lambda: out.pooler_output[0],
        "last4": lambda: torch.stack(out.hidden_states[-4:]).sum(0)[0].mean(0),
    }[pooling]()


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("bert", pooling) for pooling in ("mean", "cls", "pooler", "last4")]
    + [("roberta", pooling) for pooling in ("mean", "cls", "last4")]
    + [("gpt2", "mean")],
)
def test_equals_plain_transformers(models: Path, name: str, pooling: str):
    texts = [text for text in TEXTS if text or name != "gpt2"]  # a GPT makes no token of an empty text
    feats = text_features(load(models / name, pooling), texts)["feats"]
    expected = torch.stack([reference(models / name, text, pooling) for text in texts])
    assert feats.dtype is torch.float32
    torch.testing.assert_close(feats, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5"])
def test_features_do_not_depend_on_the_batch(models: Path, name: str):
    encoder = load(models / name, tokens=True)
    together = text_features(encoder, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = text_features(encoder, [text])
        length = encoder.text.tokenize([text])[0].length
        torch.testing.assert_close(together["feats"][row], alone["feats"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together["tokens"][row, :length], alone["tokens"][0], atol=1e-5, rtol=1e-5)


def test_tokens_are_the_last_hidden_state(models: Path):
    out = text_features(load(models / "bert", tokens=True), ["love"])
    assert out["tokens"].shape == (1, 3, 32)  # [CLS] love [SEP]
    torch.testing.assert_close(out["tokens"][0].mean(0), out["feats"][0])
    assert text_features(load(models / "bert"), ["love"]).keys() == {"feats"}


@pytest.mark.parametrize("name", ["bert", "roberta"])  # RoBERTa: 18 places, the first two unused
def test_truncation_keeps_the_closing_token_and_is_counted(models: Path, name: str, capfd: pytest.CaptureFixture):
    encoder = load(models / name)
    assert encoder.identity["max_length"] == 16
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    texts = [" ".join(["good"] * count) for count in (1, 12, 14, 15, 200)]
    capfd.readouterr()
    made = encoder.text.tokenize(texts)
    full = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    assert [t.truncated for t in made] == [length > 16 for length in full]
    assert sum(t.truncated for t in made) >= 2
    assert [t.length for t in made] == [min(length, 16) for length in full] == [len(t.ids) for t in made]
    assert all(t.ids[-1] == tokenizer.sep_token_id for t in made)
    assert text_features(encoder, texts)["feats"].isfinite().all()
    assert capfd.readouterr().err == ""
    assert encoder.text.tokenize([]) == []


def test_an_empty_text_without_special_tokens_is_one_padding_token(models: Path):
    encoder = load(models / "gpt2")
    (made,) = encoder.text.tokenize([""])
    assert made.length == len(made.ids) == 1
    assert text_features(encoder, [""])["feats"].isfinite().all()


def test_bf16_stays_close(models: Path):
    full, half = (text_features(load(models / "bert", dtype=dtype), TEXTS) for dtype in (torch.float32, torch.bfloat16))
    assert half["feats"].dtype is torch.float32  # pooled in float32
    assert torch.cosine_similarity(full["feats"], half["feats"]).min() > 0.999


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("roberta", "pooler", "no trained pooler weights.*`pooling` mean"),
        ("bert-mlm", "pooler", "no trained pooler weights"),
        ("gpt2", "pooler", "no trained pooler weights"),
        ("gpt2", "cls", "no class token first"),
        ("shallow", "last4", "2 layers.*needs 4"),
        ("vision", "mean", "doesn't work as a text encoder"),
    ],
)
def test_refused_pooling(models: Path, name: str, pooling: str, message: str):
    with pytest.raises(UsageError, match=message):
        load(models / name, pooling)


def test_identity(models: Path):
    identity = load(models / "bert", "cls").identity
    assert identity == {
        "encoder": "roberta",
        "model": "bert",
        "weights_sha256": sha256_of(models / "bert" / "model.safetensors"),
        "tokenizer_sha256": sha256_of(models / "bert" / "tokenizer.json"),
        "pooling": "cls",
        "max_length": 16,
    }
    json.dumps(identity)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_from_a_file_elsewhere(models: Path, tmp_path: Path, suffix: str):
    file = tmp_path / f"finetuned{suffix}"
    trained = AutoModel.from_pretrained(models / "bert")
    with torch.no_grad():
        trained.embeddings.word_embeddings.weight.mul_(2)
    if suffix == ".bin":
        torch.save(trained.state_dict(), file)
    else:
        trained.save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", file)
    encoder = load(models / "bert", weights=str(file))
    assert encoder.identity["weights_sha256"] == sha256_of(file)
    save_transformer(tmp_path / "whole", trained, AutoTokenizer.from_pretrained(models / "bert"))
    expected = text_features(load("ignored", weights=str(tmp_path / "whole")), TEXTS)["feats"]
    torch.testing.assert_close(text_features(encoder, TEXTS)["feats"], expected)


def test_bad_folders_and_files(models: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="no model folder at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no such file or folder"):
        load(models / "bert", weights=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="is no hub name and no folder"):
        load("not a name")

    for removed, message in (
        ("config.json", "lacks config.json"),
        ("tokenizer.json", "lacks tokenizer files"),
        ("model.safetensors", "lacks weights"),
    ):
        folder = shutil.copytree(models / "bert", tmp_path / removed)
        (folder / removed).unlink()
        with pytest.raises(UsageError, match=message):
            load(folder)

    folder = shutil.copytree(models / "bert", tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="can't be loaded as a text encoder"):
        load(folder)


def test_weights_of_another_model_are_refused(models: Path, tmp_path: Path):
    for other in ("gpt2", "shallow"):  # alone: a configuration beside them would be theirs
        file = shutil.copy(models / other / "model.safetensors", tmp_path / f"{other}.safetensors")
        with pytest.raises(UsageError, match="lacks [0-9]+ weights of its BertModel.*belongs to this config.json"):
            load(models / "bert", weights=str(file))


def test_the_hub_cache_is_used_without_a_network(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "models--some--bert"
    shutil.copytree(models / "bert", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    use_hub_cache(tmp_path, monkeypatch)
    encoder = load("some/bert")
    assert encoder.identity["model"] == "some/bert"
    (repository / "snapshots" / "abc" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no weights for some/bert.*lacks tokenizer files.*\(3\) the hub.*`weights`"):
        load("some/bert")


def test_nothing_to_be_had_is_one_quick_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    use_hub_cache(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="no weights for roberta-base.*nothing of roberta-base.*the hub.*HF_ENDPOINT"):
        load("roberta-base")
    assert capfd.readouterr() == ("", "")


def use_hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own hub cache, and a hub that can't be reached, whatever the machine's network."""
    real = hf_text_encoder.try_to_load_from_cache
    monkeypatch.setattr(
        hf_text_encoder, "try_to_load_from_cache", lambda name, file: real(name, file, cache_dir=folder)
    )

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(hf_text_encoder.HfApi, "model_info", unreachable)


def test_one_format_is_downloaded():
    files = ["config.json", "vocab.json", "merges.txt", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"]
    files += ["tf_model.h5", "rust_model.ot", "README.md"]
    assert hf_text_encoder._wanted(files, True) == ["config.json", "vocab.json", "merges.txt", "model.safetensors"]
    assert hf_text_encoder._wanted(["config.json", "pytorch_model.bin"], True) == ["config.json", "pytorch_model.bin"]


def test_loading_is_silent_and_restores_the_logging_levels(models: Path, capfd: pytest.CaptureFixture):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load(models / "bert-mlm")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
