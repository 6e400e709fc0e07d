"""Evaluation metrics: pure functions first, then a thin torchmetrics class that only keeps state."""
