"""``pixart table``: look at a table, prove its bytes, see its rows, weigh its captions."""

from pathlib import Path
from typing import Annotated

import typer

table = typer.Typer(no_args_is_help=True, help="Look into tables, local or on S3.")

PlaceArgument = Annotated[str, typer.Argument(help="A table's folder: a path or s3://...")]


@table.command()
def show(place: PlaceArgument) -> None:
    """What a table holds, from what it was made, and why rows were rejected."""
    from pixart_platform.tables import Table

    manifest = Table.open(place).manifest
    size = sum(file.num_bytes for file in manifest.files)
    taken = sum(bool(file.folder) for file in manifest.files)
    lines = {
        "schema": manifest.schema,
        "digest": manifest.digest,
        "producer": f"{manifest.producer} {manifest.commit[:12]}".strip(),
        "rows": f"{manifest.num_rows:,}",
        "bytes": f"{size:,}",
        "partitions": f"{len(manifest.files):,}" + (f", {taken:,} of neighbours" if taken else ""),
        **{f"  {status}": f"{count:,}" for status, count in manifest.counts.items()},
        **{f"setting {key}": str(value) for key, value in manifest.settings.items()},
        **{f"made from {kind}": digest for kind, digest in manifest.inputs.items()},
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")


@table.command()
def verify(places: Annotated[list[str], typer.Argument(help="Tables' folders.")]) -> None:
    """Read every byte and compare it with the manifest; exit code 2 names the first that differs.

    Also checks that every row has a place, and that ids of rows that are ok are unique.
    """
    from pixart_platform.tables import verify_table

    for place in places:
        found = verify_table(place)
        typer.echo(f"{place}: {found.num_rows:,} rows in {len(found.files):,} partitions are sound")


@table.command()
def sample(
    place: PlaceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "sheet.html"
    ),
    num_rows: Annotated[int, typer.Option(min=1, max=1000)] = 24,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a contact sheet: picture, raw caption, dense captions, bucket."""
    from pixart_jobs.sheet import gather_tables, sheet_page
    from pixart_platform.storage import open_folder, write_atomic

    page = sheet_page(gather_tables(open_folder(place)), num_rows, seed)
    write_atomic(out.absolute(), page.encode())
    typer.echo(str(out))


@table.command()
def concepts(
    place: Annotated[str, typer.Argument(help="A captions table's folder.")],
    max_rows: Annotated[int, typer.Option(min=1, help="How many rows to weigh.")] = 20_000,
) -> None:
    """Concept density, the paper's Table 1: nouns of the raw captions and of the dense ones."""
    from pixart_jobs.caption import measure_density
    from pixart_jobs.sheet import gather_tables
    from pixart_platform.storage import open_folder

    tables = gather_tables(open_folder(place))
    found = measure_density(tables["images"], tables["captions"], max_rows)
    typer.echo(f"{'captions':<10}{'nouns':>10}{'valid':>10}{'valid share':>13}{'per caption':>13}")
    for kind in ("raw", "dense"):
        typer.echo(
            f"{kind:<10}{found[f'{kind}_num_distinct']:>10,.0f}{found[f'{kind}_num_valid']:>10,.0f}"
            f"{found[f'{kind}_valid_share']:>13.1%}{found[f'{kind}_nouns_per_caption']:>13.2f}"
        )
