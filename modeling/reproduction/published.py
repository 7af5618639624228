"""What the reference studies published, as data: every row of their tables, with the encoders and settings it is of.

Figures stand as they were published: one number, or the two ends of a range. All are of validation rows of one split,
as a rule of one seed. What a study doesn't tell of a row and had to be chosen stands in the table's `chosen`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from feats.source import SIDES
from modeling.finetuning.studies import EncoderChoice
from modeling.heads.config import ABLATIONS

BOTH, TEXT_ONLY, IMAGE_ONLY = ABLATIONS


@dataclass(frozen=True)
class Study:
    """A study's letter, its validation rows, and how many of these were of each class, where it tells."""

    letter: str
    encoders: str
    validation_rows: int
    class_counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A published result. `figures` by name: accuracy, weighted_f1, macro_f1, log_loss, or of a class, such as "neutral
    recall". `image` and `text` are the encoders whose vectors (or tokens) the head read, None where there was none.

    `tuned`: the study trained its encoders along with the head; `model`, of `modeling.finetuning.studies.MODELS`, does
    the same here. `cached`: the head can be trained on caches, be it in place of a tuned model. `ablation_of`: the
    label of the row whose trained model was scored with one side removed, `sides` being what was left.
    """

    label: str
    head: str
    figures: Mapping[str, str]
    image: EncoderChoice | None
    text: EncoderChoice | None
    sides: tuple[str, ...] = SIDES
    settings: Mapping[str, Any] = field(default_factory=dict)  # beside the study's recipe: D, lr, bs
    tuned: bool = False
    cached: bool = True
    model: str | None = None
    ablation_of: str | None = None
    remark: str = ""  # the study's own

    def wanted(self, side: str) -> EncoderChoice | None:
        """The encoder of a side."""
        return {"image": self.image, "text": self.text}[side]


@dataclass(frozen=True)
class Table:
    """A study's published table. `chosen` says what it leaves open and what was taken here."""

    name: str
    study: Study
    title: str
    rows: tuple[Row, ...]
    chosen: str = ""


def ends(figure: str) -> tuple[float, float]:
    """The two ends of a published figure, equal unless it is a range: (0.61, 0.65) of ".61-.65"."""
    low, _, high = figure.removeprefix("about ").partition("-")
    return float(low), float(high or low)


_STUDIES = {
    study.letter: study
    for study in (
        Study("A", "frozen", 500, {"positive": 299, "negative": 149, "neutral": 52}),
        Study("B", "tuned end to end", 400),
        Study("C", "tuned end to end", 800, {"positive": 483, "neutral": 83, "negative": 234}),
        Study("D", "frozen, but for the rows called tuned", 400),
        Study("E", "tuned end to end", 800),
    )
}

# -- A ----------------------------------------------------------------------------------------------------------

_CLIP_336 = EncoderChoice("clip", "ViT-L/14@336px")
_CONCAT = {
    "weighted_f1": ".7799",
    "accuracy": "about .79",
    "positive recall": ".8829",
    "negative recall": ".7718",
    "neutral recall": ".3077",
    "neutral precision": ".5333",
}


def _of_a(label: str, head: str, figures: Mapping[str, str], sides: tuple[str, ...] = BOTH) -> Row:
    return Row(label, head, figures, _CLIP_336, _CLIP_336, sides)


_A_FUSIONS = (
    _of_a("concatenation", "concat", _CONCAT),
    _of_a("attention", "attention", {"weighted_f1": ".7655"}),
    _of_a("weighted sum", "weighted_sum", {"weighted_f1": ".7500"}),
)
_A_ABLATION = (
    _of_a("both", "concat", {"weighted_f1": ".7799"}),
    _of_a("image only", "concat", {"weighted_f1": ".7312"}, IMAGE_ONLY),
    _of_a("text only", "concat", {"weighted_f1": ".6962"}, TEXT_ONLY),
)

# -- B ----------------------------------------------------------------------------------------------------------

_CLIP_B32 = EncoderChoice("clip", "ViT-B/32")
_VIT = EncoderChoice("vit", "google/vit-base-patch16-224-in21k")
_BERT_CLS = EncoderChoice("roberta", "bert-base-uncased", {"pooling": "cls"})


def _of_b(label: str, head: str, accuracy: str, sides: tuple[str, ...] = BOTH) -> Row:
    return Row(label, head, {"accuracy": accuracy}, _CLIP_B32, _CLIP_B32, sides, tuned=True, model="clip")


