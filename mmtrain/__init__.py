"""mmtrain: train, sample and evaluate multimodal models. Kept empty so that starting up stays cheap."""

__version__ = "0.1.0"
