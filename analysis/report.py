"""Write report.html: one page with the final values, figures, settings and CSV files of runs."""

import re
from base64 import b64encode
from pathlib import Path

import jinja2
import pandas as pd

from analysis import gallery
from analysis.reading import COLUMNS, find_table
from analysis.table import make_tables
from analysis.tables import Group, format_value, run_script
from layerwise.runs import write_atomically


def render_page(groups: list[Group]) -> str:
    """Return the page as HTML. The page is self-contained."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    ).get_template("report.html")
    return template.render(
        title="Neural collapse and decodable information: " + "; ".join(group.label for group in groups),
        tables=make_tables(groups),
        figures=[
            (name, gallery.KINDS[name].title, gallery.write_caption(name, groups), embed_svg(svg, name))
            for name, (svg,) in gallery.render_figures(groups, ("svg",))
        ],
        settings=tabulate_settings(groups),
        downloads=encode_tables(groups),
    )


def embed_svg(svg: bytes, name: str) -> str:
    """Return an SVG file as an element of a page.

    The ids are prefixed with the name, because several figures use the same ids.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{gallery.KINDS[name].title}"', 1)


def tabulate_settings(groups: list[Group]) -> pd.DataFrame:
    """Return a row for each flag and a column for each group. A cell has the values of all runs of the group."""
    names = list(dict.fromkeys(name for group in groups for flags in group.hparams for name in flags))
    columns = {"flag": names}
    for group in groups:
        columns[group.label] = [
            ", ".join(dict.fromkeys(format_value(flags[name]) for flags in group.hparams if name in flags))
            for name in names
        ]
    return pd.DataFrame(columns)


def encode_tables(groups: list[Group]) -> list[tuple[str, str]]:
    """Return (name, content in base64) of every CSV. For several runs the names begin with the folder of the run."""
    folders = [folder for group in groups for folder in group.folders]
    paths = [find_table(folder, name) for folder in folders for name in COLUMNS]
    return [
        (
            path.name if len(folders) == 1 else f"{path.parent.as_posix().strip('/').replace('/', '-')}-{path.name}",
            b64encode(path.read_bytes()).decode(),
        )
        for path in paths
        if path.exists()
    ]


def write_report(groups: list[Group], folder: Path) -> None:
    """Write report.html into the folder, and print its path."""
    text = render_page(groups)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.html", text.encode(errors="replace"))
    print(folder / "report.html")


if __name__ == "__main__":
    run_script(__doc__, write_report)
