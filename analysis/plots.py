"""Draw the figures of one or several runs from their CSVs into a folder figures/, each as PNG and PDF."""

from pathlib import Path

from analysis import gallery, tables
from analysis.tables import Group


def write(groups: list[Group], folder: Path) -> None:
    folder = folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in gallery.pictures(groups, ("png", "pdf")):
        for ending, content in zip(("png", "pdf"), files, strict=True):
            tables.put(folder / f"{name}.{ending}", content)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    tables.script(__doc__, write)
