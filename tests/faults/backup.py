"""A team's backup, while somebody works: PostgreSQL and a bucket are destroyed and brought back.

    .venv/bin/python tests/faults/backup.py [--quick]

Runs the runbook's own lines (cluster/README.md, Back up and restore) with pg_dump, pg_restore and
rclone against a real PostgreSQL and an S3 server over HTTP, while versions are registered and
tables committed all the time. Prints one JSON object. Takes about a minute; --quick is the same.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parent.parent))
import psycopg2
from chaos_s3 import ChaosS3, endpoint, make_bucket
from processes import repeatedly
from runbook import add_version, blocks, shell
from team_server import create_database, postgres

from pixart_platform.errors import PixartError
from pixart_platform.registry import Registry
from pixart_platform.storage import Folder
from pixart_platform.tables import verify_table


def destroy(uri: str, bucket: Folder) -> None:
    """Everything but the backup; the databases are there again, empty."""
    connection = psycopg2.connect(f"{uri}/postgres".replace("+psycopg2", ""))
    connection.autocommit = True
    for name in ("mlflow", "auth"):
        connection.cursor().execute(f"DROP DATABASE {name} WITH (FORCE)")
    connection.close()
    for name in ("mlflow", "auth"):
        create_database(uri, name)
    for entry in list(bucket.walk()):
        bucket.delete(entry.name)


def count_faults(registry: Registry, bucket: Folder) -> tuple[int, int, int]:
    """Versions, tables, and how many of either are not sound."""
    faults, versions, tables = 0, registry.versions(), 0
    for version in versions:
        try:
            version.verify()
        except PixartError as error:
            print(error)
            faults += 1
    for entry in bucket.walk("tables/"):
        if entry.name.endswith("/manifest.json"):
            tables += 1
            try:
                verify_table(bucket / entry.name.rpartition("/")[0])
            except PixartError as error:
                print(error)
                faults += 1
    return len(versions), tables, faults


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pixart-backup-") as made, ExitStack() as stack:
        folder = Path(made)
        server = stack.enter_context(ChaosS3())
        stack.enter_context(endpoint(server.uri))
        uri = stack.enter_context(postgres())
        bucket, _ = make_bucket("models"), make_bucket("models-backup")
        where = urlsplit(uri)
        os.environ |= {
            "PGHOST": "127.0.0.1", "PGPORT": str(where.port), "PGUSER": "mlflow",
            "PGPASSWORD": str(where.password), "RCLONE_CONFIG_S3_PROVIDER": "Other",
            "RCLONE_CONFIG_S3_ENDPOINT": server.uri,
        }  # fmt: skip
        os.environ.pop("AWS_CA_BUNDLE", None)  # Debian 12's rclone fails where it is set
        registry = Registry(f"{uri}/mlflow", "digits")
        add_version(registry, bucket, 1)
        registry.set_alias("champion", registry.get("1"))
        _, _, back_up, restore = blocks("Back up and restore")
        with repeatedly(lambda n: add_version(registry, bucket, 1 + n)) as at_work:
            while at_work[0] < 3:
                time.sleep(0.1)
            before = at_work[0]
            while at_work[0] < before + 2:  # until something was written while one was taken
                shell(back_up, folder)
            meanwhile = at_work[0] - before
        destroy(uri, bucket)
        for dump in folder.glob("*.dump"):
            dump.unlink()
        shell(restore, folder)
        after = f"{uri}/mlflow?application_name=after"  # not the connections that were cut
        versions, tables, faults = count_faults(Registry(after, "digits"), bucket)
        told = shell(f"pixart lineage champion --registry '{after}'", folder)
    figures = {
        "made_before": before + 1, "made_during_backup": {"value": meanwhile, "ok": meanwhile > 0},
        "versions": {"value": versions, "bar": before + 1, "ok": versions > before},
        "tables": tables, "unsound": {"value": faults, "bar": 0, "ok": faults == 0},
        "lineage": {"value": told.splitlines()[0], "ok": "digits version 1" in told},
    }  # fmt: skip
    print(json.dumps(figures))
    sys.exit(any(isinstance(f, dict) and not f["ok"] for f in figures.values()))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
