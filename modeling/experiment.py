"""What lies between the options and a saved run: load, split, train, measure. Scripts compose these steps."""

import sys
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from feats.acceleration import resolve_device
from feats.errors import UsageError
from feats.store import FeatureStore
from modeling.cli import named_values, reads
from modeling.evaluation import metrics
from modeling.features.inputs import TOKENS, Preprocessing
from modeling.features.joined import DATASETS, NORMS, FeatureSet, load_features, with_known_duplicates
from modeling.features.splits import Split, duplicate_groups, make_folds, make_split, read_split_file
from modeling.heads.registry import HEADS, SIDES, n_parameters
from modeling.runs.folder import Member, Run
from modeling.training.fit import Problem, TrainConfig, Trained, n_epochs, stacks
from modeling.training.workers import LARGEST_COPY, run_jobs

INNER_FOLDS = 5
TEMPERATURES = (0.1, 10.0)  # a validation set of a few rows can be fitted perfectly, which asks for a temperature of 0


@dataclass(frozen=True)
class Experiment:
    """The rows of joined caches, their splits, and how features are made from them."""

    features: FeatureSet
    classes: list[str]  # of the rows in the splits; others may have others
    splits: list[Split]
    group_of: dict[str, int] | None  # duplicate group of each labelled row; None when duplicates may part
    norms: dict[str, str]
    scales: dict[str, float]
    device: torch.device
    source: dict[str, Any]  # which caches: what a run's config says under "features"

    def problem(self, split: Split, heads: Iterable[str]) -> tuple[Problem, Preprocessing]:
        """One split, ready for training `heads` on it, and the preprocessing fitted on its training rows."""
        train, val = (self.features.positions(ids).to(self.device) for ids in (split.train, split.val))
        preprocessing = Preprocessing.fit(self.features, train, self.norms, self.scales)
        labels = torch.full((len(self.features),), -1, device=self.device)
        for ids, rows in ((split.train, train), (split.val, val)):
            labels[rows] = torch.from_numpy(self.labels(ids)).to(self.device)
        closed_form = sorted(head for head in heads if HEADS[head].solver != "sgd")
        if closed_form and (lacking := set(self.classes) - set(self.tags(split.train))):
            raise UsageError(
                f"class {min(lacking)!r} has no training row, and {', '.join(closed_form)} can't learn it; move some there, "
                "extract again what is in quarantine, or leave that class out"
            )
        folds = self.inner_folds(split.train).to(self.device) if closed_form else None
        return Problem(preprocessing.apply(self.features), labels, train, val, self.classes, folds), preprocessing

    def inner_folds(self, ids: Sequence[str], seed: int = 0) -> torch.Tensor:
        """Fold number of each id, (len(ids),) int64: stratified, duplicates in one, as many as the rarest class allows
        up to five."""
        splits = self.folds_of(ids, INNER_FOLDS, seed)
        fold_of = {i: k for k, split in enumerate(splits) for i in split.val}
        return torch.tensor([fold_of[i] for i in ids])

    def folds_of(self, ids: Sequence[str], k: int, seed: int = 0) -> list[Split]:
        """`k` folds of training rows, or as many as the rarest class allows. Raises `UsageError` when it allows none."""
        tags = self.tags(ids)
        groups = None if self.group_of is None else [self.group_of[i] for i in ids]
        for fewer in range(max(k, 2), 1, -1):
            try:
                return make_folds(ids, tags, fewer, seed, groups)
            except UsageError as error:
                refusal = error
        distinct = {name: set() for name in tags}
        for name, group in zip(tags, ids if groups is None else groups, strict=True):
            distinct[name].add(group)
        name = min(distinct, key=lambda name: (len(distinct[name]), name))
        if len(distinct[name]) > 1:
            raise refusal
        raise UsageError(
            f"class {name!r} has {tags.count(name)} training row{'s' if tags.count(name) > 1 else ''}, expected at least "
            "2 that are no duplicates: folds of the training rows hold some out and learn from the others; add rows of "
            "it, leave it out, or do without such folds (of the heads only linear and kernel need them)"
        )

    def tags(self, ids: Sequence[str]) -> list[str]:
        return [self.features.tags[row] for row in self.features.positions(ids).tolist()]

    def labels(self, ids: Sequence[str]) -> np.ndarray:
        """(len(ids),) int64, positions in `classes`. Raises `UsageError` for a label that is none of them: it must not
        become one of them."""
        number, tags = {name: k for k, name in enumerate(self.classes)}, self.tags(ids)
        foreign = sorted({tag or "(none)" for tag in tags if tag not in number})
        if foreign:
            raise UsageError(
                f"labels {', '.join(foreign)} in the data, expected {', '.join(self.classes)}; train again"
            )
        return np.array([number[tag] for tag in tags], np.int64)

    def class_counts(self, ids: Iterable[str]) -> dict[str, int]:
        """How many of the rows are of each class."""
        counts = np.bincount(self.labels(list(ids)), minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def majority(self, split: Split) -> str:
        """The most common class of the split's training rows."""
        counts = self.class_counts(split.train)
        return max(counts, key=counts.__getitem__)


# -- loading and splitting --------------------------------------------------------------------------------------


def load_experiment(args: Namespace, values: Mapping[str, Any], heads: Sequence[str]) -> Experiment:
    """Join the caches `args` names, take the rows with a label, and split them as `values` says (val_ratio, test_ratio,
    split_seed; the other options of `options.add_split_options` are in `args`). `heads` decides whether token
    features are read.

    Raises `UsageError` for whatever doesn't fit.
    """
    device = resolve_device(args.device)
    vtypes, ttypes = named_caches(args)
    tokens = any(HEADS[head].tokens or HEADS[head].optional_tokens for head in heads)
    features = load_features(args.feats, "train", vtypes, ttypes, tokens=tokens)
    ablations = np.atleast_1d(values.get("ablation", 0)).tolist()  # a grid's are several
    features = with_fitting_tokens(features, heads, {side for ablation in ablations for side in SIDES[ablation]})
    print(features.describe())
    if args.duplicates == "together":
        features, told_by = with_known_duplicates(features, args.feats)
        if told_by:
            print(f"duplicates are also told by {', '.join(told_by)}")
    source = {"folder": str(args.feats), "vtype": vtypes, "ttype": ttypes, "fingerprints": features.fingerprints}
    splits, group_of = make_splits(features, args, values)
    classes, splits = known_classes(features, splits)
    return Experiment(
        features.to(device),
        classes,
        splits,
        group_of,
        named_norms(args.norm or ["none"], [*vtypes, *ttypes]),
        named_values(args.scale or [], "--scale"),
        device,
        source,
    )


def experiment_of_run(run: Run, folder: Path | None, device: torch.device) -> Experiment:
    """The experiment a saved run came from, for training its configuration again on other parts of its rows. `folder`
    of caches: the run's own where it is None. Raises `UsageError` when they aren't those the run was trained on."""
    source = run.features
    folder = run.feature_folder(folder)
    features = load_features(folder, "train", source["vtype"], source["ttype"], tokens=source["tokens"])
    run.check_fingerprints(features, str(folder), same_rows=True)
    features, _ = with_known_duplicates(features, folder)
    first = run.members[0].preprocessing
    dataset = features.dataset
    splits = [run.split] if isinstance(run.split, Split) else run.split
    group_of = None
    if splits[0].how.get("duplicates_together", True):
        groups = duplicate_groups(dataset.image_hash, dataset.text_key)
        group_of = dict(zip(dataset.ids, groups.tolist(), strict=True))
    return Experiment(
        features.to(device),
        run.classes,
        splits,
        group_of,
        {key.partition("/")[2]: kind for key, kind in first.kinds.items()},
        first.scales,
        device,
        source,
    )


def named_caches(args: Namespace) -> tuple[list[str], list[str]]:
    """The caches of the image side and of the text side. With --ttype alone there is no image side; without it the text
    side comes from the image side's caches that have one; without both they are CLIP's."""
    if args.vtype is None:
        vtypes = [] if args.ttype else ["clip"]
    else:
        vtypes = args.vtype
    if args.ttype is not None:
        return vtypes, args.ttype
    found = []
    for name in vtypes:
        path = args.feats / f"{name}_train.h5"
        if path.is_file():  # what is missing is said when it is loaded
            with FeatureStore.open(path) as store:
                found += [name] if "text_feats" in store.features else []
    return vtypes, found


def with_fitting_tokens(features: FeatureSet, heads: Sequence[str], sides: Collection[str]) -> FeatureSet:
    """The features without the tokens of a side of which several caches have some, where `heads` can do without.

    Raises `UsageError` when a head needs tokens of one of `sides` and no cache of that side has them."""
    needed = {side for head in heads for side in HEADS[head].tokens if side in sides}
    for side in DATASETS:
        owners = getattr(features, TOKENS[side])
        if side in needed and getattr(features, side):  # without any cache the head is trained on the other side alone
            features.require_tokens(side)
        elif len(owners) > 1:
            print(
                f"note: {', '.join(owners)} all hold {side} tokens, none are used; name one such cache to use its own"
            )
            features = replace(features, **{TOKENS[side]: {}})
    return features


def known_classes(features: FeatureSet, splits: Sequence[Split]) -> tuple[list[str], list[Split]]:
    """The classes of the training and validation rows, and the splits less the test rows of others, which nothing could
    predict; a warning counts these."""
    tag_of = dict(zip(features.ids, features.tags, strict=True))
    classes = {tag_of[i] for split in splits for i in (*split.train, *split.val)}
    foreign = [i for split in splits for i in split.test if tag_of[i] not in classes]
    if foreign:
        print(
            f"warning: {len(foreign)} test rows are of classes that no training or validation row has "
            f"({', '.join(sorted({tag_of[i] for i in foreign}))}): left out",
            file=sys.stderr,
        )
    return sorted(classes), [split.without(foreign) for split in splits]


def make_splits(
    features: FeatureSet, args: Namespace, values: Mapping[str, Any]
) -> tuple[list[Split], dict[str, int] | None]:
    """The splits of the labelled rows, quarantined ones included while dealing: the same for every choice of caches."""

    def given(**names: str) -> dict[str, Any]:
        return {parameter: values[option] for option, parameter in names.items() if option in values}

    dataset = features.dataset
    labelled = [row for row, tag in enumerate(dataset.tags) if tag]
    ids, tags = [dataset.ids[row] for row in labelled], [dataset.tags[row] for row in labelled]
    if not ids:
        raise UsageError("none of the rows has a label; there is nothing to train on")
    groups = None
    if args.duplicates == "together" and (dataset.image_hash.any() or dataset.text_key.any()):
        groups = duplicate_groups(dataset.image_hash[labelled], dataset.text_key[labelled])
    if args.split_file:
        splits = read_split_file(args.split_file, dataset.ids, dataset.tags)
        known = set(ids)  # without a label there is nothing to test
        splits = [replace(split, test=[i for i in split.test if i in known]) for split in splits]
    elif args.folds:
        splits = make_folds(ids, tags, args.folds, groups=groups, **given(split_seed="seed"))
    else:
        how = given(split_seed="seed", val_ratio="val_ratio", test_ratio="test_ratio")
        splits = [make_split(ids, tags, groups=groups, **how)]
    group_of = None if groups is None else dict(zip(ids, groups.tolist(), strict=True))
    splits = [split.without(features.left_out) for split in splits]
    for split in splits:
        for part, rows in (("training", split.train), ("validation", split.val)):
            if not rows:
                raise UsageError(
                    f"every {part} row was left out; extract again what is in quarantine, or split otherwise"
                )
    return splits, group_of


def named_norms(items: Sequence[str], caches: Sequence[str]) -> dict[str, str]:
    """{"clip": "l2", "vader": "none"} of ["l2", "vader=none"]."""
    norms = dict.fromkeys(caches, "none")
    targets = [item.rpartition("=")[0] for item in items]
    if len(set(targets)) < len(targets):
        raise UsageError(
            f"--norm {' '.join(items)}: expected one KIND for all caches, and at most one CACHE=KIND for each; run the "
            "command once for each kind to compare them"
        )
    for item in sorted(items, key=lambda item: "=" in item):  # a named one wins
        name, named, kind = item.rpartition("=")
        if kind not in NORMS or (named and name not in norms):
            raise UsageError(
                f"--norm {item}: expected one of {', '.join(NORMS)}, or CACHE=KIND with a cache in use "
                f"({', '.join(norms)})"
            )
        norms |= {name: kind} if named else dict.fromkeys(norms, kind)
    return norms


# -- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A member and what it said of the validation rows of its split."""

    member: Member
    split: Split
    trained: Trained

    @property
    def calibrated(self) -> np.ndarray:
        return metrics.softmax(self.trained.val_logits, self.member.temperature)


def train(
    configs: Sequence[TrainConfig], experiment: Experiment, failed: dict[int, str] | None = None
) -> Iterator[tuple[int, list[Outcome]]]:
    """Train every configuration on every split. As soon as one is through, its number and an outcome for each split.

    Numbers and reasons of those that diverge go into `failed`; without it the first raises `UsageError`.
    """
    if not configs:
        return
    splits = experiment.splits
    problems = {0: experiment.problem(splits[0], {config.head.head for config in configs})}
    first = problems[0][0]
    groups = list(stacks(configs, first))
    jobs = [(members, k) for members in groups for k in range(len(splits))]
    # Every split has features of its own. Where they are too large to lie side by side they are made for one job at a
    # time, which costs a fraction of an epoch.
    side_by_side = len(splits) == 1 or first.inputs.n_bytes * len(splits) <= LARGEST_COPY
    batches = [jobs] if side_by_side else [[job] for job in jobs]
    del first
    found: dict[int, list[Outcome]] = {i: [] for i in range(len(configs))}
    with tqdm(total=n_epochs(configs) * len(splits), desc="train", unit="epoch", leave=False, disable=None) as bar:
        for batch in batches:
            wanted = sorted({k for _, k in batch})
            heads = {configs[i].head.head for members, _ in batch for i in members}
            problems = {k: problem for k, problem in problems.items() if k in wanted}
            problems |= {k: experiment.problem(splits[k], heads) for k in wanted if k not in problems}
            tasks = [([configs[i] for i in members], wanted.index(k)) for members, k in batch]
            for number, results in run_jobs(tasks, [problems[k][0] for k in wanted], bar.update):
                members, k = batch[number]
                for i, trained in zip(members, results, strict=True):
                    if trained.failure:
                        if failed is None:
                            raise UsageError(trained.failure)
                        failed.setdefault(i, trained.failure)
                        continue
                    fold = k + 1 if len(splits) > 1 else None
                    found[i].append(outcome(trained, *problems[k], splits[k], fold))
                for i in members:
                    if len(found.get(i, ())) == len(splits):
                        yield i, sorted(found.pop(i), key=lambda o: o.member.fold or 0)


def outcome(
    trained: Trained, problem: Problem, preprocessing: Preprocessing, split: Split, fold: int | None
) -> Outcome:
    labels = problem.labels[problem.val].cpu().numpy()
    member = Member(
        trained.config,
        trained.head,
        preprocessing.for_head(trained.config.head).to("cpu"),
        trained.widths,
        temperature=metrics.fit_temperature(trained.val_logits, labels, TEMPERATURES),
        best_epoch=trained.best_epoch,
        facts=trained.facts,
        fold=fold,
    )
    return Outcome(member, split, trained)


def make_run(outcomes: Sequence[Outcome], experiment: Experiment) -> Run:
    """The ensemble of all outcomes, equally weighted."""
    members = [o.member for o in outcomes]
    return Run(
        experiment.classes,
        members,
        needed_caches(members, experiment.source),
        experiment.splits if len(experiment.splits) > 1 else experiment.splits[0],
    )


def needed_caches(members: Sequence[Member], source: Mapping[str, Any]) -> dict[str, Any]:
    """`source` without the caches that no member reads."""
    read = {side: {c for m in members for c in m.preprocessing.caches[side]} for side in ("image", "text")}
    tokens = any(key.split("/")[0] in TOKENS.values() for m in members for key in m.preprocessing.normalizers)
    kept = {"vtype": "image", "ttype": "text"}
    kept = {option: [name for name in source[option] if name in read[side]] for option, side in kept.items()}
    used = {name for names in kept.values() for name in names}
    fingerprints = {name: f for name, f in source["fingerprints"].items() if name in used}
    return {**source, **kept, "fingerprints": fingerprints, "tokens": tokens}


# -- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Figures of a run on its validation rows, each predicted by members that weren't trained on it."""

    ids: list[str]
    tags: list[str]
    probabilities: np.ndarray  # (N, C), calibrated
    figures: dict[str, Any]  # what goes into metrics.json
    history: list[dict[str, Any]]


def measure(outcomes: Sequence[Outcome], experiment: Experiment, run: Run) -> Report:
    """Validation figures of the ensemble (of each split's members, all splits pooled), mean and standard deviation over
    the members, and figures on the test part where the split has one."""
    raw, calibrated = [], []
    for split in experiment.splits:
        own = [o for o in outcomes if o.split is split]
        raw.append(np.mean([metrics.softmax(o.trained.val_logits) for o in own], axis=0))
        calibrated.append(np.mean([o.calibrated for o in own], axis=0))
    report = report_of(experiment, run, np.concatenate(calibrated), np.concatenate(raw))
    singles = [metrics.evaluate(experiment.labels(o.split.val), o.calibrated, experiment.classes) for o in outcomes]
    report.figures["members"] = {"count": len(outcomes), "mean_std": metrics.mean_std(singles)}
    report.figures["protocol"] = f"{protocol(experiment)}; {chosen(run.members)}"
    report.history.extend(
        {"fold": o.member.fold or "", "seed": o.member.config.seed, **row}
        for o in outcomes
        for row in o.trained.history
    )
    return report


def report_of(experiment: Experiment, run: Run, calibrated: np.ndarray, raw: np.ndarray) -> Report:
    """Figures of probabilities (n, C) on the validation rows of all splits, and on the test part where there is one."""
    ids = [i for split in experiment.splits for i in split.val]
    majority = experiment.majority(experiment.splits[0])
    figures = {"val": _figures(experiment, ids, raw, calibrated, majority)}
    if len(experiment.splits) == 1 and experiment.splits[0].test:
        test = experiment.splits[0].test
        features, rows = experiment.features.to("cpu"), experiment.features.positions(test)
        final = raw_test = run.probabilities(features, rows)
        if run.stacking is None:  # what stacks the members also calibrates them
            raw_test = np.mean([metrics.softmax(m.logits(features, rows)) for m in run.members], axis=0)
        figures["test"] = _figures(experiment, test, raw_test, final, majority)
    figures["protocol"] = protocol(experiment)
    figures["training_rows"] = experiment.class_counts({i for split in experiment.splits for i in split.train})
    return Report(ids, experiment.tags(ids), calibrated, figures, [])


def _figures(
    experiment: Experiment, ids: Sequence[str], raw: np.ndarray, calibrated: np.ndarray, majority: str
) -> dict[str, Any]:
    """`metrics.evaluate` of the calibrated predictions; log-loss and ECE before calibration beside those after."""
    labels = experiment.labels(ids)
    figures = metrics.evaluate(labels, calibrated, experiment.classes, majority)
    after = {f"{name}_calibrated": figures[name] for name in ("log_loss", "ece")}
    before = {
        "log_loss": metrics.log_loss(labels, raw),
        "ece": metrics.expected_calibration_error(labels, raw),
    }
    return {**figures, **before, **after}


def protocol(experiment: Experiment) -> str:
    """One line on how the figures came about."""
    how = experiment.splits[0].how
    if "files" in how:
        folds = f"{len(experiment.splits)} folds" if len(experiment.splits) > 1 else "split"
        split = f"{folds} from {', '.join(how['files'])}"
    elif len(experiment.splits) > 1:
        split = f"{len(experiment.splits)}-fold cross-validation, stratified, seed {how['seed']}"
    else:
        split = f"stratified split, {how['val_ratio']:g} for validation, seed {how['seed']}"
    together = "" if "files" in how else ", duplicates together" if experiment.group_of else ", duplicates anywhere"
    return f"{split}{together}"


def chosen(members: Sequence[Member]) -> str:
    """What was chosen by data in training the members, and on which rows."""
    epoch = "best epoch and " if any(m.best_epoch is not None for m in members) else ""
    by_folds = [
        name
        for name in ("penalty", "gamma")
        if any(name in reads(m.config.head.head) and getattr(m.config, name) is None for m in members)
    ]
    folds = f", {' and '.join(by_folds)} by inner folds of the training rows" if by_folds else ""
    return f"{epoch}temperature chosen on the validation rows{folds}"


def print_report(report: Report, run: Run) -> None:
    """The figures as tables, for a terminal."""
    columns = ["rows", "n", "accuracy", "weighted_f1", "macro_f1", "log_loss", "ece", "ece_calibrated"]
    rows = []
    for part in ("val", "test"):
        if part in report.figures:
            rows += metrics.figure_rows(report.figures[part], part)
    members = report.figures.get("members", {"count": 1})
    if members["count"] > 1:
        spread = {name: f"{v['mean']:.3f}±{v['std']:.3f}" for name, v in members["mean_std"].items() if name != "n"}
        rows.insert(1, {"rows": f"  each of {members['count']}", **spread})
    print(metrics.format_table(rows, columns))
    last = report.figures["test" if "test" in report.figures else "val"]
    per_class = [
        {"class": name, **figures, **dict(zip(run.classes, confused, strict=True))}
        for (name, figures), confused in zip(last["per_class"].items(), last["confusion"], strict=True)
    ]
    table = [{**row, "predicted:": ""} for row in per_class]
    print(
        "\n"
        + metrics.format_table(table, ["class", "precision", "recall", "f1", "support", "predicted:", *run.classes])
    )
    print(f"\nprotocol: {report.figures['protocol']}")


def describe_heads(members: Sequence[Member]) -> str:
    """One line on what was trained: head, parameters, settings."""
    config = members[0].config
    counts = sorted({n_parameters(m.head) for m in members})
    count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    width = f", D {config.head.D}" if "D" in reads(config.head.head) else ""
    return f"head {config.head.head}{width}, ablation {config.head.ablation}: {count} parameters"
