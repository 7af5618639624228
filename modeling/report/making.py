"""A run's report from beginning to end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modeling.experiments.experiment import experiment_of_run
from modeling.report.building import sections_of
from modeling.report.comparison import comparison_sections
from modeling.report.curves import learning_curve_section
from modeling.report.material import Material, gather
from modeling.report.page import PAGE, write_page
from modeling.report.sections import Section
from modeling.runs.encoders import check_weights
from modeling.runs.folder import load_run
from modeling.runs.pairs import DataPlace
from modeling.runs.run import single_split
from modeling.search.learning_curve import FILE, configs_of, learning_curve, table, write_curve


@dataclass(frozen=True)
class ReportSettings:
    """What a report shows besides the run itself. `feats` None, and of `data` what isn't given: as the run and its
    caches say; `sweep`: a folder whose heads are compared; `explain`: of how many pairs, with encoders whose `weights`
    are files or folders by their caches, where they aren't found."""

    feats: Path | None = None
    data: DataPlace = DataPlace()
    sweep: Path | None = None
    learning_curve: bool = False
    explain: int = 0
    weights: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"


@dataclass(frozen=True)
class Made:
    """The page, its figures' files, and what it had to do without."""

    page: Path
    figures: list[Path]
    notes: list[str]

    def lines(self) -> list[str]:
        """What a terminal shows."""
        size = self.page.stat().st_size / 1e6
        return [
            *(f"note: {note}" for note in self.notes),
            f"{len(self.figures) // 2} figures as SVG and PNG -> {self.page.with_suffix('')}",
            f"report, {size:.1f} MB -> {self.page}",
        ]


def make_report(
    path: Path, out: Path | None = None, settings: ReportSettings = ReportSettings(), command: str = ""
) -> Made:
    """Write the report of the run at `path`: the page `out` (default: in the run's folder), and its figures beside it.
    `command`, told on the page, makes it again. Raises `UsageError` as `gather` and `write_page`."""
    run = load_run(path)
    check_weights(settings.weights, run.source.names)
    of_sweep = [] if settings.sweep is None else comparison_sections(settings.sweep)
    material = gather(run, settings.feats, settings.data, command)
    out = out or path / PAGE
    figures = write_page(out, f"Report of {path.resolve().name}", _sections(material, settings, of_sweep))
    missing = (("caches", material.no_features), ("raw pairs", material.no_records))
    return Made(out, figures, [f"the report goes without the {what}: {why}" for what, why in missing if why][:1])


def _sections(material: Material, settings: ReportSettings, of_sweep: Sequence[Section]) -> list[Section]:
    found = sections_of(material)
    sections = [found[name] for name in ("headline", "data", "training", "results")] + [*of_sweep]
    curve = learning_curve_of(material, settings)
    if curve is not None:
        sections.append(curve)
    sections += [found["embeddings"], found["errors"]]
    if settings.explain:
        from modeling.report.explained_pairs import explanations  # captum: slow to import

        sections.append(explanations(material, settings.explain, settings.weights, settings.device))
    return [*sections, found["label-audit"]]


def learning_curve_of(material: Material, settings: ReportSettings) -> Section | None:
    """What lies in the run's folder, computed anew where that is asked for; None where there is none."""
    run = material.run
    if settings.learning_curve:
        single_split(run)
        source = replace(run.source, folder=run.feature_folder(settings.feats))
        curve = learning_curve(experiment_of_run(run, source, settings.device), configs_of(run))
        write_curve(run.folder / FILE, table(curve))
    return learning_curve_section(run)
