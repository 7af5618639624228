"""Every encoder of the registry saved after training and loaded again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_course, one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainable_encoders import CASES, NOTHING_LEARNED, Where, forward, load
from tiny_models import BERT_VOCABULARY, bert_tokenizer, make_torchvision, save_transformer
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5Model,
)

from feats import minilm_extract_feats, roberta_extract_feats
from feats.encoders.base import Encoder
from feats.encoders.registry import load_encoder
from feats.encoders.saved import find_saved, save_encoder
from feats.encoders.weights import sha256_of
from feats.errors import UsageError
from feats.store import FeatureStore
from modeling.runs.encoders import encoder_of

# Less torchvision's ViT: its smallest is 0.3 GB, and it is saved by the same lines as a ResNet.
LEARNED = [(name, kind) for name, kind in CASES if name not in NOTHING_LEARNED and kind != "vit" or name == "clip"]


def train(encoder: Encoder) -> Encoder:
    """Another value for every parameter and running statistic, in the lowest bits, too."""
    generator = torch.Generator().manual_seed(1)
    for side in (encoder.image, encoder.text):
        for value in side.network.state_dict().values() if side else ():
            value += 0.01 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else 1
    return encoder


def trained(name: str, where: Where) -> Encoder:
    return train(load(name, where, trainable=True))


def weights_of(encoder: Encoder) -> dict[str, torch.Tensor]:
    sides = {"image": encoder.image, "text": encoder.text}
    return {f"{key}.{k}": v for key, side in sides.items() if side for k, v in side.network.state_dict().items()}


def assert_same_features(encoder: Encoder, other: Encoder) -> None:
    with torch.no_grad():
        expected, found = forward(encoder), forward(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[side], expected[side]) for side in expected)


def assert_same_identity(saved: Encoder, loaded: Encoder, digest: str) -> None:
    assert loaded.identity == {**saved.identity, "weights_sha256": digest} != saved.identity


@pytest.mark.parametrize(("name", "kind"), LEARNED)
def test_what_is_saved_comes_back_bit_for_bit(name: str, kind: str, tmp_path: Path):
    make, unused = CASES[name, kind]
    where = make(tmp_path)
    encoder = trained(name, where)
    before = load(name, where, trainable=True)
    with torch.no_grad():
        assert not any(torch.equal(*pair) for pair in zip(forward(encoder).values(), forward(before).values()))
    run = tmp_path / "run"
    folder = run / "encoders" / "tuned"
    encoder.text_clean = "basic"  # another than its own
    digest = save_encoder(encoder, folder)
    assert digest == sha256_of(folder / "model.safetensors")
    assert find_saved(run, name) == find_saved(folder, name) == folder

    again = load_encoder(name, weights=str(folder), trainable=True, expected_sha256=digest)
    assert again.text_clean == "basic"
    assert_same_identity(encoder, again, digest)
    assert_same_features(encoder, again)
    expected, found = weights_of(encoder), weights_of(again)
    assert found.keys() == expected.keys()
    assert {k for k in found if not torch.equal(found[k], expected[k])} <= {k for k in found if ".pooler." in k}
    with pytest.raises(UsageError, match="isn't the file asked for"):
        load_encoder(name, weights=str(run), expected_sha256=before.identity["weights_sha256"])


@pytest.mark.parametrize(("name", "kind"), [("clip", "vit"), ("roberta", "pooler"), ("resnet", "logits")])
def test_a_run_names_its_encoder(name: str, kind: str, tmp_path: Path):
    """Frozen, too, and saved once more from there."""
    encoder = trained(name, CASES[name, kind][0](tmp_path))
    digest = save_encoder(encoder, tmp_path / "run" / "encoders" / "tuned")
    frozen = load_encoder(name, weights=str(tmp_path / "run"))
    assert_same_identity(encoder, frozen, digest)
    again = load_encoder(name, frozen.identity["model"], str(tmp_path / "run"), trainable=True)
    (tmp_path / "second").mkdir()  # an empty folder will do
    assert save_encoder(again, tmp_path / "second") == digest
    records = [
        json.loads((f / "encoder.json").read_text()) for f in (tmp_path / "second", find_saved(tmp_path / "run", name))
    ]
    assert records[0] == records[1] and records[0]["identity"] == frozen.identity


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] in NOTHING_LEARNED] + [("minilm", "")])
def test_nothing_to_save(name: str, kind: str, tmp_path: Path):
    encoder = load(name, CASES[name, kind][0](tmp_path), trainable=name != "minilm")
    assert encoder.save is None
    with pytest.raises(UsageError, match=f"encoder {name} has no trained weights to save; .*`trainable`"):
        save_encoder(encoder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_taken_folder_is_left_alone(tmp_path: Path):
    encoder = load_encoder("minilm", trainable=True)
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken" / "file", tmp_path / "taken"):
        (tmp_path / "taken" / "file").write_text("mine")
        with pytest.raises(UsageError, match="is there already, and isn't an empty folder"):
            save_encoder(encoder, path)
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["file"]


# -- one backend's own -------------------------------------------------------------------------------------------


def test_clip_loads_float32_weights_exactly(tmp_path: Path):
    """The package's own `build_model` rounds those of products to fp16."""
    encoder = trained("clip", CASES["clip", "vit"][0](tmp_path))
    save_encoder(encoder, tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    weight = state["visual.transformer.resblocks.0.mlp.c_fc.weight"]
    assert not torch.equal(weight, weight.half().float())
    torch.save(state, tmp_path / "plain.pt")
    plain = load_encoder("clip", weights=str(tmp_path / "plain.pt"))
    assert torch.equal(plain.image.network.transformer.resblocks[0].mlp.c_fc.weight, weight)
    assert_same_features(encoder, plain)


def test_a_random_pooler_does_not_become_a_trained_one(tmp_path: Path):
    config = {"vocab_size": len(BERT_VOCABULARY), "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    network = BertForMaskedLM(BertConfig(num_hidden_layers=2, max_position_embeddings=16, **config))
    source = save_transformer(tmp_path / "bert", network, bert_tokenizer(tmp_path))
    save_encoder(load_encoder("roberta", str(source), trainable=True), tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "bare")
    (tmp_path / "bare" / "encoder.json").unlink()
    with pytest.raises(UsageError, match="no trained pooler weights"):
        load_encoder("roberta", weights=str(tmp_path / "bare"), pooling="pooler")


T5_SHAPE = {"vocab_size": 30, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART_SHAPE = {"vocab_size": 30, "d_model": 32, "max_position_embeddings": 16} | {
    f"{half}_{size}": n
    for half in ("encoder", "decoder")
    for size, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
ENCODER_DECODERS = {
    "t5": lambda: T5Model(T5Config(**T5_SHAPE)),
    "bart": lambda: BartModel(BartConfig(**BART_SHAPE)),
}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [1, 2])
def test_an_encoder_half_is_saved_with_what_it_was_part_of(kind: str, dtype: torch.dtype, halves: int, tmp_path: Path):
    torch.manual_seed(0)
    network: PreTrainedModel = ENCODER_DECODERS[kind]().to(dtype)
    source = save_transformer(tmp_path / "source", network, bert_tokenizer(tmp_path))
    stored = load_file(source / "model.safetensors")
    decoder = {key for key in stored if key.startswith("decoder.")}
    if halves == 1:
        kept = {key: value for key, value in stored.items() if key not in decoder}
        save_file(kept, source / "model.safetensors", {"format": "pt"})
    encoder = trained("roberta", {"model": str(source)})
    digest = save_encoder(encoder, tmp_path / "saved")
    again = load_encoder("roberta", weights=str(tmp_path / "saved"), trainable=True)
    assert_same_identity(encoder, again, digest)
    assert_same_features(encoder, again)
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert {key for key in after if key.startswith("decoder.")} == (decoder if halves == 2 else set())
    assert len(decoder) > 20 and all(torch.equal(after[key], stored[key].float()) for key in decoder & after.keys())


def test_minilm_keeps_its_length(tmp_path: Path):
    first = save_encoder(load_encoder("minilm", trainable=True), tmp_path / "saved")
    settings = tmp_path / "saved" / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 5}))
    shorter = load_encoder("minilm", weights=str(tmp_path / "saved"), trainable=True)
    assert shorter.identity["max_length"] == 5
    assert save_encoder(shorter, tmp_path / "again") == first
    assert load_encoder("minilm", weights=str(tmp_path / "again")).identity["max_length"] == 5


