"""Reactive Diffusion Policy and the policies that it is compared with."""
