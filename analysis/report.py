"""Write one HTML page, report.html, with the settings, the final figures, every picture and the CSVs of runs in it."""

import re
from base64 import b64encode
from pathlib import Path

import jinja2
import pandas as pd

from analysis import gallery, table, tables
from analysis.tables import Group


def page(groups: list[Group]) -> str:
    """The page; it needs nothing beside it and no network."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    ).get_template("report.html")
    return template.render(
        title="Neural collapse and decodable information: " + "; ".join(group.label for group in groups),
        tables=table.titled(groups),
        figures=[(name, gallery.KINDS[name], inline(svg, name)) for name, (svg,) in gallery.pictures(groups, ("svg",))],
        settings=settings(groups),
        downloads=downloads(groups),
    )


def inline(svg: bytes, name: str) -> str:
    """The picture as an element of a page: without the head of a file, its ids told apart from other pictures'."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{gallery.KINDS[name].title}"', 1)


def settings(groups: list[Group]) -> pd.DataFrame:
    """Flags down, groups across; what differs among the runs of a group all in its cell."""
    names = list(dict.fromkeys(name for group in groups for its in group.hparams for name in its))
    columns = {"flag": names}
    for group in groups:
        columns[group.label] = [
            ", ".join(dict.fromkeys(tables.text(its[name]) for its in group.hparams if name in its)) for name in names
        ]
    return pd.DataFrame(columns)


def downloads(groups: list[Group]) -> list[tuple[str, str]]:
    """The name and the content in base64 of every CSV, after its run's folder where there are several."""
    folders = [folder for group in groups for folder in group.folders]
    return [
        (
            name if len(folders) == 1 else f"{folder.as_posix().strip('/').replace('/', '-')}-{name}",
            b64encode((folder / name).read_bytes()).decode(),
        )
        for folder in folders
        for name in (f"{key}.csv" for key in tables.COLUMNS)
        if (folder / name).exists()
    ]


def write(groups: list[Group], folder: Path) -> None:
    text = page(groups)
    folder.mkdir(parents=True, exist_ok=True)
    tables.put(folder / "report.html", text.encode(errors="replace"))
    print(folder / "report.html")


if __name__ == "__main__":
    tables.script(__doc__, write)
