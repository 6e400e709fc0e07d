"""Data of mmtrain: readers, loaders and LightningDataModules. Knows no model."""
