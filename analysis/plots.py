"""Draw the figures of one or several runs from their CSVs into a folder figures/, each as PNG and PDF."""

from pathlib import Path

from analysis import gallery
from analysis.tables import Group, run_script
from layerwise.runs import write_atomically


def write_figures(groups: list[Group], folder: Path) -> None:
    """Write every figure into a subfolder figures/, and print the paths of the PNGs and what is at its ceiling."""
    folder = folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in gallery.render_figures(groups, ("png", "pdf")):
        for ending, content in zip(("png", "pdf"), files, strict=True):
            write_atomically(folder / f"{name}.{ending}", content)
        print(folder / f"{name}.png")
    for sentence in gallery.describe_ceilings(groups):
        print(sentence)


if __name__ == "__main__":
    run_script(__doc__, write_figures)
