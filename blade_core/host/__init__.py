"""The only code of Blade that imports comfy."""
