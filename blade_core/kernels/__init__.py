"""Kernels of Blade's own, one a file, each with its eager twin."""
