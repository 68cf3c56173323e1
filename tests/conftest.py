"""What every test gets: one torch thread, reproducible hypothesis, no chatter, no downloads."""

import os

import hypothesis
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# On shared cores a second thread makes tensors as small as the tests' fifty times slower.
torch.set_num_threads(1)

# The first torch call takes half a second, which is no reason to call a property flaky.
hypothesis.settings.register_profile("pixart", deadline=None, derandomize=True)
hypothesis.settings.load_profile("pixart")