def _removed_in_b(label: str, accuracy: str, left: tuple[str, ...]) -> Row:
    return Row(
        label,
        "gated_transformer",
        {"accuracy": accuracy},
        _CLIP_B32,
        _CLIP_B32,
        left,
        tuned=True,
        ablation_of="attention, improved",
    )


_B_HEADS = (
    Row(
        "BERT-style + ViT from scratch",
        "cross_modal",
        {"accuracy": ".62"},
        EncoderChoice("vit", untrained=True),
        EncoderChoice("roberta", untrained=True),
        tuned=True,
        cached=False,
        model="bert_vit_scratch",
    ),
    Row(
        "ViLBERT-style",
        "vilbert",
        {"accuracy": ".67"},
        _VIT,
        _BERT_CLS,
        tuned=True,
        model="vilbert_style",
    ),
    _of_b("early", "early", ".76"),
    _of_b("late", "late", ".74"),
    _of_b("clip_match", "clip_match", ".74"),
    _of_b("attention, improved", "gated_transformer", ".77"),
    _of_b("text only", "early", ".73", TEXT_ONLY),
    _of_b("image only", "early", ".62", IMAGE_ONLY),
    _removed_in_b("image removed at test time", ".77", TEXT_ONLY),
    _removed_in_b("text removed at test time", ".28", IMAGE_ONLY),
)

# -- C ----------------------------------------------------------------------------------------------------------

_RESNET50 = EncoderChoice("resnet", "resnet50")
_BERT = EncoderChoice("roberta", "bert-base-uncased")
_C_BOTH = {
    "accuracy": ".73",
    "positive precision": ".80",
    "positive recall": ".74",
    "positive f1": ".77",
    "neutral precision": ".61",
    "neutral recall": ".20",
    "neutral f1": ".31",
    "negative precision": ".54",
    "negative recall": ".76",
    "negative f1": ".63",
}


def _of_c(label: str, figures: Mapping[str, str], sides: tuple[str, ...] = BOTH) -> Row:
    return Row(label, "coattention", figures, _RESNET50, _BERT, sides, tuned=True, model="bert_resnet_coattention")


_C_ABLATION = (
    _of_c("both", _C_BOTH),
    _of_c("text only", {"accuracy": ".70-.71"}, TEXT_ONLY),
    _of_c("image only", {"accuracy": ".61-.65"}, IMAGE_ONLY),
)

# -- D ----------------------------------------------------------------------------------------------------------

_CLIP_L14 = EncoderChoice("clip", "ViT-L/14")
_LOGITS = EncoderChoice("resnet", "resnet50", {"layer": "logits"})
_POOLER = EncoderChoice("roberta", "roberta-base", {"pooling": "pooler"})
_RATES = {"2e-5": 2e-5, "1e-4": 1e-4}


def _of_d(name: str, accuracy: str, D: int, lr: str, clip: EncoderChoice | None = None, bs: int = 512) -> Row:
    """Of frozen encoders: CLIP, or ResNet50 and RoBERTa."""
    image, text = (clip, clip) if clip else (_LOGITS, _POOLER)
    label = f"{name} D {D} lr {lr} bs {bs}"
    settings = {"D": D, "lr": _RATES[lr], "bs": bs}
    return Row(label, "fusion", {"accuracy": accuracy}, image, text, settings=settings)


def _tuned_in_d(label: str, accuracy: str, lr: str = "2e-5", sides: tuple[str, ...] = BOTH, remark: str = "") -> Row:
    return Row(
        label,
        "fusion",
        {"accuracy": accuracy},
        _RESNET50,
        EncoderChoice("roberta", "roberta-base"),
        sides,
        {"D": 256, "lr": _RATES[lr], "bs": 64},
        tuned=True,
        cached=False,
        model="resnet_roberta",
        remark=remark,
    )


_D_GRID = (
    _of_d("clip", ".755", 128, "2e-5", _CLIP_B32),
    _of_d("clip", ".775", 128, "1e-4", _CLIP_B32),
    _of_d("clip", ".775", 256, "2e-5", _CLIP_B32),
    _of_d("clip", ".787", 256, "1e-4", _CLIP_B32),
    _of_d("resnet50 + roberta", ".682", 128, "2e-5"),
    _of_d("resnet50 + roberta", ".698", 128, "1e-4"),
    _of_d("resnet50 + roberta", ".688", 256, "2e-5"),
    _of_d("resnet50 + roberta", ".718", 256, "1e-4"),
    _tuned_in_d("resnet50 + roberta tuned D 256 lr 2e-5", ".723"),
    _tuned_in_d("resnet50 + roberta tuned D 256 lr 1e-4", ".728", "1e-4"),
)
_D_L14 = tuple(
    _of_d("clip L/14", accuracy, D, lr, _CLIP_L14, bs)
    for bs, accuracies in ((512, (".750", ".785", ".767", ".777")), (32, (".777", ".787", ".780", ".775")))
    for accuracy, (D, lr) in zip(accuracies, ((128, "2e-5"), (128, "1e-4"), (256, "2e-5"), (256, "1e-4")), strict=True)
)


