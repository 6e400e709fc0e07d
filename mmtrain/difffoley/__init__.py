"""Diff-Foley: silent video to synchronous sound, and what it is compared with."""