def test_torchvision_keeps_the_preprocessing_of_the_weights_it_began_with(tmp_path: Path):
    torch.manual_seed(0)
    state = make_torchvision("resnet50").state_dict()
    save_file(state, tmp_path / "model.safetensors", {"preprocessed_as": "IMAGENET1K_V1"})
    encoder = load_encoder("resnet", "resnet50", str(tmp_path), trainable=True)
    save_file(state, tmp_path / "plain.safetensors")
    default = load_encoder("resnet", "resnet50", str(tmp_path / "plain.safetensors"))
    assert encoder.image.preprocess.resize == 256 and default.image.preprocess.resize == 232  # V1 and V2
    save_encoder(encoder, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"preprocessed_as": "IMAGENET1K_V1"}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"preprocessed_as": "IMAGENET1K_V2"})
    with pytest.raises(UsageError, match="preprocessed as IMAGENET1K_V2, and the model has only IMAGENET1K_V1; give"):
        load_encoder("resnet", "resnet18", str(tmp_path))


# -- finding and overriding --------------------------------------------------------------------------------------


def record(folder: Path, encoder: str, **more: object) -> Path:
    folder.mkdir(parents=True)
    content = {
        "format_version": 1,
        "encoder": encoder,
        "model": "m",
        "options": {},
        "text_clean": "none",
        "identity": {},
        **more,
    }
    (folder / "encoder.json").write_text(json.dumps(content))
    return folder