def _side_of_d(label: str, accuracy: str, encoder: EncoderChoice, sides: tuple[str, ...], remark: str = "") -> Row:
    image, text = (encoder, None) if sides == IMAGE_ONLY else (None, encoder)
    settings = {"D": 256, "lr": 1e-4, "bs": 512}
    return Row(label, "fusion", {"accuracy": accuracy}, image, text, sides, settings, remark=remark)


_UNSTABLE = "unstable, says the study"
_D_ABLATION = (
    _side_of_d("clip image", ".762", _CLIP_B32, IMAGE_ONLY),
    _side_of_d("clip text", ".767", _CLIP_B32, TEXT_ONLY),
    _side_of_d("resnet50", ".693", _LOGITS, IMAGE_ONLY),
    _side_of_d("roberta", ".708", _POOLER, TEXT_ONLY, _UNSTABLE),
    _tuned_in_d("resnet50 tuned", ".738", sides=IMAGE_ONLY),
    _tuned_in_d("roberta tuned", ".675", sides=TEXT_ONLY, remark=_UNSTABLE),
)

# -- E ----------------------------------------------------------------------------------------------------------

_BERT_CHINESE = EncoderChoice("roberta", "bert-base-chinese")


def _of_e(
    label: str,
    head: str,
    model: str,
    figures: Mapping[str, str],
    sides: tuple[str, ...] = BOTH,
    image: EncoderChoice = _RESNET50,
) -> Row:
    return Row(label, head, figures, image, _BERT_CHINESE, sides, tuned=True, model=model)


_E_FUSIONS = (
    _of_e("late", "late_512", "bert_resnet_late", {"macro_f1": ".5783", "accuracy": ".6913", "log_loss": ".9726"}),
    _of_e(
        "early",
        "early_plane",
        "bert_resnet_early",
        {"macro_f1": ".5046", "accuracy": ".6825", "log_loss": ".9989"},
        image=EncoderChoice("pixels", "pixels"),
    ),
    _of_e(
        "cross-attention",
        "query_attention",
        "bert_resnet_cross",
        {"macro_f1": ".4397", "accuracy": ".5988", "log_loss": ".8722"},
    ),
)
_E_ABLATION = (
    _of_e("text only", "late_512", "bert_resnet_late", {"macro_f1": ".5214"}, TEXT_ONLY),
    _of_e("image only", "late_512", "bert_resnet_late", {"macro_f1": ".4489"}, IMAGE_ONLY),
)

# -- all --------------------------------------------------------------------------------------------------------

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("A-fusions", _STUDIES["A"], "three fusions of CLIP ViT-L/14@336px", _A_FUSIONS),
        Table(
            "A-ablation",
            _STUDIES["A"],
            "one side of CLIP ViT-L/14@336px, and both",
            _A_ABLATION,
            "the study doesn't tell the classifier of one side: that of concat is taken",
        ),
        Table(
            "B-heads",
            _STUDIES["B"],
            "models from scratch and pretrained, six heads on CLIP ViT-B/32, a side removed at test time",
            _B_HEADS,
            "the study doesn't tell the classifier of one side, nor whose side was removed at test time: early and "
            "the improved attention are taken",
        ),
        Table("C-ablation", _STUDIES["C"], "co-attention of ResNet's and BERT's tokens, and one side", _C_ABLATION),
        Table("D-grid", _STUDIES["D"], "linear probe: encoders x D x learning rate", _D_GRID),
        Table("D-L14", _STUDIES["D"], "linear probe on CLIP ViT-L/14: batch x D x learning rate", _D_L14),
        Table(
            "D-ablation",
            _STUDIES["D"],
            "linear probe on one side",
            _D_ABLATION,
            "the study doesn't tell the settings of these rows: D 256 and its defaults (tuned: those of its table) "
            "are taken",
        ),
        Table("E-fusions", _STUDIES["E"], "late, early and cross-attention fusion of BERT and ResNet50", _E_FUSIONS),
        Table(
            "E-ablation",
            _STUDIES["E"],
            "one side of BERT and ResNet50",
            _E_ABLATION,
            "the study doesn't tell the classifier of one side: that of late_512 is taken",
        ),
    )
}
