"""The engine of Blade: plain torch, importable without ComfyUI and without a GPU.

Imports go one way: nodes -> blade_core.host -> blade_core -> blade_core.backends.
"""