def test_find_saved(tmp_path: Path):
    run = tmp_path / "run"
    for cache, encoder in (("clip", "clip"), ("b", "roberta"), ("a", "roberta")):
        record(run / "encoders" / cache, encoder)
    assert find_saved(run, "clip") == run / "encoders" / "clip"
    assert find_saved(run / "encoders" / "b", "roberta") == run / "encoders" / "b"
    with pytest.raises(UsageError, match="holds 2 encoders roberta; name one: .*/encoders/a, .*/encoders/b") as several:
        find_saved(run, "roberta")
    with pytest.raises(UsageError, match="holds no encoder minilm, but roberta, roberta, clip; give") as none:
        find_saved(run, "minilm")
    with pytest.raises(UsageError, match="encoders/b holds no encoder clip, but roberta"):
        find_saved(run / "encoders" / "b", "clip")
    assert one_line(several) and one_line(none)
    (tmp_path / "plain").mkdir()
    (tmp_path / "weights.pt").touch()
    for other in (tmp_path / "plain", tmp_path / "weights.pt", tmp_path / "nowhere", Path("IMAGENET1K_V1")):
        assert find_saved(other, "clip") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "encoder.json isn't JSON"), ("[]", "holds a list, expected an object"), ("{}", "lacks format_version")],
)
def test_a_damaged_record_is_refused(content: str, message: str, tmp_path: Path):
    (record(tmp_path / "x", "clip") / "encoder.json").write_text(content)
    with pytest.raises(UsageError, match=message) as raised:
        find_saved(tmp_path / "x", "clip")
    assert one_line(raised)


def test_another_format_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="format version 2, expected 1"):
        find_saved(record(tmp_path / "x", "clip", format_version=2), "clip")


@pytest.fixture
def pooled_run(tmp_path: Path) -> Path:
    """A run with a tuned text encoder that is pooled otherwise than the default."""
    encoder = trained("roberta", CASES["roberta", "pooler"][0](tmp_path))
    save_encoder(encoder, tmp_path / "run" / "encoders" / "text")
    return tmp_path / "run"


def test_settings_of_a_saved_encoder_hold(pooled_run: Path):
    for given, message in (
        ({"pooling": "mean"}, "holds an encoder of `pooling` pooler, not mean; leave out `pooling`"),
        ({"model": "roberta-base"}, "holds an encoder of `model` bert, not roberta-base; leave out `model`"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            load_encoder("roberta", weights=str(pooled_run), **given)
        assert one_line(raised)
    assert load_encoder("roberta", "bert", str(pooled_run), pooling="pooler").identity["pooling"] == "pooler"


def test_raw_pairs_are_encoded_as_the_fingerprint_says(pooled_run: Path):
    encoder = load_encoder("roberta", weights=str(pooled_run))
    fingerprint = {**encoder.identity, "dtype": "fp32", "text_clean": "tweet", "tokens": False}
    found = encoder_of("text", fingerprint, str(pooled_run), device=torch.device("cpu"))
    assert found.identity == encoder.identity


# -- the command line --------------------------------------------------------------------------------------------


def test_extraction_from_a_run(pooled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    digest = save_encoder(trained("minilm", {}), pooled_run / "encoders" / "other")
    make_course(tmp_path / "set", 4)
    command = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]
    command += ["--weights", str(pooled_run)]
    assert minilm_extract_feats.main(command) == 0
    with FeatureStore.open(tmp_path / "out" / "minilm_train.h5") as store:
        assert store.fingerprint["weights_sha256"] == digest and store.fingerprint["model"] == "all-MiniLM-L6-v2"
    assert roberta_extract_feats.main(command) == 0
    with FeatureStore.open(tmp_path / "out" / "roberta_train.h5") as store:
        assert (store.fingerprint["model"], store.fingerprint["pooling"]) == ("bert", "pooler")
    assert roberta_extract_feats.main([*command, "--pooling", "cls"]) == 2
    assert "--pooling pooler, not cls; leave out --pooling" in capsys.readouterr().err
    assert "(default: mean)" in " ".join(roberta_extract_feats.build_parser().format_help().split())
