"""What every test gets: one torch thread, reproducible hypothesis, no chatter, no downloads.

And for those who ask: ``bucket``, an empty folder of an S3 server that really listens, and
``root``, which runs a test twice: in an empty folder of this machine and in such a bucket.
"""

import os
import secrets
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from pixart_platform.storage import Folder, LocalFolder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Ray reads its token once a process, so all the Rays that tests start in this one must share it.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# On shared cores a second thread makes tensors as small as the tests' fifty times slower.
torch.set_num_threads(1)

# The first torch call takes half a second, which is no reason to call a property flaky.
hypothesis.settings.register_profile("pixart", deadline=None, derandomize=True)
hypothesis.settings.load_profile("pixart")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Where an S3 server listens that this process, and those it starts, speak to."""
    from chaos_s3 import ChaosS3, endpoint  # moto takes a second to import

    with ChaosS3() as server, endpoint(server.uri):
        yield server.uri


@pytest.fixture
def bucket(s3_endpoint: str) -> Folder:  # noqa: ARG001  # the server has to run
    """A fresh bucket; its ``uri`` is ``s3://name``."""
    from chaos_s3 import make_bucket

    return make_bucket(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, of either kind."""
    if request.param == "local":
        return LocalFolder(tmp_path)
    bucket: Folder = request.getfixturevalue("bucket")
    return bucket
