"""Reported tables beside a run's own: terminal, markdown, HTML, W&B."""
