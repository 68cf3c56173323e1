"""PixArt and its mathematics: PyTorch only; no Ray, MLflow or DeepSpeed."""
